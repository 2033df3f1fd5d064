"""Real archives -> what is to be packed: class folders, image+mask folders, tables, NIH ChestX-ray14, DICOM.

A scan looks at names and tables only, finds every problem that can be found so, and returns a Source: the items in the
order in which they will be stored, and how to load one. Nothing is decoded before packing.
"""

import csv
import gzip
import io
import os
import re
import sys
import unicodedata
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from shards import split
from shards.errors import InputError, listed, nearest
from shards.pixels import IMAGE_SUFFIXES, Frame, Scale, fit, image_size, open_gray, open_mask
from shards.sample import EFFUSION, NO_FINDING, PNEUMOTHORAX, SPLITS, SUBCUTANEOUS_EMPHYSEMA, SUPPORT_DEVICES, TASKS, LesionBox, Sample, clean_key, spelling

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
SPLIT_NAMES = {name: name for name in SPLITS} | {"training": "train", "testing": "test"} | dict.fromkeys(("valid", "validation", "validate", "dev"), "val")
OUTLINE_LIMIT = 0.6  # share of an image's border above which a mask is one of everything but the lungs
ONE_SIDE = 0.97  # share of a mask on one side of the image's middle above which it is of one lung
ONE_LUNG = "the mask shows a single lung; where left and right have files of their own, name both folders: --masks LEFT --masks RIGHT"
NOBODY = ("", "na", "nan", "none", "null", "n/a", "-")  # what stands for nothing in a cell
ANONYMOUS = re.compile(r"(anon\w*|unknown|unnamed|removed|redacted|de-?identified|patient|no ?name|test|x+|0+|none|null|nan?|n/a)", re.IGNORECASE)
TABLE_BYTES = 2**31  # of a table, unpacked
# Names of the four columns of a lesion box, in pixels of the file: corners, or a corner and the sides.
CORNERS = (("x0", "y0", "x1", "y1"), ("x_min", "y_min", "x_max", "y_max"), ("xmin", "ymin", "xmax", "ymax"), ("x1", "y1", "x2", "y2"))
SIDES = (("x", "y", "w", "h"), ("x", "y", "width", "height"))


Shares = tuple[str, tuple[float, float, float, float]]  # a lesion: its finding, and x0 y0 x1 y1 in shares of the image's sides


@dataclass(frozen=True)
class Item:
    """One sample before it is loaded."""

    split: str
    key: str
    findings: tuple[str, ...] = ()
    image: str = ""
    masks: tuple[str, ...] = ()  # several: their union
    boxes: tuple[Shares, ...] = ()
    extra: tuple[tuple[str, Any], ...] = ()


