"""Items -> tar shards + index: in parallel, the same bytes for the same input, and to be interrupted at any moment.

Shards are made in ``DIR.partial/shards``, each under a temporary name until it is whole; a note in
``DIR.partial/notes`` says from what it was made. Run again, finished shards whose input is still the same are kept. The
index comes last, then that folder gets the name DIR, which is whole or not there.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any

import webdataset
from tqdm import tqdm

from shards import atomic
from shards.atomic import sync
from shards.claim import claimed
from shards.cores import cores
from shards.errors import InputError, listed, read_json
from shards.files import file_sha256
from shards.gray import choose_scales, scale_of
from shards.index import VERSION
from shards.merge import NOTES, SHARDS, merge, note_of, refuse_existing, work_folder
from shards.pixels import extent
from shards.sample import SPLITS, check_key, encode
from shards.sources.item import Source
from shards.tars import index_tar

SMALL = 400  # items below which starting processes costs more than it saves


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
    work = work_folder(out)
    _set_scales(source, workers)
    packer = _Packer(source, work, form, on_bad)
    plan = {
        "version": VERSION,
        "dataset": dataset,
        "classes": list(source.classes),
        "asked": list(source.asked),
        "unlisted": source.unlisted,
        "stored": source.settings() | {"format": form},
    }
    plan["left_out"] = source.skipped
    plan["shards"] = [job.name for job in jobs]
    digest = hashlib.sha256()
    for item in source.items:
        digest.update(repr(item).encode(errors="surrogateescape"))
    # Parts of other items, such as other splits of the same patients, do not go together
    plan["items"] = digest.hexdigest()
    text = json.dumps(plan, indent=1, default=list)
    with claimed(work, shared=part is not None):
        try:
            _agree(work, text, part)
            mine = [job for n, job in enumerate(jobs) if part is None or n % part[1] == part[0] - 1]
            for split in {job.split for job in mine}:
                (work / SHARDS / split).mkdir(parents=True, exist_ok=True)
            (work / NOTES).mkdir(exist_ok=True)
            worth_it = workers or len(source.items) > SMALL  # starting processes takes longer than a few images
            _run(packer, mine, min(workers or cores(), len(mine)) if worth_it else 1, out, part)
            return merge(out) if part is None else None
        except OSError as error:
            raise InputError(f"--out {out}: cannot be written ({error.strerror or error}); {_kept(work)}") from error
        except InputError as error:
            raise InputError(f"{error}; {_kept(work)}") from error
        except KeyboardInterrupt:
            print(f"\n{_kept(work)}", file=sys.stderr)
            raise


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
        for name in (*item.findings, *item.absent, *item.uncertain):
            if "," in name:
                raise InputError(
                    f"{item.image}: the finding {name!r} must not hold a comma, which separates the findings of a "
                    "--task; rename it"
                )
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
    """How values of more than 8 bits become gray, for the whole set: as ``--bits`` says, or from the values of all
    images.
    """
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
                found = list(
                    tqdm(
                        pool.map(extent, paths, chunksize=64),
                        desc="bit depths",
                        total=len(paths),
                        unit="img",
                        delay=5,
                        dynamic_ncols=True,
                    )
                )
        except BrokenProcessPool as error:
            raise InputError(
                "a process was killed, most likely for want of memory; use fewer --workers, or say the depth with "
                "--bits"
            ) from error
    deep = [e for e in found if e is not None]
    source.scales = choose_scales(deep)
    for scale in source.scales:
        of = sum(scale_of(e, source.scales) == scale for e in deep)
        source.notes.append(
            f"{of} images of more than 8 bits: {scale[0]:g} is black, {scale[1]:g} is white; another depth: --bits"
        )


def _agree(work: Path, plan: str, part: tuple[int, int] | None) -> None:
    """Write the plan; parts must have the same one. A whole run replaces an older plan: shards that still fit it are
    kept.
    """
    path = work / "plan.json"
    if part is not None and path.is_file() and path.read_text() != plan:
        raise InputError(
            f"{work}: was begun with other settings or other files; use the same command for every part, or remove the "
            "folder"
        )
    if path.is_file() and path.read_text() != plan:
        print(
            f"note: {work} was begun with other settings or files; finished shards that do not fit are made again",
            file=sys.stderr,
        )
    if not path.is_file() or path.read_text() != plan:
        atomic.write(path, plan)


def _kept(work: Path) -> str:
    done = len(list(work.glob(f"{NOTES}/*.json"))) if work.is_dir() else 0
    if not done:
        return "nothing was left there"
    return f"{done} finished shards are kept in {work}: the same command goes on from there"


def _run(packer: "_Packer", mine: list[Job], workers: int, out: Path, part: tuple[int, int] | None) -> None:
    """Make the shards, show the rate and what was skipped."""
    name = out.name if part is None else f"{out.name} {part[0]}/{part[1]}"
    with tqdm(
        total=sum(job.stop - job.start for job in mine),
        desc=f"packing {name}",
        unit="img",
        mininterval=0.5,
        dynamic_ncols=True,
    ) as bar:
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
        note = note_of(self.work, job.name)
        items = self.source.items[job.start : job.stop]
        made_from = self._made_from(items)
        if note.is_file():
            try:
                old: dict[str, Any] = read_json(note)
                still = old["made_from"] == made_from and (not old["skipped"] or self.on_bad == "skip")
                if still and (not old["rows"] or (old["ids"] and file_sha256(path) == old["sha256"])):
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
            with (
                partial.open("wb") as raw,
                webdataset.TarWriter(raw, encoder=False, mtime=0.0, user="", group="") as writer,
            ):
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
            done: dict[str, Any] = {"made_from": made_from, "skipped": skipped, "remarks": remarks, "rows": []}
            if len(skipped) < len(items):
                part, _ = index_tar(partial)
                done |= {
                    **part.note(),
                    "contents": contents,
                    "bytes": partial.stat().st_size,
                    "sha256": file_sha256(partial),
                }
                sync(partial)
                partial.replace(path)
            else:
                path.unlink(missing_ok=True)
            atomic.write(note, json.dumps(done))
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
