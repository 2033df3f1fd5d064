"""Real archives -> what is to be packed: class folders, image+mask folders, tables, NIH ChestX-ray14, DICOM.

A scan looks at names and tables only, finds every problem that can be found so, and returns a Source: the items in the
order in which they will be stored, and how to load one. Nothing is decoded before packing.
"""

import csv
import gzip
import os
import re
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from shards import split
from shards.errors import InputError, listed, nearest
from shards.sample import (
    EFFUSION,
    IMAGE_SUFFIXES,
    NO_FINDING,
    PNEUMOTHORAX,
    SPLITS,
    SUBCUTANEOUS_EMPHYSEMA,
    TASKS,
    Frame,
    LesionBox,
    Sample,
    clean_key,
    fit,
    load_image,
    open_gray,
)

# The published class folders; other names are findings of their own.
FOLDER_FINDINGS = {
    "nofinding": NO_FINDING,
    "effusion": EFFUSION,
    "pneumothorax": PNEUMOTHORAX,
    "subcuemphysema": SUBCUTANEOUS_EMPHYSEMA,
    "subcutaneousemphysema": SUBCUTANEOUS_EMPHYSEMA,
}
NIH_FINDINGS = (
    NO_FINDING, "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", EFFUSION, "Emphysema", "Fibrosis", "Hernia",
    "Infiltration", "Mass", "Nodule", "Pleural_Thickening", "Pneumonia", PNEUMOTHORAX,
)  # fmt: skip
NIH_BOX_NAMES = {"Infiltrate": "Infiltration"}  # the archive's list of boxes has a spelling of its own
NIH_PIXELS = 1024.0  # lesion boxes of the archive are pixels of its 1024 x 1024 images
MASK_ENDING = re.compile(r"[_-]?(mask|lungs?)$", re.IGNORECASE)
SPLIT_NAMES = {name: name for name in SPLITS} | {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test"}


Shares = tuple[str, tuple[float, float, float, float]]  # a lesion: its finding, and x0 y0 x1 y1 in shares of the image's sides


@dataclass(frozen=True)
class Item:
    """One sample before it is loaded."""

    split: str
    key: str
    findings: tuple[str, ...] = ()
    image: str = ""
    mask: str = ""
    boxes: tuple[Shares, ...] = ()
    extra: tuple[tuple[str, Any], ...] = ()


@dataclass
class Source:
    """Items of image files. ``skipped``: what was left out, reason -> how many; ``classes``: findings in the order of the index."""

    items: list[Item]
    skipped: dict[str, int] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    size: int = 512
    aspect: str = "stretch"

    def load(self, item: Item) -> Sample:
        """Read, check and resize. InputError: a file that cannot be decoded, a mask that is empty or not its image's size."""
        image = open_gray(item.image)
        mask = None
        if item.mask:
            lungs = load_image(item.mask)
            if lungs.shape != (image.height, image.width):
                raise InputError(f"{item.mask}: is {lungs.shape[1]}x{lungs.shape[0]}, its image {image.width}x{image.height}; they must agree")
            if not lungs.any():
                raise InputError(f"{item.mask}: has no lung pixel (all 0); remove the pair")
            # 0 and 1, 0 and 255, a number for each lung; many values are a mask that was saved as a JPEG or smoothed.
            limit = 0 if len(np.unique(lungs)) <= 3 else lungs.max() // 2
            between = ((lungs > 0.1 * lungs.max()) & (lungs < 0.9 * lungs.max())).mean() if limit else 0.0
            lungs = np.where(lungs > limit, 255, 0).astype(np.uint8)
            if between > 0.2 or (lungs > 0).mean() > 0.9:
                what = f"{100 * between:.0f}% of its pixels are gray" if between > 0.2 else f"{100 * (lungs > 0).mean():.0f}% of it is lung"
                raise InputError(f"{item.mask}: is no lung mask, {what}; are --images and --masks in their places?")
            mask = fit(lungs, self.size, self.aspect, mask=True)
        frame = Frame.of((image.height, image.width), self.size, self.aspect)
        boxes = [LesionBox(finding, frame.box(share)) for finding, share in item.boxes]
        return Sample(item.key, fit(image, self.size, self.aspect), item.findings, mask, boxes, dict(item.extra))

    def settings(self) -> dict[str, Any]:
        """What the bytes of a sample depend on, beside its item."""
        return {"size": self.size, "aspect": self.aspect}

    def version(self, item: Item) -> str:
        """Changes when the files behind an item do."""
        stats = [os.stat(path) for path in (item.image, item.mask) if path]
        return " ".join(f"{s.st_size}:{s.st_mtime_ns}" for s in stats)


# -- folders ----------------------------------------------------------------------------------------------------


def images_of(folder: Path, skipped: dict[str, int] | None = None) -> Iterator[Path]:
    """Image files of one folder, sorted; other files are counted."""
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            yield path
        elif skipped is not None:
            kind = "a folder inside a class folder" if path.is_dir() else "a DICOM file: see `python -m shards dicom`"
            skipped[kind if path.is_dir() or path.suffix.lower() == ".dcm" else "not an image file"] += 1


def walk(root: Path) -> Iterator[Path]:
    """Files at any depth, sorted, links to folders followed (each folder once), hidden files left out."""
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        folders.sort()
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(folder, file) for file in sorted(files) if not file.startswith("."))