@dataclass
class Source:
    """Items of image files.

    skipped: what was left out, reason -> how many; classes: findings in the order of the index; notes: what was decided, a line each;
    scales: how values of more than 8 bits become gray, chosen when packing; bits: the depth that the user gave for them.
    """

    items: list[Item]
    skipped: dict[str, int] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    size: int = 512
    aspect: str = "stretch"
    notes: list[str] = field(default_factory=list)
    bits: int | None = None
    scales: tuple[Scale, ...] = ()

    def load(self, item: Item) -> Sample:
        """Read, check and resize. InputError: a file that cannot be decoded, a mask that is empty or not its image's size."""
        image = open_gray(item.image, self.scales)
        mask, remarks = None, []
        if item.masks:
            lungs = np.zeros((image.height, image.width), np.uint8)
            for path in item.masks:
                lungs |= _lungs(path, (image.height, image.width))
            left = int((lungs[:, : image.width // 2] > 0).sum()) / int((lungs > 0).sum())
            if max(left, 1 - left) > ONE_SIDE:
                remarks.append(ONE_LUNG)
            mask = fit(lungs, self.size, self.aspect, mask=True)
        frame = Frame.of((image.height, image.width), self.size, self.aspect)
        boxes = [LesionBox(finding, frame.box(share)) for finding, share in item.boxes]
        return Sample(item.key, fit(image, self.size, self.aspect), item.findings, mask, boxes, dict(item.extra), tuple(remarks))

    def settings(self) -> dict[str, Any]:
        """What the bytes of a sample depend on, beside its item."""
        return {"size": self.size, "aspect": self.aspect, "scales": [list(scale) for scale in self.scales]}

    def version(self, item: Item) -> str:
        """Changes when the files behind an item do."""
        stats = [os.stat(path) for path in (item.image, *item.masks) if path]
        return " ".join(f"{s.st_size}:{s.st_mtime_ns}" for s in stats)


def _lungs(path: str, shape: tuple[int, int]) -> np.ndarray:
    """A lung mask of an image of that shape: uint8 [H, W], 0 or 255. InputError: of another size, empty, no mask."""
    lungs = open_mask(path)
    if lungs.shape != shape:
        raise InputError(f"{path}: is {lungs.shape[1]}x{lungs.shape[0]}, its image {shape[1]}x{shape[0]}; they must agree")
    if not lungs.any():
        raise InputError(f"{path}: has no lung pixel (all 0); remove the pair")
    # 0 and 1, 0 and 255, a number for each lung or lobe; many values are a mask that was saved as a JPEG or smoothed.
    limit = 0 if len(np.unique(lungs)) <= 7 else lungs.max() // 2
    between = ((lungs > 0.1 * lungs.max()) & (lungs < 0.9 * lungs.max())).mean() if limit else 0.0
    lungs = np.where(lungs > limit, 255, 0).astype(np.uint8)
    if between > 0.2 or (lungs > 0).mean() > 0.9:
        what = f"{100 * between:.0f}% of its pixels are gray" if between > 0.2 else f"{100 * (lungs > 0).mean():.0f}% of it is lung"
        raise InputError(f"{path}: is no lung mask, {what}; are --images and --masks in their places?")
    border = np.concatenate([lungs[0], lungs[-1], lungs[:, 0], lungs[:, -1]]) > 0
    if border.mean() > OUTLINE_LIMIT:
        raise InputError(f"{path}: is white along {100 * border.mean():.0f}% of its border, so it shows all but the lungs; invert it (lungs are white)")
    return lungs


# -- folders ----------------------------------------------------------------------------------------------------


def images_of(folder: Path, skipped: dict[str, int] | None = None) -> Iterator[Path]:
    """Image files of one folder, sorted; other files are counted."""
    for path in sorted(folder.iterdir()):
        if hidden(path.name):
            if skipped is not None and path.is_dir():
                skipped["a hidden folder"] += 1
            continue
        if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
            yield path
        elif skipped is not None:
            if path.is_dir():
                skipped[f"a folder inside a class folder ({path}, with {_count(path)} images)"] += 1
            else:
                skipped["a DICOM file: see `python -m shards dicom`" if path.suffix.lower() == ".dcm" else "not an image file"] += 1


def _count(folder: Path) -> int:
    """Images at any depth of a folder."""
    return sum(path.suffix.lower() in IMAGE_SUFFIXES for path in walk(folder))


def _loose(folder: Path, skipped: dict[str, int]) -> None:
    """Count the images that lie beside the folders of splits or classes."""
    if loose := sum(path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES and not hidden(path.name) for path in folder.iterdir()):
        skipped[f"images in no class folder, in {folder}"] += loose


def hidden(name: str) -> bool:
    """Whether a file or folder is no data: `.ipynb_checkpoints`, `._x.png`, and what macOS and file servers put beside it."""
    return name.startswith(".") or name in ("__MACOSX", "@eaDir", "$RECYCLE.BIN")


def walk(root: Path) -> Iterator[Path]:
    """Files at any depth, sorted, links to folders followed (each folder once), hidden files and folders left out."""
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not hidden(name))
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        paths = (Path(folder, file) for file in sorted(files) if not hidden(file))
        yield from (path for path in paths if path.is_file())  # a pipe would wait for ever


def class_folders(root: Path, seed: int = 0, shares: Sequence[float] = split.SHARES) -> Source:
    """``train|val|test/<class>/*.png`` (any image suffix). A leading digit of a class name is order, not name.

    Without split folders, ``<class>/*.png``: images are dealt by ``seed`` and ``shares``, each as a patient of its own.
    InputError: no such folders, a split without images, a class missing from a split.
    """
    if not root.is_dir():
        raise InputError(f"--path {root}: no such folder")
    skipped: dict[str, int] = defaultdict(int)
    folders: dict[str, Path] = {}
    others: list[Path] = []
    for folder in sorted(p for p in root.iterdir() if p.is_dir()):
        name = split_of_folder(folder.name)
        if hidden(folder.name):
            skipped["a hidden folder"] += 1
        elif not name:
            others.append(folder)
        elif name in folders:
            raise InputError(f"--path {root}: {folders[name].name} and {folder.name} are both {name}; put them together")
        else:
            folders[name] = folder
    if folders:
        for folder in others:
            skipped[f"a folder that is no split ({folder.name}, with {_count(folder)} images)"] += 1
        for folder in folders.values():
            _loose(folder, skipped)
    _loose(root, skipped)
    if folders:
        found = [(name, folder) for name in SPLITS if name in folders for folder in sorted(p for p in folders[name].iterdir() if p.is_dir())]
    else:
        found = [("", folder) for folder in others]
    items, names = [], []
    for name, folder in found:
        if hidden(folder.name):
            skipped["a hidden folder"] += 1
            continue
        finding = folder_finding(folder.name)
        for path in images_of(folder, skipped):
            items.append(Item(name, clean_key(f"{folder.name}-{path.stem}"), (finding,), str(path), extra=(("source", path.name),)))
            names.append(f"{folder.name}/{path.name}")
    if not items and not folders:
        raise InputError(f"--path {root}: expected the folders train, val and test with a folder per class in each, or a folder per class")
    every = list(dict.fromkeys(item.findings[0] for item in items))
    if not every:
        raise InputError(f"--path {root}: no images in {', '.join(folders)} ({', '.join(IMAGE_SUFFIXES)} are read)")
    notes = []
    if not folders:
        codes = np.array([every.index(item.findings[0]) for item in items])
        parts = split.by_patient(codes, np.array([str(n) for n in range(len(items))]), seed, shares)
        items = [replace(item, split=SPLITS[p]) for item, p in zip(items, parts, strict=True)]
        notes.append("no split folders: images are dealt to train, val and test, and one patient may be in two of them; `shards csv` deals patients")
        refuse_missing_class(items, None, f"--path {root}")
    items = separated(items, names)
    classes = {name: {item.findings[0] for item in items if item.split == name} for name in folders}
    for name in folders:
        missing = [finding for finding in every if finding not in classes[name]]
        if missing:
            raise InputError(f"{folders[name]}: has no images of {listed(missing)}, other splits have; add some or remove the class")
    return Source(mixed(items), dict(skipped), tuple(every), notes=notes)


def split_of_folder(name: str) -> str:
    """train, val or test for any of the names that people give them; empty for all others."""
    return SPLIT_NAMES.get(name.strip().lower(), "")


def separated(items: Sequence[Item], names: Sequence[str]) -> list[Item]:
    """Items of a split whose names give one key (`a.png` and `a.jpg`, `COVID (1)` and `COVID(1)`) get the checksum of their name behind it."""
    places = Counter((item.split, item.key) for item in items)
    return [
        replace(item, key=f"{item.key}-{zlib.crc32(name.encode(errors='surrogateescape')):08x}") if places[item.split, item.key] > 1 else item
        for item, name in zip(items, names, strict=True)
    ]


def mixed(items: list[Item]) -> list[Item]:
    """Splits in order; within each, items in an order that does not know their class, so that every shard has some of each."""
    return sorted(items, key=lambda item: (SPLITS.index(item.split), zlib.crc32(item.key.encode()), item.key))


def folder_finding(name: str) -> str:
    """``1Effusion`` -> ``Effusion``; names that are not published ones stay, without their leading digits."""
    bare = re.sub(r"^\d+[\s._-]*", "", name) or name
    return FOLDER_FINDINGS.get(re.sub(r"[\s_-]", "", bare).lower(), bare)


def image_masks(images: Path, masks: Path | Sequence[Path], val_share: float = 0.2, test_share: float = 0.0) -> Source:
    """Images and lung masks in folders, matched by name (``x.png`` with ``x.png``, ``x_mask.png`` or ``x-lungs.png``).

    Several folders of masks, such as one for each lung: each must have every image; a sample's mask is their union.
    Shares of the names, drawn by their checksum and so the same wherever they lie, become val and test.
    InputError: an empty folder, an image without a mask, a mask without an image.
    """
    skipped: dict[str, int] = defaultdict(int)

    def named(flag: str, folder: Path) -> dict[str, Path]:
        if not folder.is_dir():
            raise InputError(f"{flag} {folder}: no such folder")
        names: dict[str, Path] = {}
        for path in images_of(folder, skipped):
            stem = unicodedata.normalize("NFC", MASK_ENDING.sub("", path.stem) if flag == "--masks" else path.stem)
            if stem in names:
                raise InputError(f"{path}: stands for the same image as {names[stem].name}; remove one of them")
            names[stem] = path
        if not names:
            raise InputError(f"{flag} {folder}: no images in it ({', '.join(IMAGE_SUFFIXES)} are read)")
        return names

    by_image = named("--images", images)
    by_mask = [named("--masks", folder) for folder in ([masks] if isinstance(masks, Path) else masks)]
    pairs = [pair for of in by_mask for pair in ((of, by_image, "masks without an image"), (by_image, of, "images without a mask"))]
    for one, other, what in pairs:
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
        Item(part.get(stem, "train"), clean_key(stem), (), str(path), tuple(str(of[stem]) for of in by_mask), extra=(("source", path.name),))
        for stem, path in by_image.items()
    ]
    return Source(mixed(separated(items, list(by_image))), dict(skipped))


# -- tables -----------------------------------------------------------------------------------------------------


class Row(dict[str, str]):
    """A row of a table, by column; ``line``: its last line in the file."""

    line = 0


def _text(data: bytes, where: str) -> str:
    """A table's text: UTF-8, UTF-16 with its mark, or what Excel writes in Western Europe, Windows-1252, which is told."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("cp1252")
        print(f"note: {where} is not UTF-8; it is read as Windows-1252", file=sys.stderr)
        return text


def read_cells(path: Path, flag: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header and rows, each with its last line in the file, of a CSV (``.gz`` too). Commas, semicolons or tabs; blank rows are left out.

    InputError: missing, empty, not text.
    """
    if not path.is_file():
        raise InputError(f"{flag} {path}: no such file")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(TABLE_BYTES + 1)
        if len(data) > TABLE_BYTES:
            raise csv.Error(f"more than {TABLE_BYTES} bytes")
        text = _text(data, f"{flag} {path}")
        first = re.match(r"[^\r\n]*", text)[0]  # type: ignore[index]
        said = re.fullmatch(r'"?sep=(.)"?', first)  # Excel's own line
        skip = 1 if said else 0
        head = re.split(r"\r\n|\r|\n", text, maxsplit=skip + 1)[skip] if text else ""
        separator = said[1] if said else max(",;\t", key=lambda one: len(next(csv.reader([head], delimiter=one), [])))
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
        rows = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)][skip:]
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, zlib.error) as error:
        raise InputError(f"{flag} {path}: cannot be read as a CSV ({error}); save it as a CSV in UTF-8") from error
    if len(rows) < 2:
        raise InputError(f"{flag} {path}: has no rows")
    return [name.strip() for name in rows[0][1]], rows[1:]


