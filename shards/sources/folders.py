"""Class folders, and folders of images and lung masks."""

import re
import unicodedata
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from shards import deal
from shards.errors import InputError, listed
from shards.files import hidden, walk
from shards.pixels import IMAGE_SUFFIXES
from shards.sample import EFFUSION, NO_FINDING, PNEUMOTHORAX, SPLITS, SUBCUTANEOUS_EMPHYSEMA, clean_key, split_of_folder
from shards.sources.item import Item, Source, mixed, refuse_missing_class, separated

# The published class folders; other names are findings of their own.
FOLDER_FINDINGS = {
    "nofinding": NO_FINDING,
    "effusion": EFFUSION,
    "pneumothorax": PNEUMOTHORAX,
    "subcuemphysema": SUBCUTANEOUS_EMPHYSEMA,
    "subcutaneousemphysema": SUBCUTANEOUS_EMPHYSEMA,
}

MASK_ENDING = re.compile(r"[_-]?(mask|lungs?)$", re.IGNORECASE)


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
                skipped[
                    "a DICOM file: see `python -m shards dicom`"
                    if path.suffix.lower() == ".dcm"
                    else "not an image file"
                ] += 1


def _count(folder: Path) -> int:
    """Images at any depth of a folder."""
    return sum(path.suffix.lower() in IMAGE_SUFFIXES for path in walk(folder))


def _loose(folder: Path, skipped: dict[str, int]) -> None:
    """Count the images that lie beside the folders of splits or classes."""
    if loose := sum(
        path.is_file() and path.suffix.lower() in IMAGE_SUFFIXES and not hidden(path.name) for path in folder.iterdir()
    ):
        skipped[f"images in no class folder, in {folder}"] += loose


def class_folders(root: Path, seed: int = 0, shares: Sequence[float] = deal.SHARES) -> Source:
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
            raise InputError(
                f"--path {root}: {folders[name].name} and {folder.name} are both {name}; put them together"
            )
        else:
            folders[name] = folder
    if folders:
        for folder in others:
            skipped[f"a folder that is no split ({folder.name}, with {_count(folder)} images)"] += 1
        for folder in folders.values():
            _loose(folder, skipped)
    _loose(root, skipped)
    if folders:
        found = [
            (name, folder)
            for name in SPLITS
            if name in folders
            for folder in sorted(p for p in folders[name].iterdir() if p.is_dir())
        ]
    else:
        found = [("", folder) for folder in others]
    items, names = [], []
    for name, folder in found:
        if hidden(folder.name):
            skipped["a hidden folder"] += 1
            continue
        finding = folder_finding(folder.name)
        for path in images_of(folder, skipped):
            items.append(
                Item(
                    name, clean_key(f"{folder.name}-{path.stem}"), (finding,), str(path), extra=(("source", path.name),)
                )
            )
            names.append(f"{folder.name}/{path.name}")
    if not items and not folders:
        raise InputError(
            f"--path {root}: expected the folders train, val and test with a folder per class in each, or a folder per "
            "class"
        )
    findings = list(dict.fromkeys(item.findings[0] for item in items))
    if not findings:
        raise InputError(f"--path {root}: no images in {', '.join(folders)} ({', '.join(IMAGE_SUFFIXES)} are read)")
    notes = []
    if not folders:
        codes = np.array([findings.index(item.findings[0]) for item in items])
        parts = deal.by_patient(codes, np.array([str(n) for n in range(len(items))]), seed, shares)
        items = [replace(item, split=SPLITS[p]) for item, p in zip(items, parts, strict=True)]
        notes.append(
            "no split folders: images are dealt to train, val and test, and one patient may be in two of them; `shards "
            "csv` deals patients"
        )
        refuse_missing_class(items, None, f"--path {root}")
    items = separated(items, names)
    classes = {name: {item.findings[0] for item in items if item.split == name} for name in folders}
    for name in folders:
        missing = [finding for finding in findings if finding not in classes[name]]
        if missing:
            raise InputError(
                f"{folders[name]}: has no images of {listed(missing)}, other splits have; add some or remove the class"
            )
    return Source(mixed(items), dict(skipped), tuple(findings), notes=notes)


def folder_finding(name: str) -> str:
    """``1Effusion`` -> ``Effusion``; names that are not published ones stay, without their leading digits."""
    bare = re.sub(r"^\d+[\s._-]*", "", name) or name
    return FOLDER_FINDINGS.get(re.sub(r"[\s_-]", "", bare).lower(), bare)


def image_masks(images: Path, masks: Path | Sequence[Path], val_share: float = 0.2, test_share: float = 0.0) -> Source:
    """Images and lung masks in folders, matched by name (``x.png`` with ``x.png``, ``x_mask.png`` or ``x-lungs.png``).

    Several folders of masks, such as one for each lung: each must have every image; a sample's mask is their union.
    LesionShare of the names, drawn by their checksum and so the same wherever they lie, become val and test.
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
    pairs = [
        pair
        for of in by_mask
        for pair in ((of, by_image, "masks without an image"), (by_image, of, "images without a mask"))
    ]
    for one, other, what in pairs:
        alone = [one[stem].name for stem in one if stem not in other]
        if alone:
            raise InputError(
                f"{next(iter(one.values())).parent}: {len(alone)} {what}: {listed(alone)}; add their partners or "
                "remove them"
            )
    if len(by_image) < 2:
        raise InputError("one image with a mask cannot be split into train and val; give at least two")
    ranked = sorted(by_image, key=lambda stem: (zlib.crc32(clean_key(stem).encode()), stem))
    if not 0 <= test_share < 1:
        raise InputError(f"--test-share {test_share}: a share lies between 0 and 1")
    first = max(1, round(val_share * len(ranked)))
    last = first + round(test_share * len(ranked))
    if last >= len(ranked):
        raise InputError(
            f"--val-share {val_share} and --test-share {test_share} leave none of {len(ranked)} images for training"
        )
    part = dict.fromkeys(ranked[:first], "val") | dict.fromkeys(ranked[first:last], "test")
    items = [
        Item(
            part.get(stem, "train"),
            clean_key(stem),
            (),
            str(path),
            tuple(str(of[stem]) for of in by_mask),
            extra=(("source", path.name),),
        )
        for stem, path in by_image.items()
    ]
    return Source(mixed(separated(items, list(by_image))), dict(skipped))
