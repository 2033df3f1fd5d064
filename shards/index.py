"""THE format of packed shards: what ``index.json`` and its tables say, reading and writing them.

DIR/index.json           what is here: findings, counts, shards with their sizes and checksums
DIR/<split>/000000.tar   ordinary WebDataset shards
DIR/<split>.npy          one row a sample: where its members lie
DIR/<split>.labels.npy   one number a sample: its row of ``labels`` in index.json, where each different one stands once
DIR/<split>.boxes.npy    one row a lesion box, in the order of the samples
DIR/<split>.masks.npy    one row a lesion mask, in a few bytes (`shards.coarse`), likewise
DIR/<split>.ids.npy      one row a sample: hashes of its key and its patient

The last three say what the samples' JSON says, so that nobody has to read ten million of them. Shards from before they
were written lack them.

A row of ``labels`` has the names of findings, absent, uncertain, as far as there are any. ``asked`` are the findings
that the source was asked for, ``unlisted`` is what one of them is that a sample does not list: absent or unknown. In
version 2 a row is the list of findings, and all others are absent.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shards import atomic
from shards.coarse import BYTES, CoarseMask
from shards.errors import InputError
from shards.files import SHA256, file_sha256
from shards.sample import SILENT, SPLITS, Asked, Labels

VERSION = 3
READABLE = (2, 3)
MOST_LABELS = 2**20  # different rows of labels; an archive of 200 findings and 160,000 images has 50,000
UNLISTED = ("absent", "unknown")
LABELS = ("findings", "absent", "uncertain")  # of a sample's JSON, and of a row of ``labels``

# One row a sample. Members are (offset of the data in the tar, bytes); a length of 0 says that there is none.
ROW = np.dtype(
    [
        ("image_at", "<u8"),
        ("image_len", "<u4"),
        ("json_at", "<u8"),
        ("json_len", "<u4"),
        ("mask_at", "<u8"),
        ("mask_len", "<u4"),
    ]
)

# Finding: a number into ``boxed`` of index.json. A mask's row is that of `CoarseMask`.
BOX = np.dtype([("row", "<u4"), ("finding", "<u2"), ("xyxy", "<f8", (4,))])
MASK = np.dtype([("row", "<u4"), ("finding", "<u2"), ("xyxy", "<u2", (4,)), ("cut", "u1"), ("cells", "u1", (BYTES,))])
ID = np.dtype([("key", "<u8"), ("patient", "<u8")])  # `hashed`


class Indexed(NamedTuple):
    """What an index says of some samples, n of them.

    rows: `ROW` [n]; labels: of each sample; ids: `ID` [n]; boxes: of lesions, each with the sample's number here, its
    finding, x0, y0, x1, y1; masks: of lesions, each with the sample's number, its finding, x0, y0, x1, y1, its cut, its
    cells as hexadecimal digits.
    """

    rows: np.ndarray
    labels: list[Labels]
    ids: np.ndarray
    boxes: list[tuple[int, str, float, float, float, float]]
    masks: list[tuple[int, str, int, int, int, int, int, str]]

    def note(self) -> dict[str, Any]:
        """As JSON."""
        return self._asdict() | {"rows": self.rows.tolist(), "ids": self.ids.tolist()}

    @classmethod
    def of(cls, note: Mapping[str, Any]) -> "Indexed":
        """From the JSON."""
        rows, ids = (np.array([tuple(row) for row in note[name]], kind) for name, kind in (("rows", ROW), ("ids", ID)))
        labels = [Labels(*map(tuple, said)) for said in note["labels"]]
        return cls(rows, labels, ids, *([tuple(lesion) for lesion in note[name]] for name in ("boxes", "masks")))


def mask_line(number: int, finding: str, mask: CoarseMask) -> tuple[int, str, int, int, int, int, int, str]:
    """A mask of sample ``number`` as `Indexed` has it."""
    return (number, finding, *mask.xyxy, mask.cut, mask.cells.tobytes().hex())


def hashed(text: Any) -> int:
    """64 bits of a key or of a patient's ID, as `ID` has them; 0 for none."""
    text = "" if text is None else str(text).strip()
    return (
        int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")
        if text
        else 0
    )


