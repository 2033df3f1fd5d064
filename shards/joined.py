"""Several splits read as one, such as lung masks of several hospitals."""

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from shards.dataset import Split
from shards.errors import InputError


class Joined:
    """Several splits read as one, such as lung masks of several hospitals: their positions follow each other.

    Raises:
        InputError: images of different sizes.
    """

    def __init__(self, parts: Sequence[Split]) -> None:
        self.parts = list(parts)
        self.masks = all(part.masks for part in parts)
        self.ends = list(accumulate(len(part) for part in parts))
        self.fingerprint = hashlib.sha256("".join(part.fingerprint for part in parts).encode()).hexdigest()
        sizes = {part.image(0).shape: part.store.name for part in parts if len(part)}
        if len(sizes) > 1:
            raise InputError(
                f"images of different sizes: {', '.join(f'{w}x{h} in {name}' for (h, w), name in sizes.items())}; pack "
                "all to one --size"
            )

    def _part(self, position: int) -> tuple[Split, int]:
        k = bisect_right(self.ends, position)
        return self.parts[k], int(position) - (self.ends[k - 1] if k else 0)

    def __len__(self) -> int:
        return self.ends[-1]

    @property
    def where(self) -> str:
        """See Split."""
        return ", ".join(part.where for part in self.parts)

    def targets(self, positions: np.ndarray | slice = slice(None)) -> np.ndarray:
        """None: int8 [n,0]."""
        return np.zeros((len(np.arange(len(self))[positions]), 0), np.int8)

    def shard_sizes(self) -> np.ndarray:
        """See Split."""
        return np.concatenate([part.shard_sizes() for part in self.parts])

    def image(self, position: int) -> np.ndarray:
        """See Split."""
        part, at = self._part(position)
        return part.image(at)

    def image_bytes(self, position: int) -> bytes:
        """See Split."""
        part, at = self._part(position)
        return part.image_bytes(at)

    def mask(self, position: int) -> np.ndarray | None:
        """See Split."""
        part, at = self._part(position)
        return part.mask(at)

    def key(self, position: int) -> str:
        """See Split."""
        part, at = self._part(position)
        return part.key(at)

    def name(self, position: int) -> str:
        """See Split."""
        part, at = self._part(position)
        return part.name(at)

    def close(self) -> None:
        """See Split."""
        for part in self.parts:
            part.close()


Samples = Split | Joined  # what a loader reads
