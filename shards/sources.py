"""Folders on disk -> samples: class folders in the published layout, and images with lung masks."""

import re
import zlib
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from shards.errors import InputError, listed
from shards.sample import (
    EFFUSION,
    IMAGE_SUFFIXES,
    NO_FINDING,
    PNEUMOTHORAX,
    SPLITS,
    SUBCUTANEOUS_EMPHYSEMA,
    Sample,
    clean_key,
    fit,
    load_image,
)

# The published class folders; other names are findings of their own.
FOLDER_FINDINGS = {
    "nofinding": NO_FINDING,
    "effusion": EFFUSION,
    "pneumothorax": PNEUMOTHORAX,
    "subcuemphysema": SUBCUTANEOUS_EMPHYSEMA,
    "subcutaneousemphysema": SUBCUTANEOUS_EMPHYSEMA,
}
MASK_ENDING = re.compile(r"[_-]?(mask|lungs?)$", re.IGNORECASE)


@dataclass
class Source:
    """What was found, before anything is decoded: ``files`` counts the samples that ``samples`` will yield."""

    files: int
    skipped: dict[str, int] = field(default_factory=dict)

    def samples(self) -> Iterator[tuple[str, Sample]]:
        """(split, sample) pairs; a file that cannot be decoded raises InputError."""
        raise NotImplementedError


@dataclass
class ClassFolders(Source):
    """``train|val|test/<class>/*.png`` (any image suffix). A leading digit of a class name is order, not name."""

    entries: list[tuple[str, str, Path]] = field(default_factory=list)
    size: int = 512

    @staticmethod
    def scan(root: Path, size: int) -> "ClassFolders":
        """Find the images. InputError: no split folders, a split without images, a class missing from a split."""
        if not root.is_dir():
            raise InputError(f"--path {root}: no such folder")
        splits = [split for split in SPLITS if (root / split).is_dir()]
        if not splits:
            raise InputError(f"--path {root}: expected the folders train, val and test with a folder per class in each")
        entries: list[tuple[str, str, Path]] = []
        skipped: dict[str, int] = defaultdict(int)
        seen: dict[tuple[str, str], Path] = {}
        classes: dict[str, dict[str, int]] = {}
        for split in splits:
            classes[split] = {}
            for folder in sorted(p for p in (root / split).iterdir() if p.is_dir()):
                finding = folder_finding(folder.name)
                for path in sorted(folder.iterdir()):
                    if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("."):
                        skipped["not an image file"] += 1
                        continue
                    place = split, clean_key(f"{folder.name}-{path.stem}")
                    if place in seen:
                        raise InputError(f"{path}: would have the same key as {seen[place]}; rename one of them")
                    seen[place] = path
                    entries.append((split, finding, path))
                    classes[split][finding] = classes[split].get(finding, 0) + 1
        every = sorted({finding for found in classes.values() for finding in found})
        if not every:
            raise InputError(f"--path {root}: no images in {', '.join(splits)} ({', '.join(IMAGE_SUFFIXES)} are read)")
        for split in splits:
            missing = [finding for finding in every if finding not in classes[split]]
            if missing:
                raise InputError(f"{root / split}: has no images of {listed(missing)}, other splits have; add some or remove the class")
        return ClassFolders(len(entries), dict(skipped), entries, size)

    def samples(self) -> Iterator[tuple[str, Sample]]:
        """See Source."""
        for split, finding, path in self.entries:
            image = fit(load_image(path), self.size)
            key = clean_key(f"{path.parent.name}-{path.stem}")
            yield split, Sample(key, image, (finding,), extra={"source": path.name})


def folder_finding(name: str) -> str:
    """``1Effusion`` -> ``Effusion``; names that are not published ones stay, without their leading digits."""
    bare = re.sub(r"^\d+[\s._-]*", "", name) or name
    return FOLDER_FINDINGS.get(re.sub(r"[\s_-]", "", bare).lower(), bare)


@dataclass
class ImageMasks(Source):
    """Images and lung masks in two folders, matched by name (``x.png`` with ``x.png``, ``x_mask.png`` or ``x-lungs.png``).

    A share of ``val_share`` of the names, drawn by their checksum and so the same wherever they lie, becomes val.
    """

    pairs: list[tuple[Path, Path]] = field(default_factory=list)
    size: int = 512
    val_share: float = 0.2

    @staticmethod
    def scan(images: Path, masks: Path, size: int, val_share: float = 0.2) -> "ImageMasks":
        """Match the files. InputError: an empty folder, an image without a mask, a mask without an image."""
        found: list[dict[str, Path]] = []
        for flag, folder in (("--images", images), ("--masks", masks)):
            if not folder.is_dir():
                raise InputError(f"{flag} {folder}: no such folder")
            names: dict[str, Path] = {}
            for path in sorted(folder.iterdir()):
                if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith("."):
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
        return ImageMasks(len(by_image), {}, [(by_image[stem], by_mask[stem]) for stem in by_image], size, val_share)

    def samples(self) -> Iterator[tuple[str, Sample]]:
        """See Source. InputError also for a mask whose shape is not its image's, or that is empty."""
        keys = [clean_key(image.stem) for image, _ in self.pairs]
        ranked = sorted(keys, key=lambda key: (zlib.crc32(key.encode()), key))
        val = set(ranked[: max(1, round(self.val_share * len(keys)))])
        if len(keys) < 2:
            raise InputError("one image with a mask cannot be split into train and val; give at least two")
        for key, (image_path, mask_path) in zip(keys, self.pairs, strict=True):
            image, mask = load_image(image_path), load_image(mask_path)
            if image.shape != mask.shape:
                raise InputError(f"{mask_path}: is {mask.shape[1]}x{mask.shape[0]}, its image {image.shape[1]}x{image.shape[0]}; they must agree")
            if not mask.any():
                raise InputError(f"{mask_path}: has no lung pixel (all 0); remove the pair")
            mask = ((mask > mask.max() // 2) * 255).astype("uint8")  # 0/1 and 0/255 masks alike
            sample = Sample(key, fit(image, self.size), mask=fit(mask, self.size, mask=True), extra={"source": image_path.name})
            yield "val" if key in val else "train", sample
