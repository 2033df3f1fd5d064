"""Items -> tar shards + index: in parallel, the same bytes for the same input, and to be interrupted at any moment.

    DIR/index.json           what is here: findings, counts, shards with their sizes and checksums
    DIR/<split>/000000.tar   ordinary WebDataset shards
    DIR/<split>.npy          one row a sample: where its members lie
    DIR/<split>.labels.npy   one number a sample: its set of findings, as in ``labels`` of index.json

Shards are made in ``DIR.partial/shards``, each under a temporary name until it is whole; a note in ``DIR.partial/notes`` says
from what it was made. Run again, finished shards whose input is still the same are kept. The index comes last, then that
folder gets the name DIR, which is whole or not there.
"""

import fcntl
import hashlib
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import tarfile
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

import numpy as np
import webdataset
from tqdm import tqdm

from shards.atomic import sync
from shards.errors import InputError, listed, read_json
from shards.pixels import IMAGE_SUFFIXES, Extent, choose_scales, extent, extent_of, scale_of
from shards.sample import SPLITS, check_key, encode, parse_meta
from shards.sources import Source, hidden, split_of_folder

VERSION = 2
SHARDS, NOTES = "shards", "notes"  # in the working folder
SMALL = 400  # items below which starting processes costs more than it saves

# One row a sample. Members are (offset of the data in the tar, bytes); a length of 0 says that there is none.
ROW = np.dtype([("image_at", "<u8"), ("image_len", "<u4"), ("json_at", "<u8"), ("json_len", "<u4"), ("mask_at", "<u8"), ("mask_len", "<u4")])


@dataclass(frozen=True)
class Job:
    """One shard: items ``start`` to ``stop`` of the source."""

    split: str
    number: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """Its path below the folder."""
        return f"{self.split}/{self.number:06d}.tar"


def pack(
    source: Source,
    out: Path,
    *,
    dataset: str,
    form: str = "jpg",
    per_shard: int = 256,
    workers: int | None = None,
    on_bad: str = "stop",
    part: tuple[int, int] | None = None,
) -> dict[str, Any] | None:
    """Write the source's items as shards with their index to ``out``, which must not hold anything yet.

    Args:
        source: items and how to load them.
        out: folder to make.
        dataset: its name in reports.
        form: ``jpg``, ``png`` or ``webp``.
        per_shard: samples in a tar.
        workers: processes; None: one for each core, or none where there is little to do.
        on_bad: ``stop`` at a sample that cannot be loaded, or ``skip`` it and write down why.
        part: (i, n): only every n-th shard from the i-th on, i from 1; `merge` makes the whole.

    Returns:
        The content of ``index.json``; None for a part.

    Raises:
        InputError: something is there already, two samples with one key, a bad sample, a disk that is full. Finished
            shards stay in ``out.partial``, and the same command goes on from there.
    """
    refuse_existing(out)
    jobs = _jobs(source, per_shard)
    work = _work_folder(out)
    _set_scales(source, workers)
    packer = _Packer(source, work, form, on_bad)
    plan = {"version": VERSION, "dataset": dataset, "classes": list(source.classes), "stored": source.settings() | {"format": form}}
    plan["left_out"] = source.skipped
    plan["shards"] = [job.name for job in jobs]
    digest = hashlib.sha256()
    for item in source.items:
        digest.update(repr(item).encode(errors="surrogateescape"))
    plan["items"] = digest.hexdigest()  # parts of other items, such as other splits of the same patients, do not go together
    text = json.dumps(plan, indent=1, default=list)
    with _claimed(work, shared=part is not None):
        try:
            _agree(work, text, part)
            mine = [job for n, job in enumerate(jobs) if part is None or n % part[1] == part[0] - 1]
            for split in {job.split for job in mine}:
                (work / SHARDS / split).mkdir(parents=True, exist_ok=True)
            (work / NOTES).mkdir(exist_ok=True)
            _run(packer, mine, min(workers or cores(), len(mine)) if workers or len(source.items) > SMALL else 1, out, part)
            return merge(out) if part is None else None
        except OSError as error:
            raise InputError(f"--out {out}: cannot be written ({error.strerror or error}); {_kept(work)}") from error
        except InputError as error:
            raise InputError(f"{error}; {_kept(work)}") from error
        except KeyboardInterrupt:
            print(f"\n{_kept(work)}", file=sys.stderr)
            raise


def _work_folder(out: Path) -> Path:
    out = Path(os.path.abspath(out))
    return out.with_name(out.name + ".partial")


def _note(work: Path, name: str) -> Path:
    """The note of the shard ``train/000000.tar``."""
    return work / NOTES / f"{name.replace('/', '-')}.json"