def class_folders(root: Path) -> Source:
    """``train|val|test/<class>/*.png`` (any image suffix). A leading digit of a class name is order, not name.

    InputError: no split folders, a split without images, a class missing from a split.
    """
    if not root.is_dir():
        raise InputError(f"--path {root}: no such folder")
    skipped: dict[str, int] = defaultdict(int)
    folders: dict[str, Path] = {}
    for folder in sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith(".")):
        name = SPLIT_NAMES.get(folder.name.lower(), "")
        if not name:
            skipped[f"a folder that is no split ({folder.name})"] += 1
        elif name in folders:
            raise InputError(f"--path {root}: {folders[name].name} and {folder.name} are both {name}; put them together")
        else:
            folders[name] = folder
    splits = [name for name in SPLITS if name in folders]
    if not splits:
        raise InputError(
            f"--path {root}: expected the folders train, val and test with a folder per class in each; "
            "`python -m shards csv` splits by patient what is not split yet"
        )
    items: list[Item] = []
    classes: dict[str, Counter[str]] = {}
    for name in splits:
        found = []
        for folder in sorted(p for p in folders[name].iterdir() if p.is_dir()):
            finding = folder_finding(folder.name)
            for path in images_of(folder, skipped):
                key = clean_key(f"{folder.name}-{path.stem}")
                found.append(Item(name, key, (finding,), str(path), extra=(("source", path.name),)))
        classes[name] = Counter(item.findings[0] for item in found)
        items += found
    every = list(dict.fromkeys(item.findings[0] for item in items))
    if not every:
        raise InputError(f"--path {root}: no images in {', '.join(splits)} ({', '.join(IMAGE_SUFFIXES)} are read)")
    for name in splits:
        missing = [finding for finding in every if finding not in classes[name]]
        if missing:
            raise InputError(f"{folders[name]}: has no images of {listed(missing)}, other splits have; add some or remove the class")
    return Source(mixed(items), dict(skipped), tuple(every))


def mixed(items: list[Item]) -> list[Item]:
    """Splits in order; within each, items in an order that does not know their class, so that every shard has some of each."""
    return sorted(items, key=lambda item: (SPLITS.index(item.split), zlib.crc32(item.key.encode()), item.key))


def folder_finding(name: str) -> str:
    """``1Effusion`` -> ``Effusion``; names that are not published ones stay, without their leading digits."""
    bare = re.sub(r"^\d+[\s._-]*", "", name) or name
    return FOLDER_FINDINGS.get(re.sub(r"[\s_-]", "", bare).lower(), bare)


