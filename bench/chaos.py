"""python bench/chaos.py [--runs 30] [--seed 0]: trainings that are killed, frozen, cut off, and go on.

Small runs on 1, 2 and 4 processes (gloo), by accelerate's launcher; one as two machines, by launch/machines.sh. At a
random moment something happens: a signal to a process, to its loader's, to the launcher; a process is frozen; the disk
is full; a machine dies; a checkpoint is cut off or has another bit. What must hold: it ends by itself within the time
that is named below, nothing of it is alive 15 s later, and `--resume auto` goes on to the weights, bit by bit, of a run
of as many processes that nothing happened to. Writes bench/chaos.md; exit code 1 where something did not hold. A full
disk needs root (a tmpfs of its own), else that trial is left out, and said.
"""

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import torch
from safetensors.torch import load_file
from step import processor

from shards.pack import pack
from shards.phantom import Phantoms

ROOT = Path(__file__).parents[1]
TIMEOUT = 8  # --timeout of the runs: seconds
# Seconds in which a run must have ended: at once where it may save, after the timeout where it waits in vain, and
# torch's launcher gives those that are left 30 more
AT_ONCE, IN_VAIN = 25.0, TIMEOUT + 45.0
ORPHANS = 15.0
MARK = "CXR_FOCUS_CHAOS"


@dataclass
class Process:
    """One of a run."""

    pid: int
    parent: int
    rank: str
    words: str

    def send(self, number: int) -> None:
        """A signal, if it is still there."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)


def processes(mark: str) -> list[Process]:
    """All that are alive with that mark in their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        try:
            environment = dict(
                one.split("=", 1) for one in (folder / "environ").read_text(errors="replace").split("\0") if "=" in one
            )
            status = (folder / "stat").read_text().rpartition(")")[2].split()
            words = (folder / "cmdline").read_text(errors="replace").replace("\0", " ")
        except OSError:
            continue
        if environment.get(MARK) == mark and status[0] != "Z":
            found.append(Process(int(folder.name), int(status[1]), environment.get("RANK", ""), words))
    return found


def trainers(mark: str) -> list[Process]:
    """The processes that train, by rank."""
    there = processes(mark)
    pids = {one.pid for one in there if "trainer.train" in one.words and "accelerate" not in one.words}
    own = [one for one in there if one.pid in pids and one.parent not in pids and "machines.sh" not in one.words]
    return sorted(own, key=lambda one: int(one.rank or 0))


def loaders(mark: str) -> list[Process]:
    """The processes of their loaders."""
    ranks = {one.pid for one in trainers(mark)}
    return [one for one in processes(mark) if one.parent in ranks]