def refuse_existing(out: Path) -> None:
    """InputError unless ``out`` is missing or an empty folder that can be replaced: shards are never overwritten or mixed."""
    if out.is_symlink():
        raise InputError(f"--out {out}: is a link; name the folder itself")
    if out.is_dir() and (os.path.ismount(out) or out.resolve() == Path.cwd()):
        what = "a mounted volume" if os.path.ismount(out) else "the working folder"
        raise InputError(f"--out {out}: is {what}, which cannot be replaced in one step; name a folder inside it, such as {out / 'shards'}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out}: already holds something; choose another folder or remove this one first")


def _jobs(source: Source, per_shard: int) -> list[Job]:
    """Which items make which shard: fixed before anything is written, so the number of workers does not matter."""
    seen: dict[tuple[str, str], str] = {}
    same = []
    for item in source.items:
        check_key(item.key, item.image or "phantom")
        place = item.split, item.key
        if place in seen:
            same.append(f"{item.image} and {seen[place]} ({item.split}, {item.key!r})")
        seen[place] = item.image
        for name in item.findings:
            if "," in name:
                raise InputError(f"{item.image}: the finding {name!r} must not hold a comma, which separates the findings of a --task; rename it")
    if same:
        raise InputError(f"{len(same)} images would have the same key as another: {listed(same)}; rename one of each")
    jobs, start = [], 0
    for split in SPLITS:
        stop = start + sum(item.split == split for item in source.items)
        jobs += [Job(split, n, at, min(at + per_shard, stop)) for n, at in enumerate(range(start, stop, per_shard))]
        start = stop
    assert start == len(source.items)  # a source lists train, then val, then test
    return jobs


def _set_scales(source: Source, workers: int | None) -> None:
    """How values of more than 8 bits become gray, for the whole set: as ``--bits`` says, or from the values of all images."""
    if source.bits is not None:
        source.scales = ((0.0, 2.0**source.bits - 1),)
        return
    paths = [item.image for item in source.items if item.image]
    if len(paths) <= SMALL or workers == 1:
        found = [extent(path) for path in paths]
    else:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["shards.pack"])
        try:
            with ProcessPoolExecutor(workers or cores(), context) as pool:
                found = list(tqdm(pool.map(extent, paths, chunksize=64), desc="bit depths", total=len(paths), unit="img", delay=5, dynamic_ncols=True))
        except BrokenProcessPool as error:
            raise InputError("a process was killed, most likely for want of memory; use fewer --workers, or say the depth with --bits") from error
    deep = [e for e in found if e is not None]
    source.scales = choose_scales(deep)
    for scale in source.scales:
        of = sum(scale_of(e, source.scales) == scale for e in deep)
        source.notes.append(f"{of} images of more than 8 bits: {scale[0]:g} is black, {scale[1]:g} is white; another depth: --bits")