def read_table(path: Path, flag: str) -> tuple[list[str], list[Row]]:
    """Columns and rows, by column, of a CSV; errors as `read_cells`, and for a row shorter than the header."""
    columns, found = read_cells(path, flag)
    while columns and not columns[-1]:
        columns.pop()
    rows = []
    for line, cells in found:
        if len(cells) < len(columns):
            raise InputError(f"{flag} {path}: row {line} has {len(cells)} cells, the header {len(columns)}; correct the row")
        rows.append(Row(zip(columns, (cell.strip() for cell in cells), strict=False)))
        rows[-1].line = line
    return columns, rows


def column(columns: list[str], flag: str, *names: str) -> str:
    """The first of ``names`` that is a column; InputError says which columns there are."""
    for name in names:
        if columns.count(name) > 1:
            raise InputError(f"{flag}: has {columns.count(name)} columns {name!r}; rename one")
        if name in columns:
            return name
    close = nearest(names[0], [c for c in columns if c])
    hint = f"; {close}" if close.startswith("did you mean") else ""
    raise InputError(f"{flag}: has no column {names[0]!r}; its columns are {', '.join(c for c in columns if c)}{hint}")


@dataclass
class Columns:
    """Names of the columns of a table. ``finding``: one column with names, or several of 0 and 1 named after their finding."""

    path: str = "path"
    finding: Sequence[str] = ("finding",)
    split: str = ""
    patient: str = ""
    separator: str = "|"


