"""A split of packed shards, sample by sample.

Legend: n samples of a split that belong to the task, position p in 0..n-1; row: the number of a sample in the split, of the task or not.
"""

import hashlib
import os
import tarfile
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torchvision.io import ImageReadMode, decode_jpeg

from shards.errors import InputError, listed, nearest
from shards.gray import MAX_PIXELS, Scale
from shards.index import ROW
from shards.pixels import decode_image
from shards.sample import SUPPORT_DEVICES, parse_meta
from shards.store import Folder, Remote, open_store

MAX_OPEN_FILES = 64


class Split:
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

    def __reduce__(self) -> Any:
        # A loader's process that is spawned opens the index itself: rows and tables of ten million samples are 360 MB.
        return partial(Split, masks=self.masks, among=tuple(self.among)), (self.store, self.split, self.classes)


class Joined:
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


Samples = Split | Joined  # what a loader reads


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
