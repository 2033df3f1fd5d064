"""Synthetic frontal radiographs: known lungs, known lesions, and a shortcut that can be planted.

Drawn in chest coordinates: u to the image's right and v down, both about 0..1 over the image, u = 0 on the midline;
``side`` is -1 for the lung on the image's left (the patient's right) and +1 for the other one. Pose (rotation, scale,
shift) turns chest coordinates into pixels, so that every shape moves with it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from shards.errors import InputError
from shards.sample import (
    EFFUSION,
    FINDINGS,
    NO_FINDING,
    PNEUMOTHORAX,
    SPLITS,
    SUBCUTANEOUS_EMPHYSEMA,
    LesionBox,
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
    ) -> None:
        if kind not in KINDS:
            raise InputError(f"--shortcut-kind {kind}: expected {' or '.join(KINDS)}")
        if kind != KINDS[0] and shortcut is None:
            raise InputError(f"--shortcut-kind {kind}: say how well it agrees with the finding, --shortcut 0.95")
        for name in findings:
            if name not in FINDINGS:
                raise InputError(f"--findings {name}: phantoms exist for {', '.join(FINDINGS)}")
        if size < MIN_SIZE:
            raise InputError(f"--size {size}: phantoms need at least {MIN_SIZE} pixels")
        for flag, value in (("--shortcut", shortcut), ("--shortcut-test", shortcut_test)):
            if value is not None and not -1 <= value <= 1:
                raise InputError(f"{flag} {value}: a correlation lies in [-1, 1]")
        sizes = split_sizes(count)
        if min(sizes) < len(findings):
            raise InputError(
                f"--count {count}: too few for {len(findings)} findings in three splits; at least {5 * len(findings)}"
            )
        names = list(findings)
        items = [
            Item(split, f"{split}-{i:06d}", (names[i % len(names)],), extra=(("number", i),))
            for split, n in zip(SPLITS, sizes, strict=True)
            for i in range(n)
        ]
        super().__init__(items, {}, tuple(names), size)
        self.seed, self.kind = seed, kind
        self.shortcut = {"train": shortcut, "val": shortcut, "test": shortcut if shortcut is None else shortcut_test}

    def load(self, item: Item) -> Sample:
        """Draw one."""
        part, i = SPLITS.index(item.split), dict(item.extra)["number"]
        rng = np.random.default_rng([self.seed, part, i])
        agreement = self.shortcut[item.split]
        if agreement is None:
            return phantom(item.key, item.findings[0], rng, self.size)
        # Its own random numbers: apart from the shortcut the image is the one without it.
        of_marker = np.random.default_rng([self.seed, part, i, 1])
        marker = _marker_class(of_marker, i % len(self.classes), len(self.classes), agreement)
        tube = (marker, of_marker) if self.kind == "tube" else None
        sample = phantom(item.key, item.findings[0], rng, self.size, tube)
        if tube is None:
            _stamp(sample.image, marker, of_marker)
        sample.extra["marker"] = marker
        return sample

    def settings(self) -> dict[str, Any]:
        """See Source."""
        return {
            "size": self.size,
            "seed": self.seed,
            "shortcut": self.shortcut,
            "findings": self.classes,
            "kind": self.kind,
        }


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
    chest = _Chest.draw(rng, size)
    image, lungs = chest.image, chest.lungs
    lesions: list[np.ndarray] = []
    if finding == EFFUSION:
        lesions = _effusion(chest, image, rng)
    elif finding == PNEUMOTHORAX:
        lesions = _pneumothorax(chest, image, rng)
    else:
        image += chest.vessels
        if finding == SUBCUTANEOUS_EMPHYSEMA:
            lesions = _emphysema(chest, image, rng)
        elif finding != NO_FINDING:
            raise ValueError(f"no phantom of {finding!r}")
    if tube is not None:
        _insert(chest, image, *tube)
    image = _expose(image, rng)
    boxes = [LesionBox(finding, _bounds(lesion)) for lesion in lesions]
    return Sample(key, image, (finding,), np.where(lungs, 255, 0).astype(np.uint8), boxes)


@dataclass
class _Lung:
    """One lung. All arrays are float or bool [S, S]."""

    mask: np.ndarray
    depth: np.ndarray  # 0 at the apex, 1 at the lung's lowest point
    across: np.ndarray  # 0 at the mediastinum, 1 at the chest wall
    side: int


@dataclass
class _Chest:
    """Everything that is there before the finding. ``image`` is float [S, S], 0 black, about 1 white."""

    image: np.ndarray
    lungs: np.ndarray
    body: np.ndarray
    vessels: np.ndarray
    pair: list[_Lung]
    u: np.ndarray
    v: np.ndarray
    wall: np.ndarray  # distance to the midline, as a share of the lungs' half width
    apex: float
    base: float

    @staticmethod
    def draw(rng: np.random.Generator, size: int) -> "_Chest":
        u, v = _pose(rng, size)
        edge = 1.5 / size  # how soft an anatomical edge is
        apex, base = rng.uniform(0.12, 0.19), rng.uniform(0.74, 0.84)
        half = rng.uniform(0.33, 0.40)
        pair = [_lung(u, v, side, apex, base, half, rng) for side in (-1, 1)]
        lungs = pair[0].mask | pair[1].mask
        wall = np.abs(u) / half

        # The body: shoulders, trunk, and air around it.
        trunk = half + rng.uniform(0.07, 0.11)
        neck = rng.uniform(0.10, 0.14)
        shoulder = neck + (trunk + 0.08 - neck) * _step(v, apex - 0.03, 0.055)
        body = np.abs(u) < shoulder - 0.06 * _step(v, 0.5, 0.2)
        image = np.where(body, 0.58 + 0.06 * _smooth(rng, size, 6), 0.03)
        image -= 0.10 * np.clip(wall - 1.12, 0, 1) * body  # less tissue toward the skin

        # Lungs, mediastinum, heart, abdomen.
        air = rng.uniform(0.17, 0.26)
        soft = _blur(lungs.astype(float), edge * size)
        image = image * (1 - soft) + soft * (air + 0.05 * _smooth(rng, size, 5) + 0.05 * v)
        spine = np.exp(-((u / 0.045) ** 4)) * (0.10 + 0.03 * np.sin(v * rng.uniform(55, 65)))
        image += spine * body
        cx, cy = rng.uniform(0.04, 0.08), base - rng.uniform(0.13, 0.18)
        rx, ry = rng.uniform(0.12, 0.17), rng.uniform(0.13, 0.17)
        heart = ((u - cx) / rx) ** 2 + ((v - cy) / ry) ** 2 < 1
        image = np.maximum(image, _blur(heart.astype(float), edge * size) * rng.uniform(0.66, 0.76) * (v < base + 0.1))
        abdomen = _step(v, base + 0.02, 0.02) * body * ~lungs
        image = image * (1 - abdomen) + abdomen * (0.72 + 0.05 * _smooth(rng, size, 4))
        if rng.random() < 0.5:  # the gas bubble of the stomach
            bubble = ((u - rng.uniform(0.12, 0.2)) / 0.06) ** 2 + ((v - base - 0.07) / 0.03) ** 2 < 1
            image -= 0.25 * _blur((bubble & ~lungs).astype(float), edge * size)
        for lung in pair:
            lung.mask &= ~heart
        lungs = lungs & ~heart

        image += _ribs(u, v, half, apex, base, rng) * body
        image += _clavicles(u, v, half, apex, rng) * body
        vessels = _vessels(pair, lungs, size, rng)
        return _Chest(image, lungs, body, vessels, pair, u, v, wall, apex, base)


def _pose(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Chest coordinates of every pixel centre, rotated by up to 5 degrees, scaled, shifted and a little sheared."""
    y, x = (np.mgrid[:size, :size] + 0.5) / size
    angle, scale = np.deg2rad(rng.uniform(-5, 5)), rng.uniform(0.92, 1.12)
    x, y = x - 0.5 - rng.uniform(-0.04, 0.04), y - 0.5 - rng.uniform(-0.04, 0.04)
    u = (np.cos(angle) * x + np.sin(angle) * y) / scale
    v = (np.cos(angle) * y - np.sin(angle) * x) / (scale * rng.uniform(0.95, 1.05)) + 0.5
    return u, v