def image_masks(images: Path, masks: Path, val_share: float = 0.2, test_share: float = 0.0) -> Source:
    """Images and lung masks in two folders, matched by name (``x.png`` with ``x.png``, ``x_mask.png`` or ``x-lungs.png``).

    Shares of the names, drawn by their checksum and so the same wherever they lie, become val and test.
    InputError: an empty folder, an image without a mask, a mask without an image.
    """
    found: list[dict[str, Path]] = []
    for flag, folder in (("--images", images), ("--masks", masks)):
        if not folder.is_dir():
            raise InputError(f"{flag} {folder}: no such folder")
        names: dict[str, Path] = {}
        for path in images_of(folder):
            stem = MASK_ENDING.sub("", path.stem) if flag == "--masks" else path.stem
            if stem in names:
                raise InputError(f"{path}: stands for the same image as {names[stem].name}; remove one of them")
            names[stem] = path
        if not names:
            raise InputError(f"{flag} {folder}: no images in it ({', '.join(IMAGE_SUFFIXES)} are read)")
        found.append(names)
    by_image, by_mask = found
    for one, other, what in ((by_mask, by_image, "masks without an image"), (by_image, by_mask, "images without a mask")):
        alone = [one[stem].name for stem in one if stem not in other]
        if alone:
            raise InputError(f"{next(iter(one.values())).parent}: {len(alone)} {what}: {listed(alone)}; add their partners or remove them")
    if len(by_image) < 2:
        raise InputError("one image with a mask cannot be split into train and val; give at least two")
    ranked = sorted(by_image, key=lambda stem: (zlib.crc32(clean_key(stem).encode()), stem))
    if not 0 <= test_share < 1:
        raise InputError(f"--test-share {test_share}: a share lies between 0 and 1")
    first = max(1, round(val_share * len(ranked)))
    last = first + round(test_share * len(ranked))
    if last >= len(ranked):
        raise InputError(f"--val-share {val_share} and --test-share {test_share} leave none of {len(ranked)} images for training")
    part = dict.fromkeys(ranked[:first], "val") | dict.fromkeys(ranked[first:last], "test")
    items = [
        Item(part.get(stem, "train"), clean_key(stem), (), str(path), str(by_mask[stem]), extra=(("source", path.name),)) for stem, path in by_image.items()
    ]
    return Source(mixed(items))


# -- tables -----------------------------------------------------------------------------------------------------


