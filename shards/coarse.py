"""A mask in a few bytes: a grid over the box around it, two bits a cell.

That is what is remembered of lungs and of lesions where masks would be too large: ten million of them are 1.4 GB.
"""

from typing import NamedTuple

import numpy as np

GRID, LEVELS = (22, 24), 4  # rows and columns, and how many values a cell has
BYTES = GRID[0] * GRID[1] // 4
CUTS = 12  # where a pixel begins to count, in twelfths of a full cell


class CoarseMask(NamedTuple):
    """xyxy: the box around it in whole pixels, ends exclusive; cut: from how many twelfths of a full cell, between the
    cells bilinear, a pixel belongs to it; cells uint8 [132]: how much of each cell it fills, in thirds.
    """

    xyxy: tuple[int, int, int, int]
    cut: int
    cells: np.ndarray


def packed(levels: np.ndarray) -> np.ndarray:
    """Levels uint8 [N,22,24] in 0..3 -> uint8 [N,132], four cells a byte."""
    four = levels.reshape(len(levels), BYTES, 4)
    return four[..., 0] | four[..., 1] << 2 | four[..., 2] << 4 | four[..., 3] << 6


def coarse(mask: np.ndarray) -> CoarseMask | None:
    """Of a mask bool [H,W]; None where there is nothing.

    A cell of which anything is filled is never empty, and the cut is the one that gives the mask back best, so that
    what is a pixel wide does not vanish.
    """
    rows, columns = (np.flatnonzero(mask.any(axis)) for axis in (1, 0))
    if not len(rows):
        return None
    y0, y1, x0, x1 = int(rows[0]), int(rows[-1]) + 1, int(columns[0]), int(columns[-1]) + 1
    inside = mask[y0:y1, x0:x1]
    share = _shares(inside)
    levels = np.clip(np.rint(share * (LEVELS - 1)), share > 0, LEVELS - 1).astype(np.uint8)
    down, across = (_tent(side, cells) for side, cells in zip(inside.shape, GRID, strict=True))
    drawn = down @ (levels / np.float32(LEVELS - 1)) @ across.T
    overlap = [
        (inside & (drawn >= cut / CUTS)).sum() / max(1, (inside | (drawn >= cut / CUTS)).sum())
        for cut in range(1, CUTS)
    ]
    return CoarseMask((x0, y0, x1, y1), 1 + int(np.argmax(overlap)), packed(levels[None])[0])


def _shares(mask: np.ndarray) -> np.ndarray:
    """How much of each cell of a grid over a mask bool [h,w] is filled: float [22,24]."""
    total = np.pad(mask.astype(float).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    for axis, cells in enumerate(GRID):
        edges = np.linspace(0, mask.shape[axis], cells + 1)
        low = np.minimum(edges.astype(int), mask.shape[axis] - 1)
        part = np.expand_dims(edges - low, 1 - axis)
        total = total.take(low, axis) * (1 - part) + total.take(low + 1, axis) * part
    return np.diff(np.diff(total, axis=0), axis=1) * (GRID[0] * GRID[1] / mask.size)


def _tent(pixels: int, cells: int) -> np.ndarray:
    """How much of each cell a pixel has by linear interpolation: float32 [pixels,cells]."""
    place = (np.arange(pixels) + 0.5) * cells / pixels - 0.5
    return np.clip(1 - np.abs(place[:, None] - np.arange(cells)), 0, None).astype(np.float32)
