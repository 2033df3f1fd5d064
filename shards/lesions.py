"""What is drawn into a synthetic chest: lesions, a technician's mark, tubes; then exposure.

A lesion changes ``image``, float [S,S], and gives its places, bool [S,S] each.
"""

import numpy as np
from PIL import Image, ImageDraw

from shards.chest import Chest, blur, grown, smooth


def effusion(chest: Chest, image: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """Fluid in the bottom of one lung (sometimes both) whose surface climbs toward the chest wall: the meniscus."""
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
        soft = blur(grown(fluid).astype(float), image.shape[0] * 0.008)
        image += soft * np.maximum(rng.uniform(0.62, 0.74) - image, 0) * rng.uniform(0.8, 0.95)
        lesions.append(fluid)
    return lesions


def pneumothorax(chest: Chest, image: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
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
    image -= blur(rim.astype(float), size / 250) * lung.mask * rng.uniform(0.07, 0.12)
    line = grown(rim) & inner
    image += blur(line.astype(float), size / 400) * rng.uniform(0.22, 0.32)
    return [rim]


def mass(chest: Chest, image: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """A round opacity in one lung."""
    size = image.shape[0]
    lung = chest.pair[int(rng.integers(2))]
    rows, columns = np.nonzero(lung.mask & (lung.depth > 0.15) & (lung.depth < 0.8))
    i, radius = int(rng.integers(len(rows))), size * rng.uniform(0.04, 0.065)
    y, x = np.mgrid[:size, :size]
    ball = np.hypot(y - rows[i], x - columns[i]) < radius * (1 + 0.15 * smooth(rng, size, 8))
    soft = blur(ball.astype(float), size * 0.006)
    image += soft * np.maximum(rng.uniform(0.55, 0.68) - image, 0) * 0.9
    return [ball]


def consolidation(chest: Chest, image: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
    """A patch of lung that is dense, with ragged edges."""
    size = image.shape[0]
    lung = chest.pair[int(rng.integers(2))]
    rows, columns = np.nonzero(lung.mask & (lung.depth > 0.15) & (lung.depth < 0.85))
    i, radius = int(rng.integers(len(rows))), size * rng.uniform(0.09, 0.14)
    y, x = np.mgrid[:size, :size]
    near = np.hypot(y - rows[i], x - columns[i]) < radius * (1 + 0.45 * smooth(rng, size, 9))
    patch = near & lung.mask
    if not patch.any():
        patch = lung.mask & (np.hypot(y - rows[i], x - columns[i]) < radius)
    texture = 0.75 + 0.25 * smooth(rng, size, 24)
    soft = blur(patch.astype(float), size * 0.012) * texture
    image += soft * np.maximum(rng.uniform(0.48, 0.6) - image, 0)
    return [patch]


def emphysema(chest: Chest, image: np.ndarray, rng: np.random.Generator) -> list[np.ndarray]:
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
        streaks = blur(np.asarray(layer) / 255.0, size / 350) * field
        image -= streaks * rng.uniform(0.22, 0.34)
        # Two boxes a side: one around both places would hold the upper lung as well.
        lesions += [gas for gas in ((streaks > 0.2) & beside, (streaks > 0.2) & above & ~beside) if gas.any()]
    return lesions


def stamp(image: np.ndarray, marker: int, rng: np.random.Generator) -> None:
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


def insert(chest: Chest, image: np.ndarray, kind: int, rng: np.random.Generator) -> None:
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
    shape = blur(np.asarray(layer) / 255.0, size / 400)
    image += shape * np.maximum(0.95 - image, 0)


def expose(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Exposure, contrast, gamma, blur of the focus and noise of the detector; uint8."""
    size = image.shape[0]
    image = blur(image, size * rng.uniform(0.001, 0.003))
    image = np.clip(image * rng.uniform(0.88, 1.12) + rng.uniform(-0.04, 0.04), 0, 1) ** rng.uniform(0.85, 1.2)
    image = image + rng.normal(0, rng.uniform(0.008, 0.022), image.shape)
    return np.clip(np.rint(image * 255), 0, 255).astype(np.uint8)


def bounds(mask: np.ndarray) -> tuple[float, float, float, float]:
    """The box around a place: x0 y0 x1 y1, ends exclusive."""
    rows, columns = np.nonzero(mask)
    return float(columns.min()), float(rows.min()), float(columns.max() + 1), float(rows.max() + 1)