class Finder:
    """Files below a folder by the names that tables give them.

    A name that is not there as it stands is looked for with ``/`` for ``\\``, in another Unicode normal form or case, and without its
    suffix; what fits one file alone is that file.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.known: dict[str, dict[str, list[str]]] = {}  # of a folder: plain name or stem -> names

    def find(self, name: str) -> Path:
        """The file, or, where there is none, the path that the name stands for."""
        plain = self.root / name
        if os.path.isfile(plain) or "\0" in name:
            return plain
        parts = Path(name.replace("\\", "/")).parts
        if len(parts) > 1 and parts[0] == self.root.name and not os.path.isdir(self.root / parts[0]):
            parts = parts[1:]  # from the folder above the one that is named
        if not parts or os.path.isabs(name) or ".." in parts:
            return plain
        at = str(self.root)
        for part in parts:
            exact = os.path.join(at, part)
            names = [] if os.path.lexists(exact) and (os.path.isdir(exact) or part is parts[-1]) else self._like(at, part)
            at = os.path.join(at, names[0]) if len(names) == 1 else exact
        return Path(at) if os.path.isfile(at) else plain

    def _like(self, folder: str, name: str) -> list[str]:
        if folder not in self.known:
            self.known[folder] = defaultdict(list)
            with suppress(OSError):
                for entry in sorted(os.listdir(folder)):
                    if not hidden(entry):
                        stem, suffix = os.path.splitext(entry)
                        readable = suffix.lower() in (*IMAGE_SUFFIXES, ".dcm", ".dicom", "")
                        for key in {_plain(entry), *([_plain(stem)] if readable else [])}:
                            self.known[folder][key].append(entry)
        return self.known[folder].get(_plain(name), [])


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _labelled(
    rows: Sequence[Row],
    names: Sequence[str],
    columns: Columns,
    declared: Sequence[str] | None,
    flag: str,
    skipped: dict[str, int],
    notes: list[str],
    skip: bool,
) -> list[tuple[Row, tuple[str, ...]]]:
    """The rows that can be used, each with its findings. InputError: a finding that is not among ``declared``, and what else a cell should not hold."""
    healthy = next((name for name in names if spelling(name) == spelling(NO_FINDING)), "")
    if not _indicators(rows, columns):
        found = [_named(row, columns, flag, skipped, notes, skip) for row in rows]
    else:
        found = [_indicated(row, columns, healthy, flag, skipped, skip) for row in rows]
        assumed = [row for row, findings in zip(rows, found, strict=True) if findings == (NO_FINDING,)]
        if not healthy and assumed:
            flags = [name for name in names if name not in columns.finding and _only_numbers(rows, name)]
            ones = {name: sum(row[name] in ("1", "1.0") for row in assumed) for name in flags}
            ill = sum(any(row[name] in ("1", "1.0") for name in flags) for row in assumed)
            also = f" ({ill} of them have a 1 in another column: {listed(f'{name} {n}' for name, n in ones.items() if n)})" if ill else ""
            notes.append(f"the table has no column {NO_FINDING!r}: its {len(assumed)} rows with none of the findings named are taken as healthy{also}")
    taken = []
    for row, findings in zip(rows, found, strict=True):
        other = [name for name in findings or () if declared and name not in declared]
        if other and not skip:
            raise InputError(
                f"{flag}, row {row.line}: the finding {other[0]!r} was not declared; {nearest(other[0], declared or ())}; "
                "correct the row, add it to --findings, or leave such rows out with --on-bad skip"
            )
        if other:
            skipped["a finding that was not declared"] += 1
        elif findings is not None:
            taken.append((row, findings))
    return taken


def _only_numbers(rows: Sequence[Row], name: str) -> bool:
    values = {row[name].lower() for row in rows}
    return {""} != values <= {"0", "1", "-1", "0.0", "1.0", "-1.0", "", "true", "false", "yes", "no"}


def _indicators(rows: Sequence[Row], columns: Columns) -> bool:
    """Whether the columns hold 0 and 1, each named after its finding, and not names of findings."""
    return len(columns.finding) > 1 or _only_numbers(rows, columns.finding[0])


def _named(row: Row, columns: Columns, flag: str, skipped: dict[str, int], notes: list[str], skip: bool) -> tuple[str, ...] | None:
    """Findings of a cell of names."""
    cell = columns.finding[0]
    found = tuple(dict.fromkeys(name.strip() for name in row[cell].split(columns.separator) if name.strip()))
    if not found or any(name.lower() in NOBODY for name in found):
        if skip:
            skipped[f"no finding in column {cell!r}"] += 1
            return None
        what = f"no finding in column {cell!r}" if not found else f"column {cell!r} holds {row[cell]!r}, which is no finding"
        raise InputError(f"{flag}, row {row.line}: {what}; write {NO_FINDING!r} where there is none, or leave such rows out with --on-bad skip")
    for name in found:
        if name != NO_FINDING and spelling(name) == spelling(NO_FINDING):
            note = f"{name!r} is read as {NO_FINDING!r}"
            if note not in notes:
                notes.append(note)
    found = tuple(dict.fromkeys(NO_FINDING if spelling(name) == spelling(NO_FINDING) else name for name in found))
    if NO_FINDING in found and len(found) > 1:
        if skip:
            skipped[f"{NO_FINDING} and something else"] += 1
            return None
        raise InputError(f"{flag}, row {row.line}: says {NO_FINDING} and something else ({listed(found)}); correct the row")
    return found


def _indicated(row: Row, columns: Columns, healthy: str, flag: str, skipped: dict[str, int], skip: bool) -> tuple[str, ...] | None:
    """Findings of columns of 1, 0, -1 (uncertain) and nothing; ``healthy``: the table's own column No Finding, which alone says that an image is."""
    where = f"{flag}, row {row.line}"
    values = {name: _number(row[name], where, name) for name in columns.finding}
    if min(values.values()) < 0:
        skipped["uncertain finding (-1)"] += 1
        return None
    found = tuple(name for name, value in values.items() if value > 0 and name != healthy)
    well = _number(row[healthy], where, healthy) > 0 if healthy else not found
    if well and set(found) - {SUPPORT_DEVICES}:
        if skip:
            skipped[f"{NO_FINDING} and something else"] += 1
            return None
        raise InputError(f"{where}: says {NO_FINDING} and something else ({listed(found)}); correct the row")
    if not well and not found:
        skipped[f"none of the findings named, and not called {NO_FINDING}"] += 1
        return None
    return ((NO_FINDING,) if well else ()) + found


