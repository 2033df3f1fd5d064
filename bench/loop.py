"""python bench/loop.py [--steps 10000]: what the loop costs beside its steps.

- From shards with two loader processes, beside the same steps on one batch in memory, by turns of an epoch: the ratio
  of their rates, and the share of the time that the loop waits for images.
- Two processes, one thread each, beside twice one, of a ResNet-50 at 224 px, by turns (of a small network most of the
  time goes into the sum of gradients).
- Resident memory of a run and its loader's processes (proportional, of shared pages their part) along 10,000 steps.
- Seconds from a command to its help, to a refusal, to the first step, also by `accelerate launch`; best of three, as
  a warm machine has it.

The first of a small ResNet at 152 px, whose step takes 50 ms on one core, else a ResNet-18 at 64 px; batches of 8 files
of 512 px. Writes bench/loop.md.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch
from step import processor

from shards.loader import Loader
from shards.pack import pack
from shards.phantom import Phantoms
from shards.plan import EpochPlan
from trainer.build import build
from trainer.command import resolve
from trainer.loop import groups
from trainer.upload import ahead

HERE = Path(__file__).parent
FINDINGS = ("No Finding", "Effusion")
SMALL = ["--task", "ne", "--backbone", "resnet18", "--pretrained", "false", "--size", "64", "--batch", "8"]
QUICK = [*SMALL[:3], "test_resnet", "--pretrained", "false", "--size", "152", "--batch", "8"]
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--mixed_precision", "no"]


def quartiles(values: Sequence[float]) -> str:
    """Median (first to third quartile)."""
    first, middle, third = statistics.quantiles(values, n=4)
    return f"{middle:.3f} ({first:.3f} to {third:.3f})"


def from_shards(root: Path, turns: int) -> list[str]:
    """Rows: the ratio of rates, the share of waiting."""
    out = root / "memory"
    flags = ["--shards", str(root / "shards"), "--out", str(out), "--workers", "2", "--tracker", "none", *QUICK]
    trainer = build(resolve(flags))
    trainer.net.train()
    split, device = trainer.splits["train"], trainer.accelerator.device
    one = next(iter(Loader(split, EpochPlan(split.shard_sizes()), batch=8, workers=0).batches(0)))
    for group in groups(ahead(trainer.loader.batches(0), device), 1):  # all lungs are known afterwards
        trainer.step(group, 0.5)
    ratios, waits, each = [], [], []
    for epoch in range(1, turns + 1):
        iterator, waited, count = groups(ahead(trainer.loader.batches(epoch), device), 1), 0.0, 0
        began = time.perf_counter()
        while True:
            before = time.perf_counter()
            group = next(iterator, None)
            waited += time.perf_counter() - before
            if group is None:
                break
            trainer.step(group, 0.5)
            count += 1
        read = time.perf_counter() - began
        before = time.perf_counter()
        for _ in range(count):
            trainer.step([one], 0.5)
        memory = time.perf_counter() - before
        ratios.append(memory / read)
        waits.append(waited / read)
        each.append(memory / count)
    trainer.close()
    return [
        f"rate from shards, two loader processes / steps on one batch in memory | {quartiles(ratios)} | >= 0.9",
        f"share of the time that the loop waits, at a step of {1000 * statistics.median(each):.0f} ms | "
        f"{quartiles(waits)} | <= 0.05",
    ]


def rate(root: Path, name: str, processes: int) -> float:
    """Images a second of a run of a ResNet-50 at 224 px, from its fourth step to its fourteenth."""
    out = root / name
    flags = ["--shards", str(root / "shards"), "--out", str(out), *SMALL, "--workers", "0", "--tracker", "none"]
    flags += ["--backbone", "resnet", "--size", "224", "--log_every", "1"]
    several = ["--multi_gpu", "--num_processes", str(processes)] if processes > 1 else []
    command = [*LAUNCH, *several, "-m", "trainer.train", *flags]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    nowhere, file = subprocess.DEVNULL, out / "metrics.jsonl"
    process = subprocess.Popen(command, cwd=HERE.parent, env=environment, stdout=nowhere, stderr=nowhere)
    lines: list[str] = []
    while len(lines) < 14:
        time.sleep(0.1)
        if process.poll() is not None:
            sys.exit(f"{name}: ended with {process.returncode}")
        lines = file.read_text().splitlines() if file.is_file() else []
    process.terminate()
    process.wait()
    # Each line has the mean since the beginning
    images = [8 * processes * step for step in (4, 14)]
    seconds = [n / json.loads(lines[k])["images_per_s"] for n, k in zip(images, (3, 13), strict=True)]
    return (images[1] - images[0]) / (seconds[1] - seconds[0])


def tree(pid: int) -> list[int]:
    """A process and its children."""
    found = [pid]
    for task in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += tree(int(task))
    return found


def proportional(pid: int) -> float:
    """MB of a process and its children."""
    total = 0
    for one in tree(pid):
        for line in Path(f"/proc/{one}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total / 1024


def memory(root: Path, steps: int) -> list[float]:
    """MB at each tenth of so many steps."""
    out = root / "long"
    flags = ["--shards", str(root / "shards"), "--out", str(out), *SMALL, "--workers", "1", "--tracker", "none"]
    flags += ["--backbone", "test_resnet", "--epochs", "1000000", "--log_every", "10", "--save_every", "500"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "trainer.train", *flags]
    process = subprocess.Popen(
        command, cwd=HERE.parent, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    found, file = [], out / "metrics.jsonl"
    try:
        while len(found) < 10:
            time.sleep(1)
            if process.poll() is not None:
                sys.exit(f"the run ended with {process.returncode}")
            lines = file.read_text().splitlines() if file.is_file() else []
            if lines and json.loads(lines[-1])["step"] >= (len(found) + 1) * steps / 10:
                found.append(proportional(process.pid))
                print(f"{lines[-1][:40]} {found[-1]:.0f} MB", flush=True)
    finally:
        process.terminate()
        process.wait()
    return found


def seconds_to(command: list[str], first_line: Path | None = None) -> float:
    """From a command to its end, or to the first line of a file."""
    best = float("inf")
    for _ in range(3):
        began = time.perf_counter()
        process = subprocess.Popen(command, cwd=HERE.parent, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        if first_line is None:
            process.wait()
            best = min(best, time.perf_counter() - began)
            continue
        while not (first_line.is_file() and first_line.read_text().count("\n")):
            time.sleep(0.02)
            if process.poll() is not None:
                sys.exit(f"{' '.join(command)}: ended with {process.returncode}")
        best = min(best, time.perf_counter() - began)
        process.terminate()
        process.wait()
        shutil.rmtree(first_line.parent)
    return best


def start(root: Path) -> list[str]:
    """Rows: seconds to help, refusal, first step."""
    train = [sys.executable, "-m", "trainer.train"]
    out = root / "first"
    flags = ["--shards", str(root / "shards"), "--out", str(out), *SMALL, "--tracker", "none", "--log_every", "1"]
    pvt = [*flags, "--backbone", "pvt", "--size", "224"]
    rows = [
        ("help", seconds_to([*train, "--help"]), "< 1"),
        ("a refusal that needs no model", seconds_to([*train, *flags, "--task", "nothing"]), "< 2"),
        ("first step", seconds_to([*train, *flags], out / "metrics.jsonl"), "<= 10"),
        ("first step, PVT at 224 px", seconds_to([*train, *pvt], out / "metrics.jsonl"), "<= 10"),
        (
            "first step, accelerate launch",
            seconds_to([*LAUNCH, "-m", "trainer.train", *flags], out / "metrics.jsonl"),
            "<= 10",
        ),
    ]
    return [f"seconds to {what} | {seconds:.2f} | {wanted}" for what, seconds, wanted in rows]


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--steps", type=int, default=10000)
    parser.add_argument("--images", type=int, default=1000)
    a = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        pack(Phantoms(a.images, 0, size=512, findings=FINDINGS), root / "shards", dataset="phantom")
        rows = [*start(root), *from_shards(root, a.turns)]
        ratios = [rate(root, f"two{k}", 2) / (2 * rate(root, f"one{k}", 1)) for k in range(max(3, a.turns // 2))]
        rows.append(f"two processes / twice one, one thread each | {quartiles(ratios)} | >= 0.9")
        along = memory(root, a.steps)
        rows.append(f"MB after each tenth of {a.steps} steps | {', '.join(f'{mb:.0f}' for mb in along)} | flat")
    text = f"# The loop\n\n{(__doc__ or '').partition(chr(10) * 2)[2].strip()}\n\n{processor()}; torch "
    text += f"{torch.__version__}, {date.today()}.\n\n| what | measured | wanted |\n|---|---|---|\n"
    text += "".join(f"| {row} |\n" for row in rows)
    (HERE / "loop.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
