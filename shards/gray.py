"""What image formats have in common: their first bytes, the largest size, and values of more than 8 bits, which become
gray.

Legend: gray images uint8 [H, W]; deep values are those of files with more than 8 bits a pixel, [H, W] of any number
type.

How bright a deep value is depends on the detector's depth, which files seldom say. A `Scale` is the range of values
from black to white. It is chosen for a whole set of images (`choose_scales`), since one image's largest value says
little about its detector.
"""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from shards.errors import InputError

MAX_PIXELS = 2**27  # 134 million: beyond any detector, far below what exhausts a machine
# First bytes
KNOWN = {
    b"\x89PNG": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF8": "GIF",
    b"BM": "BMP",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
}
LUMINANCE = np.array([0.299, 0.587, 0.114])  # ITU-R BT.601, as Pillow's
ROWS = 256  # that are converted at a time, so that no copy of a large image in floats is made
SLACK = 1.25  # a value that is beyond a scale by less than this is cut; beyond, the image is of another kind

Scale = tuple[float, float]


@dataclass(frozen=True)
class Extent:
    """Smallest and largest value of one deep image;
    ``fractions``: floats that are shares of white rather than counts.
    """

    low: float
    high: float
    fractions: bool = False

    @staticmethod
    def of(values: np.ndarray) -> "Extent":
        """Of the values of an image. ValueError: pixels that are not numbers."""
        if not values.size:
            return Extent(0, 0)
        low, high = float(values.min()), float(values.max())
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ValueError("pixels that are not numbers")
        # Resampling overshoots 1 by a little, and sometimes not so little; four gray levels are no radiograph.
        return Extent(low, high, values.dtype.kind == "f" and low > -1e-3 and high <= 4)

    @property
    def depth(self) -> int:
        """The smallest even number of bits, 8 or more, that holds the largest value."""
        return max(8, 2 * math.ceil(math.log2(self.high + 1) / 2))


def choose_scales(extents: Sequence[Extent]) -> tuple[Scale, ...]:
    """The scales of a set of deep images.

    Depths that follow each other (10, 12 and 14 bits) are one detector's, whose darker images do not reach its largest
    value: they share the largest of these depths. A gap (12 and 16) parts two kinds of files, such as 12-bit values and
    values that were spread to 16 bits; a deeper part with fewer than one image in fifty stays, a shallower one goes
    with the next deeper. Shares of white are 0 to 1. Signed values of a set lie between its smallest and its largest.
    """
    scales: list[Scale] = []
    signed = [e for e in extents if e.low < 0 and not e.fractions]
    if signed:
        rest = extents if len(signed) > len(extents) / 2 else signed
        scales.append((min(e.low for e in rest), max(e.high for e in rest)))
    if any(e.fractions for e in extents):
        scales.append((0.0, 1.0))
    counted = Counter(e.depth for e in extents if not (e.fractions or e.low < 0))
    if len(signed) > len(extents) / 2:
        counted.clear()
    total, run = sum(counted.values()), 0
    depths = sorted(counted)
    for depth, following in zip(depths, [*depths[1:], 0], strict=False):
        run += counted[depth]
        if following and (following - depth <= 2 or run < 0.02 * total):
            continue
        scales.append((0.0, 2.0**depth - 1))
        run = 0
    return tuple(scales)


def scale_of(extent: Extent, scales: Sequence[Scale]) -> Scale:
    """The scale of one image: the narrowest of the set's that holds its values, else one of its own."""
    if extent.fractions and (0.0, 1.0) in scales:
        return 0.0, 1.0
    fitting = [s for s in scales if s != (0.0, 1.0) and s[0] <= extent.low and extent.high <= SLACK * s[1]]
    if not extent.fractions and fitting:
        return min(fitting, key=lambda s: (s[0] < 0 <= extent.low, s[1] - s[0]))
    return choose_scales([extent])[0]


def to_gray(values: np.ndarray, scale: Scale) -> np.ndarray:
    """Deep values [H, W] to uint8 [H, W]: black at the scale's lower end, white at its upper one."""
    low, high = scale
    if values.dtype == np.uint16:
        table = np.clip(np.rint((np.arange(2**16) - low) * (255.0 / max(high - low, 1e-9))), 0, 255).astype(np.uint8)
        return table[values]
    gray = np.empty(values.shape, np.uint8)
    for rows in _rows(len(values)):
        gray[rows] = np.clip(np.rint((values[rows].astype(np.float64) - low) * (255.0 / max(high - low, 1e-9))), 0, 255)
    return gray


def _rows(height: int) -> Iterator[slice]:
    return (slice(top, top + ROWS) for top in range(0, height, ROWS))


def refuse_large(width: int, height: int, where: str) -> None:
    """InputError for an image beyond `MAX_PIXELS`, before its pixels are decoded."""
    if width * height > MAX_PIXELS:
        raise InputError(f"{where}: {width} x {height} pixels is beyond the limit of {MAX_PIXELS} pixels")


def one_channel(values: np.ndarray) -> np.ndarray:
    """Channels [H, W, C] to one: luminance of colour, gray without its alpha."""
    if values.ndim == 2:
        return values
    if values.ndim != 3:
        raise ValueError(f"pixels of shape {values.shape}")
    if values.shape[2] < 3:
        return values[..., 0]
    one = np.empty(values.shape[:2], values.dtype)
    for rows in _rows(len(values)):
        mixed = values[rows, :, :3].astype(np.float64) @ LUMINANCE
        one[rows] = mixed if values.dtype.kind == "f" else np.rint(mixed)
    return one


def kind_of(data: bytes) -> str:
    """The format that the first bytes of a file are of, or nothing."""
    return next((name for magic, name in KNOWN.items() if data.startswith(magic)), "")