def _number(value: str, where: str, name: str) -> float:
    try:
        number = float(value) if value else 0.0
    except ValueError:
        number = {"true": 1.0, "false": 0.0, "yes": 1.0, "no": 0.0}.get(value.lower(), 9.0)
    if number not in (-1.0, 0.0, 1.0):
        raise InputError(f"{where}: column {name!r} holds {value!r}; expected 1, 0, -1 (uncertain) or nothing")
    return number


@dataclass
class Listed:
    """An image of a table. ``boxes``: of its own rows, each with the row, its finding and x0 y0 x1 y1 in pixels of the file."""

    path: Path
    findings: tuple[str, ...]
    split: str
    patient: str
    boxes: list[tuple[Row, str, tuple[float, float, float, float]]]


def read_listed(
    path: Path,
    images: Path,
    columns: Columns,
    declared: Sequence[str] | None,
    skipped: dict[str, int],
    notes: list[str],
    skip: bool,
    *,
    own_boxes: bool = True,
) -> list[Listed]:
    """The images that a table lists, in its order. Several rows of an image, one for each box or finding, are put together.

    InputError: a column that is not there, images outside the folder or missing, a row that is there twice, rows of an image that disagree.
    """
    flag = f"--csv {path}"
    names, rows = read_table(path, "--csv")
    for name in (columns.path, *columns.finding, *filter(None, (columns.split, columns.patient))):
        column(names, flag, name)
    if "split" in names and not columns.split:
        skipped["column 'split', for --split-column was not given: patients are dealt anew"] += 1
    corners = box_columns(names)
    finder, found = Finder(images), dict[Path, Listed]()
    rows_of: dict[Path, list[Row]] = defaultdict(list)
    torn: set[Path] = set()
    for row, findings in _labelled(rows, names, columns, declared, flag, skipped, notes, skip):
        image = finder.find(row[columns.path])
        part = _split_name(row[columns.split], f"{flag}, image {row[columns.path]}") if columns.split else ""
        who = row[columns.patient] if columns.patient else ""
        box = box_of(row, corners, flag) if corners and own_boxes else None
        boxes = [(row, findings[0], box)] if box and len(findings) == 1 and findings[0] != NO_FINDING else []
        other = found.setdefault(image, Listed(image, (), part, who, []))
        rows_of[image].append(row)
        both = tuple(dict.fromkeys((*other.findings, *findings)))
        if (other.split, other.patient) != (part, who) or (NO_FINDING in both and set(both) - {NO_FINDING, SUPPORT_DEVICES}):
            what = listed(both) if (other.split, other.patient) == (part, who) else "different splits or patients"
            if skip:
                torn.add(image)
                continue
            raise InputError(f"{flag}, rows {rows_of[image][0].line} and {row.line}: say {what} of one image, {row[columns.path]}; correct one")
        other.findings = both
        other.boxes += boxes
    if torn:
        skipped["rows of one image that disagree"] += len(torn)
        found = {image: of for image, of in found.items() if image not in torn}
    outside = [str(image) for image in found if not image.is_relative_to(images)]
    if outside:
        raise InputError(f"{flag}: {len(outside)} images are not below --images {images}: {listed(outside)}; name the folder that holds them all")
    # A row for each box is usual; rows without boxes, or that say the same, are a mistake.
    twice = [str(image) for image, of in rows_of.items() if len(of) > 1 and (not corners or len({tuple(row.values()) for row in of}) < len(of))]
    if twice:
        raise InputError(f"{flag}: {len(twice)} images are listed more than once: {listed(twice)}; keep one row of each, with all its findings")
    here = present(found, flag, skipped, skip)
    listed_ = [image for image, there in zip(found.values(), here, strict=True) if there]
    if corners and own_boxes and (count := sum(len(image.boxes) for image in listed_)):
        notes.append(f"lesion boxes are taken from the table's own columns {', '.join(corners)}: {count}")
    return listed_


