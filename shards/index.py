"""THE format of packed shards: what ``index.json`` and its tables say, reading and writing them, and indexing tars of
other writers.

DIR/index.json           what is here: findings, counts, shards with their sizes and checksums
DIR/<split>/000000.tar   ordinary WebDataset shards
DIR/<split>.npy          one row a sample: where its members lie
DIR/<split>.labels.npy   one number a sample: its set of findings, as in ``labels`` of index.json
DIR/<split>.boxes.npy    one row a lesion box, in the order of the samples
DIR/<split>.ids.npy      one row a sample: hashes of its key and its patient

The last two say what the samples' JSON says, so that nobody has to read ten million of them. Shards from before they
were written lack them.
"""

import hashlib
import json
import re
import sys
import tarfile
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from shards import atomic
from shards.errors import InputError, listed
from shards.files import SHA256, file_sha256, hidden
from shards.gray import Extent, choose_scales
from shards.pixels import IMAGE_SUFFIXES, extent_of
from shards.sample import SPLITS, check_key, parse_meta, split_of_folder

VERSION = 2

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

# Finding: a number into ``boxed`` of index.json
BOX = np.dtype([("row", "<u4"), ("finding", "<u2"), ("xyxy", "<f8", (4,))])
ID = np.dtype([("key", "<u8"), ("patient", "<u8")])  # `hashed`


class Indexed(NamedTuple):
    """What an index says of some samples, n of them.

    rows: `ROW` [n]; findings: of each sample; ids: `ID` [n]; boxes: of lesions, each with the sample's number here, its
    finding, x0, y0, x1, y1.
    """

    rows: np.ndarray
    findings: list[tuple[str, ...]]
    ids: np.ndarray
    boxes: list[tuple[int, str, float, float, float, float]]

    def note(self) -> dict[str, Any]:
        """As JSON."""
        return {"rows": self.rows.tolist(), "findings": self.findings, "ids": self.ids.tolist(), "boxes": self.boxes}

    @classmethod
    def of(cls, note: Mapping[str, Any]) -> "Indexed":
        """From the JSON."""
        rows, ids = (np.array([tuple(row) for row in note[name]], kind) for name, kind in (("rows", ROW), ("ids", ID)))
        return cls(rows, [tuple(found) for found in note["findings"]], ids, [tuple(box) for box in note["boxes"]])


def hashed(text: Any) -> int:
    """64 bits of a key or of a patient's ID, as `ID` has them; 0 for none."""
    text = "" if text is None else str(text).strip()
    return (
        int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest(), "little")
        if text
        else 0
    )


