"""What is to be packed: items, how to load one, and what all archives must keep to."""

import os
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from shards.errors import InputError, listed
from shards.gray import Scale
from shards.pixels import Frame, fit, open_gray, open_mask
from shards.rle import Runs, relative
from shards.sample import SPLITS, LesionBox, LesionMask, Sample, spelling

OUTLINE_LIMIT = 0.6  # share of an image's border above which a mask is one of everything but the lungs

ONE_SIDE = 0.97  # share of a mask on one side of the image's middle above which it is of one lung

ONE_LUNG = (
    "the mask shows a single lung; where left and right have files of their own, name both folders: --masks "
    "LEFT --masks RIGHT"
)


# A lesion: its finding, and x0 y0 x1 y1 in shares of the image's sides
LesionShare = tuple[str, tuple[float, float, float, float]]


@dataclass(frozen=True)
class Outline:
    """What a lesion mask is drawn of, and united: polygons in shares of the image's sides; SIIM's runs
    (`shards.rle.relative`) over an image of ``size`` (height, width); COCO's, and image files, of the image's own size
    or one as wide for its height.
    """

    finding: str
    polygons: tuple[tuple[tuple[float, float], ...], ...] = ()
    runs: tuple[str, ...] = ()
    size: tuple[int, int] = (0, 0)
    masks: tuple[Runs, ...] = ()
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class Item:
    """One sample before it is loaded."""

    split: str
    key: str
    findings: tuple[str, ...] = ()
    image: str = ""
    masks: tuple[str, ...] = ()  # several: their union
    boxes: tuple[LesionShare, ...] = ()
    extra: tuple[tuple[str, Any], ...] = ()
    absent: tuple[str, ...] = ()
    uncertain: tuple[str, ...] = ()
    outlines: tuple[Outline, ...] = ()


@dataclass
class Source:
    """Items of image files.

    skipped: what was left out, reason -> how many; classes: findings in the order of the index; asked, unlisted: as
    the index has them; notes: what was decided, a line each;
    scales: how values of more than 8 bits become gray, chosen when packing; bits: the depth that the user gave for
    them.
    """

    items: list[Item]
    skipped: dict[str, int] = field(default_factory=dict)
    classes: tuple[str, ...] = ()
    size: int = 512
    aspect: str = "stretch"
    notes: list[str] = field(default_factory=list)
    bits: int | None = None
    scales: tuple[Scale, ...] = ()
    asked: tuple[str, ...] = ()
    unlisted: str = "absent"

    def load(self, item: Item) -> Sample:
        """Read, check and resize. InputError: a file that cannot be decoded, a mask that is empty or not its image's
        size.
        """
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
        return Sample(
            item.key,
            fit(image, self.size, self.aspect),
            item.findings,
            mask,
            boxes,
            item.absent,
            item.uncertain,
            [LesionMask(o.finding, self._runs(o, image, item.image)) for o in item.outlines],
            dict(item.extra),
            tuple(remarks),
        )

    def _runs(self, outline: Outline, image: Any, where: str) -> Runs:
        """An outline, filled, at stored size. A pixel that is half covered counts; of a part of it that covers none by
        half, the most covered one.
        """
        lesion = np.zeros((self.size, self.size), bool)
        for part in _parts(outline, image, where):
            soft = fit(part, self.size, self.aspect)
            lesion |= soft >= min(128, max(1, int(soft.max())))
        return Runs.drawn(lesion)

    def settings(self) -> dict[str, Any]:
        """What the bytes of a sample depend on, beside its item."""
        return {"size": self.size, "aspect": self.aspect, "scales": [list(scale) for scale in self.scales]}

    def version(self, item: Item) -> str:
        """Changes when the files behind an item do."""
        drawn = [path for outline in item.outlines for path in outline.files]
        stats = [os.stat(path) for path in (item.image, *item.masks, *drawn) if path]
        return " ".join(f"{s.st_size}:{s.st_mtime_ns}" for s in stats)


def _parts(outline: Outline, image: Any, where: str) -> Iterator[Image.Image]:
    """Each run list or polygon of an outline, white on black, as wide for its height as the image."""
    for text in outline.runs:
        drawn = Image.fromarray(relative(text, outline.size, where).astype(np.uint8) * 255)
        same = drawn.width * image.height == drawn.height * image.width
        yield drawn if same else drawn.resize((image.width, image.height), Image.Resampling.BOX)
    masks = [(runs.mask(), "its run lengths") for runs in outline.masks]
    masks += [(open_mask(path) > 0, path) for path in outline.files]
    for mask, what in masks:
        (height, width), whole = mask.shape, (image.width, image.height)
        if abs(width * image.height - height * image.width) > max(whole):
            raise InputError(
                f"{where}: {what}: the mask is {width}x{height} pixels, the image {image.width}x{image.height}; a mask "
                "has the size of its image, or the same proportions"
            )
        part = Image.fromarray(mask.astype(np.uint8) * 255)
        yield part if part.size == whole else part.resize(whole, Image.Resampling.BOX)
    for polygon in outline.polygons:
        drawn = Image.new("L", (image.width, image.height))
        ImageDraw.Draw(drawn).polygon([(x * image.width, y * image.height) for x, y in polygon], fill=255)
        yield drawn