def box_columns(names: Sequence[str]) -> tuple[str, str, str, str] | None:
    """The columns of a lesion box, corners before sides, whatever their case; None where there are none."""
    lower = {name.lower(): name for name in names}
    for four in (*CORNERS, *SIDES):
        if all(name in lower for name in four):
            a, b, c, d = (lower[name] for name in four)
            return a, b, c, d
    return None


def box_of(row: Row, corners: tuple[str, str, str, str], flag: str) -> tuple[float, float, float, float] | None:
    """The box of a row as corners in pixels; None where all four cells are empty."""
    cells = [row[name] for name in corners]
    if all(cell.lower() in NOBODY for cell in cells):
        return None
    try:
        x0, y0, x1, y1 = (float(cell.replace(",", ".")) if cell.count(",") == 1 else float(cell) for cell in cells)  # 20,5 as in half of Europe
    except ValueError as error:
        raise InputError(f"{flag}, row {row.line}: columns {', '.join(corners)} hold no four numbers ({error})") from error
    if corners[2].lower() in ("w", "width"):
        x1, y1 = x0 + x1, y0 + y1
    return x0, y0, x1, y1


def share_of(box: tuple[float, float, float, float], size: tuple[int, int], told: str, name: str) -> tuple[float, float, float, float]:
    """A box in pixels of a file of that width and height, as shares of its sides. InputError: outside, or less than a pixel."""
    (x0, y0, x1, y1), (width, height) = box, size
    told = f"{told}: {x0:g} {y0:g} {x1:g} {y1:g}"
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise InputError(f"{told} is no box in {name} of {width}x{height} pixels; correct the row")
    if min(x1 - x0, y1 - y0) < 1:
        raise InputError(f"{told} is less than a pixel of {name} ({width}x{height}): boxes are in pixels of the file, not in shares of it")
    return x0 / width, y0 / height, x1 / width, y1 / height


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
    counts as a patient. InputError: as `read_listed`, and a patient in two splits.
    """
    flag = f"--csv {path}"
    skipped: dict[str, int] = defaultdict(int)
    notes: list[str] = []
    taken = read_listed(path, images, columns, declared, skipped, notes, skip_missing, own_boxes=boxes is None)
    patient = np.array([image.patient if columns.patient else str(i) for i, image in enumerate(taken)])
    if columns.patient:
        nobody = sum(who.lower() in NOBODY for who in patient)
        if nobody:
            raise InputError(f"{flag}: {nobody} rows have no patient in column {columns.patient!r}; fill it, or leave those rows out of the table")
        if not columns.split and len(taken) > 1 and len(set(patient)) == 1:
            raise InputError(
                f"{flag}: column {columns.patient!r} holds {str(patient[0])!r} for all {len(taken)} images, so nobody can be split; "
                "name the column that tells patients apart (or the study), or leave --patient-column out"
            )
        notes += alike_patients(patient)
    if columns.split:
        parts = [image.split for image in taken]
    else:
        codes = {findings: k for k, findings in enumerate(dict.fromkeys(image.findings for image in taken))}
        part = split.by_patient(np.array([codes[image.findings] for image in taken], np.int64), patient, seed, shares)
        parts = [SPLITS[p] for p in part]
    every = tuple(declared or dict.fromkeys(name for image in taken for name in image.findings))
    lesions = _table_boxes(boxes, images, taken, columns, every, skipped, skip_missing) if boxes else _own_boxes(taken, flag, image_size, skip_missing)
    items, sources = [], []
    for image, p, who in zip(taken, parts, patient, strict=True):
        extra = [("source", image.path.name)]
        if columns.patient:
            extra.append(("patient", pseudonym(who) if pseudonym else str(who)))
        sources.append(str(image.path.relative_to(images)))
        theirs = lesions.get(image.path, ())
        if other := sum(name not in image.findings for name, _ in theirs):
            skipped["boxes of findings that their image is not labelled with"] += other
        kept = tuple(box for box in theirs if box[0] in image.findings)
        items.append(Item(p, clean_key(os.path.splitext(sources[-1])[0]), image.findings, str(image.path), boxes=kept, extra=tuple(extra)))
    refuse_torn(items, flag)
    refuse_missing_class(items, declared, flag)
    return Source(mixed(separated(items, sources)), dict(skipped), every, notes=notes)


def alike_patients(patients: Iterable[str]) -> list[str]:
    """A warning for IDs that differ only by leading zeros, ``.0`` or case: one patient may be in two splits under two of them."""
    spellings: dict[str, set[str]] = defaultdict(set)
    for who in map(str, patients):
        spellings[re.sub(r"\.0+$", "", who.strip()).lstrip("0").casefold()].add(who)
    alike = [sorted(names) for names in spellings.values() if len(names) > 1]
    if not alike:
        return []
    examples = listed((" and ".join(map(repr, names)) for names in alike), 3)
    return [f"warning: {len(alike)} patients may stand under two IDs that differ only by zeros or case: {examples}; correct the table if they are one"]


def _own_boxes(taken: Sequence[Listed], flag: str, size: Callable[[Path], tuple[int, int]], skip: bool) -> dict[Path, list[Shares]]:
    """The boxes of the table's own rows, by image."""
    found = {}
    for image in taken:
        if image.boxes:
            try:
                pixels = size(image.path)
            except InputError:
                if skip:  # the image itself is left out, and counted, when it is packed
                    continue
                raise
            found[image.path] = [(finding, share_of(box, pixels, f"{flag}, row {row.line}", image.path.name)) for row, finding, box in image.boxes]
    return found


