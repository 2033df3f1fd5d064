"""Synthetic frontal radiographs: known lungs, known lesions, and a shortcut that can be planted."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from shards.chest import Chest
from shards.errors import InputError
from shards.lesions import bounds, consolidation, effusion, emphysema, expose, insert, mass, pneumothorax, stamp
from shards.rle import Runs
from shards.sample import (
    CARDIOMEGALY,
    EFFUSION,
    FINDINGS,
    NO_FINDING,
    PNEUMOTHORAX,
    SPLITS,
    SUBCUTANEOUS_EMPHYSEMA,
    LesionBox,
    LesionMask,
    Sample,
)
from shards.sources.item import Item, Source

SHARES = (0.6, 0.2, 0.2)  # of train, val and test, as published
MIN_SIZE = 32
KINDS = ("marker", "tube")  # of shortcuts


class Phantoms(Source):
    """``count`` radiographs, 60/20/20, with equally many of each finding in every split. An image depends on (seed,
    split, its number) alone.

    Args:
        count: all images together; at least 5 for each finding.
        seed: the same seed gives the same bytes.
        size: pixels of a side.
        findings: which of the four to draw.
        shortcut: None for no shortcut, else the correlation in [-1, 1] of it with the finding in train and
            val: with probability ``|shortcut|`` it is the finding's own (negative: another finding's), otherwise drawn
            at random.
        shortcut_test: the same for test.
        kind: of the shortcut: ``marker``, a technician's mark in the corner, or ``tube``, a tube or wire inside one
            lung.
        lesion_masks: keep the lesions' outlines beside their boxes.
    """

    def __init__(
        self,
        count: int,
        seed: int,
        *,
        size: int = 256,
        findings: Sequence[str] = FINDINGS,
        shortcut: float | None = None,
        shortcut_test: float = 0.0,
        kind: str = "marker",
        lesion_masks: bool = False,
    ) -> None:
        if kind not in KINDS:
            raise InputError(f"--shortcut-kind {kind}: expected {' or '.join(KINDS)}")
        if kind != KINDS[0] and shortcut is None:
            raise InputError(f"--shortcut-kind {kind}: say how well it agrees with the finding, --shortcut 0.95")
        _check(count, size, findings, FINDINGS, shortcut, shortcut_test)
        sizes = split_sizes(count)
        names = list(findings)
        items = [
            Item(split, f"{split}-{i:06d}", (names[i % len(names)],), extra=(("number", i),))
            for split, n in zip(SPLITS, sizes, strict=True)
            for i in range(n)
        ]
        super().__init__(items, {}, tuple(names), size)
        self.seed, self.kind, self.lesion_masks = seed, kind, lesion_masks
        self.shortcut = {"train": shortcut, "val": shortcut, "test": shortcut if shortcut is None else shortcut_test}

    def load(self, item: Item) -> Sample:
        """Draw one."""
        part, i = SPLITS.index(item.split), dict(item.extra)["number"]
        rng = np.random.default_rng([self.seed, part, i])
        agreement = self.shortcut[item.split]
        if agreement is None:
            return self._kept(phantom(item.key, item.findings[0], rng, self.size))
        # Its own random numbers: apart from the shortcut the image is the one without it.
        of_marker = np.random.default_rng([self.seed, part, i, 1])
        marker = _marker_class(of_marker, i % len(self.classes), len(self.classes), agreement)
        tube = (marker, of_marker) if self.kind == "tube" else None
        sample = phantom(item.key, item.findings[0], rng, self.size, tube)
        if tube is None:
            stamp(sample.image, marker, of_marker)
        sample.extra["marker"] = marker
        return self._kept(sample)

    def _kept(self, sample: Sample) -> Sample:
        """Without the lesions' outlines, unless they are wanted."""
        if not self.lesion_masks:
            sample.lesion_masks = []
        return sample

    def settings(self) -> dict[str, Any]:
        """See Source."""
        return {
            "size": self.size,
            "seed": self.seed,
            "shortcut": self.shortcut,
            "findings": self.classes,
            "kind": self.kind,
            "lesion_masks": self.lesion_masks,
        }