def _lungs(path: str, shape: tuple[int, int]) -> np.ndarray:
    """A lung mask of an image of that shape: uint8 [H, W], 0 or 255. InputError: of another size, empty, no mask."""
    lungs = open_mask(path)
    if lungs.shape != shape:
        raise InputError(
            f"{path}: is {lungs.shape[1]}x{lungs.shape[0]}, its image {shape[1]}x{shape[0]}; they must agree"
        )
    if not lungs.any():
        raise InputError(f"{path}: has no lung pixel (all 0); remove the pair")
    # 0 and 1, 0 and 255, a number for each lung or lobe; many values are a mask that was saved as a JPEG or smoothed.
    limit = 0 if len(np.unique(lungs)) <= 7 else lungs.max() // 2
    between = ((lungs > 0.1 * lungs.max()) & (lungs < 0.9 * lungs.max())).mean() if limit else 0.0
    lungs = np.where(lungs > limit, 255, 0).astype(np.uint8)
    if between > 0.2 or (lungs > 0).mean() > 0.9:
        what = (
            f"{100 * between:.0f}% of its pixels are gray"
            if between > 0.2
            else f"{100 * (lungs > 0).mean():.0f}% of it is lung"
        )
        raise InputError(f"{path}: is no lung mask, {what}; are --images and --masks in their places?")
    border = np.concatenate([lungs[0], lungs[-1], lungs[:, 0], lungs[:, -1]]) > 0
    if border.mean() > OUTLINE_LIMIT:
        raise InputError(
            f"{path}: is white along {100 * border.mean():.0f}% of its border, so it shows all but the lungs; invert "
            "it (lungs are white)"
        )
    return lungs


def separated(items: Sequence[Item], names: Sequence[str]) -> list[Item]:
    """Items of a split whose names give one key (`a.png` and `a.jpg`, `COVID (1)` and `COVID(1)`) get the checksum of
    their name behind it.
    """
    places = Counter((item.split, item.key) for item in items)
    return [
        replace(item, key=f"{item.key}-{zlib.crc32(name.encode(errors='surrogateescape')):08x}")
        if places[item.split, item.key] > 1
        else item
        for item, name in zip(items, names, strict=True)
    ]


def mixed(items: list[Item]) -> list[Item]:
    """Splits in order; within each, items in an order that does not know their class, so that every shard has some of
    each.
    """
    return sorted(items, key=lambda item: (SPLITS.index(item.split), zlib.crc32(item.key.encode()), item.key))


def refuse_torn(items: Iterable[Item], what: str) -> None:
    """InputError for a patient in two splits."""
    homes: dict[str, str] = {}
    torn = {
        who
        for item in items
        for name, who in item.extra
        if name == "patient" and homes.setdefault(who, item.split) != item.split
    }
    if torn:
        raise InputError(f"{what}: {len(torn)} patients are in two splits: {listed(sorted(torn))}; split by patient")


def refuse_missing_class(items: Sequence[Item], declared: Sequence[str] | None, what: str) -> None:
    """InputError for a class that a split lacks while another has it.

    Classes are the findings that are ``declared``, else those that some image has alone: a rare one that only comes
    with others need not be everywhere.
    """
    classes = declared or tuple(dict.fromkeys(item.findings[0] for item in items if len(item.findings) == 1))
    have: dict[str, set[str]] = defaultdict(set)
    for item in items:
        have[item.split].update(item.findings)
    for name in sorted(have, key=SPLITS.index):
        missing = [finding for finding in classes if finding not in have[name]]
        if missing:
            other = [
                known
                for known in dict.fromkeys(f for item in items for f in item.findings)
                if known != missing[0] and spelling(known) == spelling(missing[0])
            ]
            spelt = f" (is it {listed(map(repr, other))}, spelt otherwise?)" if other else ""
            raise InputError(
                f"{what}: the {name} split gets no image of {listed(missing)}{spelt}; give more images with it, of "
                "more patients (each is in one split), other --ratios or fewer findings"
            )


def present(paths: Iterable[Path], flag: str, skipped: dict[str, int], skip: bool, more: str = "") -> list[bool]:
    """Which files are there. InputError with how many are not, the first five, and what stands where the first should
    (or ``more``), unless ``skip``: then they are counted.
    """
    paths = list(paths)
    here = [os.path.isfile(path) for path in paths]
    missing = [path for path, there in zip(paths, here, strict=True) if not there]
    if missing and (not skip or len(missing) == len(here)):
        rest = "" if skip else ", or leave them out with --on-bad skip"
        raise InputError(
            f"{flag}: {len(missing)} of {len(here)} images that it lists are missing: {listed(missing)}"
            f"{more or _instead_of(missing[0])}; add them{rest}"
        )
    if missing:
        skipped["listed but missing"] += len(missing)
    return here


def _instead_of(path: Path) -> str:
    """What there is instead of a file that is missing."""
    folder = next((parent for parent in path.parents if parent.is_dir()), Path())
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        names = []
    if folder == path.parent and (alike := [name for name in names if os.path.splitext(name)[0] == path.stem]):
        return f" (another suffix is there: {alike[0]})"
    gone = f"there is no folder {path.parent}; " if folder != path.parent else ""
    return f" ({gone}in {folder} there {'are ' + listed(names[:3]) if names else 'is nothing'})"
