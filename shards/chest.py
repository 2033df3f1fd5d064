"""The chest of a synthetic radiograph, before anything is wrong with it.

Chest coordinates: u to the image's right and v down, both about 0..1 over the image, u = 0 on the midline; ``side`` is
-1 for the lung on the image's left (the patient's right) and +1 for the other one. Pose (rotation, scale, shift) turns
chest coordinates into pixels, so that every shape moves with it.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter


@dataclass
class Lung:
    """One lung. All arrays are float or bool [S, S]."""

    mask: np.ndarray
    depth: np.ndarray  # 0 at the apex, 1 at the lung's lowest point
    across: np.ndarray  # 0 at the mediastinum, 1 at the chest wall
    side: int


@dataclass
class Chest:
    """Everything that is there before the finding. ``image`` is float [S, S], 0 black, about 1 white."""

    image: np.ndarray
    lungs: np.ndarray
    body: np.ndarray
    vessels: np.ndarray
    pair: list[Lung]
    u: np.ndarray
    v: np.ndarray
    wall: np.ndarray  # distance to the midline, as a share of the lungs' half width
    apex: float
    base: float
    heart: np.ndarray

    @staticmethod
    def draw(rng: np.random.Generator, size: int, heart_size: float = 1.0) -> "Chest":
        """``heart_size``: how many times as large as it happens to be the heart is."""
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
        shoulder = neck + (trunk + 0.08 - neck) * step(v, apex - 0.03, 0.055)
        body = np.abs(u) < shoulder - 0.06 * step(v, 0.5, 0.2)
        image = np.where(body, 0.58 + 0.06 * smooth(rng, size, 6), 0.03)
        image -= 0.10 * np.clip(wall - 1.12, 0, 1) * body  # less tissue toward the skin

        # Lungs, mediastinum, heart, abdomen.
        air = rng.uniform(0.17, 0.26)
        soft = blur(lungs.astype(float), edge * size)
        image = image * (1 - soft) + soft * (air + 0.05 * smooth(rng, size, 5) + 0.05 * v)
        spine = np.exp(-((u / 0.045) ** 4)) * (0.10 + 0.03 * np.sin(v * rng.uniform(55, 65)))
        image += spine * body
        cx, cy = rng.uniform(0.04, 0.08), base - rng.uniform(0.13, 0.18)
        rx, ry = rng.uniform(0.12, 0.17), rng.uniform(0.13, 0.17)
        heart = ((u - cx) / (rx * heart_size)) ** 2 + ((v - cy) / (ry * heart_size)) ** 2 < 1
        image = np.maximum(image, blur(heart.astype(float), edge * size) * rng.uniform(0.66, 0.76) * (v < base + 0.1))
        abdomen = step(v, base + 0.02, 0.02) * body * ~lungs
        image = image * (1 - abdomen) + abdomen * (0.72 + 0.05 * smooth(rng, size, 4))
        if rng.random() < 0.5:  # the gas bubble of the stomach
            bubble = ((u - rng.uniform(0.12, 0.2)) / 0.06) ** 2 + ((v - base - 0.07) / 0.03) ** 2 < 1
            image -= 0.25 * blur((bubble & ~lungs).astype(float), edge * size)
        for lung in pair:
            lung.mask &= ~heart
        lungs = lungs & ~heart

        image += _ribs(u, v, half, apex, base, rng) * body
        image += _clavicles(u, v, half, apex, rng) * body
        vessels = _vessels(pair, lungs, size, rng)
        return Chest(image, lungs, body, vessels, pair, u, v, wall, apex, base, heart & (v < base + 0.1))


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
) -> Lung:
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
    return Lung(mask, np.clip((v - apex) / (lowest - apex), 0, 1), across, side)


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


def _vessels(pair: list[Lung], lungs: np.ndarray, size: int, rng: np.random.Generator) -> np.ndarray:
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
    return 0.32 * blur(np.asarray(layer) / 255.0, size / 200) * lungs


def blur(image: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blur of float [S, S], renormalised at the border, as two products with a banded matrix."""
    size = len(image)
    taps = np.exp(-0.5 * ((np.arange(size)[:, None] - np.arange(size)) / max(sigma, 1e-3)) ** 2)
    taps /= taps.sum(1, keepdims=True)
    return taps @ image @ taps.T


def grown(mask: np.ndarray) -> np.ndarray:
    """A mask and the pixels that touch it."""
    return np.asarray(Image.fromarray(mask).convert("L").filter(ImageFilter.MaxFilter(3))) > 0


def smooth(rng: np.random.Generator, size: int, cells: int) -> np.ndarray:
    """Smooth noise, about -1..1, with ``cells`` cells over the image."""
    coarse = Image.fromarray(rng.uniform(-1, 1, (cells, cells)).astype(np.float32))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), float)


def step(x: np.ndarray, at: float, width: float) -> np.ndarray:
    """From 0 to 1 around ``at``."""
    return 1 / (1 + np.exp(-np.clip((x - at) / width * 2, -40, 40)))
