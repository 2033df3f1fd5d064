"""What is in a tar, ours or another writer's, and the index of a folder of them."""

import hashlib
import re
import sys
import tarfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from shards.coarse import coarse
from shards.errors import InputError, listed
from shards.files import file_sha256, hidden
from shards.gray import Extent, choose_scales
from shards.index import ID, ROW, Indexed, hashed, mask_line, write_index
from shards.pixels import IMAGE_SUFFIXES, extent_of
from shards.sample import SILENT, SPLITS, Labels, check_key, labels_of, parse_meta, split_of_folder


def build_index(
    root: Path,
    *,
    dataset: str,
    classes: Sequence[str] | None = None,
    stored: Mapping[str, Any] | None = None,
    asked: Sequence[str] = (),
    unlisted: str = "absent",
) -> dict[str, Any]:
    """Index every tar of ``root`` (``<split>/*.tar`` or ``<split>-*.tar``): writes the tables, then ``index.json``.

    Tars of other writers need a ``json`` member with ``findings``, or a ``cls`` member with a number into ``classes``.
    ``asked``, ``unlisted``: as the index has them.
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
    more: dict[str, Any] = {"asked": list(asked), "unlisted": unlisted}
    if classes:
        more["classes"] = list(classes)
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


def index_tar(
    path: Path, classes: Sequence[str] | None = None, keys: dict[bytes, Path] | None = None
) -> tuple[Indexed, list[str]]:
    """What is in one tar, and the key of each sample; ``keys`` remembers the keys of other tars of the split.

    InputError: not a whole tar, a member that is not a plain file, a key that could leave a folder, two samples of one
    key, a sample without an image.
    """
    rows: dict[str, dict[str, int]] = {}
    said: dict[str, Labels] = {}
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
                    known = said.get(key, SILENT)
                    if not known.present:
                        known = Labels() if known == SILENT else known
                        said[key] = known._replace(present=(_class_name(raw, member, classes, path),))
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
                    labels = labels_of(meta)
                    classed_as = said.get(key, SILENT)
                    said[key] = (
                        classed_as if labels == SILENT or (classed_as.present and not labels.present) else labels
                    )
                    metas[key] = {name: meta.get(name) for name in ("patient", "boxes", "lesion_masks")}
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
    masks = [
        mask_line(i, mask.finding, small)
        for i, key in enumerate(rows)
        for mask in metas.get(key, {}).get("lesion_masks") or ()
        if (small := coarse(mask.runs.mask())) is not None
    ]
    return Indexed(table, [said.get(key, SILENT) for key in rows], ids, boxes, masks), list(rows)


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
