"""Shards -> batches, by the epoch plan.

Legend: n samples of a split that belong to the task, position p in 0..n-1; W processes, B images a process and batch.

The order of an epoch is a pure function of (seed, epoch): shards are permuted, cut into windows, and the samples of a
window are permuted together, so that reading stays among a few files. After c samples the n - c that remain are cut into as few
global batches of at most W*B as there can be, as equal as they can be (`cut`): the next one is ``g[c : c + cut(n - c, W*B)]``, of which
rank r takes its r-th W-th. So no epoch ends with a crumb of one image, and exactly-once epochs and resuming at any c, also with another
W or B, follow from that line.
"""

import hashlib
import multiprocessing
import os
import signal
import sys
import tarfile
import threading
import time
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info
from torchvision.io import ImageReadMode, decode_jpeg

from shards.errors import WORKER_LOST, InputError, listed, nearest
from shards.pack import ROW
from shards.pixels import MAX_PIXELS, Scale, decode_image
from shards.sample import SUPPORT_DEVICES, parse_meta
from shards.store import Folder, Remote, open_store

MAX_OPEN_FILES = 64
FETCHERS = 4  # shards of a URL that are fetched ahead at a time
STALLED = 600.0  # seconds without a batch after which the loader's processes count as stuck
SHM_REMEDY = "use fewer --workers (0: none) or a smaller --batch, or give the container more (docker run --shm-size 1g)"