def _lung(
    u: np.ndarray, v: np.ndarray, side: int, apex: float, base: float, half: float, rng: np.random.Generator
) -> _Lung:
    d = side * u
    base = base - (0.02 if side < 0 else 0.0) * rng.uniform(0.5, 1.5)  # the liver lifts the patient's right side
    half = half * rng.uniform(0.95, 1.02)
    t = (v - apex) / (base - apex)
    # Lateral wall: a quarter ellipse from the apex to the widest place, then nearly straight.
    widest = rng.uniform(0.6, 0.75)
    lateral = half * np.where(
        t < widest, np.sqrt(np.clip(1 - ((widest - t) / widest) ** 2, 0, 1)), 1 - 0.10 * (t - widest)
    )
    medial = rng.uniform(0.05, 0.07) + 0.02 * np.clip(t, 0, 1)
    # Diaphragm: a dome that falls off toward the costophrenic angle.
    across = np.clip((d - medial) / np.maximum(lateral - medial, 1e-3), -1, 2)
    dome = rng.uniform(0.05, 0.10)
    floor = base + 0.03 - dome * np.clip(1 - ((across - 0.35) / 0.68) ** 2, -1.2, 1)
    mask = (t > 0) & (d > medial) & (d < lateral) & (v < floor)
    lowest = v[mask].max() if mask.any() else base
    return _Lung(mask, np.clip((v - apex) / (lowest - apex), 0, 1), across, side)


