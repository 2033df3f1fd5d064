"""Are packed shards what their index says, does every image decode, and is nobody in two splits?"""

import hashlib
import multiprocessing
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from shards.cache import Cache
from shards.cores import cores
from shards.errors import InputError, listed
from shards.files import file_sha256
from shards.index import Indexed
from shards.pack import SMALL
from shards.pixels import decode_image
from shards.sample import parse_meta
from shards.store import Folder, Remote, open_store
from shards.tars import index_tar

# Store, shard, what the index says of it, names of the classes of .cls members.
Job = tuple[Folder | Remote, dict[str, Any], Indexed, list[str] | None]


@dataclass
class Found:
    """One shard: what is wrong with it, and key, patient and content hash of every image that decodes."""

    problems: list[str] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    patients: list[str] = field(default_factory=list)
    contents: list[bytes] = field(default_factory=list)


def verify(root: str, workers: int | None = None) -> tuple[dict[str, Any], list[str]]:
    """Check everything; returns the index and the problems, each one line.

    Checksums of tables and shards; members of the tars against the index; every image and mask decodes and they agree
    in size; findings as counted; no key twice in a split; no patient and no image, by its pixels, in two splits. Shards
    of a URL are fetched anew.
    """
    with tempfile.TemporaryDirectory(prefix="cxr-focus-verify-") as folder:
        store = open_store(root)
        if isinstance(store, Remote):  # what lies in the user's cache says nothing about the server
            store.cache = Cache(Path(folder), store.cache.limit)
        return _verify(store, workers)


def _verify(store: Folder | Remote, workers: int | None) -> tuple[dict[str, Any], list[str]]:
    from shards.dataset import Split

    index = store.index()
    problems: list[str] = []
    jobs = []
    for split, entry in index["splits"].items():
        for name, table in entry["tables"].items():
            if file_sha256(store.table(name, table)) != table["sha256"]:
                problems.append(f"{store.name}/{name}: changed since it was written; {store.remedy}")
        opened = Split(store, split)  # the cheap checks, which stop with one message
        labels = opened.findings()
        problems += [
            f"{store.name}/{split}: {problem}; {store.remedy}" for problem in _counts(entry, opened.table, labels)
        ]
        jobs += [
            (store, shard, known, index.get("classes"))
            for shard, known in zip(entry["shards"], opened.indexed(), strict=True)
        ]
    where: list[str] = [split for split, entry in index["splits"].items() for _ in entry["shards"]]
    patients: dict[str, dict[str, str]] = defaultdict(dict)
    contents: dict[bytes, dict[str, str]] = defaultdict(dict)
    keys: dict[str, set[str]] = defaultdict(set)
    images = sum(entry["samples"] for entry in index["splits"].values())
    with tqdm(total=images, desc="verifying", unit="img", mininterval=0.5, dynamic_ncols=True) as bar:
        for split, found, (_, shard, known, _) in zip(where, _each(jobs, workers, images), jobs, strict=True):
            problems += found.problems
            for key, patient, content in zip(found.keys, found.patients, found.contents, strict=True):
                name = f"{shard['name']}:{key}"
                if key in keys[split]:
                    problems.append(f"{store.name}/{name}: the key is in {split} twice; pack again")
                keys[split].add(key)
                contents[content].setdefault(split, name)
                if patient:
                    patients[patient].setdefault(split, name)
            bar.update(len(known.rows))
    for patient, seen in patients.items():
        if len(seen) > 1:
            problems.append(
                f"patient {patient} is in {' and '.join(seen)} ({listed(seen.values())}); split by patient and pack "
                "again"
            )
    for seen in contents.values():
        if len(seen) > 1:
            problems.append(
                f"the same image is in {' and '.join(seen)}: {listed(seen.values())}; remove one and pack again"
            )
    return index, problems


def _counts(entry: dict[str, Any], table: np.ndarray, labels: list[tuple[str, ...]]) -> Iterator[str]:
    """Counts of a split in the index that are not those of its tables."""
    counted = Counter(name for found in labels for name in found)
    for name in dict.fromkeys((*entry["findings"], *counted)):
        if entry["findings"].get(name, 0) != counted[name]:
            yield f"the index counts {entry['findings'].get(name, 0)} {name}, there are {counted[name]}"
    masks = int((table["mask_len"] > 0).sum())
    if entry["masks"] != masks:
        yield f"the index counts {entry['masks']} masks, there are {masks}"


def _each(jobs: list[Any], workers: int | None, images: int) -> Iterator[Found]:
    count = min(workers or (cores() if images > SMALL else 1), len(jobs))
    if count <= 1:
        yield from map(_check, jobs)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["shards.verify"])
    try:
        with ProcessPoolExecutor(count, context) as pool:
            yield from pool.map(_check, jobs)
    except BrokenProcessPool as error:
        raise InputError(
            "a verifying process was killed, most likely for want of memory; use fewer --workers"
        ) from error


def _check(job: Job) -> Found:
    for _ in range(10):
        with suppress(FileNotFoundError):  # another process made room in the cache: fetch the shard again
            return _check_shard(*job)
    return Found(
        [f"{job[0].name}/{job[1]['name']}: does not stay in the cache long enough to be read; raise CXR_FOCUS_CACHE_GB"]
    )


def _check_shard(store: Folder | Remote, shard: dict[str, Any], known: Indexed, classes: list[str] | None) -> Found:
    found, name = Found(), f"{store.name}/{shard['name']}"
    try:
        path = store.shard(shard)
        if file_sha256(path) != shard["sha256"]:
            found.problems.append(f"{name}: changed since it was indexed; copy it again, or {store.remedy}")
        there, keys = index_tar(path, classes)
    except InputError as error:
        found.problems.append(str(error))
        return found
    same = np.array_equal(there.rows, known.rows) and there.labels == known.labels
    if len(known.ids):  # of shards from before these were in the index nothing is said
        same = same and np.array_equal(there.ids, known.ids) and there.boxes == known.boxes
        same = same and there.masks == known.masks
    if not same:
        found.problems.append(f"{name}: its members are not those of the index; {store.remedy}")
        return found
    with path.open("rb") as raw:

        def member(row: Any, kind: str) -> bytes:
            raw.seek(int(row[f"{kind}_at"]))
            return raw.read(int(row[f"{kind}_len"]))

        for row, key in zip(known.rows, keys, strict=True):
            try:
                image = decode_image(member(row, "image"), f"{name}:{key}")
                meta = parse_meta(member(row, "json"), f"{name}:{key}") if row["json_len"] else {}
                if row["mask_len"] and decode_image(member(row, "mask"), f"{name}:{key} (mask)").shape != image.shape:
                    found.problems.append(f"{name}:{key}: the mask's size is not the image's; pack it again")
                if any(mask.runs.size != image.shape for mask in meta.get("lesion_masks", ())):
                    found.problems.append(f"{name}:{key}: a lesion mask's size is not the image's; pack it again")
            except InputError as error:
                found.problems.append(str(error))
                continue
            found.keys.append(key)
            found.patients.append("" if meta.get("patient") is None else str(meta["patient"]).strip())
            found.contents.append(hashlib.sha256(repr(image.shape).encode() + image.tobytes()).digest())
    return found
