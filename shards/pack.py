"""Samples -> tar shards + index, all or nothing.

    DIR/index.json            what is here: findings, counts, shards with their sizes and checksums
    DIR/<split>/000000.tar    ordinary WebDataset shards
    DIR/<split>.npy           one row a sample: where its members lie and which findings it has

Everything is written under a temporary name beside DIR and renamed when it is whole.
"""

import hashlib
import json
import shutil
import tarfile
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from tqdm import tqdm

from shards.errors import InputError, listed
from shards.sample import IMAGE_SUFFIXES, SPLITS, Sample, check_key, encode, parse_meta

VERSION = 1
MAX_FINDINGS = 64

# One row a sample. Members are (offset of the data in the tar, bytes); a length of 0 says that there is none.
# `findings` is a set of bits, bit i standing for findings[i] of index.json.
ROW = np.dtype(
    [
        ("shard", "<u4"),
        ("image_at", "<u8"),
        ("image_len", "<u4"),
        ("json_at", "<u8"),
        ("json_len", "<u4"),
        ("mask_at", "<u8"),
        ("mask_len", "<u4"),
        ("findings", "<u8"),
    ]
)


def pack(
    samples: Iterable[tuple[str, Sample]],
    out: Path,
    *,
    dataset: str,
    total: int,
    form: str = "jpg",
    per_shard: int = 256,
) -> dict[str, Any]:
    """Write ``(split, sample)`` pairs as shards with their index to ``out``, which must not hold anything yet.

    Returns the content of ``index.json``. Whatever goes wrong, ``out`` is either whole or not there.
    """
    refuse_existing(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror}); choose a folder that can") from error
    writer = _Writer(work, form, per_shard)
    try:
        for split, sample in tqdm(samples, total=total, desc=f"packing {out.name}", unit="img", mininterval=1.0):
            writer.write(split, sample)
        writer.close()
        index = build_index(work, dataset=dataset)
        if out.exists():
            out.rmdir()  # refuse_existing made sure that it is empty
        work.rename(out)
        out.chmod(0o755)
        return index
    except OSError as error:
        raise InputError(f"--out {out}: packing stopped ({error.strerror or error}); nothing was left there") from error
    finally:
        writer.close()
        shutil.rmtree(work, ignore_errors=True)


