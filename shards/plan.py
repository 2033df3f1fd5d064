"""Which samples make which batch: pure functions of (seed, epoch, position), known without a file.

Legend: n samples of a split that belong to the task, position p in 0..n-1; W processes, B images a process and batch.

The order of an epoch is a pure function of (seed, epoch): shards are permuted, cut into windows, and the samples of a
window are permuted together, so that reading stays among a few files. After c samples the n - c that remain are cut
into as few global batches of at most W*B as there can be, as equal as they can be (`cut`): the next one is ``g[c : c +
cut(n - c, W*B)]``, of which rank r takes its r-th W-th. So no epoch ends with a crumb of one image, and exactly-once
epochs and resuming at any c, also with another W or B, follow from that line.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from torch.utils.data import Sampler

AHEAD = 256  # samples of a balanced epoch whose shards are fetched ahead


class EpochPlan:
    """The order of samples in each epoch, a pure function of (seed, epoch), computed window by window.

    Args:
        shard_sizes: samples of each shard, int [shards]; positions count through the shards in order.
        seed: of the order.
        window: shards that are shuffled together.
        shuffle: False: positions in order (evaluation).
    """

    def __init__(
        self, shard_sizes: Sequence[int] | np.ndarray, seed: int = 0, *, window: int = 8, shuffle: bool = True
    ) -> None:
        self.sizes = np.asarray(shard_sizes, np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self.seed, self.window, self.shuffle = seed, window, shuffle
        self._epoch: tuple[int, np.ndarray, np.ndarray] | None = None
        self._last: tuple[tuple[int, int], np.ndarray] | None = None

    def __len__(self) -> int:
        return int(self.starts[-1])

    def order(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Positions of samples ``start`` to ``stop`` of the epoch: int64 [stop - start] (shorter at the end)."""
        stop = min(stop, len(self))
        if not self.shuffle or start >= stop:
            return np.arange(start, max(start, stop))
        shards, ends = self._windows(epoch)
        first, last = np.searchsorted(ends, [start, stop - 1], side="right")
        parts = []
        for w in range(first, last + 1):
            begin = int(ends[w - 1]) if w else 0
            positions = self._window(epoch, w, shards)
            parts.append(positions[max(start - begin, 0) : stop - begin])
        return np.concatenate(parts)

    def times(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """How many times each of `order` came before in the epoch: int64, 0 where every sample comes once."""
        return np.zeros(max(0, min(stop, len(self)) - start), np.int64)

    def shards_ahead(self, epoch: int, start: int) -> list[int]:
        """Shards of the window that sample ``start`` lies in, then those of the next one."""
        shards, ends = self._windows(epoch)
        w = int(np.searchsorted(ends, start, side="right"))
        return [int(s) for s in shards[w * self.window : (w + 2) * self.window]]

    def _windows(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of shards, and where in the epoch each window of them ends."""
        if self._epoch is None or self._epoch[0] != epoch:
            shards = (
                np.random.default_rng([self.seed, epoch]).permutation(len(self.sizes))
                if self.shuffle
                else np.arange(len(self.sizes))
            )
            ends = np.cumsum(self.sizes[shards])[self.window - 1 :: self.window]
            if not len(ends) or ends[-1] < len(self):
                ends = np.append(ends, len(self))
            self._epoch = epoch, shards, ends
        return self._epoch[1:]

    def _window(self, epoch: int, w: int, shards: np.ndarray) -> np.ndarray:
        if self._last is None or self._last[0] != (epoch, w):
            members = shards[w * self.window : (w + 1) * self.window]
            positions = np.concatenate([np.arange(self.starts[s], self.starts[s + 1]) for s in members])
            self._last = (epoch, w), np.random.default_rng([self.seed, epoch, w]).permutation(positions)
        return self._last[1]


class BalancedPlan(EpochPlan):
    """An epoch of as many samples as there are, equally many of each group: those of a large one are a random part of
    it, those of a small one come several times, each of them equally often (but for one). A pure function of (seed,
    epoch), too, computed whole for an epoch, and read from all over the shards.

    Args:
        groups: positions int64 of each; a sample may be in several. Empty ones have no share.
    """

    def __init__(self, shard_sizes: Sequence[int] | np.ndarray, groups: Sequence[np.ndarray], seed: int = 0) -> None:
        super().__init__(shard_sizes, seed)
        self.groups = [group for group in groups if len(group)]
        self._order: tuple[int, np.ndarray] | None = None
        self._times: tuple[int, np.ndarray] | None = None

    def order(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """See `EpochPlan`."""
        return self._whole(epoch)[start : max(start, stop)]

    def times(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """See `EpochPlan`."""
        whole = self._whole(epoch)
        if self._times is None or self._times[0] != epoch:
            by_sample = np.argsort(whole, kind="stable")
            first = np.flatnonzero(np.diff(whole[by_sample], prepend=-1))
            times = np.empty(len(whole), np.int64)
            times[by_sample] = np.arange(len(whole)) - np.repeat(first, np.diff(first, append=len(whole)))
            self._times = epoch, times
        return self._times[1][start : max(start, stop)]

    def shards_ahead(self, epoch: int, start: int) -> list[int]:
        """See `EpochPlan`: those of the next samples, in their order."""
        shards = np.searchsorted(self.starts, self._whole(epoch)[start : start + AHEAD], side="right") - 1
        return list(dict.fromkeys(shards.tolist()))

    def _whole(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch])
            shares = [len(part) for part in np.array_split(np.arange(len(self)), len(self.groups))]
            parts = [
                np.concatenate([rng.permutation(group) for _ in range(-(-share // len(group)))])[:share]
                for group, share in zip(self.groups, shares, strict=True)
                if share
            ]
            self._order = epoch, rng.permutation(np.concatenate(parts))
        return self._order[1]


def cut(remaining: int, most: int) -> int:
    """Samples of the next of the fewest, nearly equal batches of at most ``most`` that make ``remaining``. What it
    leaves is cut likewise.
    """
    return -(-remaining // -(-remaining // most))


@dataclass
class Share:
    """What one rank reads of one global batch of ``total`` samples; times: see `EpochPlan.times`; ``counts`` is False
    for stand-ins of a rank that has nothing.
    """

    positions: np.ndarray
    total: int
    times: np.ndarray
    counts: bool = True


class Shares(Sampler[Share]):
    """The shares of one rank, from sample ``start`` of the epoch to its end. Every rank gets equally many."""

    def __init__(self, plan: EpochPlan, epoch: int, start: int, *, batch: int, rank: int, world: int) -> None:
        self.plan, self.epoch, self.start = plan, epoch, start
        self.batch, self.rank, self.world = batch, rank, world

    def __len__(self) -> int:
        return max(0, -(-(len(self.plan) - self.start) // (self.batch * self.world)))

    def starts(self) -> Iterator[int]:
        """First sample of each global batch."""
        start = self.start
        while start < len(self.plan):
            yield start
            start += cut(len(self.plan) - start, self.batch * self.world)

    def share(self, start: int) -> Share:
        """This rank's part of the global batch that begins at sample ``start``."""
        stop = start + cut(len(self.plan) - start, self.batch * self.world)
        g, times = self.plan.order(self.epoch, start, stop), self.plan.times(self.epoch, start, stop)
        mine = np.array_split(np.arange(len(g)), self.world)[self.rank]
        # Two stand-ins: a normalisation over the batch has nothing to go by with one.
        return Share(g[mine], len(g), times[mine]) if len(mine) else Share(g[:2], len(g), times[:2], counts=False)

    def __iter__(self) -> Iterator[Share]:
        return map(self.share, self.starts())

    def smallest(self) -> int:
        """Images of the smallest share of any rank that has some:
        what a forward in training must be able to do with.
        """
        batches = -(-(len(self.plan) - self.start) // (self.batch * self.world))
        return max(1, (len(self.plan) - self.start) // max(1, batches) // self.world)
