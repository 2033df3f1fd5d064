"""Run lengths of lesion masks, as COCO has them: column by column, beginning with a run of nothing.

The compressed form is a string of 6-bit groups, 48 added to each, of the differences to the run two before (from the
fourth on): cocodataset/cocoapi, common/maskApi.c.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from shards.errors import InputError

MAX_SIDE = 2**15  # pixels, of what is drawn


class Runs(NamedTuple):
    """A mask: size (height, width), and its runs as COCO's compressed string."""

    size: tuple[int, int]
    counts: str

    @classmethod
    def of(cls, size: Any, counts: Any) -> "Runs":
        """From a file. ValueError: these are no runs of a mask of that size."""
        height, width = size
        if not (
            isinstance(height, int) and isinstance(width, int) and 0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE
        ):
            raise ValueError(f"size {size}: expected height and width in pixels")
        runs = counts if isinstance(counts, list) else _unpacked(str(counts))
        if any(not isinstance(run, int) or run < 0 for run in runs):
            raise ValueError("run lengths must be whole numbers, 0 or more")
        if sum(runs) != height * width:
            raise ValueError(f"the runs cover {sum(runs)} pixels, the mask has {height}x{width}")
        return cls((height, width), _packed(runs))

    @classmethod
    def drawn(cls, mask: np.ndarray) -> "Runs":
        """Of a mask bool [H,W]."""
        flat = np.concatenate([[False], np.asarray(mask, bool).T.ravel()])
        edges = np.flatnonzero(flat[1:] != flat[:-1])
        runs = np.diff(np.concatenate([[0], edges, [mask.size]]))
        return cls((mask.shape[0], mask.shape[1]), _packed([int(run) for run in runs]))

    def mask(self) -> np.ndarray:
        """bool [H,W]."""
        runs = _unpacked(self.counts)
        inside = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
        return np.ascontiguousarray(inside.reshape(self.size[1], self.size[0]).T)


def _packed(runs: Sequence[int]) -> str:
    text = bytearray()
    for i, run in enumerate(runs):
        x = run - runs[i - 2] if i > 2 else run
        more = True
        while more:
            group = x & 0x1F
            x >>= 5
            more = x != -1 if group & 0x10 else x != 0
            text.append((group | 0x20 if more else group) + 48)
    return text.decode()


def _unpacked(text: str) -> list[int]:
    """ValueError: no such string."""
    runs: list[int] = []
    x, shift = 0, 0
    for sign in text.encode():
        group = sign - 48
        if not 0 <= group < 64 or shift > 60:
            raise ValueError("its counts are no compressed run lengths")
        x |= (group & 0x1F) << shift
        shift += 5
        if not group & 0x20:
            if group & 0x10:
                x -= 1 << shift
            runs.append(x + runs[-2] if len(runs) > 2 else x)
            x, shift = 0, 0
    if shift:
        raise ValueError("its counts are cut")
    return runs


def relative(text: str, size: tuple[int, int], where: str) -> np.ndarray:
    """SIIM-ACR's runs as a mask bool [H,W]: pairs of a start, counted from the end of the run before, and a length,
    column by column. InputError: no pairs of numbers, or beyond the image.
    """
    try:
        numbers = np.array(
            [min(int(word), 2**40) for word in text.split()], np.int64
        )  # larger ones are beyond any image
        starts, lengths = numbers[::2], numbers[1::2]
        ends = np.cumsum(starts + lengths)
    except (ValueError, OverflowError) as error:
        raise InputError(f"{where}: {text[:40]!r} is no list of pairs of start and length") from error
    if len(numbers) % 2 or (numbers < 0).any() or not len(numbers):
        raise InputError(f"{where}: {text[:40]!r} is no list of pairs of start and length")
    if ends[-1] > size[0] * size[1]:
        raise InputError(
            f"{where}: its last run ends at pixel {ends[-1]}, the image of {size[1]}x{size[0]} has {size[0] * size[1]}"
        )
    flat = np.zeros(size[0] * size[1], bool)
    for end, length in zip(ends.tolist(), lengths.tolist(), strict=True):
        flat[end - length : end] = True
    return np.ascontiguousarray(flat.reshape(size[1], size[0]).T)