@dataclass
class Batch:
    """What one process gets. A process whose share is empty gets others' images with weight 0.

    image: uint8 [B,1,H,W]; label: int64 [B]; index: int64 [B], position in the split; weight: float32 [B], 1 or 0;
    mask: bool [B,H,W] or None (only a Split opened with ``masks=True``); total: images of the global batch, of all processes.
    """

    image: torch.Tensor
    label: torch.Tensor
    index: torch.Tensor
    weight: torch.Tensor
    mask: torch.Tensor | None = None
    total: int = 0

    def pin_memory(self) -> "Batch":
        """For the loader: in page-locked memory, from which copies to a GPU do not wait."""
        pinned = replace(self)
        for name, tensor in self.tensors().items():
            setattr(pinned, name, tensor.pin_memory())
        return pinned

    def tensors(self) -> dict[str, torch.Tensor]:
        """Those that there are, by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}


class Split(Dataset["Batch | InputError"]):
    """One split of packed shards, as far as it belongs to a task.

    Args:
        root: folder or URL with ``index.json``, or its opened store.
        split: ``train``, ``val`` or ``test``.
        classes: finding of each class; a sample belongs to class k when classes[k] is its one finding. None: all
            samples, label 0 (for lung masks).
        among: those classes to which a sample belongs whatever else it shows, as long as it belongs to no other class.
        masks: read lung masks; every sample must have one.

    Raises:
        InputError: no index, an index that does not match its tars, an unknown finding, a class without samples.
    """

    def __init__(
        self, root: str | Path | Folder | Remote, split: str, classes: Sequence[str] | None = None, *, masks: bool = False, among: Sequence[str] = ()
    ) -> None:
        self.store = root if isinstance(root, Folder | Remote) else open_store(root)
        index = self.store.index()
        if split not in index["splits"]:
            raise InputError(f"{self.store.name}: has no split {split!r} (it has {', '.join(index['splits'])}); pack one")
        entry = index["splits"][split]
        self.split, self.masks = split, masks
        self.dataset: str = index["dataset"]
        self.stored: dict[str, Any] = index.get("stored", {})
        self.scales = tuple((float(low), float(high)) for low, high in self.stored.get("scales", ()))
        self.shards: list[dict[str, Any]] = entry["shards"]
        self.store.check(self.shards)
        self.starts = list(accumulate((shard["samples"] for shard in self.shards), initial=0))  # first sample of each shard
        self.table = self._table(f"{split}.npy", ROW, entry)
        self.classes, self.among = tuple(classes or ()), frozenset(among)
        self.rows, self.labels = self._select(index, entry)
        self.left_out = entry["samples"] - len(self.rows)
        digest = hashlib.sha256("".join(shard["sha256"] for shard in self.shards).encode())
        digest.update(self.labels.tobytes())
        digest.update(self.rows.tobytes())
        self.fingerprint = digest.hexdigest()
        self._files: OrderedDict[int, int] = OrderedDict()
        self._buffers = _Buffers()

    def _table(self, name: str, dtype: Any, entry: dict[str, Any]) -> np.ndarray:
        path = self.store.table(name, entry["tables"].get(name, {}))
        try:
            table: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: cannot be read ({error}); {self.store.remedy}") from error
        if table.dtype != dtype or len(table) != entry["samples"] or len(table) != self.starts[-1]:
            raise InputError(f"{path}: does not match index.json ({len(table)} rows, {entry['samples']} expected); {self.store.remedy}")
        return table

    def _select(self, index: dict[str, Any], entry: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """Rows of the split that belong to the task, int64 [n], and the class of each, int16 [n]."""
        if not self.classes:
            missing = entry["samples"] - entry["masks"]
            if self.masks and missing:
                raise InputError(
                    f"{self.store.name}/{self.split}: {missing} of {entry['samples']} samples have no lung mask; "
                    "pack them with `python -m shards masks` or `python -m shards phantom`"
                )
            return np.arange(entry["samples"]), np.zeros(entry["samples"], np.int16)
        if not index["findings"]:
            raise InputError(f"{self.store.name}: its images have no findings; are these shards of lung masks?")
        for name in self.classes:
            if name not in index["findings"]:
                raise InputError(f"{self.store.name}: has no images with finding {name!r}; {nearest(name, index['findings'])}")
        codes = self._codes(index, entry)
        none = len(self.classes)
        label = np.array([self._class(found) for found in index["labels"]], np.int16)[codes]
        rows = np.flatnonzero(label != none)
        counts = np.bincount(label, minlength=none)
        empty = [name for name, count in zip(self.classes, counts, strict=False) if not count]
        if empty:
            beside = int(sum(empty[0] in index["labels"][code] for code in codes.tolist()))
            told = f"{self.store.name}: the {self.split} split has no image {'of' if empty[0] in self.among else 'whose one finding is'} {listed(empty)}"
            if beside and empty[0] not in self.among:
                told += f" ({beside} have {empty[0]} beside others: to take those, declare it with `images: any` in a file of --findings)"
            torn = [found for found in index["labels"] if empty[0] in found and sum(name in self.classes for name in found) > 1]
            several = int(sum(index["labels"][code] in torn for code in codes.tolist()))
            if several and empty[0] in self.among:
                told += f" alone of the task's classes ({several} show {empty[0]} and another of them: an image belongs to one class or to none)"
            raise InputError(f"{told}; pack images of it into every split, or train a task without it")
        return rows, label[rows]

    def _class(self, found: Sequence[str]) -> int:
        """The class of an image with these findings; the number of classes where it has none."""
        found = [name for name in found if name != SUPPORT_DEVICES or name in self.classes]  # a device is no disease, of the ill or the healthy
        of_task = [k for k, name in enumerate(self.classes) if name in found]
        if len(of_task) == 1 and (len(found) == 1 or self.classes[of_task[0]] in self.among):
            return of_task[0]
        return len(self.classes)

    def _codes(self, index: dict[str, Any], entry: dict[str, Any]) -> np.ndarray:
        codes = self._table(f"{self.split}.labels.npy", np.dtype("<u2"), entry)
        if len(codes) and codes.max() >= len(index["labels"]):
            raise InputError(f"{self.store.name}: {self.split}.labels.npy names labels that index.json does not have; {self.store.remedy}")
        return codes

    def findings(self) -> list[tuple[str, ...]]:
        """Findings of every sample of the split, of the task or not, in the order of the shards."""
        index = self.store.index()
        return [tuple(index["labels"][code]) for code in self._codes(index, index["splits"][self.split])]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def where(self) -> str:
        """The folder or URL, for messages."""
        return self.store.name

    def counts(self) -> dict[str, int]:
        """Images of each class."""
        return {name: int((self.labels == k).sum()) for k, name in enumerate(self.classes)}

    def shard_sizes(self) -> np.ndarray:
        """Samples of each shard that belong to the task: int64 [shards]."""
        return np.diff(np.searchsorted(self.rows, self.starts))

    # -- one sample ---------------------------------------------------------------------------------------------

    def image(self, position: int) -> np.ndarray:
        """Radiograph: uint8 [H, W]."""
        return _decode(self._member(position, "image"), lambda: self.name(position), self.scales)

    def image_length(self, position: int) -> int:
        """Bytes of the radiograph as stored."""
        return int(self.table[self.rows[position]]["image_len"])

    def image_bytes(self, position: int) -> bytes:
        """The radiograph as stored, encoded."""
        return bytes(self._member(position, "image"))

    def mask(self, position: int) -> np.ndarray | None:
        """Lungs: bool [H, W], or None where unknown."""
        data = self._member(position, "mask")
        return decode_image(data, f"{self.name(position)} (mask)") >= 128 if data else None

    def meta(self, position: int) -> dict[str, Any]:
        """The JSON member: findings, boxes (LesionBox, pixels of the stored image) and whatever else was stored."""
        data = bytes(self._member(position, "json"))
        return parse_meta(data, self.name(position)) if data else {"findings": [], "boxes": []}

    def key(self, position: int) -> str:
        """The sample's key, read from its tar header."""
        row = int(self.rows[position])
        header = self._read(row, int(self.table[row]["image_at"]) - tarfile.BLOCKSIZE, tarfile.BLOCKSIZE)
        try:
            name = tarfile.TarInfo.frombuf(header, "utf-8", "surrogateescape").name
        except tarfile.HeaderError as error:
            raise self._mismatch(row) from error
        if len(name) >= tarfile.LENGTH_NAME:  # longer names have a record of their own before the header
            name = self._long_name(row) or name
        folder, _, base = name.removeprefix("./").rpartition("/")
        return "/".join(filter(None, [folder, base.partition(".")[0]]))

    def _long_name(self, row: int) -> str:
        at = int(self.table[row]["image_at"])
        with tarfile.open(self.store.shard(self.shards[self._shard(row)]), "r:") as tar:
            return next((member.name for member in tar if member.offset_data == at), "")

    def name(self, position: int) -> str:
        """Shard and key, for messages."""
        return f"{self._shard_name(int(self.rows[position]))}:{self.key(position)}"

    def _shard(self, row: int) -> int:
        return bisect_right(self.starts, row) - 1

    def _shard_name(self, row: int) -> str:
        return f"{self.store.name}/{self.shards[self._shard(row)]['name']}"

    def _member(self, position: int, kind: str) -> bytearray:
        row = int(self.rows[position])
        members = self.table[row]
        return self._read(row, int(members[f"{kind}_at"]), int(members[f"{kind}_len"]))

    def _read(self, row: int, at: int, size: int) -> bytearray:
        shard = self._shard(row)
        if shard in self._files:
            self._files.move_to_end(shard)
        else:
            self._files[shard] = self._open(shard)
            if len(self._files) > MAX_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
        data = bytearray(size)
        if os.preadv(self._files[shard], [data], at) != size:
            raise self._mismatch(row)
        return data

    def _open(self, shard: int) -> int:
        for _ in range(10):
            path = self.store.shard(self.shards[shard])
            try:
                return os.open(path, os.O_RDONLY)
            except FileNotFoundError as error:
                problem: OSError = error
                if not self.store.remote:
                    break
                # another process made room in the cache between our two looks at it: fetch the shard again
            except OSError as error:
                problem = error
                break
        raise InputError(f"{path}: cannot be opened ({problem.strerror})") from problem

    def _mismatch(self, row: int) -> InputError:
        return InputError(f"{self._shard_name(row)}: does not match its index; {self.store.remedy}")

    def close(self) -> None:
        """Close the shard files; they open again when read."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        if hasattr(self, "_files"):
            self.close()

    def __getstate__(self) -> dict[str, Any]:  # a loader worker that is spawned opens its own files
        return self.__dict__ | {"_files": OrderedDict(), "_buffers": _Buffers()}

    # -- one batch ----------------------------------------------------------------------------------------------

    def __getitem__(self, share: "Share") -> "Batch | InputError":
        try:
            batch = self._batch(share)
            if get_worker_info() is not None:
                for tensor in batch.tensors().values():
                    tensor.share_memory_()  # here, where a full /dev/shm is an error: the queue's thread would lose the batch, and all would wait
            return batch
        except InputError as error:
            return error  # raised by `batches`: a loader worker would wrap it in its traceback
        except RuntimeError as error:
            if "shared memory" not in str(error) and "/torch_" not in str(error):
                raise
            return InputError(f"the loader's processes have no room left in /dev/shm; {SHM_REMEDY}")

    def _batch(self, share: "Share") -> Batch:
        images = np.empty((0, 0, 0), np.uint8)
        for i, position in enumerate(share.positions):
            image = self.image(position)
            if not i:
                images = self._buffers.get((len(share.positions), *image.shape))
            elif image.shape != images.shape[1:]:
                sizes = " and ".join(f"{shape[1]}x{shape[0]}" for shape in (images.shape[1:], image.shape))
                raise InputError(f"{self.where}: images of different sizes in one batch ({sizes}); pack them to one --size")
            images[i] = image
        masks = None
        if self.masks:
            known = [self.mask(p) for p in share.positions]
            masks = torch.from_numpy(np.stack([m for m in known if m is not None]))  # all are there: checked when opened
        return Batch(
            image=torch.from_numpy(images)[:, None],
            label=torch.from_numpy(self.labels[share.positions].astype(np.int64)),
            index=torch.from_numpy(share.positions),
            weight=torch.full((len(images),), float(share.counts)),
            mask=masks,
            total=share.total,
        )

    def batches(self, plan: "EpochPlan", epoch: int, start: int, *, batch: int, rank: int, world: int, workers: int, pinned: bool = False) -> Iterator[Batch]:
        """Batches of this rank from sample ``start`` of ``epoch`` on; every rank gets equally many. ``pinned``: in page-locked memory, for a GPU.

        Shards of a URL are fetched ahead, one window of the plan before they are needed. InputError: a sample that cannot be read, loader
        processes that are killed, have no shared memory left, or deliver nothing for `STALLED` seconds.
        """
        ahead = self._ahead(plan, Shares(plan, epoch, start, batch=batch, rank=rank, world=world))
        options: dict[str, Any] = {"num_workers": workers, "pin_memory": pinned, "worker_init_fn": _leave_interrupts}
        others = set(multiprocessing.active_children())
        loader = iter(DataLoader(self, batch_size=None, sampler=ahead, collate_fn=None, **options))
        watch = _Watch([child for child in multiprocessing.active_children() if child not in others])
        try:
            yield from _watched(loader, watch)
        except (RuntimeError, OSError, EOFError) as error:
            if watch.stalled:
                what = f"have delivered nothing for {STALLED:g} s: is the disk or network of {self.where} stuck, or a process stopped?"
                raise InputError(f"the loader's processes {what}") from error
            if "DataLoader worker" not in str(error) and not (workers and isinstance(error, ConnectionError | EOFError)):
                raise
            raise InputError(WORKER_LOST) from error
        finally:
            if isinstance(ahead, _Ahead):
                ahead.close(wait=not watch.stalled)  # what is stuck is not waited for

    def _ahead(self, plan: "EpochPlan", shares: "Shares") -> "_Ahead | Shares":
        return _Ahead(self, plan, shares) if self.store.remote else shares


def _watched(loader: Iterator[Any], watch: "_Watch") -> Iterator[Batch]:
    """What the loader's processes deliver; the first InputError of theirs is raised here."""
    try:
        while True:
            with watch.waiting():
                got = next(loader, None)
            if got is None:
                return
            if isinstance(got, InputError):
                raise got
            yield got
    finally:
        watch.end()