def build_index(
    root: Path, *, dataset: str, classes: Sequence[str] | None = None, stored: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Index every tar of ``root`` (``<split>/*.tar`` or ``<split>-*.tar``): writes the tables, then ``index.json``.

    Tars of other writers need a ``json`` member with ``findings``, or a ``cls`` member with a number into ``classes``.
    """
    tars = _tars(root)
    if not any(tars.values()):
        raise InputError(f"{root}: has no shards; expected {{train,val,test}}/*.tar or {{train,val,test}}-*.tar")
    shards: dict[str, list[dict[str, Any]]] = defaultdict(list)
    parts: dict[str, list[Indexed]] = defaultdict(list)
    deep: list[Extent] = []
    with tqdm(total=sum(map(len, tars.values())), desc=f"indexing {root.name}", unit="tar", mininterval=0.5) as bar:
        for split, paths in tars.items():
            keys: dict[bytes, Path] = {}
            for path in paths:
                part, _ = index_tar(path, classes, keys)
                deep += _extents(path, part.rows)
                name = path.relative_to(root).as_posix()
                shards[split].append(
                    {"name": name, "bytes": path.stat().st_size, "sha256": file_sha256(path), "samples": len(part.rows)}
                )
                parts[split].append(part)
                bar.update()
    more: dict[str, Any] = {"classes": list(classes)} if classes else {}
    if stored or deep:
        scales = {"scales": [list(scale) for scale in choose_scales(deep)]} if deep else {}
        more["stored"] = dict(stored or {}) | scales
    return write_index(root, dataset, [], shards, parts, more)


def _extents(path: Path, rows: np.ndarray) -> list[Extent]:
    """Of the images of a tar that have more than 8 bits."""
    with path.open("rb") as raw:

        def member(row: Any) -> bytes:
            raw.seek(int(row["image_at"]))
            return raw.read(int(row["image_len"]))

        return [e for row in rows if (e := extent_of(member(row), str(path))) is not None]


def _tars(root: Path) -> dict[str, list[Path]]:
    """The tars of each split: in a folder of its name, or with it before the first ``-`` or ``_`` of their own."""
    tars: dict[str, list[Path]] = {split: [] for split in SPLITS}
    for path in sorted(root.iterdir()):
        if path.is_dir() and (split := split_of_folder(path.name)):
            tars[split] += sorted(p for p in path.glob("*.tar") if not hidden(p.name))
        elif path.suffix == ".tar" and (split := split_of_folder(re.split("[-_.]", path.name)[0])):
            tars[split].append(path)
    return tars


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
        more: what else the index says.
    """
    number: dict[tuple[str, ...], int] = {}
    boxed: dict[str, int] = {}
    splits: dict[str, Any] = {}
    names = dict.fromkeys(classes)
    for split in (s for s in SPLITS if shards[s]):
        table = np.concatenate([part.rows for part in parts[split]])
        findings = [found for part in parts[split] for found in part.findings]
        labels = np.array([number.setdefault(found, len(number)) for found in findings])
        boxes = _boxes(parts[split], boxed)
        if len(number) > np.iinfo(np.uint16).max:
            raise InputError(
                f"{root}: more than {np.iinfo(np.uint16).max} different sets of findings; are these class names?"
            )
        counts = Counter(name for found in findings for name in found)
        names.update(dict.fromkeys(counts))
        splits[split] = {
            "samples": len(table),
            "masks": int((table["mask_len"] > 0).sum()),
            "findings": counts,
            "shards": shards[split],
        }
        of_split = {
            "": table,
            ".labels": labels.astype("<u2"),
            ".boxes": boxes,
            ".ids": np.concatenate([part.ids for part in parts[split]]),
        }
        for file, array in ((f"{split}{kind}.npy", array) for kind, array in of_split.items()):
            with atomic.whole(root / file) as partial, partial.open("wb") as raw:
                np.save(raw, array)
            splits[split].setdefault("tables", {})[file] = {
                "bytes": (root / file).stat().st_size,
                "sha256": file_sha256(root / file),
            }
    for entry in splits.values():
        entry["findings"] = {name: entry["findings"][name] for name in names}
    known = {
        "version": VERSION,
        "dataset": dataset,
        "findings": list(names),
        "labels": [list(found) for found in number],
        "boxed": list(boxed),
    }
    index = {**known, **more, "splits": splits}
    atomic.write(root / "index.json", json.dumps(index, indent=1))
    return index


def _boxes(parts: Sequence[Indexed], boxed: dict[str, int]) -> np.ndarray:
    """`BOX` of all parts of a split; ``boxed`` numbers the findings."""
    start, tables = 0, [np.zeros(0, BOX)]
    for part in parts:
        lines = [
            (start + row, boxed.setdefault(finding, len(boxed)), tuple(xyxy)) for row, finding, *xyxy in part.boxes
        ]
        if len(boxed) > np.iinfo(BOX["finding"]).max:
            raise InputError(f"lesion boxes of {len(boxed)} different findings; are these names of findings?")
        tables.append(np.array(lines, BOX))
        start += len(part.rows)
    return np.concatenate(tables)


def index_tar(
    path: Path, classes: Sequence[str] | None = None, keys: dict[bytes, Path] | None = None
) -> tuple[Indexed, list[str]]:
    """What is in one tar, and the key of each sample; ``keys`` remembers the keys of other tars of the split.

    InputError: not a whole tar, a member that is not a plain file, a key that could leave a folder, two samples of one
    key, a sample without an image.
    """
    rows: dict[str, dict[str, int]] = {}
    found: dict[str, tuple[str, ...]] = {}
    metas: dict[str, dict[str, Any]] = {}
    classed: set[str] = set()  # keys with a .cls member
    named: dict[tuple[str, str], str] = {}  # the suffix of the member that a row has
    end = 0
    try:
        if not path.is_file():  # a pipe would wait for ever
            raise tarfile.ReadError("not a file")
        with tarfile.open(path, "r:") as tar, path.open("rb") as raw:
            for member in tar:
                if member.isdir():
                    continue
                if not member.isfile():
                    raise InputError(f"{path}: {member.name!r} is not a plain file; repack the shard")
                end = member.offset_data + member.size
                folder, _, name = member.name.removeprefix("./").rpartition("/")
                stem, _, suffix = name.partition(".")
                suffix = suffix.lower()
                # `._x.png` of macOS, and webdataset's own entries: no reader takes them for samples.
                if not stem or (stem.startswith("__") and name.endswith("__")):
                    continue
                key = check_key(f"{folder}/{stem}" if folder else stem, str(path))
                field = _field(suffix)
                if not field:
                    continue
                row = rows.setdefault(key, {})
                if field == "cls":
                    classed.add(key)
                    found[key] = found.get(key) or (_class_name(raw, member, classes, path),)
                    continue
                if f"{field}_len" in row:
                    if "." not in suffix and "." in named[key, field]:
                        pass  # `key.jpg` is the image, `key.overlay.jpg` beside it is not
                    elif "." in suffix and "." not in named[key, field]:
                        continue
                    else:
                        raise InputError(f"{path}: the key {key!r} has two {field} members; keys must be unique")
                named[key, field] = suffix
                row[f"{field}_at"], row[f"{field}_len"] = member.offset_data, member.size
                if field == "json":
                    raw.seek(member.offset_data)
                    meta = parse_meta(raw.read(member.size), f"{path}:{member.name}")
                    found[key] = tuple(dict.fromkeys(meta["findings"])) or found.get(key, ())
                    metas[key] = {name: meta.get(name) for name in ("patient", "boxes")}
            # tarfile takes a broken header for the end of the file: there must be nothing but zeros from here on.
            raw.seek(tar.offset)
            rest = raw.read(tarfile.BLOCKSIZE)
            whole = len(rest) == tarfile.BLOCKSIZE and not any(rest)
            while whole and (rest := raw.read(2**20)):
                whole = not any(rest)
        if end > path.stat().st_size or not whole:
            raise tarfile.ReadError(f"cut or damaged after {len(rows)} samples")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InputError(f"{path}: not a whole tar file ({error}); pack or copy it again") from error
    alone = [
        key for key, row in rows.items() if "image_len" not in row and "mask_len" not in row and key not in classed
    ]
    if alone and len(alone) < len(rows):  # such as dataset_info.json: of no sample
        print(f"note: {path}: {len(alone)} files without an image are no samples: {listed(alone)}", file=sys.stderr)
        for key in alone:
            del rows[key]
    table = np.zeros(len(rows), ROW)
    for i, (key, row) in enumerate(rows.items()):
        if "image_len" not in row:
            raise InputError(f"{path}: the key {key!r} has no image member ({', '.join(IMAGE_SUFFIXES)})")
        if row["image_len"] >= 2**32 or row.get("json_len", 0) >= 2**32:
            raise InputError(f"{path}: the key {key!r} has a member of 4 GB or more; is it an image?")
        if keys is not None:
            digest = hashlib.blake2b(key.encode(), digest_size=12).digest()
            if digest in keys:
                raise InputError(
                    f"{path}: the key {key!r} is in {keys[digest].name}, too; keys must be unique within a split"
                )
            keys[digest] = path
        for field, value in row.items():
            table[field][i] = value
    ids = np.array([(hashed(key), hashed(metas.get(key, {}).get("patient"))) for key in rows], ID)
    boxes = [(i, box.finding, *box.xyxy) for i, key in enumerate(rows) for box in metas.get(key, {}).get("boxes") or ()]
    return Indexed(table, [found.get(key, ()) for key in rows], ids, boxes), list(rows)


def _field(suffix: str) -> str:
    """What a member is by its suffix, as webdataset reads it, by its last part: image, mask, json, cls, or nothing of
    ours.
    """
    if suffix in ("json", "cls"):
        return suffix
    if suffix == "mask.png":
        return "mask"
    return (
        "image"
        if f".{suffix.rpartition('.')[2]}" in IMAGE_SUFFIXES and not suffix.startswith(("mask.", "seg."))
        else ""
    )


def _class_name(raw: Any, member: tarfile.TarInfo, classes: Sequence[str] | None, path: Path) -> str:
    raw.seek(member.offset_data)
    text = raw.read(member.size).decode(errors="replace").strip()
    if classes is None or not text.isdecimal() or int(text) >= len(classes):
        raise InputError(
            f"{path}:{member.name}: class {text!r} has no name; give --findings with one name for each class"
        )
    return classes[int(text)]


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def parse_index(text: str | bytes, where: str, remedy: str) -> dict[str, Any]:
    """``index.json``, checked for its version, its types, and names that would leave the folder."""
    try:
        index = json.loads(text)
        if index["version"] != VERSION:
            raise InputError(f"{where}: version {index['version']}, expected {VERSION}; {remedy}")
        if not (
            isinstance(index["splits"], dict)
            and _are_names(index["findings"])
            and isinstance(index["dataset"], str)
            and _are_names(index.get("boxed", []))
            and isinstance(index["labels"], list)
            and all(map(_are_names, index["labels"]))
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