class Run:
    """A training, and what is done to it."""

    def __init__(self, root: Path, name: str, world: int, *, machines: bool = False) -> None:
        self.out, self.mark, self.world, self.machines = root / name, f"{os.getpid()}-{name}", world, machines
        self.log = root / f"{name}.log"
        self.port = 20000 + random.randrange(20000)
        self.flags = ["--shards", str(root / "shards"), "--out", str(self.out), "--task", "ne"]
        self.flags += ["--backbone", "resnet18", "--pretrained", "false", "--size", "64", "--batch", str(8 // world)]
        self.flags += ["--workers", "1", "--tracker", "none", "--log_every", "1", "--save_every", "3", "--epochs", "3"]
        self.flags += ["--best", "last", "--timeout", str(TIMEOUT), "--resume", "auto"]

    def start(self) -> list[subprocess.Popen[bytes]]:
        """By its launcher, one for each machine."""
        environment = os.environ | {MARK: self.mark, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        if self.machines:
            commands = [
                ["bash", "launch/machines.sh", str(k), "2", f"127.0.0.1:{self.port}", "1", "trainer.train"]
                for k in (0, 1)
            ]
            environment["ACCELERATE_MIXED_PRECISION"] = "no"
        else:
            several = ["--multi_gpu", "--num_processes", str(self.world)] if self.world > 1 else []
            how = ["--quiet", "--config_file", "accelerate_config.yaml", "--mixed_precision", "no"]
            commands = [["accelerate", "launch", *how, *several, "-m", "trainer.train"]]
        with self.log.open("ab") as log:
            return [
                subprocess.Popen(
                    [*command, *self.flags], cwd=ROOT, env=environment, stdout=log, stderr=log, process_group=0
                )
                for command in commands
            ]

    def steps(self) -> int:
        """Lines of its log."""
        path = self.out / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.is_file() else 0

    def until(self, lines: int, launched: list[subprocess.Popen[bytes]]) -> None:
        """Wait until its log has so many lines."""
        end = time.monotonic() + 180
        while self.steps() < lines and time.monotonic() < end and any(one.poll() is None for one in launched):
            time.sleep(0.02)

    def ended(self, launched: list[subprocess.Popen[bytes]], seconds: float) -> float | None:
        """How long it took to end; None: longer than that."""
        began = time.monotonic()
        while any(one.poll() is None for one in launched) or trainers(self.mark):
            if time.monotonic() - began > seconds:
                return None
            time.sleep(0.05)
        return time.monotonic() - began

    def clean(self, seconds: float) -> bool:
        """Whether nothing of it is alive after so long."""
        end = time.monotonic() + seconds
        while (there := processes(self.mark)) and time.monotonic() < end:
            time.sleep(0.2)
        for one in there:
            one.send(signal.SIGKILL)
        return not there

    def finish(self) -> bool:
        """Go on, again and again as a script would, until it has its report."""
        for _ in range(4):
            if (self.out / "report.json").is_file():
                return True
            for one in self.start():
                one.wait()
        return (self.out / "report.json").is_file()

    def weights(self) -> dict[str, torch.Tensor]:
        """Of the last epoch's model."""
        return load_file(self.out / "model.safetensors")


Fault = Callable[[Run, list["subprocess.Popen[bytes]"], random.Random], None]


def to_rank(number: int) -> Fault:
    """A signal to one of the processes that train."""
    return lambda run, _, rng: rng.choice(trainers(run.mark)).send(number)


def to_launcher(number: int) -> Fault:
    """A signal to the launcher."""
    return lambda _run, launched, _rng: launched[0].send_signal(number)


def to_loader(number: int) -> Fault:
    """A signal to a loader's process."""
    return lambda run, _, rng: rng.choice(loaders(run.mark)).send(number)


def to_all(number: int) -> Fault:
    """As schedulers do: to every process there is."""
    return lambda run, _, _rng: [one.send(number) for one in processes(run.mark)] and None


def damaged(change: Callable[[bytes], bytes]) -> Fault:
    """A kill of all, and then something happens to the newest checkpoint."""

    def fault(run: Run, launched: list["subprocess.Popen[bytes]"], _rng: random.Random) -> None:
        for one in processes(run.mark):
            one.send(signal.SIGKILL)
        launched[0].wait()
        path = run.out / "checkpoints/last.pt"
        if path.is_file():
            path.write_bytes(change(path.read_bytes()))

    return fault


def flipped(content: bytes) -> bytes:
    """One bit in its midst."""
    half = len(content) // 2
    return content[:half] + bytes([content[half] ^ 16]) + content[half + 1 :]


def full_disk(run: Run, launched: list["subprocess.Popen[bytes]"], _rng: random.Random) -> None:
    """All that is free of the run's disk is taken, and given back when the run has ended."""
    filler = run.out.parent / "filler"
    with filler.open("wb") as file:
        try:
            while True:
                file.write(bytes(2**20))
        except OSError:
            pass
    for one in launched:
        one.wait()
    filler.unlink()


def machine_dies(run: Run, launched: list["subprocess.Popen[bytes]"], _rng: random.Random) -> None:
    """All of the second machine at once."""
    second = {launched[1].pid}
    for _ in range(4):
        second |= {one.pid for one in processes(run.mark) if one.parent in second}
    for one in processes(run.mark):
        if one.pid in second:
            one.send(signal.SIGKILL)


# What happens, on how many processes it can, and in which time the run must have ended
FAULTS: dict[str, tuple[Fault, tuple[int, ...], float]] = {
    "SIGKILL of a process": (to_rank(signal.SIGKILL), (1, 2, 4), IN_VAIN),
    "SIGTERM to a process": (to_rank(signal.SIGTERM), (1, 2, 4), AT_ONCE),
    "SIGUSR1 to a process": (to_rank(signal.SIGUSR1), (1, 2, 4), AT_ONCE),
    "SIGTERM to all": (to_all(signal.SIGTERM), (1, 2, 4), AT_ONCE),
    "SIGTERM to the launcher": (to_launcher(signal.SIGTERM), (1, 2, 4), AT_ONCE),
    "SIGKILL of the launcher": (to_launcher(signal.SIGKILL), (1, 2, 4), AT_ONCE),
    "SIGKILL of a loader's process": (to_loader(signal.SIGKILL), (1, 2), IN_VAIN),
    "a frozen loader's process": (to_loader(signal.SIGSTOP), (1, 2), IN_VAIN),
    "a frozen process": (to_rank(signal.SIGSTOP), (2, 4), IN_VAIN),
    "a checkpoint cut off": (damaged(lambda content: content[: len(content) // 2]), (1, 2), AT_ONCE),
    "a bit of a checkpoint": (damaged(flipped), (1, 2), AT_ONCE),
    "a full disk": (full_disk, (1, 2), IN_VAIN),
    "a machine dies": (machine_dies, (2,), IN_VAIN),
}


def trial(root: Path, name: str, fault: str, world: int, calm: dict[str, torch.Tensor], seed: int) -> tuple[str, bool]:
    """A line of the table, and whether all of it holds."""
    rng = random.Random(seed)
    act, _, limit = FAULTS[fault]
    run = Run(root, name, world, machines=fault == "a machine dies")
    launched = run.start()
    # Of 12 steps and three lines of validation. Of two checkpoints one may be damaged: where the only one is, a run
    # refuses to go on rather than to begin anew
    at = rng.randint(8 if "checkpoint" in fault else 1, 11)
    run.until(at, launched)
    time.sleep(rng.uniform(0, 0.3))
    happened = any(one.poll() is None for one in launched) and bool(trainers(run.mark))
    if happened:
        act(run, launched, rng)
    seconds = run.ended(launched, limit)
    clean = run.clean(ORPHANS)
    whole = run.finish()
    ours = run.weights() if whole else {}
    same = whole and all(torch.equal(ours[key], calm[key]) for key in calm)
    held = seconds is not None and clean and same
    took = f"{seconds:.1f} s" if seconds is not None else f"**not within {limit:.0f} s**"
    words = "yes" if same else "**no**"
    line = f"| {fault} | {world} | {at if happened else 'over before'} | {took} | {'none' if clean else '**some**'} | "
    return f"{line}{words} |", held


def main() -> None:
    """Run the trials, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="a fault alone")
    a = parser.parse_args()
    rng = random.Random(a.seed)
    random.seed(os.getpid())
    cases = [
        (fault, world) for fault, (_, worlds, _) in FAULTS.items() for world in worlds if not a.only or a.only == fault
    ]
    rng.shuffle(cases)
    cases = (cases * (a.runs // max(1, len(cases)) + 1))[: a.runs]
    text = f"# Chaos\n\n{(__doc__ or '').partition(chr(10) * 2)[2].strip()}\n\n"
    text += f"{processor()}, {date.today()}; seed {a.seed}.\n\n"
    text += "| what happened | processes | after lines of the log | ended within | alive after 15 s | same weights |\n"
    text += "|---|---|---|---|---|---|\n"
    held = []
    with tempfile.TemporaryDirectory() as name:
        root, disk = Path(name) / "work", Path(name) / "disk"
        root.mkdir()
        disk.mkdir()
        pack(Phantoms(50, 0, size=64, findings=("No Finding", "Effusion")), root / "shards", dataset="phantom")
        mounted = not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=700m", "none", str(disk)], capture_output=True, check=False
        ).returncode
        calm = {}
        try:
            for world in sorted({world for _, world in cases}):
                run = Run(root, f"calm{world}", world)
                assert run.finish(), run.log.read_text()
                calm[world] = run.weights()
            for number, (fault, world) in enumerate(cases):
                if fault == "a full disk":
                    if not mounted:
                        text += f"| {fault} | {world} | left out: no tmpfs can be mounted | | | |\n"
                        continue
                    if not (disk / "shards").exists():
                        (disk / "shards").symlink_to(root / "shards")
                at = disk if fault == "a full disk" else root
                line, well = trial(at, f"run{number}", fault, world, calm[world], a.seed * 1000 + number)
                held.append(well)
                text += f"{line}\n"
                print(line if well else f"{line}\n{(at / f'run{number}.log').read_text()[-3000:]}", flush=True)
                (Path(__file__).with_name("chaos.md")).write_text(text)
        finally:
            if mounted:
                subprocess.run(["umount", str(disk)], check=False)
    text += f"\n{sum(held)} of {len(held)} held.\n"
    (Path(__file__).with_name("chaos.md")).write_text(text)
    print(text.splitlines()[-1])
    sys.exit(0 if all(held) else 1)


if __name__ == "__main__":
    main()