@contextmanager
def _claimed(work: Path, *, shared: bool) -> Iterator[None]:
    """The working folder, locked; removed when it is left without a finished shard. Only parts share it."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = os.open(work / ".lock", os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise InputError(f"--out {work.with_suffix('')}: cannot be written ({error.strerror or error}); choose a folder that can") from error
    try:
        if not _lock(lock, fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
            raise InputError(f"{work}: another process is packing there; wait for it, or choose another --out")
        yield
    finally:
        if work.is_dir() and not any(work.glob(f"{NOTES}/*.json")) and _lock(lock, fcntl.LOCK_EX):
            shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


def _lock(descriptor: int, how: int) -> bool:
    """Whether the lock was to be had at once."""
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True


def _agree(work: Path, plan: str, part: tuple[int, int] | None) -> None:
    """Write the plan; parts must have the same one. A whole run replaces an older plan: shards that still fit it are kept."""
    path = work / "plan.json"
    if part is not None and path.is_file() and path.read_text() != plan:
        raise InputError(f"{work}: was begun with other settings or other files; use the same command for every part, or remove the folder")
    if path.is_file() and path.read_text() != plan:
        print(f"note: {work} was begun with other settings or files; finished shards that do not fit are made again", file=sys.stderr)
    if not path.is_file() or path.read_text() != plan:
        _write(path, plan.encode())


def _kept(work: Path) -> str:
    done = len(list(work.glob(f"{NOTES}/*.json"))) if work.is_dir() else 0
    if not done:
        return "nothing was left there"
    return f"{done} finished shards are kept in {work}: the same command goes on from there"


def _run(packer: "_Packer", mine: list[Job], workers: int, out: Path, part: tuple[int, int] | None) -> None:
    """Make the shards, show the rate and what was skipped."""
    name = out.name if part is None else f"{out.name} {part[0]}/{part[1]}"
    with tqdm(total=sum(job.stop - job.start for job in mine), desc=f"packing {name}", unit="img", mininterval=0.5, dynamic_ncols=True) as bar:
        skipped = 0

        def finished(done: dict[str, Any]) -> None:
            nonlocal skipped
            skipped += len(done["skipped"])
            if skipped:
                bar.set_postfix(skipped=skipped, refresh=False)

        if workers <= 1:
            for job in mine:
                finished(packer.shard(job, lambda: bar.update()))
        else:
            _run_parallel(packer, mine, workers, bar, finished)


def _run_parallel(packer: "_Packer", mine: list[Job], workers: int, bar: Any, finished: Any) -> None:
    context = multiprocessing.get_context("forkserver")  # clean processes: no threads of this one, no open files
    context.set_forkserver_preload(["shards.pack"])
    count = context.Value("Q", 0)
    pool = ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(packer, count))
    try:
        open_jobs = {pool.submit(_work, job) for job in mine}
        while open_jobs:
            done, open_jobs = wait(open_jobs, timeout=0.5, return_when=FIRST_COMPLETED)
            bar.update(count.value - bar.n)
            for future in done:
                finished(future.result())
        bar.update(bar.total - bar.n)
    except BrokenProcessPool as error:
        raise InputError("a packing process was killed, most likely for want of memory; use fewer --workers") from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


class _Packer:
    """Makes one shard. All that it needs travels to the worker processes once."""

    def __init__(self, source: Source, work: Path, form: str, on_bad: str) -> None:
        self.source, self.work, self.form, self.on_bad = source, work, form, on_bad

    def shard(self, job: Job, tick: Any) -> dict[str, Any]:
        """Make the shard, or find that it is made; returns its note."""
        path = self.work / SHARDS / job.name
        note = _note(self.work, job.name)
        items = self.source.items[job.start : job.stop]
        made_from = self._made_from(items)
        if note.is_file():
            try:
                old: dict[str, Any] = read_json(note)
                still = old["made_from"] == made_from and (not old["skipped"] or self.on_bad == "skip")
                if still and (not old["rows"] or file_sha256(path) == old["sha256"]):
                    for _ in items:
                        tick()
                    return old
            except (OSError, InputError, KeyError):
                pass  # not a note of ours, or its shard is gone: make it again
            note.unlink()
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        skipped, contents, remarks = [], [], Counter[str]()
        try:
            # Fixed owner and time: the same samples give the same bytes.
            # An open file: of a name webdataset would make a command or a URL.
            with partial.open("wb") as raw, webdataset.TarWriter(raw, encoder=False, mtime=0.0, user="", group="") as writer:
                for item in items:
                    try:
                        sample = self.source.load(item)
                        record = encode(sample, self.form)
                        writer.write(record)
                        remarks.update(sample.remarks)
                        contents.append(hashlib.blake2b(record[self.form], digest_size=12).hexdigest())
                    except InputError as error:
                        if self.on_bad == "stop":
                            raise
                        why = str(error)
                        for file in filter(None, (item.image, *item.masks)):  # names of files may name patients
                            why = why.replace(f"{file}: ", "").replace(file, "the file")
                        skipped.append({"split": job.split, "key": item.key, "why": why})
                    tick()
            done: dict[str, Any] = {"made_from": made_from, "skipped": skipped, "remarks": remarks, "rows": [], "findings": []}
            if len(skipped) < len(items):
                rows, findings, _ = index_tar(partial)
                done |= {
                    "rows": [row.tolist() for row in rows],
                    "findings": findings,
                    "contents": contents,
                    "bytes": partial.stat().st_size,
                    "sha256": file_sha256(partial),
                }
                sync(partial)
                partial.replace(path)
            else:
                path.unlink(missing_ok=True)
            _write(note, json.dumps(done).encode())
            return done
        finally:
            partial.unlink(missing_ok=True)

    def _made_from(self, items: Sequence[Any]) -> str:
        """Changes with the settings, the items and the files behind them."""
        digest = hashlib.sha256(json.dumps([VERSION, self.form, self.source.settings()], default=list).encode())
        for item in items:
            try:
                version = self.source.version(item)
            except OSError:
                version = "missing"
            digest.update(json.dumps([asdict(item), version], default=str).encode())
        return digest.hexdigest()


_packer: _Packer
_count: Any


def _start_worker(packer: _Packer, count: Any) -> None:
    """In a worker process: keep the packer; leave Ctrl-C to the parent; end with it, even if it was killed."""
    global _packer, _count
    _packer, _count = packer, count
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait_for([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _work(job: Job) -> dict[str, Any]:
    def tick() -> None:
        with _count.get_lock():
            _count.value += 1

    return _packer.shard(job, tick)


def cores() -> int:
    """Cores that this process may use: those it is bound to, and no more than its control group's share (containers, SLURM)."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([count, *(math.ceil(share) for share in _cgroup_shares())]))