def refuse_existing(out: Path) -> None:
    """InputError unless ``out`` is missing or an empty folder: shards are never overwritten or mixed."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out}: already holds something; choose another folder or remove this one first")


class _Writer:
    """Tars by split, ``per_shard`` samples each, the same bytes for the same samples."""

    def __init__(self, root: Path, form: str, per_shard: int) -> None:
        self.root, self.form, self.per_shard = root, form, per_shard
        self.written: Counter[str] = Counter()
        self.open: dict[str, webdataset.TarWriter] = {}
        self.keys: set[tuple[str, str]] = set()

    def write(self, split: str, sample: Sample) -> None:
        if (split, sample.key) in self.keys:
            raise InputError(f"{split}: two samples have the key {sample.key!r}; rename one of the files")
        self.keys.add((split, sample.key))
        if self.written[split] % self.per_shard == 0:
            if split in self.open:
                self.open[split].close()
            path = self.root / split / f"{self.written[split] // self.per_shard:06d}.tar"
            path.parent.mkdir(exist_ok=True)
            # Fixed owner and time: the same samples give the same bytes.
            self.open[split] = webdataset.TarWriter(str(path), encoder=False, mtime=0.0, user="", group="")
        self.open[split].write(encode(sample, self.form))
        self.written[split] += 1

    def close(self) -> None:
        while self.open:
            self.open.popitem()[1].close()


def build_index(root: Path, *, dataset: str, classes: Sequence[str] | None = None) -> dict[str, Any]:
    """Index every tar of ``root`` (``<split>/*.tar`` or ``<split>-*.tar``) and write ``index.json`` and ``<split>.npy``.

    Tars of other writers need a ``json`` member with ``findings``, or a ``cls`` member with a number into ``classes``.
    """
    splits: dict[str, Any] = {}
    findings: list[str] = []
    for split in SPLITS:
        tars = sorted(root.glob(f"{split}/*.tar")) or sorted(root.glob(f"{split}-*.tar"))
        if not tars:
            continue
        rows, shards = [], []
        for number, tar in enumerate(tars):
            part = _index_tar(tar, number, findings, classes)
            rows.append(part)
            shards.append(
                {
                    "name": tar.relative_to(root).as_posix(),
                    "bytes": tar.stat().st_size,
                    "sha256": file_sha256(tar),
                    "samples": len(part),
                }
            )
        table = np.concatenate(rows)
        np.save(root / f"{split}.npy", table)
        splits[split] = {"samples": len(table), "shards": shards}
    if not splits:
        raise InputError(f"{root}: has no shards; expected {{train,val,test}}/*.tar or {{train,val,test}}-*.tar")
    for split, entry in splits.items():
        bits = np.load(root / f"{split}.npy")["findings"]
        entry["findings"] = {name: int(((bits >> np.uint64(i)) & np.uint64(1)).sum()) for i, name in enumerate(findings)}
    index = {"version": VERSION, "dataset": dataset, "findings": findings, "splits": splits}
    text = json.dumps(index, indent=1)
    (root / "index.json.partial").write_text(text)
    (root / "index.json.partial").rename(root / "index.json")
    return index


def _index_tar(path: Path, number: int, findings: list[str], classes: Sequence[str] | None) -> np.ndarray:
    """The rows of one tar; names not met before are appended to ``findings``."""
    rows: dict[str, dict[str, int]] = {}
    try:
        with tarfile.open(path, "r:") as tar, path.open("rb") as raw:
            for member in tar:
                if not member.isfile():
                    raise InputError(f"{path}: {member.name!r} is not a plain file; repack the shard")
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")
                key = check_key(f"{folder}/{stem}" if folder else stem, str(path))
                row = rows.setdefault(key, {"shard": number})
                if f".{suffix}" in IMAGE_SUFFIXES:
                    field = "image"
                elif suffix in ("json", "cls", "mask.png"):
                    field = suffix.removesuffix(".png")
                else:
                    continue
                if field == "cls":
                    row["findings"] = 1 << _bit(_class_name(raw, member, classes, path), findings)
                    continue
                if f"{field}_len" in row:
                    raise InputError(f"{path}: the key {key!r} has two {field} members; keys must be unique")
                row[f"{field}_at"], row[f"{field}_len"] = member.offset_data, member.size
                if field == "json":
                    raw.seek(member.offset_data)
                    meta = parse_meta(raw.read(member.size), f"{path}:{member.name}")
                    row["findings"] = sum(1 << _bit(name, findings) for name in set(meta["findings"]))
    except (tarfile.TarError, EOFError) as error:
        raise InputError(f"{path}: not a whole tar file ({error}); pack or copy it again") from error
    for key, row in rows.items():
        if "image_len" not in row:
            raise InputError(f"{path}: the key {key!r} has no image member ({', '.join(IMAGE_SUFFIXES)})")
    table = np.zeros(len(rows), ROW)
    for i, row in enumerate(rows.values()):
        for name, value in row.items():
            table[name][i] = value
    return table


def _class_name(raw: Any, member: tarfile.TarInfo, classes: Sequence[str] | None, path: Path) -> str:
    raw.seek(member.offset_data)
    text = raw.read(member.size).decode(errors="replace").strip()
    if classes is None or not text.isdecimal() or int(text) >= len(classes):
        raise InputError(f"{path}:{member.name}: class {text!r} has no name; give --findings with one name for each class")
    return classes[int(text)]


def _bit(name: str, findings: list[str]) -> int:
    if name not in findings:
        if len(findings) == MAX_FINDINGS:
            raise InputError(f"more than {MAX_FINDINGS} findings ({listed(findings)}); are these class names?")
        findings.append(name)
    return findings.index(name)


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
