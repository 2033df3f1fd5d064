"""python -m trainer.sweep GRID.yaml --out DIR: a grid of trainings, resumable, in parts.

    base: {shards: SHARDS, config: published, epochs: 20}       # flags of trainer.train that all have
    grid:
      backbone: [pvt, vgg, resnet]                              # an axis: a flag and its values,
      lambda:                                                   # or names and the flags of each
        1: {balance.lam: 1}
        adaptive: {balance.policy: published}
      task: [ne, np]
      seed: [0, 1, 2]

The runs lie in DIR/pvt_1_ne_0 and so on. More flags of trainer.train on the command line are for all of them. A
finished one is not repeated, one that was interrupted goes on.
"""

import itertools
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from shards.errors import InputError, listed, nearest, read_json, read_yaml, run
from trainer.command import flat, from_yaml, parse, positionals, resolve
from trainer.config import Config
from trainer.options import SweepConfig
from trainer.report.words import file_name
from trainer.stopping import Stop

GRIDS = Path(__file__).parents[1] / "launch" / "grids"
MOST = 10_000  # runs of a grid
PATIENCE = 60.0  # seconds that trainings have for their last checkpoint
# Settings of a finished run that may differ from the grid's: nothing of the model follows from them
CARRIED_OUT = {"out", "epochs", "resume", "workers", "log_every", "save_every", "keep", "timeout", "compile", "tracker"}
CARRIED_OUT |= {"dry_run"}


@dataclass(frozen=True)
class Job:
    """A run of the grid: its folder, and the flags of trainer.train beside ``--out``."""

    out: Path
    flags: tuple[str, ...]

    @cached_property
    def config(self) -> Config:
        """Its settings, resolved once. InputError names the run."""
        try:
            return resolve([*self.flags, "--out", str(self.out)])
        except InputError as error:
            raise InputError(f"{self.out.name}: {error}") from error


def main(argv: list[str] | None = None) -> None:
    """Check all runs of the grid, then train what is left of them."""
    flags, files = positionals(argv)
    own, more = _divided(flags)
    options = parse(SweepConfig, own, prog="trainer.sweep")
    if len(files) != 1:
        raise InputError(f"{len(files)} grids named: python -m trainer.sweep GRID.yaml --out DIR")
    jobs = jobs_of(Path(files[0]), Path(options.out), more)
    for job in jobs:
        _ = job.config  # what is wrong is said before the first run
    number, of = options.part_of()
    part = jobs[number - 1 :: of]
    left = [job for job in part if not finished(job)]
    whole = f" of {len(jobs)}" if of > 1 else ""
    print(f"{len(part)} runs{whole}, {len(part) - len(left)} are finished", flush=True)
    devices = gpus()
    failed = Trainings(options.jobs or max(1, len(devices)), devices).run(left)
    done = [job for job in jobs if finished(job)]
    print(f"{len(done)} of {len(jobs)} runs are finished")
    if len(done) == len(jobs):
        print(f"side by side: python -m trainer.report --out {options.out}/runs.html {options.out}/*/")
        print(f"as published: python -m trainer.report --table paper --out {options.out}/paper.md {options.out}/*/")
    if failed:
        raise InputError(
            f"{len(failed)} runs failed: {listed([job.out.name for job in failed])}; why stands in NAME.log beside "
            "each. The same command goes on"
        )


def _divided(flags: list[str]) -> tuple[list[str], list[str]]:
    """Flags of the sweep, and those of all its trainings."""
    mine = {f"--{item.name}" for item in fields(SweepConfig)} | {"--help"}
    own: list[str] = []
    more: list[str] = []
    to = own
    for token in flags:
        if token.startswith("--"):
            to = own if token.partition("=")[0] in mine else more
        to.append(token)
    return own, more


def jobs_of(file: Path, out: Path, more: Sequence[str] = ()) -> list[Job]:
    """The runs of a grid, a file or the name of one in launch/grids, in order: the last axis runs first. ``more``:
    flags that all have, too. InputError: it is none.
    """
    if not file.exists() and (known := GRIDS / f"{file}.yaml").is_file():
        file = known
    content = read_yaml(file, "the grid")
    if not isinstance(content, dict) or not isinstance(content.get("grid"), dict) or not content["grid"]:
        raise InputError(f"{file}: expected `base:` with flags of trainer.train, and `grid:` with axes")
    if unknown := set(content) - {"base", "grid"}:
        name = sorted(map(str, unknown))[0]
        raise InputError(f"{file}: {name}: is neither of base and grid; {nearest(name, ('base', 'grid'))}")
    base = _flags(content.get("base") or {}, f"{file}: base")
    axes = [_axis(str(name), values, f"{file}: grid: {name}") for name, values in content["grid"].items()]
    count = 1
    for axis in axes:
        count *= len(axis)
    if count > MOST:
        raise InputError(f"{file}: has {count} runs; at most {MOST} are one grid")
    jobs = []
    for points in itertools.product(*axes):
        name = file_name("_".join(point for point, _ in points))
        jobs.append(Job(out / name, (*base, *more, *itertools.chain.from_iterable(flags for _, flags in points))))
    if twice := sorted(name for name, often in Counter(job.out.name for job in jobs).items() if often > 1):
        raise InputError(f"{file}: several runs would be called {listed(twice)}; give the points of an axis names")
    return jobs