class _Watch:
    """Ends loader processes for which the main one has waited longer than `STALLED` seconds.

    The loader's own timeout does not see a process that is frozen while it hands a batch over; a killed one ends every kind of waiting.
    """

    def __init__(self, processes: list[Any]) -> None:
        self.processes, self.stalled = processes, False
        self.since: float | None = None
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        if processes:
            self.thread.start()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        self.since = time.monotonic()
        try:
            yield
        finally:
            self.since = None

    def _watch(self) -> None:
        while not self.over.wait(min(1.0, STALLED / 4)):
            since = self.since
            if since is not None and time.monotonic() - since > STALLED:
                self.stalled = True
                for process in self.processes:
                    process.kill()
                return

    def end(self) -> None:
        """Stop watching. Of processes that were killed torch's signal handler raises once more, wherever this one is: it does so here, unheard."""
        self.over.set()
        if self.processes:
            self.thread.join()
        if self.stalled:
            for process in self.processes:
                with suppress(RuntimeError):
                    process.join(5)


def _leave_interrupts(_: int) -> None:
    """In a loader process: Ctrl-C is the parent's, which ends this one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class Joined(Split):
    """Several splits read as one, such as lung masks of several hospitals: their positions follow each other, labels are the number of the part.

    Raises:
        InputError: images of different sizes.
    """

    def __init__(self, parts: Sequence[Split]) -> None:
        self.parts = list(parts)
        self.masks = all(part.masks for part in parts)
        self.ends = list(accumulate(len(part) for part in parts))
        self.labels = np.repeat(np.arange(len(parts), dtype=np.int16), [len(part) for part in parts])
        self.fingerprint = hashlib.sha256("".join(part.fingerprint for part in parts).encode()).hexdigest()
        self._buffers = _Buffers()
        sizes = {part.image(0).shape: part.store.name for part in parts if len(part)}
        if len(sizes) > 1:
            raise InputError(f"images of different sizes: {', '.join(f'{w}x{h} in {name}' for (h, w), name in sizes.items())}; pack all to one --size")

    def _part(self, position: int) -> tuple[Split, int]:
        k = bisect_right(self.ends, position)
        return self.parts[k], int(position) - (self.ends[k - 1] if k else 0)

    def __len__(self) -> int:
        return self.ends[-1]

    @property
    def where(self) -> str:
        """See Split."""
        return ", ".join(part.where for part in self.parts)

    def shard_sizes(self) -> np.ndarray:
        """See Split."""
        return np.concatenate([part.shard_sizes() for part in self.parts])

    def image(self, position: int) -> np.ndarray:
        """See Split."""
        part, at = self._part(position)
        return part.image(at)

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

    def __del__(self) -> None:  # the parts close themselves
        pass

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_buffers": _Buffers()}

    def _ahead(self, plan: "EpochPlan", shares: "Shares") -> "_Ahead | Shares":
        return shares  # sets of lung masks are small: a shard of a URL is fetched when it is needed


class _Buffers:
    """Memory of batches that nobody holds any more: asking the system for new pages costs as much as a tenth of decoding."""

    def __init__(self) -> None:
        self.known: list[np.ndarray] = []
        self.idle = self._idle([np.empty(1, np.uint8)])

    @staticmethod
    def _idle(known: list[np.ndarray]) -> int:
        """References that Python counts for an array that only the list holds, asked as `get` asks: 3, from Python 3.14 on 2."""
        for array in known:
            if array.shape == (1,) and (count := sys.getrefcount(array)):
                return count
        raise AssertionError

    def get(self, shape: tuple[int, ...]) -> np.ndarray:
        """An uninitialised uint8 array. It is handed out again when the tensors made from it are gone: they hold a reference to it."""
        for array in self.known:
            if array.shape == shape and sys.getrefcount(array) == self.idle:
                return array
        array = np.empty(shape, np.uint8)
        self.known = [*self.known[-3:], array]
        return array


def _decode(data: bytearray, name: Callable[[], str], scales: Sequence[Scale] = ()) -> np.ndarray:
    """uint8 [H, W]. A gray JPEG by torchvision, which is faster and gives the same grays; the rest, and what fails, by Pillow."""
    if data[:2] == b"\xff\xd8" and 0 < _gray_jpeg_pixels(data) <= MAX_PIXELS:
        with suppress(RuntimeError):
            image: np.ndarray = decode_jpeg(torch.frombuffer(data, dtype=torch.uint8), ImageReadMode.GRAY)[0].numpy()
            return image
    return decode_image(data, name(), scales)


def _gray_jpeg_pixels(data: bytearray) -> int:
    """Width times height as the frame header says (ITU-T T.81, B.2.2); 0 where there is none, more than one component, or EXIF data that may turn it."""
    at = 2
    while at + 10 <= len(data) and data[at] == 0xFF:
        marker, length = data[at + 1], int.from_bytes(data[at + 2 : at + 4])
        if marker == 0xE1 and data[at + 4 : at + 8] == b"Exif":
            return 0
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            return int.from_bytes(data[at + 5 : at + 7]) * int.from_bytes(data[at + 7 : at + 9]) * (data[at + 9] == 1)
        at += 2 + length
    return 0


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

    def shards_ahead(self, epoch: int, start: int) -> list[int]:
        """Shards of the window that sample ``start`` lies in, then those of the next one."""
        shards, ends = self._windows(epoch)
        w = int(np.searchsorted(ends, start, side="right"))
        return [int(s) for s in shards[w * self.window : (w + 2) * self.window]]

    def _windows(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of shards, and where in the epoch each window of them ends."""
        if self._epoch is None or self._epoch[0] != epoch:
            shards = np.random.default_rng([self.seed, epoch]).permutation(len(self.sizes)) if self.shuffle else np.arange(len(self.sizes))
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


