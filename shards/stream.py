"""Shards -> batches, by the epoch plan.

Legend: n samples of a split that belong to the task, position p in 0..n-1; W processes, B images a process and batch.

The order of an epoch is a pure function of (seed, epoch): shards are permuted, cut into windows, and the samples of a
window are permuted together, so that reading stays among a few files. After c samples the next global batch is
``g[c : c + W*B]`` and rank r takes its r-th B; a last, smaller batch is split evenly. Exactly-once epochs and resuming
at any c, also with another W, follow from that line.
"""

import hashlib
import json
import os
import tarfile
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from shards.errors import InputError, listed, nearest
from shards.pack import ROW, VERSION
from shards.sample import decode_image, parse_meta

MAX_OPEN_FILES = 64


@dataclass
class Batch:
    """What one process gets. A process whose share of a last batch is empty gets one image of weight 0.

    image: uint8 [B,1,H,W]; label: int64 [B]; index: int64 [B], position in the split; weight: float32 [B], 1 or 0;
    mask: bool [B,H,W] or None (only a Split opened with ``masks=True``).
    """

    image: torch.Tensor
    label: torch.Tensor
    index: torch.Tensor
    weight: torch.Tensor
    mask: torch.Tensor | None = None


class Split(Dataset[Batch]):
    """One split of packed shards, as far as it belongs to a task.

    Args:
        root: folder with ``index.json``.
        split: ``train``, ``val`` or ``test``.
        classes: finding of each class; a sample belongs to class k when classes[k] is its one finding. None: all
            samples, label 0 (for lung masks).
        masks: read lung masks; every sample must have one.

    Raises:
        InputError: no index, an index that does not match its tars, an unknown finding, a class without samples.
    """

    def __init__(self, root: Path, split: str, classes: Sequence[str] | None = None, *, masks: bool = False) -> None:
        index = read_index(root)
        if split not in index["splits"]:
            raise InputError(f"{root}: has no split {split!r} (it has {', '.join(index['splits'])}); pack one")
        entry = index["splits"][split]
        self.root, self.split, self.masks = root, split, masks
        self.dataset: str = index["dataset"]
        self.paths = [_checked_shard(root, shard) for shard in entry["shards"]]
        self.table = _checked_table(root / f"{split}.npy", entry)
        self.classes = tuple(classes or ())
        self.rows, self.labels = self._select(index["findings"])
        self.left_out = len(self.table) - len(self.rows)
        digest = hashlib.sha256(json.dumps([shard["sha256"] for shard in entry["shards"]]).encode())
        digest.update(self.rows.tobytes())
        self.fingerprint = digest.hexdigest()
        self._files: OrderedDict[int, int] = OrderedDict()

    def _select(self, findings: list[str]) -> tuple[np.ndarray, np.ndarray]:
        bits = np.asarray(self.table["findings"])
        if not self.classes:
            if self.masks and not self.table["mask_len"].all():
                missing = int((self.table["mask_len"] == 0).sum())
                raise InputError(
                    f"{self.root}/{self.split}: {missing} of {len(bits)} samples have no lung mask; "
                    "pack them with `python -m shards masks` or `python -m shards phantom`"
                )
            return np.arange(len(bits)), np.zeros(len(bits), np.int64)
        labels = np.full(len(bits), -1, np.int64)
        for k, name in enumerate(self.classes):
            if name not in findings:
                raise InputError(f"{self.root}: has no images with finding {name!r}; {nearest(name, findings)}")
            labels[bits == np.uint64(1 << findings.index(name))] = k
        rows = np.flatnonzero(labels >= 0)
        counts = np.bincount(labels[rows], minlength=len(self.classes))
        empty = [name for name, count in zip(self.classes, counts, strict=True) if not count]
        if empty:
            raise InputError(
                f"{self.root}: the {self.split} split has no image whose one finding is {listed(empty)}; "
                "pack images of it into every split, or choose another --task"
            )
        return rows, labels[rows]

    def __len__(self) -> int:
        return len(self.rows)

    def counts(self) -> dict[str, int]:
        """Images of each class."""
        return {name: int((self.labels == k).sum()) for k, name in enumerate(self.classes)}

    def shard_sizes(self) -> np.ndarray:
        """Samples of each shard that belong to the task: int64 [shards]."""
        return np.bincount(self.table["shard"][self.rows], minlength=len(self.paths))

    # -- one sample ---------------------------------------------------------------------------------------------

    def image(self, position: int) -> np.ndarray:
        """Radiograph: uint8 [H, W]."""
        return decode_image(self._member(position, "image"), self.name(position))

    def mask(self, position: int) -> np.ndarray | None:
        """Lungs: bool [H, W], or None where unknown."""
        data = self._member(position, "mask")
        return decode_image(data, f"{self.name(position)} (mask)") >= 128 if data else None

    def meta(self, position: int) -> dict[str, Any]:
        """The JSON member: findings, boxes (LesionBox, pixels of the stored image) and whatever else was stored."""
        data = self._member(position, "json")
        return parse_meta(data, self.name(position)) if data else {"findings": [], "boxes": []}

    def key(self, position: int) -> str:
        """The sample's key, read from its tar header."""
        row = self.table[self.rows[position]]
        header = self._read(int(row["shard"]), int(row["image_at"]) - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE)
        try:
            name = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
        except tarfile.HeaderError as error:
            raise self._mismatch(int(row["shard"])) from error
        folder, _, base = name.rpartition("/")
        return "/".join(filter(None, [folder, base.partition(".")[0]]))

    def name(self, position: int) -> str:
        """Shard and key, for messages."""
        return f"{self.paths[self.table['shard'][self.rows[position]]]}:{self.key(position)}"

    def _member(self, position: int, kind: str) -> bytes:
        row = self.table[self.rows[position]]
        return self._read(int(row["shard"]), int(row[f"{kind}_at"]), int(row[f"{kind}_len"]))

    def _read(self, shard: int, at: int, size: int) -> bytes:
        if shard in self._files:
            self._files.move_to_end(shard)
        else:
            try:
                self._files[shard] = os.open(self.paths[shard], os.O_RDONLY)
            except OSError as error:
                raise InputError(f"{self.paths[shard]}: cannot be opened ({error.strerror})") from error
            if len(self._files) > MAX_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        data = os.pread(self._files[shard], size, at)
        if len(data) != size:
            raise self._mismatch(shard)
        return data

    def _mismatch(self, shard: int) -> InputError:
        return InputError(f"{self.paths[shard]}: does not match its index; run `python -m shards index {self.root}`")

    def close(self) -> None:
        """Close the shard files; they open again when read."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:  # a loader worker that is spawned opens its own files
        return self.__dict__ | {"_files": OrderedDict()}

    # -- one batch ----------------------------------------------------------------------------------------------

    def __getitem__(self, share: "Share") -> Batch:
        images = [self.image(p) for p in share.positions]
        if len({image.shape for image in images}) > 1:
            sizes = listed(sorted({f"{i.shape[1]}x{i.shape[0]}" for i in images}))
            raise InputError(f"{self.root}: images of different sizes in one batch ({sizes}); pack them to one --size")
        masks = None
        if self.masks:
            known = [self.mask(p) for p in share.positions]
            masks = torch.from_numpy(np.stack([m for m in known if m is not None]))  # all are there: checked when opened
        return Batch(
            image=torch.from_numpy(np.stack(images))[:, None],
            label=torch.from_numpy(self.labels[share.positions]),
            index=torch.from_numpy(share.positions),
            weight=torch.full((len(images),), float(share.counts)),
            mask=masks,
        )

    def loader(self, plan: "EpochPlan", epoch: int, start: int, *, batch: int, rank: int, world: int, workers: int) -> DataLoader:
        """Batches of this rank from sample ``start`` of ``epoch`` on."""
        return DataLoader(
            self,
            batch_size=None,
            sampler=Shares(plan, epoch, start, batch=batch, rank=rank, world=world),
            num_workers=workers,
            pin_memory=torch.cuda.is_available(),
            collate_fn=None,
        )


def read_index(root: Path) -> dict[str, Any]:
    """``index.json`` of a packed folder, checked for its version."""
    path = root / "index.json"
    if not root.is_dir():
        raise InputError(f"--shards {root}: no such folder; make one with `python -m shards phantom|folder|masks --out {root}`")
    if not path.is_file():
        raise InputError(f"{root}: has no index.json; if it holds tars, run `python -m shards index {root}`")
    try:
        index = json.loads(path.read_text())
        if index["version"] != VERSION:
            raise InputError(f"{path}: version {index['version']}, expected {VERSION}; run `python -m shards index {root}`")
        if not (isinstance(index["splits"], dict) and isinstance(index["findings"], list) and isinstance(index["dataset"], str)):
            raise ValueError("wrong types")
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is not an index ({error}); run `python -m shards index {root}`") from error
    return index


def _checked_shard(root: Path, shard: dict[str, Any]) -> Path:
    path = root / shard["name"]
    if not path.resolve().is_relative_to(root.resolve()):
        raise InputError(f"{root}/index.json: the shard {shard['name']!r} lies outside the folder; run `python -m shards index {root}`")
    if not path.is_file():
        raise InputError(f"{path}: is in the index but not on disk; copy it again, or run `python -m shards index {root}`")
    if path.stat().st_size != shard["bytes"]:
        raise InputError(f"{path}: has {path.stat().st_size} bytes, its index says {shard['bytes']}; copy it again, or run `python -m shards index {root}`")
    return path


def _checked_table(path: Path, entry: dict[str, Any]) -> np.ndarray:
    remedy = f"run `python -m shards index {path.parent}`"
    try:
        table = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read ({error}); {remedy}") from error
    if table.dtype != ROW or len(table) != entry["samples"]:
        raise InputError(f"{path}: does not match index.json ({len(table)} rows, {entry['samples']} expected); {remedy}")
    if len(table) and table["shard"].max() >= len(entry["shards"]):
        raise InputError(f"{path}: names shards that index.json does not have; {remedy}")
    return table


class EpochPlan:
    """The order of samples in each epoch, a pure function of (seed, epoch), computed window by window.

    Args:
        shard_sizes: samples of each shard, int [shards]; positions count through the shards in order.
        seed: of the order.
        window: shards that are shuffled together.
        shuffle: False: positions in order (evaluation).
    """

    def __init__(self, shard_sizes: Sequence[int] | np.ndarray, seed: int = 0, *, window: int = 8, shuffle: bool = True) -> None:
        self.sizes = np.asarray(shard_sizes, np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self.seed, self.window, self.shuffle = seed, window, shuffle
        self._cached: tuple[tuple[int, int], np.ndarray] | None = None

    def __len__(self) -> int:
        return int(self.starts[-1])

    def order(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Positions of samples ``start`` to ``stop`` of the epoch: int64 [stop - start] (shorter at the end)."""
        stop = min(stop, len(self))
        if not self.shuffle or start >= stop:
            return np.arange(start, max(start, stop))
        shards = np.random.default_rng([self.seed, epoch]).permutation(len(self.sizes))
        ends = np.cumsum(self.sizes[shards])[self.window - 1 :: self.window]
        if not len(ends) or ends[-1] < len(self):
            ends = np.append(ends, len(self))
        first, last = np.searchsorted(ends, [start, stop - 1], side="right")
        parts = []
        for w in range(first, last + 1):
            begin = int(ends[w - 1]) if w else 0
            positions = self._window(epoch, w, shards)
            parts.append(positions[max(start - begin, 0) : stop - begin])
        return np.concatenate(parts)

    def _window(self, epoch: int, w: int, shards: np.ndarray) -> np.ndarray:
        if self._cached is None or self._cached[0] != (epoch, w):
            members = shards[w * self.window : (w + 1) * self.window]
            positions = np.concatenate([np.arange(self.starts[s], self.starts[s + 1]) for s in members])
            self._cached = (epoch, w), np.random.default_rng([self.seed, epoch, w]).permutation(positions)
        return self._cached[1]


@dataclass
class Share:
    """What one rank reads of one global batch; ``counts`` is False for a stand-in of a rank that has nothing."""

    positions: np.ndarray
    counts: bool = True


class Shares(Sampler[Share]):
    """The shares of one rank, from sample ``start`` of the epoch to its end. Every rank gets equally many."""

    def __init__(self, plan: EpochPlan, epoch: int, start: int, *, batch: int, rank: int, world: int) -> None:
        self.plan, self.epoch, self.start = plan, epoch, start
        self.batch, self.rank, self.world = batch, rank, world

    def __len__(self) -> int:
        return max(0, -(-(len(self.plan) - self.start) // (self.batch * self.world)))

    def __iter__(self) -> Iterator[Share]:
        for c in range(self.start, len(self.plan), self.batch * self.world):
            g = self.plan.order(self.epoch, c, c + self.batch * self.world)
            mine = np.array_split(g, self.world)[self.rank]  # full batches: exactly the r-th B
            yield Share(mine) if len(mine) else Share(g[:1], counts=False)