def read_cells(path: Path, flag: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a CSV (``.gz`` too). InputError: missing, empty, not text."""
    if not path.is_file():
        raise InputError(f"{flag} {path}: no such file")
    try:
        with gzip.open(path, "rt", encoding="utf-8-sig", newline="") if path.suffix == ".gz" else path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            columns = [name.strip() for name in next(reader, [])]
            rows = [cells for cells in reader if cells]
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, zlib.error) as error:
        raise InputError(f"{flag} {path}: cannot be read as a CSV in UTF-8 ({error})") from error
    if not rows:
        raise InputError(f"{flag} {path}: has no rows")
    return columns, rows


def read_table(path: Path, flag: str) -> tuple[list[str], list[dict[str, str]]]:
    """Columns and rows, by column, of a CSV; errors as `read_cells`, and for a row shorter than the header."""
    columns, rows = read_cells(path, flag)
    while columns and not columns[-1]:
        columns.pop()
    for n, cells in enumerate(rows, 2):
        if len(cells) < len(columns):
            raise InputError(f"{flag} {path}: row {n} has {len(cells)} cells, the header {len(columns)}; correct the row")
    return columns, [dict(zip(columns, cells, strict=False)) for cells in rows]


def column(columns: list[str], flag: str, *names: str) -> str:
    """The first of ``names`` that is a column; InputError says which columns there are."""
    for name in names:
        if name in columns:
            return name
    hint = "; is it separated by semicolons or tabs? Commas are expected" if len(columns) == 1 and re.search("[;\t]", columns[0]) else ""
    raise InputError(f"{flag}: has no column {names[0]!r}; its columns are {', '.join(c for c in columns if c)}{hint}")


@dataclass
class Columns:
    """Names of the columns of a table. ``finding``: one column with names, or several of 0 and 1 named after their finding."""

    path: str = "path"
    finding: Sequence[str] = ("finding",)
    split: str = ""
    patient: str = ""
    separator: str = "|"


def table(
    path: Path,
    images: Path,
    columns: Columns,
    *,
    declared: Sequence[str] | None = None,
    boxes: Path | None = None,
    seed: int = 0,
    shares: Sequence[float] = split.SHARES,
    skip_missing: bool = False,
    pseudonym: Any = None,
) -> Source:
    """Rows of a CSV that name images, findings and, where they are known, splits and patients; ``boxes``: a CSV of lesions.

    Without a split column patients are dealt to the splits by ``seed`` and ``shares``; without a patient column every image
    counts as a patient. InputError: a column that is not there, images that are not there, a finding that is not among
    ``declared``, one image listed twice, a patient in two splits.
    """
    flag = f"--csv {path}"
    names, rows = read_table(path, "--csv")
    for name in (columns.path, *columns.finding, *filter(None, (columns.split, columns.patient))):
        column(names, flag, name)
    skipped: dict[str, int] = defaultdict(int)
    ones = _indicators(rows, columns)
    found = [_row_findings(row, columns, ones, declared, f"{flag}, row {n}", skipped, skip_missing) for n, row in enumerate(rows, 2)]
    taken = [(row, findings) for row, findings in zip(rows, found, strict=True) if findings is not None]
    paths = [images / row[columns.path].strip() for row, _ in taken]
    outside = [str(path) for path in paths if not path.is_relative_to(images)]
    if outside:
        raise InputError(f"{flag}: {len(outside)} images are not below --images {images}: {listed(outside)}; name the folder that holds them all")
    twice = [str(p) for p, count in Counter(paths).items() if count > 1]
    if twice:
        raise InputError(f"{flag}: {len(twice)} images are listed more than once: {listed(twice)}; keep one row of each")
    here = present(paths, flag, skipped, skip_missing)
    taken, paths = [t for t, h in zip(taken, here, strict=True) if h], [p for p, h in zip(paths, here, strict=True) if h]
    patient = np.array([row[columns.patient].strip() if columns.patient else str(i) for i, (row, _) in enumerate(taken)])
    nobody = sum(who.lower() in ("", "na", "nan", "none", "null") for who in patient) if columns.patient else 0
    if nobody:
        raise InputError(f"{flag}: {nobody} rows have no patient in column {columns.patient!r}; fill it, or leave those rows out of the table")
    if columns.split:
        parts = [_split_name(row[columns.split], f"{flag}, image {row[columns.path]}") for row, _ in taken]
    else:
        codes = {findings: k for k, findings in enumerate(dict.fromkeys(findings for _, findings in taken))}
        part = split.by_patient(np.array([codes[findings] for _, findings in taken]), patient, seed, shares)
        parts = [SPLITS[p] for p in part]
    if not columns.split and "split" in names:
        skipped["column 'split', for --split-column was not given: patients are dealt anew"] += 1
    every = tuple(declared or dict.fromkeys(name for _, findings in taken for name in findings))
    lesions = _table_boxes(boxes, images, paths, columns.path, every, skipped, skip_missing) if boxes else {}
    items = []
    for (_, findings), p, image, who in zip(taken, parts, paths, patient, strict=True):
        extra = [("source", image.name)]
        if columns.patient:
            extra.append(("patient", pseudonym(who) if pseudonym else who))
        key = clean_key(str(image.relative_to(images).with_suffix("")))
        theirs = lesions.get(image, ())
        if other := sum(name not in findings for name, _ in theirs):
            skipped["boxes of findings that their image is not labelled with"] += other
        items.append(Item(p, key, findings, str(image), boxes=tuple(box for box in theirs if box[0] in findings), extra=tuple(extra)))
    refuse_torn(items, flag)
    refuse_missing_class(items, declared, flag)
    return Source(mixed(items), dict(skipped), every)


def _table_boxes(
    path: Path, images: Path, known: Iterable[Path], column_of_path: str, findings: Sequence[str], skipped: dict[str, int], skip_bad: bool
) -> dict[Path, list[Shares]]:
    """Lesion boxes of the ``known`` images: columns of the image, ``finding``, and x0, y0, x1, y1 or x, y, w, h in pixels of the file."""
    flag = f"--boxes {path}"
    names, rows = read_table(path, "--boxes")
    corners = ("x0", "y0", "x1", "y1") if "x0" in names else ("x", "y", "w", "h")
    for name in (column_of_path, "finding", *corners):
        column(names, flag, name)
    wanted, boxes, sizes = set(known), defaultdict(list), dict[Path, tuple[int, int]]()
    for n, row in enumerate(rows, 2):
        image, finding = images / row[column_of_path].strip(), row["finding"].strip()
        if image not in wanted:
            skipped["boxes of images that are not in the table"] += 1
            continue
        if finding not in findings:
            finding = NIH_BOX_NAMES.get(finding, finding)
        if finding not in findings:
            skipped[f"boxes of {finding!r}, which is no finding of the table{_close(finding, findings)}"] += 1
            continue
        try:
            sizes[image] = sizes.get(image) or open_gray(str(image)).size
        except InputError:
            if skip_bad:  # the image itself is left out, and counted, when it is packed
                continue
            raise
        width, height = sizes[image]
        try:
            x0, y0, x1, y1 = (float(row[name]) for name in corners)
        except ValueError as error:
            raise InputError(f"{flag}, row {n}: columns {', '.join(corners)} hold no four numbers ({error})") from error
        if "w" in corners:
            x1, y1 = x0 + x1, y0 + y1
        told = f"{flag}, row {n}: {x0:g} {y0:g} {x1:g} {y1:g}"
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise InputError(f"{told} is no box in {image.name} of {width}x{height} pixels; correct the row")
        if min(x1 - x0, y1 - y0) < 1:
            raise InputError(f"{told} is less than a pixel of {image.name} ({width}x{height}): boxes are in pixels of the file, not in shares of it")
        boxes[image].append((finding, (x0 / width, y0 / height, x1 / width, y1 / height)))
    if not boxes:
        why = listed(f"{count} {what}" for what, count in skipped.items() if what.startswith("boxes")) or "no image with a box can be read"
        raise InputError(f"{flag}: none of its {len(rows)} boxes can be used ({why}); expected paths in column {column_of_path!r} and findings as in the table")
    return boxes


def _close(name: str, known: Sequence[str]) -> str:
    close = nearest(name, known)
    return f" ({close})" if close.startswith("did you mean") else ""


def _indicators(rows: Sequence[dict[str, str]], columns: Columns) -> bool:
    """Whether the columns hold 0 and 1, each named after its finding, and not names of findings."""
    numbers = {"0", "1", "-1", "0.0", "1.0", "-1.0", "", "true", "false", "yes", "no"}
    values = {row[columns.finding[0]].strip().lower() for row in rows}
    return len(columns.finding) > 1 or {""} != values <= numbers


def _row_findings(
    row: dict[str, str],
    columns: Columns,
    indicators: bool,
    declared: Sequence[str] | None,
    where: str,
    skipped: dict[str, int],
    skip_undeclared: bool,
) -> tuple[str, ...] | None:
    if not indicators:
        found = tuple(name.strip() for name in row[columns.finding[0]].split(columns.separator) if name.strip())
        if not found:
            raise InputError(f"{where}: no finding in column {columns.finding[0]!r}; write {NO_FINDING!r} where there is none")
    else:
        values = {name: row[name].strip() for name in columns.finding}
        if any(_number(value, where, name) < 0 for name, value in values.items()):
            skipped["uncertain finding (-1)"] += 1
            return None
        found = tuple(name for name, value in values.items() if _number(value, where, name) > 0) or (NO_FINDING,)
    for name in found:
        if declared and name not in declared:
            if skip_undeclared:
                skipped["a finding that was not declared"] += 1
                return None
            raise InputError(
                f"{where}: the finding {name!r} was not declared; {nearest(name, declared)}; "
                "correct the row, add it to --findings, or leave such rows out with --on-bad skip"
            )
    if NO_FINDING in found and len(found) > 1:
        raise InputError(f"{where}: says {NO_FINDING} and something else ({listed(found)}); correct the row")
    return found


def _number(value: str, where: str, name: str) -> float:
    try:
        number = float(value) if value else 0.0
    except ValueError:
        number = {"true": 1.0, "false": 0.0, "yes": 1.0, "no": 0.0}.get(value.lower(), 9.0)
    if number not in (-1.0, 0.0, 1.0):
        raise InputError(f"{where}: column {name!r} holds {value!r}; expected 1, 0, -1 (uncertain) or nothing")
    return number


def _split_name(value: str, where: str) -> str:
    name = SPLIT_NAMES.get(value.strip().lower())
    if name is None:
        raise InputError(f"{where}: unknown split {value!r}; expected train, val or test")
    return name


def present(paths: Iterable[Path], flag: str, skipped: dict[str, int], skip: bool) -> list[bool]:
    """Which files are there. InputError with how many are not and the first five, unless ``skip``: then they are counted."""
    here = [os.path.isfile(path) for path in paths]
    missing = [str(path) for path, there in zip(paths, here, strict=True) if not there]
    if missing and (not skip or len(missing) == len(here)):
        raise InputError(
            f"{flag}: {len(missing)} of {len(here)} images that it lists are missing: {listed(missing)}; add them, or leave them out with --on-bad skip"
        )
    if missing:
        skipped["listed but missing"] += len(missing)
    return here


def refuse_torn(items: Iterable[Item], what: str) -> None:
    """InputError for a patient in two splits."""
    homes: dict[str, str] = {}
    torn = {who for item in items for name, who in item.extra if name == "patient" and homes.setdefault(who, item.split) != item.split}
    if torn:
        raise InputError(f"{what}: {len(torn)} patients are in two splits: {listed(sorted(torn))}; split by patient")


def refuse_missing_class(items: Sequence[Item], declared: Sequence[str] | None, what: str) -> None:
    """InputError for a class that a split lacks while another has it.

    Classes are the findings that are ``declared``, else those that some image has alone: a rare one that only comes with others need not be everywhere.
    """
    classes = declared or tuple(dict.fromkeys(item.findings[0] for item in items if len(item.findings) == 1))
    have: dict[str, set[str]] = defaultdict(set)
    for item in items:
        have[item.split].update(item.findings)
    for name in sorted(have, key=SPLITS.index):
        missing = [finding for finding in classes if finding not in have[name]]
        if missing:
            raise InputError(f"{what}: the {name} split gets no image of {listed(missing)}; give more images, other --ratios or fewer findings")


# -- NIH ChestX-ray14 -------------------------------------------------------------------------------------------


def nih_task(task: str) -> tuple[str, ...]:
    """Classes of ``--task``: a published task or names of the archive's findings; No Finding comes first unless it is named."""
    names = TASKS.get(task) or tuple(name.strip() for name in task.split(","))
    for name in names:
        if name not in NIH_FINDINGS:
            known = [t for t, classes in TASKS.items() if set(classes) <= set(NIH_FINDINGS)]
            more = f" ({name} is not a label of NIH ChestX-ray14)" if task in TASKS else ""
            raise InputError(f"--task {task}: unknown{more}; {nearest(name, (*NIH_FINDINGS, *known))}")
    if len(set(names)) < len(names):
        raise InputError(f"--task {task}: names a finding twice")
    return names if NO_FINDING in names else (NO_FINDING, *names)


def nih(
    images: Path,
    metadata: Path,
    task: str,
    *,
    how: str = "published",
    seed: int = 0,
    shares: Sequence[float] = split.SHARES,
    balanced: bool = True,
    lists: Path | None = None,
    boxes: Path | None = None,
    skip_missing: bool = False,
) -> Source:
    """NIH ChestX-ray14 as downloaded: ``Data_Entry_2017(_v2020).csv`` and images at any depth.

    An image belongs to a finding when that is its one label. ``how``: ``published`` (Wu et al., DMKD 2026), ``official``
    (train_val_list.txt and test_list.txt in ``lists``) or ``random`` (patients dealt by ``seed`` and ``shares``).
    """
    flag, classes = f"--metadata {metadata}", nih_task(task)
    names, rows = read_table(metadata, "--metadata")
    image = column(names, flag, "Image Index")
    labels, patient = column(names, flag, "Finding Labels"), column(names, flag, "Patient ID")
    age, sex, view = column(names, flag, "Patient Age"), column(names, flag, "Patient Sex", "Patient Gender"), column(names, flag, "View Position")
    if not images.is_dir():
        raise InputError(f"--images {images}: no such folder")
    where: dict[str, str] = {}
    for path in walk(images):
        if path.suffix in (".png", ".jpg"):
            other = where.setdefault(path.stem, str(path))
            if other != str(path):
                raise InputError(f"--images {images}: {path.name} is there twice, in {os.path.dirname(other)} and in {path.parent}; remove one")
    if not where:
        raise InputError(f"--images {images}: no .png or .jpg at any depth; expected the archive's folders, such as images_001/images")

    stems = [row[image].rpartition(".")[0] for row in rows]
    findings = [tuple(row[labels].split("|")) for row in rows]
    unknown = sorted({name for found in findings for name in found} - set(NIH_FINDINGS))
    if unknown:
        raise InputError(f"{flag}: labels that the archive does not have: {listed(unknown)}; {nearest(unknown[0], NIH_FINDINGS)}")
    who = np.array([row[patient].strip() for row in rows])
    cases = split.Cases([row[image] for row in rows], findings, who, np.array([not skip_missing or stem in where for stem in stems]))
    if how == "published":
        parts = split.published(cases, classes, seed, balanced=balanced)
    elif how == "official":
        parts = split.official(cases, classes, seed, _official_test(lists or metadata.parent, cases.names), balanced=balanced)
    else:
        parts = split.at_random(cases, classes, seed, shares, balanced=balanced)
    skipped: dict[str, int] = defaultdict(int)
    label = cases.labels(classes)
    wanted = [i for p in parts for i in p]
    if not skip_missing:
        present([Path(where.get(stems[i], images / rows[i][image])) for i in wanted], flag, skipped, False)
    elif not cases.here.any():
        raise InputError(f"--images {images}: none of the {len(rows)} images of {metadata.name} is there")
    else:
        skipped["listed but missing"] = int((~cases.here).sum())
    test = how != "random" or shares[2] > 0
    split.check(parts, label, who, classes, f"--task {task} --split {how} of {int(cases.here.sum())} images", test=test)
    of_task = int((label[cases.here] >= 0).sum())
    skipped |= {"several findings, or none of the task's": int(cases.here.sum()) - of_task, "not drawn": of_task - len(wanted)}
    lesions = _nih_boxes(boxes) if boxes else {}
    items = []
    for name, part in zip(SPLITS, parts, strict=True):
        for i in part:
            row = rows[i]
            extra = (("age", _age(row[age])), ("patient", row[patient]), ("sex", row[sex]), ("source", row[image]), ("view", row[view]))
            items.append(Item(name, stems[i], (findings[i][0],), where[stems[i]], boxes=tuple(lesions.get(stems[i], ())), extra=extra))
    return Source(items, {why: count for why, count in skipped.items() if count}, classes)


def _age(text: str) -> float | None:
    """``058Y`` (2017) or ``58`` (2020) in years; months, weeks and days as shares of one."""
    match = re.fullmatch(r"(\d+)([YMWD]?)", text.strip())
    if not match:
        return None
    years = int(match[1]) / {"": 1, "Y": 1, "M": 12, "W": 52.18, "D": 365.25}[match[2]]
    return round(years, 2)


def _official_test(folder: Path, names: list[str]) -> set[str]:
    found = []
    for file in ("train_val_list.txt", "test_list.txt"):
        try:
            found.append(set((folder / file).read_text().split()))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--lists {folder}: needs {file} for --split official; it comes with the archive") from error
    rest = [name for name in names if name not in found[0] and name not in found[1]]
    both = sorted(found[0] & found[1])
    if rest or both:
        raise InputError(
            f"--lists {folder}: {len(rest)} images of the metadata are in neither list ({listed(rest)}), {len(both)} in both; use the archive's own lists"
        )
    return found[1]


def _nih_boxes(path: Path) -> dict[str, list[Shares]]:
    """Lesion boxes by image, in shares of its sides. The file's header spans the four numbers with one name."""
    names, rows = read_cells(path, "--boxes")
    image, at = (names.index(column(names, f"--boxes {path}", name)) for name in ("Image Index", "Finding Label"))
    boxes = defaultdict(list)
    for cells in rows:
        try:
            x, y, w, h = (float(value) / NIH_PIXELS for value in cells[at + 1 : at + 5])
        except (ValueError, IndexError) as error:
            raise InputError(f"--boxes {path}: {cells[0]} has no box of four numbers; use the archive's BBox_List_2017.csv") from error
        name = NIH_BOX_NAMES.get(cells[at], cells[at])
        boxes[cells[image].rpartition(".")[0]].append((name, (x, y, x + w, y + h)))
    return boxes


# -- DICOM ------------------------------------------------------------------------------------------------------


def dicom(
    root: Path,
    salt: bytes,
    *,
    labels: Path | None = None,
    columns: Columns | None = None,
    declared: Sequence[str] | None = None,
    seed: int = 0,
    shares: Sequence[float] = split.SHARES,
    skip_bad: bool = False,
) -> Source:
    """DICOM files at any depth. Of the patient only a salted hash of the ID is stored, and the file's name and UID as one.

    Findings come from ``labels`` (a CSV whose path column names files below ``root``) or from the folders:
    ``train|val|test/<class>/...`` or ``<class>/...``, which is split by patient.
    """
    from shards.dicom import UNREADABLE, pseudonym, read_header

    if not root.is_dir():
        raise InputError(f"--path {root}: no such folder")
    skipped: dict[str, int] = defaultdict(int)
    listed_rows: dict[str, tuple[tuple[str, ...], str]] = {}
    if labels is not None:
        names, rows = read_table(labels, "--csv")
        columns = columns or Columns()
        for name in (columns.path, *columns.finding, *filter(None, [columns.split])):
            column(names, f"--csv {labels}", name)
        ones = _indicators(rows, columns)
        for n, row in enumerate(rows, 2):
            found = _row_findings(row, columns, ones, declared, f"--csv {labels}, row {n}", skipped, skip_bad)
            name = os.path.normpath(row[columns.path].strip() or ".")
            name = os.path.relpath(name, root) if os.path.isabs(name) else name
            if name.startswith(".."):
                raise InputError(f"--csv {labels}, row {n}: {row[columns.path]} is not below --path {root}")
            if name in listed_rows:
                raise InputError(f"--csv {labels}, row {n}: {name} is listed more than once; keep one row of each, with all its findings")
            if found is not None:
                part = _split_name(row[columns.split], f"--csv {labels}, row {n}") if columns.split else ""
                listed_rows[name] = found, part
        here = present([root / name for name in listed_rows], f"--csv {labels}", skipped, skip_bad)
        listed_rows = {name: row for (name, row), there in zip(listed_rows.items(), here, strict=True) if there}
        paths = [root / name for name in listed_rows]
    else:
        paths = list(walk(root))
    items, patients, nameless = [], [], 0
    same: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        header = read_header(path)
        if isinstance(header, str):
            if not skip_bad and (labels is not None or header.startswith(UNREADABLE)):
                remedy = "correct --csv" if labels is not None else "replace or remove it"
                raise InputError(f"{path}: {header}; {remedy}, or leave it out with --on-bad skip")
            skipped[header.partition(":")[0]] += 1
            continue
        if any(path.stat().st_size == other.stat().st_size and path.read_bytes() == other.read_bytes() for other in same[header.uid]):
            skipped["a copy of another file"] += 1
            continue
        same[header.uid].append(path)
        folders = path.relative_to(root).parts[:-1]
        if labels is not None:
            findings, part = listed_rows[str(path.relative_to(root))]
        elif folders and folders[0] in SPLITS and len(folders) > 1:
            findings, part = (folder_finding(folders[1]),), folders[0]
        elif folders and folders[0] not in SPLITS:
            findings, part = (folder_finding(folders[0]),), ""
        else:
            raise InputError(f"{path}: has no class; put files into <class>/ or train|val|test/<class>/ folders, or name a table with --csv")
        nameless += not header.patient.strip()
        who = pseudonym(header.patient.strip() or header.study or header.uid, salt)
        extra = (("patient", who), *((("view", header.view),) if header.view else ()))
        number = len(same[header.uid])
        key = pseudonym(header.uid, salt) + (f"-{number}" if number > 1 else "")
        items.append(Item(part, key, findings, str(path), extra=extra))
        patients.append(who)
    if nameless:
        print(f"warning: {nameless} images have no patient ID: the images of one study count as one patient", file=sys.stderr)
    if not items:
        raise InputError(f"--path {root}: no DICOM image in it ({', '.join(f'{n} {why}' for why, n in skipped.items()) or 'it is empty'})")
    if not all(item.split for item in items):
        codes = {findings: k for k, findings in enumerate(dict.fromkeys(item.findings for item in items))}
        part_of = split.by_patient(np.array([codes[item.findings] for item in items]), np.array(patients), seed, shares)
        items = [replace(item, split=SPLITS[p]) for item, p in zip(items, part_of, strict=True)]
    every = tuple(declared or dict.fromkeys(name for item in items for name in item.findings))
    refuse_torn(items, f"--path {root}")
    refuse_missing_class(items, declared, f"--path {root}")
    return Source(mixed(items), dict(skipped), every)