def _table_boxes(
    path: Path, images: Path, known: Sequence[Listed], columns: Columns, findings: Sequence[str], skipped: dict[str, int], skip_bad: bool
) -> dict[Path, list[Shares]]:
    """Lesion boxes of the ``known`` images: columns of the image, of the finding, and four of the box in pixels of the file."""
    flag = f"--boxes {path}"
    names, rows = read_table(path, "--boxes")
    column(names, flag, columns.path)
    corners = box_columns(names)
    if corners is None:
        raise InputError(
            f"{flag}: has no column {next(n for n in (CORNERS if 'x0' in names else SIDES)[0] if n not in names)!r} of a box; it has {listed(names, 30)}"
        )
    ill = [name for name in findings if name != NO_FINDING]
    sure = ill[0] if len(ill) == 1 and not {"finding", *columns.finding} & set(names) else ""
    of = "" if sure else column(names, flag, "finding", *columns.finding[:1])
    wanted, finder = {image.path for image in known}, Finder(images)
    boxes, sizes = defaultdict(list), dict[Path, tuple[int, int]]()
    for row in rows:
        image, finding = finder.find(row[columns.path]), sure or row[of]
        if image not in wanted:
            skipped["boxes of images that are not in the table"] += 1
            continue
        if finding not in findings:
            finding = NIH_BOX_NAMES.get(finding, finding)
        if finding not in findings:
            skipped[f"boxes of {finding!r}, which is no finding of the table{_close(finding, findings)}"] += 1
            continue
        box = box_of(row, corners, flag)
        if box is None:
            skipped["boxes without numbers"] += 1
            continue
        try:
            sizes[image] = sizes.get(image) or image_size(image)
        except InputError:
            if skip_bad:  # the image itself is left out, and counted, when it is packed
                continue
            raise
        boxes[image].append((finding, share_of(box, sizes[image], f"{flag}, row {row.line}", image.name)))
    if not boxes:
        why = listed(f"{count} {what}" for what, count in skipped.items() if what.startswith("boxes")) or "no image with a box can be read"
        raise InputError(f"{flag}: none of its {len(rows)} boxes can be used ({why}); expected paths in column {columns.path!r} and findings as in the table")
    return boxes


def _close(name: str, known: Sequence[str]) -> str:
    close = nearest(name, known)
    return f" ({close})" if close.startswith("did you mean") else ""


def _split_name(value: str, where: str) -> str:
    name = split_of_folder(value)
    if not name:
        raise InputError(f"{where}: unknown split {value!r}; expected train, val or test")
    return name