def write_index(
    root: Path,
    dataset: str,
    classes: Sequence[str],
    shards: dict[str, list[dict[str, Any]]],
    parts: dict[str, list[Indexed]],
    more: dict[str, Any],
) -> dict[str, Any]:
    """Write the tables, then ``index.json``, into the folder of the shards; returns the content of the latter.

    Args:
        shards, parts: by split: its shards as they stand in the index, and what is in each.
        classes: findings in the order of the index; others follow.
        more: what else the index says, ``asked`` and ``unlisted`` among it; without these all findings were asked for,
            and what is not listed is absent.
    """
    number: dict[Labels, int] = {}
    boxed: dict[str, int] = {}
    splits: dict[str, Any] = {}
    names = dict.fromkeys(classes)
    said = {split: [labels for part in parts[split] for labels in part.labels] for split in SPLITS if shards[split]}
    codes = {
        split: np.array([number.setdefault(labels, len(number)) for labels in rows]) for split, rows in said.items()
    }
    if len(number) > MOST_LABELS:
        raise InputError(f"{root}: more than {MOST_LABELS} different sets of findings; are these class names?")
    for split in (s for s in SPLITS if shards[s]):
        table = np.concatenate([part.rows for part in parts[split]])
        boxes, masks = _lesions(parts[split], boxed)
        counts = Counter(name for labels in said[split] for name in labels.present)
        names.update(dict.fromkeys(counts))
        splits[split] = {
            "samples": len(table),
            "masks": int((table["mask_len"] > 0).sum()),
            "findings": counts,
            "shards": shards[split],
        }
        of_split = {
            "": table,
            ".labels": codes[split].astype("<u2" if len(number) <= 2**16 else "<u4"),
            ".boxes": boxes,
            ".masks": masks,
            ".ids": np.concatenate([part.ids for part in parts[split]]),
        }
        for file, array in ((f"{split}{kind}.npy", array) for kind, array in of_split.items()):
            with atomic.whole(root / file) as partial, partial.open("wb") as raw:
                np.save(raw, array)
            splits[split].setdefault("tables", {})[file] = {
                "bytes": (root / file).stat().st_size,
                "sha256": file_sha256(root / file),
            }
    names.update(dict.fromkeys(filter(None, (n for labels in number for n in (*labels.absent, *labels.uncertain)))))
    for entry in splits.values():
        entry["findings"] = {name: entry["findings"][name] for name in names}
    known = {
        "version": VERSION,
        "dataset": dataset,
        "findings": list(names),
        "asked": [],
        "unlisted": UNLISTED[0],
        "labels": [
            {name: list(found) for name, found in zip(LABELS, labels, strict=True) if found} for labels in number
        ],
        "boxed": list(boxed),
    }
    index = {**known, **more, "splits": splits}
    index["asked"] = index["asked"] or list(names)
    atomic.write(root / "index.json", json.dumps(index, indent=1))
    return index


def _lesions(parts: Sequence[Indexed], boxed: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """`BOX` and `MASK` of all parts of a split; ``boxed`` numbers the findings."""
    start, boxes, masks = 0, [np.zeros(0, BOX)], [np.zeros(0, MASK)]

    def numbered(finding: str) -> int:
        return boxed.setdefault(finding, len(boxed))

    for part in parts:
        boxes.append(np.array([(start + n, numbered(name), tuple(xyxy)) for n, name, *xyxy in part.boxes], BOX))
        lines = [
            (start + n, numbered(name), (x0, y0, x1, y1), cut, np.frombuffer(bytes.fromhex(cells), np.uint8))
            for n, name, x0, y0, x1, y1, cut, cells in part.masks
        ]
        masks.append(np.array(lines, MASK))
        start += len(part.rows)
    if len(boxed) > np.iinfo(BOX["finding"]).max:
        raise InputError(f"lesions of {len(boxed)} different findings; are these names of findings?")
    return np.concatenate(boxes), np.concatenate(masks)


def labels_in(index: Mapping[str, Any]) -> list[Labels]:
    """The different rows of labels of an index, by their number."""
    return [Labels(*(tuple(labels.get(name, ())) for name in LABELS)) for labels in index["labels"]]


def asked_in(index: Mapping[str, Any]) -> Asked:
    """What the source of an index was asked for."""
    return Asked(frozenset(index["asked"]), index["unlisted"] == UNLISTED[0])


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def parse_index(text: str | bytes, where: str, remedy: str) -> dict[str, Any]:
    """``index.json``, checked for its version, its types, and names that would leave the folder."""
    try:
        index = json.loads(text)
        if index["version"] not in READABLE:
            raise InputError(f"{where}: version {index['version']}, expected {VERSION}; {remedy}")
        if index["version"] == 2:  # of before there were absent and uncertain findings
            index["labels"] = [
                {LABELS[0]: found} if found else dict(zip(LABELS, map(list, SILENT), strict=True))
                for found in index["labels"]
            ]
            index |= {"asked": index["findings"], "unlisted": UNLISTED[0]}
        if not (
            isinstance(index["splits"], dict)
            and _are_names(index["findings"])
            and isinstance(index["dataset"], str)
            and _are_names(index.get("boxed", []))
            and _are_names(index["asked"])
            and index["unlisted"] in UNLISTED
            and isinstance(index["labels"], list)
            and all(_are_names(labels.get(name, [])) for labels in index["labels"] for name in LABELS)
        ):
            raise ValueError("wrong types")
        for entry in index["splits"].values():
            for shard in entry["shards"]:
                if not all(isinstance(shard[name], int) for name in ("bytes", "samples")) or not SHA256.fullmatch(
                    shard["sha256"]
                ):
                    raise ValueError(f"the shard {shard['name']!r} lacks its size or checksum")
            for name, table in entry["tables"].items():
                if not isinstance(table["bytes"], int) or not SHA256.fullmatch(table["sha256"]):
                    raise ValueError(f"the table {name!r} lacks its size or checksum")
            if not isinstance(entry["samples"], int):
                raise ValueError("samples must be a number")
            for name in (*(shard["name"] for shard in entry["shards"]), *entry["tables"]):
                if name.startswith("/") or "\\" in name or ".." in name.split("/"):
                    raise InputError(f"{where}: the shard {name!r} lies outside the folder; {remedy}")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{where}: is not an index ({str(error).splitlines()[0]}); {remedy}") from error
    return index  # type: ignore[no-any-return]
