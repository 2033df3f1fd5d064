"""Are packed shards what their index says, does every image decode, and is nobody in two splits?"""

import hashlib
import multiprocessing
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from shards.errors import InputError, listed
from shards.pack import SMALL, cores, file_sha256, index_tar
from shards.sample import decode_image, parse_meta
from shards.store import Folder, Remote, open_store


@dataclass
class Found:
    """One shard: what is wrong with it, and key, patient and content hash of every image that decodes."""

    problems: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    patients: list[str] = field(default_factory=list)
    contents: list[bytes] = field(default_factory=list)


def verify(root: str, workers: int | None = None) -> tuple[dict[str, Any], list[str]]:
    """Check everything; returns the index and the problems, each one line.

    Checksums of tables and shards; members of the tars against the index; every image and mask decodes and they agree in
    size; findings as counted; no key twice in a split; no patient and no image, by its pixels, in two splits.
    """
    from shards.stream import Split

    store = open_store(root)
    index = store.index()
    problems: list[str] = []
    jobs = []
    for split, entry in index["splits"].items():
        for name, table in entry["tables"].items():
            if file_sha256(store.table(name, table)) != table["sha256"]:
                problems.append(f"{store.name}/{name}: changed since it was written; {store.remedy}")
        opened = Split(store, split)  # the cheap checks, which stop with one message
        labels = opened.findings()
        for shard, start, stop in zip(entry["shards"], opened.starts[:-1], opened.starts[1:], strict=True):
            jobs.append((store, shard, np.array(opened.table[start:stop]), labels[start:stop]))
    where: list[str] = [split for split, entry in index["splits"].items() for _ in entry["shards"]]
    patients: dict[str, dict[str, str]] = defaultdict(dict)
    contents: dict[bytes, dict[str, str]] = defaultdict(dict)
    keys: dict[str, set[str]] = defaultdict(set)
    images = sum(entry["samples"] for entry in index["splits"].values())
    with tqdm(total=images, desc="verifying", unit="img", mininterval=0.5, dynamic_ncols=True) as bar:
        for split, found, (_, shard, rows, _) in zip(where, _each(jobs, workers, images), jobs, strict=True):
            problems += found.problems
            for key, patient, content in zip(found.keys, found.patients, found.contents, strict=True):
                name = f"{shard['name']}:{key}"
                if key in keys[split]:
                    problems.append(f"{store.name}/{name}: the key is in {split} twice; pack again")
                keys[split].add(key)
                contents[content].setdefault(split, name)
                if patient:
                    patients[patient].setdefault(split, name)
            bar.update(len(rows))
    for patient, homes in patients.items():
        if len(homes) > 1:
            problems.append(f"patient {patient} is in {' and '.join(homes)} ({listed(homes.values())}); split by patient and pack again")
    for homes in contents.values():
        if len(homes) > 1:
            problems.append(f"the same image is in {' and '.join(homes)}: {listed(homes.values())}; remove one and pack again")
    return index, problems


def _each(jobs: list[Any], workers: int | None, images: int) -> Iterator[Found]:
    count = min(workers or (cores() if images > SMALL else 1), len(jobs))
    if count <= 1:
        yield from map(_check, jobs)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["shards.verify"])
    with ProcessPoolExecutor(count, context) as pool:
        yield from pool.map(_check, jobs)


def _check(job: tuple[Folder | Remote, dict[str, Any], np.ndarray, list[tuple[str, ...]]]) -> Found:
    store, shard, rows, findings = job
    found, name = Found(), f"{store.name}/{shard['name']}"
    try:
        path = store.shard(shard)
        if file_sha256(path) != shard["sha256"]:
            found.problems.append(f"{name}: changed since it was indexed; copy it again, or {store.remedy}")
        there, labels, keys = index_tar(path)
    except InputError as error:
        found.problems.append(str(error))
        return found
    if len(there) != len(rows) or (there != rows).any() or labels != findings:
        found.problems.append(f"{name}: its members are not those of the index; {store.remedy}")
        return found
    with path.open("rb") as raw:

        def member(row: Any, kind: str) -> bytes:
            raw.seek(int(row[f"{kind}_at"]))
            return raw.read(int(row[f"{kind}_len"]))

        for row, key in zip(rows, keys, strict=True):
            try:
                image = decode_image(member(row, "image"), f"{name}:{key}")
                meta = parse_meta(member(row, "json"), f"{name}:{key}") if row["json_len"] else {}
                if row["mask_len"] and decode_image(member(row, "mask"), f"{name}:{key} (mask)").shape != image.shape:
                    found.problems.append(f"{name}:{key}: the mask's size is not the image's; pack it again")
            except InputError as error:
                found.problems.append(str(error))
                continue
            found.keys.append(key)
            found.patients.append(str(meta.get("patient") or ""))
            found.contents.append(hashlib.sha256(repr(image.shape).encode() + image.tobytes()).digest())
    return found