def _cgroup_shares(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[float]:
    """The quotas of this process's control group and of those above it, in cores, where there are any (cgroup v2, then v1)."""
    with suppress(OSError, ValueError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            folder = root / ("" if not controllers else "cpu") / path.lstrip("/")
            for at in (folder, *folder.parents):
                with suppress(OSError, ValueError):
                    if not controllers:
                        quota, period = (at / "cpu.max").read_text().split()
                        yield float(quota) / float(period)  # "max" is no number: no quota
                    elif "cpu" in controllers.split(",") and (microseconds := float((at / "cpu.cfs_quota_us").read_text())) > 0:
                        yield microseconds / float((at / "cpu.cfs_period_us").read_text())
                if at == root:
                    break


def _write(path: Path, data: bytes) -> None:
    """Whole or not there, power cut included."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(data)
    sync(partial)
    partial.replace(path)


# -- the index --------------------------------------------------------------------------------------------------


def merge(out: Path) -> dict[str, Any]:
    """Finished shards in ``out.partial`` -> their index, then the name ``out``. InputError: which shards are missing."""
    work = _work_folder(out)
    refuse_existing(out)
    try:
        plan = read_json(work / "plan.json")
        names: list[str] = plan["shards"]
    except (OSError, InputError, KeyError) as error:
        raise InputError(f"{work}: holds no packed parts; make them with `python -m shards ... --out {out} --part 1/N`") from error
    missing = [name for name in names if not _note(work, name).is_file()]
    if missing:
        raise InputError(f"{work}: {len(missing)} of {len(names)} shards are not made yet: {listed(missing)}; run the parts that make them")
    shards: dict[str, list[dict[str, Any]]] = defaultdict(list)
    tables: dict[str, list[np.ndarray]] = defaultdict(list)
    findings: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    skipped: list[dict[str, str]] = []
    homes: dict[str, set[str]] = defaultdict(set)  # of each image
    remarks: Counter[str] = Counter()
    for name in names:
        split, note = name.partition("/")[0], read_json(_note(work, name))
        skipped += note["skipped"]
        remarks.update(note.get("remarks", {}))
        if not note["rows"]:
            continue
        tar = work / SHARDS / name
        if not tar.is_file() or tar.stat().st_size != note["bytes"]:
            raise InputError(f"{tar}: is not the shard that was made; copy it again or run its part again")
        shards[split].append({"name": name, "bytes": note["bytes"], "sha256": note["sha256"], "samples": len(note["rows"])})
        tables[split].append(np.array([tuple(row) for row in note["rows"]], ROW))
        findings[split] += [tuple(found) for found in note["findings"]]
        for content in note["contents"]:
            homes[content].add(split)
    if not shards:
        raise InputError(f"{work}: every sample was skipped: {listed(s['key'] + ': ' + s['why'] for s in skipped)}")
    shared = sum(len(splits) > 1 for splits in homes.values())
    more = {"stored": plan["stored"], "left_out": plan["left_out"], "skipped": skipped, "remarks": remarks, "in_two_splits": shared}
    whole = work / SHARDS
    wanted = {shard["name"] for of_split in shards.values() for shard in of_split}
    for path in whole.glob("*/*"):  # of an earlier plan, or of a process that was killed
        if path.relative_to(whole).as_posix() not in wanted:
            path.unlink()
    index = _write_index(whole, plan["dataset"], plan["classes"], shards, tables, findings, more)
    if out.exists():
        out.rmdir()  # refuse_existing made sure that it is empty
    whole.rename(out)
    sync(work.parent)
    shutil.rmtree(work, ignore_errors=True)
    return index


def build_index(root: Path, *, dataset: str, classes: Sequence[str] | None = None) -> dict[str, Any]:
    """Index every tar of ``root`` (``<split>/*.tar`` or ``<split>-*.tar``): writes the tables, then ``index.json``.

    Tars of other writers need a ``json`` member with ``findings``, or a ``cls`` member with a number into ``classes``.
    """
    tars = _tars(root)
    if not any(tars.values()):
        raise InputError(f"{root}: has no shards; expected {{train,val,test}}/*.tar or {{train,val,test}}-*.tar")
    shards: dict[str, list[dict[str, Any]]] = defaultdict(list)
    tables: dict[str, list[np.ndarray]] = defaultdict(list)
    findings: dict[str, list[tuple[str, ...]]] = defaultdict(list)
    deep: list[Extent] = []
    with tqdm(total=sum(map(len, tars.values())), desc=f"indexing {root.name}", unit="tar", mininterval=0.5) as bar:
        for split, paths in tars.items():
            keys: dict[bytes, Path] = {}
            for path in paths:
                rows, found, _ = index_tar(path, classes, keys)
                deep += _extents(path, rows)
                name = path.relative_to(root).as_posix()
                shards[split].append({"name": name, "bytes": path.stat().st_size, "sha256": file_sha256(path), "samples": len(rows)})
                tables[split].append(rows)
                findings[split] += found
                bar.update()
    more: dict[str, Any] = {"classes": list(classes)} if classes else {}
    if deep:
        more["stored"] = {"scales": [list(scale) for scale in choose_scales(deep)]}
    return _write_index(root, dataset, [], shards, tables, findings, more)


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


def _write_index(
    root: Path,
    dataset: str,
    classes: Sequence[str],
    shards: dict[str, list[dict[str, Any]]],
    tables: dict[str, list[np.ndarray]],
    findings: dict[str, list[tuple[str, ...]]],
    more: dict[str, Any],
) -> dict[str, Any]:
    number: dict[tuple[str, ...], int] = {}
    splits: dict[str, Any] = {}
    names = dict.fromkeys(classes)
    for split in (s for s in SPLITS if shards[s]):
        table = np.concatenate(tables[split])
        labels = np.array([number.setdefault(found, len(number)) for found in findings[split]])
        if len(number) > np.iinfo(np.uint16).max:
            raise InputError(f"{root}: more than {np.iinfo(np.uint16).max} different sets of findings; are these class names?")
        counts = Counter(name for found in findings[split] for name in found)
        names.update(dict.fromkeys(counts))
        splits[split] = {"samples": len(table), "masks": int((table["mask_len"] > 0).sum()), "findings": counts, "shards": shards[split]}
        for file, array in ((f"{split}.npy", table), (f"{split}.labels.npy", labels.astype("<u2"))):
            with (root / f".{file}.partial").open("wb") as raw:
                np.save(raw, array)
            sync(root / f".{file}.partial")
            (root / f".{file}.partial").replace(root / file)
            splits[split].setdefault("tables", {})[file] = {"bytes": (root / file).stat().st_size, "sha256": file_sha256(root / file)}
    for entry in splits.values():
        entry["findings"] = {name: entry["findings"][name] for name in names}
    index = {"version": VERSION, "dataset": dataset, "findings": list(names), "labels": [list(found) for found in number], **more, "splits": splits}
    _write(root / "index.json", json.dumps(index, indent=1).encode())
    return index


def index_tar(path: Path, classes: Sequence[str] | None = None, keys: dict[bytes, Path] | None = None) -> tuple[np.ndarray, list[tuple[str, ...]], list[str]]:
    """Rows of one tar, the findings and the key of each; ``keys`` remembers the keys of other tars of the split.

    InputError: not a whole tar, a member that is not a plain file, a key that could leave a folder, two samples of one key,
    a sample without an image.
    """
    rows: dict[str, dict[str, int]] = {}
    found: dict[str, tuple[str, ...]] = {}
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
    alone = [key for key, row in rows.items() if "image_len" not in row and "mask_len" not in row and key not in classed]
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
                raise InputError(f"{path}: the key {key!r} is in {keys[digest].name}, too; keys must be unique within a split")
            keys[digest] = path
        for field, value in row.items():
            table[field][i] = value
    return table, [found.get(key, ()) for key in rows], list(rows)


def _field(suffix: str) -> str:
    """What a member is by its suffix, as webdataset reads it, by its last part: image, mask, json, cls, or nothing of ours."""
    if suffix in ("json", "cls"):
        return suffix
    if suffix == "mask.png":
        return "mask"
    return "image" if f".{suffix.rpartition('.')[2]}" in IMAGE_SUFFIXES and not suffix.startswith(("mask.", "seg.")) else ""


def _class_name(raw: Any, member: tarfile.TarInfo, classes: Sequence[str] | None, path: Path) -> str:
    raw.seek(member.offset_data)
    text = raw.read(member.size).decode(errors="replace").strip()
    if classes is None or not text.isdecimal() or int(text) >= len(classes):
        raise InputError(f"{path}:{member.name}: class {text!r} has no name; give --findings with one name for each class")
    return classes[int(text)]


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