def _ribs(u: np.ndarray, v: np.ndarray, half: float, apex: float, base: float, rng: np.random.Generator) -> np.ndarray:
    """Posterior ribs falling off to the side, anterior ones crossing them."""
    bend = rng.uniform(0.35, 0.5)
    phase, spacing = rng.uniform(0, 1), rng.uniform(0.068, 0.082)
    a = np.abs(u)
    posterior = (v - bend * a**1.6 - apex) / spacing + phase
    anterior = (v + bend * 0.9 * (half - a) - apex) / (spacing * 1.1) + phase + 0.4
    ridge = np.exp(-(((posterior % 1) - 0.5) ** 2) / 0.022)
    front = np.exp(-(((anterior % 1) - 0.5) ** 2) / 0.02) * (a > 0.4 * half)
    cage = (a < half * 1.06) & (v > apex - 0.04) & (v < base + 0.03)
    return cage * (rng.uniform(0.05, 0.09) * ridge + rng.uniform(0.02, 0.04) * front)


def _clavicles(u: np.ndarray, v: np.ndarray, half: float, apex: float, rng: np.random.Generator) -> np.ndarray:
    tilt, height = rng.uniform(-0.25, -0.1), apex + rng.uniform(0.05, 0.08)
    a = np.abs(u)
    line = np.exp(-(((v - height - tilt * (a - 0.05)) / 0.013) ** 2))
    return rng.uniform(0.08, 0.12) * line * (a > 0.03) * (a < half * 1.15)