def _axis(name: str, values: Any, where: str) -> list[tuple[str, list[str]]]:
    """Its points: their names and flags."""
    if isinstance(values, dict) and values:
        return [(str(point), _flags(flags or {}, f"{where}: {point}")) for point, flags in values.items()]
    if isinstance(values, list) and values and not any(isinstance(value, dict | list) for value in values):
        return [(_text(value).replace(",", "-"), [f"--{name}={_text(value)}"]) for value in values]
    raise InputError(f"{where}: expected a list of values, or names with flags, such as {{a: {{balance.lam: 1}}}}")


def _flags(settings: Any, where: str) -> list[str]:
    if not isinstance(settings, dict):
        raise InputError(f"{where}: expected flags of trainer.train and their values")
    if "out" in settings or "resume" in settings:
        raise InputError(f"{where}: out and resume are the sweep's own; leave them out")
    return [f"--{name}={_text(value)}" for name, value in flat({str(k): v for k, v in settings.items()}).items()]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def finished(job: Job) -> bool:
    """Whether the run has its report, of all the epochs that are wanted now. InputError: it is of other settings."""
    if not (job.out / "config.yaml").is_file():
        return False
    was, wanted = (flat(asdict(config)) for config in (from_yaml(Config, job.out / "config.yaml"), job.config))
    # Lambda of another policy than fixed is its own
    idle = {*CARRIED_OUT, *(("balance.lam", "balance.ramp") if job.config.balance.policy != "fixed" else ())}
    other = [name for name in wanted if name not in idle and was[name] != wanted[name]]
    if other:
        said = ", ".join(f"{name} {was[name]}, in the grid {wanted[name]}" for name in other[:5])
        raise InputError(f"{job.out}: is a run of other settings ({said}); name another --out, or remove it")
    if not (job.out / "report.json").is_file():
        return False
    training = (read_json(job.out / "report.json") or {}).get("training", {})
    # Of how many epochs the report is: a run that was stopped after it was given more has the report of fewer
    asked = training.get("asked_epochs", was["epochs"])
    return asked >= wanted["epochs"] and not training.get("unfinished", "epochs" not in training)


def gpus() -> list[str]:
    """The GPUs of this machine that may be used; asked of the driver, as torch takes seconds."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [one for one in named.split(",") if one.strip() and one.strip() != "-1"]
    try:
        listing = subprocess.run(["nvidia-smi", "--list-gpus"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [str(k) for k, line in enumerate(listing.stdout.splitlines()) if line.startswith("GPU ")]


class Trainings:
    """Trains runs, a few at a time, each in a process of its own and on a GPU of its own where there are some."""

    def __init__(self, at_once: int, devices: Sequence[str]) -> None:
        self.at_once, self.devices = at_once, list(devices)
        self.free = list(range(at_once))
        self.lock, self.stopped = threading.Lock(), threading.Event()
        self.running: set[subprocess.Popen[bytes]] = set()

    def run(self, jobs: Sequence[Job]) -> list[Job]:
        """Those that failed. A signal that ends the sweep (`trainer.stopping`) ends all of them, each with a checkpoint
        of the step that it is at.
        """
        with Stop(), ThreadPoolExecutor(self.at_once) as pool:
            try:
                codes = list(pool.map(self._train, jobs))
            except KeyboardInterrupt:
                self._stop()
                pool.shutdown(cancel_futures=True)
                raise
        return [job for job, code in zip(jobs, codes, strict=True) if code]

    def _stop(self) -> None:
        """Ask all to end; those that have not after `PATIENCE` seconds are killed."""
        with self.lock:
            self.stopped.set()
            running = list(self.running)
            for process in running:
                process.terminate()
        until = time.monotonic() + PATIENCE
        for process in running:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()

    def _train(self, job: Job) -> int:
        with self.lock:
            if self.stopped.is_set():
                return 1
            slot = self.free.pop(0)
            own = {"CUDA_VISIBLE_DEVICES": self.devices[slot % len(self.devices)]} if self.devices else {}
            job.out.parent.mkdir(parents=True, exist_ok=True)
            begun = (job.out / "config.yaml").is_file()
            command = [sys.executable, "-m", "trainer.train", *job.flags, "--out", str(job.out)]
            try:
                with job.out.with_name(f"{job.out.name}.log").open("ab") as log:
                    process = subprocess.Popen(
                        [*command, *(["--resume"] if begun else [])],
                        stdout=log,
                        stderr=subprocess.STDOUT,
                        env=os.environ | own | {"CXR_FOCUS_SWEEP": "1"},
                        process_group=0,  # Ctrl-C is this process's to pass on
                    )
            except OSError as error:
                self.free.append(slot)
                print(f"{job.out.name}: cannot be started ({error.strerror}: {error.filename})", flush=True)
                return 1
            self.running.add(process)
        code = process.wait()
        with self.lock:
            self.running.discard(process)
            self.free.append(slot)
        done = code == 0 and finished(job)  # one that a signal has ended says 0, too
        how = "finished" if done else "stopped, and can go on" if code == 0 else f"failed, see {job.out}.log"
        print(f"{job.out.name}: {how}", flush=True)
        return 0 if done else code or 1


if __name__ == "__main__":
    run(main)