def cut(remaining: int, most: int) -> int:
    """Samples of the next of the fewest, nearly equal batches of at most ``most`` that make ``remaining``. What it leaves is cut likewise."""
    return -(-remaining // -(-remaining // most))


@dataclass
class Share:
    """What one rank reads of one global batch of ``total`` samples; ``counts`` is False for stand-ins of a rank that has nothing."""

    positions: np.ndarray
    total: int
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
        g = self.plan.order(self.epoch, start, start + cut(len(self.plan) - start, self.batch * self.world))
        mine = np.array_split(g, self.world)[self.rank]
        # Two stand-ins: a normalisation over the batch has nothing to go by with one.
        return Share(mine, len(g)) if len(mine) else Share(g[:2], len(g), counts=False)

    def __iter__(self) -> Iterator[Share]:
        return map(self.share, self.starts())

    def smallest(self) -> int:
        """Images of the smallest share of any rank that has some: what a forward in training must be able to do with."""
        batches = -(-(len(self.plan) - self.start) // (self.batch * self.world))
        return max(1, (len(self.plan) - self.start) // max(1, batches) // self.world)


class _Ahead(Sampler[Share]):
    """Hands out shares and has the shards of this window of the plan and of the next one fetched meanwhile."""

    def __init__(self, split: Split, plan: EpochPlan, shares: Shares) -> None:
        self.split, self.plan, self.shares = split, plan, shares
        self.threads: list[threading.Thread] = []
        self.queue: SimpleQueue[int | None] = SimpleQueue()
        self.asked: set[int] = set()
        self.room = split.store.room_ahead() if isinstance(split.store, Remote) else 0

    def __len__(self) -> int:
        return len(self.shares)

    def __iter__(self) -> Iterator[Share]:
        # Threads start here, after the loader has forked its workers.
        self.asked = set()
        self.threads = [threading.Thread(target=self._serve, daemon=True) for _ in range(FETCHERS)]
        for thread in self.threads:
            thread.start()
        for start in self.shares.starts():
            room = self.room
            for shard in self.plan.shards_ahead(self.shares.epoch, start):
                room -= self.split.shards[shard]["bytes"]
                if shard not in self.asked and room >= 0:
                    self.asked.add(shard)
                    self.queue.put(shard)
            yield self.shares.share(start)

    def _serve(self) -> None:
        """In a thread, which the end of the process does not wait for: fetch what is asked for until nothing more is."""
        while (shard := self.queue.get()) is not None:
            with suppress(InputError):  # whoever needs the shard tries again and says so
                self.split.store.shard(self.split.shards[shard])

    def close(self, *, wait: bool = True) -> None:
        """Drop what was not begun; with ``wait`` for the fetches under way: nothing of them is left when the next loader forks."""
        with suppress(Empty):
            while True:
                self.queue.get_nowait()
        for _ in self.threads:
            self.queue.put(None)
        if wait:
            for thread in self.threads:
                thread.join()
        self.threads = []