def _check(
    count: int,
    size: int,
    findings: Sequence[str],
    known: Sequence[str],
    shortcut: float | None,
    shortcut_test: float,
) -> None:
    """InputError: settings of which no phantoms can be made."""
    for name in findings:
        if name not in known:
            more = "" if name not in SEVERAL else ", and with --several for " + ", ".join(SEVERAL)
            raise InputError(f"--findings {name}: phantoms exist for {', '.join(known)}{more}")
    if size < MIN_SIZE:
        raise InputError(f"--size {size}: phantoms need at least {MIN_SIZE} pixels")
    for flag, value in (("--shortcut", shortcut), ("--shortcut-test", shortcut_test)):
        if value is not None and not -1 <= value <= 1:
            raise InputError(f"{flag} {value}: a correlation lies in [-1, 1]")
    if min(split_sizes(count)) < len(findings):
        raise InputError(
            f"--count {count}: too few for {len(findings)} findings in three splits; at least {5 * len(findings)}"
        )


def split_sizes(count: int) -> tuple[int, int, int]:
    """``count`` cut 60/20/20; the rounding goes to train."""
    val, test = (int(count * share) for share in SHARES[1:])
    return count - val - test, val, test


def _marker_class(rng: np.random.Generator, k: int, classes: int, correlation: float) -> int:
    if rng.random() < abs(correlation):
        return k if correlation > 0 else int((k + rng.integers(1, classes)) % classes) if classes > 1 else k
    return int(rng.integers(classes))


def phantom(
    key: str, finding: str, rng: np.random.Generator, size: int, tube: tuple[int, np.random.Generator] | None = None
) -> Sample:
    """One radiograph uint8 [size, size] with its lung mask (both lungs, without the heart) and lesion boxes.

    ``tube``: the class whose kind of tube lies in a lung, and its own random numbers.
    """
    return several_phantoms(key, [finding] if finding != NO_FINDING else [], rng, size, tube)


DRAWN = {
    EFFUSION: effusion,
    SUBCUTANEOUS_EMPHYSEMA: emphysema,
    "Mass": mass,
    "Consolidation": consolidation,
}
SEVERAL = (EFFUSION, PNEUMOTHORAX, SUBCUTANEOUS_EMPHYSEMA, CARDIOMEGALY, "Mass", "Consolidation")
LARGE = 1.45  # times a heart that is too large


def several_phantoms(
    key: str,
    findings: Sequence[str],
    rng: np.random.Generator,
    size: int,
    tube: tuple[int, np.random.Generator] | None = None,
) -> Sample:
    """As `phantom`, with any of `SEVERAL`."""
    chest = Chest.draw(rng, size, LARGE if CARDIOMEGALY in findings else 1.0)
    image, lungs = chest.image, chest.lungs
    lesions: dict[str, list[np.ndarray]] = {CARDIOMEGALY: [chest.heart]} if CARDIOMEGALY in findings else {}
    if PNEUMOTHORAX in findings:
        lesions[PNEUMOTHORAX] = pneumothorax(chest, image, rng)
    else:
        image += chest.vessels
    for name, draw in DRAWN.items():
        if name in findings:
            lesions[name] = draw(chest, image, rng)
    if unknown := [name for name in findings if name not in lesions]:
        raise ValueError(f"no phantom of {unknown[0]!r}")
    if tube is not None:
        insert(chest, image, *tube)
    image = expose(image, rng)
    places = [(name, place) for name in findings for place in lesions[name] if place.any()]
    sample = Sample(key, image, tuple(findings) or (NO_FINDING,), np.where(lungs, 255, 0).astype(np.uint8))
    sample.boxes = [LesionBox(name, bounds(place)) for name, place in places]
    sample.lesion_masks = [LesionMask(name, Runs.drawn(place)) for name, place in places]
    return sample


