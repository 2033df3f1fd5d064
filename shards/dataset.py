"""A split of packed shards, sample by sample.

Legend: n samples of a split that belong to the task, position p in 0..n-1; row: the number of a sample in the split, of
the task or not.
"""

import hashlib
import os
import tarfile
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from shards.errors import InputError, listed, nearest
from shards.index import BOX, ID, MASK, ROW, Indexed, asked_in, hashed, labels_in, mask_line
from shards.jpeg import decode
from shards.names import exact_or_known_as, lists
from shards.pixels import decode_image
from shards.rle import Runs
from shards.sample import NO_FINDING, Labels, parse_meta
from shards.store import Folder, Remote, open_store
from shards.targets import ABSENT, PRESENT, UNKNOWN, SingleLabel, Targets, Unlabelled
from shards.truth import LesionMasks, Lesions, coarse_of, from_samples, wrong_with

MAX_OPEN_FILES = 64
# Of the cache: this window of the plan and the next. What the cache made room of stays on the disk while it is open.
MAX_OPEN_REMOTE = 16


class Split:
    """One split of packed shards, as far as it belongs to a task.

    Args:
        root: folder or URL with ``index.json``, or its opened store.
        split: ``train``, ``val`` or ``test``.
        labels: what findings are to the task; names stand for one finding an image, None for all samples (for lung
            masks).
        masks: read lung masks; every sample must have one.
        of_each: above 0: only the first so many samples with each finding and as many without it, for a rehearsal.

    Raises:
        InputError: no index, an index that does not match its tars, an unknown finding, a class without samples.
    """

    def __init__(
        self,
        root: str | Path | Folder | Remote,
        split: str,
        labels: Targets | Sequence[str] | None = None,
        *,
        masks: bool = False,
        of_each: int = 0,
    ) -> None:
        self.store = root if isinstance(root, Folder | Remote) else open_store(root)
        index = self.store.index()
        if split not in index["splits"]:
            raise InputError(
                f"{self.store.name}: has no split {split!r} (it has {', '.join(index['splits'])}); pack one"
            )
        entry = index["splits"][split]
        self.split, self.masks, self.of_each = split, masks, of_each
        self.where = self.store.name  # for messages
        self.dataset: str = index["dataset"]
        self.stored: dict[str, Any] = index.get("stored", {})
        self.scales = tuple((float(low), float(high)) for low, high in self.stored.get("scales", ()))
        self.shards: list[dict[str, Any]] = entry["shards"]
        self.store.check(self.shards)
        # First sample of each shard
        self.starts = list(accumulate((shard["samples"] for shard in self.shards), initial=0))
        self.table = self._table(f"{split}.npy", ROW, entry, entry["samples"])
        self._entry, self._boxed = entry, index.get("boxed", [])
        self._version: int = index["version"]
        self._lesions: Lesions | None = None
        self._lesion_masks: LesionMasks | None = None
        self._ids: np.ndarray | None = None
        self.labels: Targets = (
            Unlabelled() if not labels else SingleLabel(labels) if isinstance(labels, Sequence) else labels
        )
        self.classes = self.labels.findings
        self.rows, self._set, self._of_set = self._select(index, entry)
        self.left_out = entry["samples"] - len(self.rows)
        if of_each:
            ways = [t[self._set] == say for t in self._of_set.T for say in (PRESENT, ABSENT)]
            few = np.unique(np.concatenate([np.flatnonzero(way)[:of_each] for way in ways]))
            self.rows, self._set = self.rows[few], self._set[few]
        digest = hashlib.sha256("".join(shard["sha256"] for shard in self.shards).encode())
        digest.update(self.labels.signature(self._of_set)[self._set].tobytes())
        digest.update(self.rows.tobytes())
        self.fingerprint = digest.hexdigest()
        self._files: OrderedDict[int, int] = OrderedDict()

    @property
    def lists_absent(self) -> bool:
        """Whether what a sample's labels do not name is absent, not unmentioned."""
        return asked_in(self.store.index()).absent

    def _table(self, name: str, dtype: Any, entry: dict[str, Any], rows: int | None) -> np.ndarray:
        path = self.store.table(name, entry["tables"].get(name, {}))
        try:
            table: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) and error.strerror else "it is no table, or damaged"
            raise InputError(f"{path}: cannot be read ({why}); {self.store.remedy}") from error
        fits = table.dtype == dtype and table.ndim == 1 and (rows is None or len(table) == rows)
        if not fits or entry["samples"] != self.starts[-1]:
            raise InputError(
                f"{path}: does not match index.json ({len(np.atleast_1d(table))} rows, {entry['samples']} expected); "
                f"{self.store.remedy}"
            )
        return table

    def _later_table(self, kind: str, dtype: Any, rows: int | None = None) -> np.ndarray | None:
        """A table that shards of an earlier version lack."""
        name = f"{self.split}.{kind}.npy"
        return self._table(name, dtype, self._entry, rows) if name in self._entry["tables"] else None

    def _select(self, index: dict[str, Any], entry: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Rows of the split that belong to the task, int64 [n]; which of its sets of targets each has, int [n]; those
        sets, int8 [sets,K].
        """
        if not self.classes:
            lacking = entry["samples"] - entry["masks"]
            if self.masks and lacking:
                raise InputError(
                    f"{self.store.name}/{self.split}: {lacking} of {entry['samples']} samples have no lung mask; "
                    "pack them with `python -m shards masks` or `python -m shards phantom`"
                )
            return np.arange(entry["samples"]), np.zeros(entry["samples"], np.uint8), np.zeros((1, 0), np.int8)
        if not index["findings"]:
            raise InputError(f"{self.store.name}: its images have no findings; are these shards of lung masks?")
        asked, where, training = asked_in(index), self.store.name, self.split == "train"
        known = tuple(dict.fromkeys((*index["findings"], *index["asked"])))
        lacking = [
            name
            for name in (self.classes if self.labels.must_be_asked(training) else ())
            if not (name == NO_FINDING and asked.absent) and exact_or_known_as(name, known, where) is None
        ]  # (No Finding: where nothing is listed)
        if lacking:
            more = f" (nor {listed(map(repr, lacking[1:]))})" if len(lacking) > 1 else ""
            close = f"{nearest(lacking[0], known)}; lists of findings are {listed(sorted(lists()), 30)}"
            raise InputError(f"{where}: has no images with finding {lacking[0]!r}{more}; {close}")
        codes, rows = self._codes(index, entry), labels_in(index)
        read = self.labels.reader(known, asked, training, where)
        targets = [read(said) for said in rows]
        of_row = np.array([target or (ABSENT,) * len(self.classes) for target in targets], np.int8).reshape(
            len(rows), len(self.classes)
        )
        belongs = np.array([target is not None for target in targets], bool)
        chosen = np.flatnonzero(belongs[codes])
        own = np.ascontiguousarray(codes[chosen])
        images = np.bincount(codes, minlength=len(rows))
        words = self.labels.lacking(rows, images, np.where(belongs[:, None], of_row, UNKNOWN), training)
        if words:
            raise InputError(
                f"{self.store.name}: the {self.split} split has {words}; pack images of it into every split, or "
                "train a task without it"
            )
        return chosen, own, of_row

    def _codes(self, index: dict[str, Any], entry: dict[str, Any]) -> np.ndarray:
        wide = len(index["labels"]) > 2**16
        codes = self._table(f"{self.split}.labels.npy", np.dtype("<u4" if wide else "<u2"), entry, entry["samples"])
        if len(codes) and codes.max() >= len(index["labels"]):
            raise InputError(
                f"{self.store.name}: {self.split}.labels.npy names labels that index.json does not have; "
                f"{self.store.remedy}"
            )
        return codes

    def said(self) -> list[Labels]:
        """The labels of every sample of the split, of the task or not, in the order of the shards."""
        index = self.store.index()
        rows = labels_in(index)
        return [rows[code] for code in self._codes(index, index["splits"][self.split])]

    def findings(self) -> list[tuple[str, ...]]:
        """Findings that are present in every sample of the split, of the task or not, in the order of the shards."""
        return [said.present for said in self.said()]

    def __len__(self) -> int:
        return len(self.rows)

    def targets(self, positions: np.ndarray | slice = slice(None)) -> np.ndarray:
        """What each sample, or each of ``positions``, has of the task's findings: int8 [n,K], see `shards.targets`."""
        return self._of_set[self._set[positions]]

    def ids(self) -> np.ndarray:
        """Hashes of the key and of the patient of each sample: `shards.index.ID` [n]."""
        known = self._later_table("ids", ID, len(self.table))
        if known is not None:
            return known[self.rows]
        if self._ids is None:
            pairs = [(hashed(self.key(p)), hashed(self.meta(p).get("patient"))) for p in range(len(self))]
            self._ids = np.array(pairs, ID)
        return self._ids

    def lesions(self) -> Lesions:
        """The lesion boxes, read once."""
        if self._lesions is None:
            self._lesions = Lesions(*self._truth("boxes", BOX, "xyxy"))
        return self._lesions

    def lesion_masks(self) -> LesionMasks:
        """The lesion masks in a few bytes each, read once; exact ones are in the samples' JSON."""
        if self._lesion_masks is None:
            self._lesion_masks = LesionMasks(*self._truth("masks", MASK))
        return self._lesion_masks

    def marks(self, names: Sequence[str]) -> tuple[Lesions, LesionMasks]:
        """Boxes and masks of what is no finding of the task, such as devices; ``finding`` counts ``names``."""
        return Lesions(*self._truth("boxes", BOX, "xyxy", names)), LesionMasks(*self._truth("masks", MASK, "", names))

    def lesion_boxes(self, position: int, finding: int) -> list[tuple[float, ...]]:
        """The boxes of a finding, by its number in the task, that a sample shows: x0 y0 x1 y1 as `Lesions`."""
        if self._lesions is None and f"{self.split}.boxes.npy" not in self._entry["tables"]:
            boxes = self.meta(position)["boxes"]
            name = exact_or_known_as(self.classes[finding], (box.finding for box in boxes), self.where)
            return [box.xyxy for box in boxes if box.finding == name]
        every = self.lesions()
        of_sample = slice(*np.searchsorted(every.position, [position, position + 1]).tolist())
        return [tuple(xyxy) for xyxy in every.xyxy[of_sample][every.finding[of_sample] == finding].tolist()]

    def lesion_runs(self, position: int, finding: int) -> list[Runs]:
        """The exact masks of a finding, by its number in the task, that a sample shows."""
        masks = self.meta(position)["lesion_masks"]
        name = exact_or_known_as(self.classes[finding], (mask.finding for mask in masks), self.where)
        return [mask.runs for mask in masks if mask.finding == name]

    def _truth(
        self, kind: str, dtype: np.dtype, column: str = "", others: Sequence[str] = ()
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the lesions in a table that are of the task, or of ``others`` in its images: position, finding, and the
        rows or their ``column``.
        """
        table, names = self._lesion_table(kind, dtype), list(self._boxed)
        if table is None and (kind == "boxes" or self._version > 2):  # of an earlier version: every sample is asked
            table, names = from_samples((self.meta(p) for p in range(len(self))), kind, dtype)
            row = self.rows[table["row"].astype(np.int64)]
        else:
            table = np.zeros(0, dtype) if table is None else table
            row = np.asarray(table["row"], np.int64)
        position = np.searchsorted(self.rows, row)
        of_task = position < len(self.rows)
        of_task[of_task] = self.rows[position[of_task]] == row[of_task]
        wanted = others or self.classes
        numbers = {exact_or_known_as(name, names, self.where): k for k, name in enumerate(wanted)}
        place = np.array([numbers.get(name, -1) for name in names] or [-1], np.int64)
        finding = place[table["finding"].astype(np.int64)]
        kept = np.flatnonzero(of_task & (finding >= 0))
        if self.classes and not others:
            kept = kept[self._of_set[self._set[position[kept]], finding[kept]] == PRESENT]
        values = table[column] if column else table
        if len(kept) < len(table):  # all of a mapped table stay where they are
            position, finding, values = position[kept], finding[kept], values[kept]
        return position, finding, values

    def _lesion_table(self, kind: str, dtype: np.dtype) -> np.ndarray | None:
        """A table of lesions, of the task or not, checked; None where the shards have none."""
        table = self._later_table(kind, dtype)
        if table is not None and (problem := wrong_with(table, len(self._boxed), len(self.table))):
            raise InputError(f"{self.store.name}: {self.split}.{kind}.npy {problem}; {self.store.remedy}")
        return table

    def indexed(self) -> Iterator[Indexed]:
        """What the index says of each shard, of the task or not; where it has no ids or lesions, there are none."""
        said, ids = self.said(), self._later_table("ids", ID, len(self.table))
        lesions = [self._lesion_table(kind, dtype) for kind, dtype in (("boxes", BOX), ("masks", MASK))]
        ends = [
            np.searchsorted(t["row"], self.starts) if t is not None else np.zeros_like(self.starts) for t in lesions
        ]
        for k, (start, stop) in enumerate(pairwise(self.starts)):
            boxes, masks = (
                t[end[k] : end[k + 1]] if t is not None else () for t, end in zip(lesions, ends, strict=True)
            )
            of_shard = np.array(ids[start:stop] if ids is not None else [], ID)
            yield Indexed(
                np.array(self.table[start:stop]),
                said[start:stop],
                of_shard,
                [(int(box["row"]) - start, self._boxed[box["finding"]], *box["xyxy"].tolist()) for box in boxes],
                [mask_line(int(m["row"]) - start, self._boxed[m["finding"]], coarse_of(m)) for m in masks],
            )

    def counts(self) -> dict[str, int]:
        """Images with each finding."""
        return dict(zip(self.classes, self.tally(PRESENT).tolist(), strict=True))

    def tally(self, target: int) -> np.ndarray:
        """How many samples have that target, by finding: int64 [K]."""
        of_row = np.bincount(self._set, minlength=len(self._of_set))
        return np.asarray(of_row @ (self._of_set == target))

    def shard_sizes(self) -> np.ndarray:
        """Samples of each shard that belong to the task: int64 [shards]."""
        return np.diff(np.searchsorted(self.rows, self.starts))

    def image(self, position: int) -> np.ndarray:
        """Radiograph: uint8 [H, W]."""
        return decode(self._member(position, "image"), lambda: self.name(position), self.scales)

    def image_lengths(self) -> np.ndarray:
        """Bytes of each radiograph as stored: int [n]."""
        return np.asarray(self.table["image_len"])[self.rows]

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
        return parse_meta(data, self.name(position)) if data else parse_meta(b"{}", "")

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
            if len(self._files) > (MAX_OPEN_REMOTE if self.store.remote else MAX_OPEN_FILES):
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
        return partial(Split, masks=self.masks, of_each=self.of_each), (self.store, self.split, self.labels)