def present(paths: Iterable[Path], flag: str, skipped: dict[str, int], skip: bool, more: str = "") -> list[bool]:
    """Which files are there. InputError with how many are not and the first five, unless ``skip``: then they are counted."""
    here = [os.path.isfile(path) for path in paths]
    missing = [str(path) for path, there in zip(paths, here, strict=True) if not there]
    if missing and (not skip or len(missing) == len(here)):
        raise InputError(
            f"{flag}: {len(missing)} of {len(here)} images that it lists are missing: {listed(missing)}{more}; add them, or leave them out with --on-bad skip"
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
            other = [
                known for known in dict.fromkeys(f for item in items for f in item.findings) if known != missing[0] and spelling(known) == spelling(missing[0])
            ]
            spelt = f" (is it {listed(map(repr, other))}, spelt otherwise?)" if other else ""
            raise InputError(f"{what}: the {name} split gets no image of {listed(missing)}{spelt}; give more images, other --ratios or fewer findings")


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
        if path.suffix.lower() in (".png", ".jpg", ".jpeg"):
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
    there = np.array([stem in where for stem in stems])
    told = listed((f"{name} {((label == k) & there).sum()} of {(label == k).sum()}" for k, name in enumerate(classes)), len(classes))
    if not skip_missing:
        present([Path(where.get(stems[i], images / rows[i][image])) for i in wanted], flag, skipped, False, f" (there are {told})")
    elif not cases.here.any():
        raise InputError(f"--images {images}: none of the {len(rows)} images of {metadata.name} is there")
    else:
        skipped["listed but missing"] = int((~cases.here).sum())
    what = f"--task {task} --split {how} of {int(there.sum())} images that are there ({told})"
    split.check(parts, label, who, classes, what, shares=shares if how == "random" else split.SHARES)
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
    for _, cells in rows:
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
    from shards.dicom import MISNAMED, UNREADABLE, Header, pseudonym, read_header

    if not root.is_dir():
        raise InputError(f"--path {root}: no such folder")
    skipped: dict[str, int] = defaultdict(int)
    notes: list[str] = []
    listed_images: dict[Path, Listed] = {}
    if labels is not None:
        listed_images = {image.path: image for image in read_listed(labels, root, columns or Columns(), declared, skipped, notes, skip_bad)}
    paths = list(listed_images) if labels is not None else list(walk(root))
    headers: dict[Path, Header] = {}
    same: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        header = read_header(path)
        if isinstance(header, str):
            if not skip_bad and (labels is not None or header.startswith((UNREADABLE, MISNAMED))):
                remedy = "rename it" if header.startswith(MISNAMED) else "correct --csv" if labels is not None else "replace or remove it"
                raise InputError(f"{path}: {header}; {remedy}, or leave it out with --on-bad skip")
            skipped[header.partition(":")[0]] += 1
        elif any(path.stat().st_size == other.stat().st_size and path.read_bytes() == other.read_bytes() for other in same[header.uid]):
            skipped["a copy of another file"] += 1
        else:
            same[header.uid].append(path)
            headers[path] = header
    if not headers:
        raise InputError(f"--path {root}: no DICOM image in it ({', '.join(f'{n} {why}' for why, n in skipped.items()) or 'it is empty'})")
    homes = _folder_labels(root, headers) if labels is None else {}
    nobody = _no_patients(headers.values(), notes)
    lesions = _own_boxes([image for path, image in listed_images.items() if path in headers], f"--csv {labels}", lambda path: headers[path].size, skip_bad)
    items, patients = [], []
    for path, header in headers.items():
        findings, part = homes[path] if labels is None else (listed_images[path].findings, listed_images[path].split)
        patient = header.patient.strip()
        who = pseudonym((header.study or header.uid) if patient in nobody else patient, salt)
        extra = (("patient", who), *((("view", header.view),) if header.view else ()))
        number = 1 + same[header.uid].index(path)
        key = pseudonym(header.uid, salt) + (f"-{number}" if number > 1 else "")
        items.append(Item(part, key, findings, str(path), boxes=tuple(lesions.get(path, ())), extra=extra))
        patients.append(who)
    if not all(item.split for item in items):
        if len(items) > 1 and len(set(patients)) == 1:
            notes.append(f"warning: all {len(items)} images have one patient ID and one study, so all are in one split")
        codes = {findings: k for k, findings in enumerate(dict.fromkeys(item.findings for item in items))}
        part_of = split.by_patient(np.array([codes[item.findings] for item in items]), np.array(patients), seed, shares)
        items = [replace(item, split=SPLITS[p]) for item, p in zip(items, part_of, strict=True)]
    every = tuple(declared or dict.fromkeys(name for item in items for name in item.findings))
    refuse_torn(items, f"--path {root}")
    refuse_missing_class(items, declared, f"--path {root}")
    return Source(mixed(items), dict(skipped), every, notes=notes)


def _folder_labels(root: Path, paths: Iterable[Path]) -> dict[Path, tuple[tuple[str, ...], str]]:
    """Finding and split of each file by its folders: ``<split>/<class>/...`` for all of them, or ``<class>/...`` for all of them."""
    found: dict[Path, tuple[tuple[str, ...], str]] = {}
    first: dict[bool, str] = {}
    for path in paths:
        folders = path.relative_to(root).parts[:-1]
        part = split_of_folder(folders[0]) if folders else ""
        if len(folders) < (2 if part else 1):
            raise InputError(f"{path}: has no class; put files into <class>/ or train|val|test/<class>/ folders, or name a table with --csv")
        first.setdefault(bool(part), folders[0])
        found[path] = (folder_finding(folders[1] if part else folders[0]),), part
    if len(first) > 1:
        raise InputError(
            f"--path {root}: the folder {first[True]} is a split, {first[False]} is none, so it is not said where its images belong; "
            "put all class folders into train, val and test, or none"
        )
    return found


def _no_patients(headers: Iterable[Any], notes: list[str]) -> set[str]:
    """Patient IDs that name nobody, for which the study stands: empty, a placeholder, or one ID on most of the studies."""
    studies: dict[str, set[str]] = defaultdict(set)
    images: Counter[str] = Counter()
    for header in headers:
        studies[header.patient.strip()].add(header.study or header.uid)
        images[header.patient.strip()] += 1
    every = len(set().union(*studies.values()))
    nobody = {who for who, of in studies.items() if len(of) > 1 and (ANONYMOUS.fullmatch(who) or (len(of) > every / 2 and len(of) >= 10))}
    if len(studies) == 1 and every > 1:
        nobody |= set(studies)
    if empty := images[""]:
        notes.append(f"warning: {empty} images have no patient ID: the images of one study count as one patient")
    for who in sorted(nobody - {""}):
        notes.append(f"warning: {images[who]} images have the patient ID {who!r}, which names nobody: the images of one study count as one patient")
    notes += alike_patients(set(studies) - nobody)
    return nobody | {""}