class SeveralPhantoms(Source):
    """``count`` radiographs, 60/20/20, each with any number of findings, of some of which the label says nothing or is
    uncertain. An image depends on (seed, split, its number) alone; so does its label.

    Args:
        count, seed, size: as `Phantoms`.
        findings: of `SEVERAL`.
        share: in (0,1), probability of each finding.
        unknown, uncertain: shares of the cells of which the label says nothing, or that it is uncertain.
        shortcut: None, else the correlation in [-1,1] in train and val of a mark in the corner, one of two, with the
            first finding's being there; shortcut_test: in test.
        lesion_masks: as `Phantoms`.
    """

    def __init__(
        self,
        count: int,
        seed: int,
        *,
        size: int = 256,
        findings: Sequence[str] = SEVERAL,
        share: float = 0.3,
        unknown: float = 0.0,
        uncertain: float = 0.0,
        shortcut: float | None = None,
        shortcut_test: float = 0.0,
        lesion_masks: bool = False,
    ) -> None:
        _check(count, size, findings, SEVERAL, shortcut, shortcut_test)
        if not (0 < share < 1 and unknown >= 0 and uncertain >= 0 and unknown + uncertain < 1):
            raise InputError(
                f"--several {share}, --unknown {unknown}, --uncertain {uncertain}: expected shares from 0 to 1, the "
                "last "
                "two together below 1"
            )
        self.seed, self.drawn, self.lesion_masks = seed, (share, unknown, uncertain), lesion_masks
        self.shortcut = {"train": shortcut, "val": shortcut, "test": shortcut if shortcut is None else shortcut_test}
        items = [
            self._item(split, i, tuple(findings))
            for split, n in zip(SPLITS, split_sizes(count), strict=True)
            for i in range(n)
        ]
        asked = (NO_FINDING, *findings)
        super().__init__(items, {}, tuple(findings), size, asked=asked, unlisted="unknown")

    def _item(self, split: str, i: int, findings: tuple[str, ...]) -> Item:
        """What it shows, and what its label says of that."""
        share, unknown, uncertain = self.drawn
        rng = np.random.default_rng([self.seed, SPLITS.index(split), i, 2])
        shown = rng.random(len(findings)) < share
        luck = rng.random(len(findings))
        said: dict[str, list[str]] = {"present": [], "absent": [], "uncertain": []}
        for name, there, chance in zip(findings, shown, luck, strict=True):
            if chance < uncertain:
                said["uncertain"].append(name)
            elif chance >= uncertain + unknown:
                said["present" if there else "absent"].append(name)
        healthy = (NO_FINDING,) if len(said["absent"]) == len(findings) else ()
        extra = (("number", i), ("shown", tuple(n for n, there in zip(findings, shown, strict=True) if there)))
        return Item(
            split,
            f"{split}-{i:06d}",
            (*healthy, *said["present"]),
            absent=tuple(said["absent"]),
            uncertain=tuple(said["uncertain"]),
            extra=extra,
        )

    def load(self, item: Item) -> Sample:
        """Draw one."""
        part, extra = SPLITS.index(item.split), dict(item.extra)
        i, shown = extra["number"], extra["shown"]
        sample = several_phantoms(item.key, shown, np.random.default_rng([self.seed, part, i]), self.size)
        sample.findings, sample.absent, sample.uncertain = item.findings, item.absent, item.uncertain
        sample.boxes = [box for box in sample.boxes if box.finding in item.findings]
        masks = sample.lesion_masks if self.lesion_masks else []
        sample.lesion_masks = [mask for mask in masks if mask.finding in item.findings]
        sample.extra = {"shown": list(shown)}
        agreement = self.shortcut[item.split]
        if agreement is not None:
            of_marker = np.random.default_rng([self.seed, part, i, 1])
            marker = _marker_class(of_marker, int(self.classes[0] in shown), 2, agreement)
            stamp(sample.image, marker, of_marker)
            sample.extra["marker"] = marker
        return sample

    def version(self, item: Item) -> str:
        """See Source: no files are behind it."""
        return ""

    def settings(self) -> dict[str, Any]:
        """See Source."""
        return {
            "size": self.size,
            "seed": self.seed,
            "shortcut": self.shortcut,
            "findings": self.classes,
            "several": self.drawn,
            "lesion_masks": self.lesion_masks,
        }