def _vessels(pair: list[_Lung], lungs: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
    """Branches that run from the hila outward and fade toward the pleura: float [S, S]."""
    layer = Image.new("L", (size, size))
    pen = ImageDraw.Draw(layer)
    for lung in pair:
        if not lung.mask.any():
            continue
        rows, columns = np.nonzero(lung.mask)
        inner = np.argmin(
            np.abs(lung.depth[rows, columns] - rng.uniform(0.42, 0.52)) + lung.across[rows, columns] * 0.6
        )
        hilum = np.array([columns[inner], rows[inner]], float)
        reach = 0.5 * np.ptp(rows)
        for _ in range(14):
            angle = rng.uniform(-1.35, 1.35)
            point, heading = hilum.copy(), np.array([lung.side * np.cos(angle), np.sin(angle)])
            steps = 9
            for step in range(steps):
                heading += rng.normal(0, 0.16, 2)
                heading /= np.linalg.norm(heading) + 1e-9
                after = point + heading * reach * rng.uniform(0.8, 1.1) / steps
                strength = int(150 * (1 - step / steps) + 30)
                pen.line([*point, *after], fill=strength, width=max(1, round(size / 110 * (1 - step / steps))))
                point = after
        r = size * 0.02
        pen.ellipse([hilum[0] - r, hilum[1] - 1.6 * r, hilum[0] + r, hilum[1] + 1.6 * r], fill=150)
    return 0.32 * _blur(np.asarray(layer) / 255.0, size / 200) * lungs


def _effusion(chest: _Chest, image: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Fluid in the bottom of one lung (sometimes both) whose surface climbs toward the chest wall: the meniscus."""
    image += chest.vessels
    lesions = []
    both = rng.random() < 0.2
    first = int(rng.integers(2))
    for lung in (chest.pair[first], chest.pair[1 - first])[: 2 if both else 1]:
        level = 1 - rng.uniform(0.16, 0.42)  # depth of the surface at the mediastinum
        rise = rng.uniform(0.12, 0.22)
        surface = level + 0.06 - rise * np.clip(lung.across, 0, 1) ** 2.2
        fluid = lung.mask & (lung.depth > surface)
        if not fluid.any():
            fluid = lung.mask & (lung.depth > 0.8)
        # A little beyond the lung's edge, so that fluid and chest wall run into each other.
        soft = _blur(_grown(fluid).astype(float), image.shape[0] * 0.008)
        image += soft * np.maximum(rng.uniform(0.62, 0.74) - image, 0) * rng.uniform(0.8, 0.95)
        lesions.append(fluid)
    return lesions


def _pneumothorax(chest: _Chest, image: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Air over the apex of one lung: darker, without vessels, behind a thin pleural line."""
    lung = chest.pair[int(rng.integers(2))]
    size = image.shape[0]
    limit = rng.uniform(0.34, 0.48)  # how far down the rim reaches
    fall = rng.uniform(0.12, 0.22)  # how far the apex has come down, as a share of the lung's height
    # The collapsed lung is the lung with its apex pulled down: each row looks like one that lies higher.
    rows = np.flatnonzero(lung.mask.any(1))
    top, height = rows[0], len(rows)
    row = np.arange(size)
    pulled = fall * height * np.clip(1 - (row - top) / (limit * height), 0, 1)
    inner = lung.mask & lung.mask[np.clip(np.rint(row - pulled), 0, size - 1).astype(int)]
    rim = lung.mask & ~inner
    if not rim.any():
        rim = lung.mask & (lung.depth < 0.1)
    image += np.where(rim, 0.0, chest.vessels)
    image -= _blur(rim.astype(float), size / 250) * lung.mask * rng.uniform(0.07, 0.12)
    line = _grown(rim) & inner
    image += _blur(line.astype(float), size / 400) * rng.uniform(0.22, 0.32)
    return [rim]


def _emphysema(chest: _Chest, image: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Gas in the soft tissue: dark streaks along the muscles of the lateral chest wall and above the lungs."""
    size = image.shape[0]
    sides = [-1, 1] if rng.random() < 0.4 else [int(rng.choice([-1, 1]))]
    lesions = []
    for side in sides:
        top, bottom = chest.apex - rng.uniform(0.02, 0.06), rng.uniform(0.45, 0.68)
        tissue = chest.body & ~chest.lungs & (side * chest.u > 0)
        beside = tissue & (chest.v > top) & (chest.v < bottom) & (chest.wall > 1.03)
        above = tissue & (side * chest.u > 0.09) & (chest.v > chest.apex - 0.09) & (chest.v < chest.apex - 0.015)
        field = beside | above
        rows, columns = np.nonzero(field)
        if not len(rows):
            continue
        layer = Image.new("L", (size, size))
        pen = ImageDraw.Draw(layer)
        for _ in range(int(rng.integers(28, 48))):
            i = int(rng.integers(len(rows)))
            angle = np.deg2rad(side * rng.normal(62, 14))
            length = size * rng.uniform(0.02, 0.06)
            dx, dy = np.cos(angle) * length / 2, np.sin(angle) * length / 2
            width = max(1, round(size * rng.uniform(0.004, 0.011)))
            pen.line(
                [columns[i] - dx, rows[i] - dy, columns[i] + dx, rows[i] + dy],
                fill=int(rng.integers(150, 255)),
                width=width,
            )
        streaks = _blur(np.asarray(layer) / 255.0, size / 350) * field
        image -= streaks * rng.uniform(0.22, 0.34)
        # Two boxes a side: one around both places would hold the upper lung as well.
        lesions += [gas for gas in ((streaks > 0.2) & beside, (streaks > 0.2) & above & ~beside) if gas.any()]
    return lesions


def _stamp(image: np.ndarray, marker: int, rng: np.random.Generator) -> None:
    """A bright technician's mark in the upper left corner of a uint8 image; its shape is the class."""
    size = image.shape[0]
    side = max(5, round(size * 0.085))
    top, left = (int(size * 0.02 + rng.integers(0, max(1, size // 40))) for _ in range(2))
    y, x = np.mgrid[:side, :side] / (side - 1)
    bar = 0.3
    shape = (
        (np.maximum(abs(x - 0.5), abs(y - 0.5)) > 0.5 - bar * 0.7),  # a frame
        (x < bar) | (y > 1 - bar),  # an L
        (abs(x - 0.5) < bar / 2) | (abs(y - 0.5) < bar / 2),  # a cross
        (x < bar) | (x > 1 - bar),  # two bars
    )[marker]
    image[top : top + side, left : left + side][shape] = 247


def _insert(chest: _Chest, image: np.ndarray, kind: int, rng: np.random.Generator) -> None:
    """A tube or wire in the middle of one lung, drawn into float [S, S]; what it looks like is the class."""
    size = image.shape[0]
    lung = chest.pair[int(rng.integers(2))]
    middle = lung.mask & (lung.depth > 0.38) & (lung.depth < 0.62) & (lung.across > 0.25) & (lung.across < 0.8)
    rows, columns = np.nonzero(middle if middle.any() else lung.mask)
    i = int(rng.integers(len(rows)))
    at, angle, reach = np.array([columns[i], rows[i]], float), rng.uniform(0, np.pi), size * rng.uniform(0.05, 0.07)
    along, aside = np.array([np.cos(angle), np.sin(angle)]), np.array([-np.sin(angle), np.cos(angle)])
    layer = Image.new("L", (size, size))
    pen = ImageDraw.Draw(layer)
    width = max(2, round(size * 0.016))
    if kind == 0:  # a solid drain
        pen.line([*(at - reach * along), *(at + reach * along)], fill=255, width=width)
    elif kind == 1:  # a tube with two walls
        for side in (-1, 1):
            edge = at + side * size * 0.02 * aside
            pen.line([*(edge - reach * along), *(edge + reach * along)], fill=255, width=max(1, width // 2))
    elif kind == 2:  # a wire with beads
        for k in np.linspace(-1, 1, 4):
            bead = at + k * reach * along
            pen.ellipse([*(bead - width * 0.8), *(bead + width * 0.8)], fill=255)
    else:  # a coil
        pen.ellipse([*(at - reach * 0.7), *(at + reach * 0.7)], outline=255, width=max(1, width // 2))
    shape = _blur(np.asarray(layer) / 255.0, size / 400)
    image += shape * np.maximum(0.95 - image, 0)


def _expose(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Exposure, contrast, gamma, blur of the focus and noise of the detector; uint8."""
    size = image.shape[0]
    image = _blur(image, size * rng.uniform(0.001, 0.003))
    image = np.clip(image * rng.uniform(0.88, 1.12) + rng.uniform(-0.04, 0.04), 0, 1) ** rng.uniform(0.85, 1.2)
    image = image + rng.normal(0, rng.uniform(0.008, 0.022), image.shape)
    return np.clip(np.rint(image * 255), 0, 255).astype(np.uint8)


def _bounds(mask: np.ndarray) -> tuple[float, float, float, float]:
    rows, columns = np.nonzero(mask)
    return float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1)


def _blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of float [S, S], renormalised at the border, as two products with a banded matrix."""
    size = len(image)
    taps = np.exp(-0.5 * ((np.arange(size)[:, None] - np.arange(size)) / max(sigma, 1e-3)) ** 2)
    taps /= taps.sum(1, keepdims=True)
    return taps @ image @ taps.T


def _grown(mask: np.ndarray) -> np.ndarray:
    """A mask and the pixels that touch it."""
    return np.asarray(Image.fromarray(mask).convert("L").filter(ImageFilter.MaxFilter(3))) > 0


def _smooth(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Smooth noise, about -1..1, with ``cells`` cells over the image."""
    coarse = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), float)


def _step(x: np.ndarray, at: float, width: float) -> np.ndarray:
    return 1 / (1 + np.exp(-np.clip((x - at) / width * 2, -40, 40)))
