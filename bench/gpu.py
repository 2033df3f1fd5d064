"""python bench/gpu.py [--backbones pvt,resnet,vgg] [--batch 32]: what a run costs on the GPU that is there.

In under eight minutes: images a second of a step, alternating, in bf16, fp16 and float32 (TF32): cross-entropy, the
default with remembered and with new lungs, the default with `--compile`; its peak memory; whether a step makes the host
wait for the GPU (torch's own check, which raises there); the share of a training loop from shards in which it waits for
images, decoded by its loader's processes and by the GPU, and how far their grays differ; the rate of evaluation and of
the forward alone. Writes bench/gpu.md, with the card's name. Without a GPU it
says so, and with --cpu it runs all the same, to see that it works.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
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
from trainer.loop import Trainer, groups
from trainer.upload import ahead

HERE = Path(__file__).parent
FINDINGS = ("No Finding", "Effusion")


def wait() -> None:
    """Until the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def trainer_of(root: Path, backbone: str, batch: int, *flags: str) -> Trainer:
    """A run that has not begun."""
    out = root / f"run{time.monotonic_ns()}"
    given = ["--shards", str(root / "shards"), "--out", str(out), "--backbone", backbone, "--pretrained", "false"]
    trainer = build(resolve([*given, "--task", "ne", "--batch", str(batch), "--tracker", "none", *flags]))
    trainer.net.train()
    return trainer


def steps(backbone: str, batch: int, turns: int, root: Path) -> list[str]:
    """Rows of the table: by turns, medians."""
    eager = trainer_of(root, backbone, batch, "--workers", "0")
    compiled = trainer_of(root, backbone, batch, "--workers", "0", "--compile")
    split = eager.splits["train"]
    one = next(iter(Loader(split, EpochPlan(split.shard_sizes()), batch=batch, workers=0).batches(0)))
    kinds = {
        "cross-entropy": (eager, 1.0),
        "default": (eager, 0.5),
        "default, new lungs": (eager, 0.5),
        "default, compiled": (compiled, 0.5),
    }
    times: dict[str, list[float]] = {name: [] for name in kinds}
    memory = {}
    for turn in range(turns + 2):
        for name, (trainer, lam) in kinds.items():
            if "new" in name:
                trainer.lungs["train"].memory.table[:] = 0
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            wait()
            began = time.perf_counter()
            trainer.step([one], lam)
            wait()
            if turn >= 2:
                times[name].append(time.perf_counter() - began)
            memory[name] = torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else float("nan")
    base = times["cross-entropy"]
    waits = sync(eager, one)
    rows = []
    for name, seconds in times.items():
        ratio = statistics.median(s / b for s, b in zip(seconds, base, strict=True))
        rate = batch / statistics.median(seconds)
        said = waits if name == "default" else ""
        rows.append(f"{name} | {rate:.0f} | {ratio:.3f} | {memory[name]:.0f} | {said} |")
    return rows


def sync(trainer: Trainer, batch: object) -> str:
    """Whether a step with remembered lungs waits for the GPU."""
    if not torch.cuda.is_available():
        return "no GPU"
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.step([batch], 0.5)  # type: ignore[list-item]
        return "no"
    except RuntimeError as error:
        return f"yes: {str(error).splitlines()[0][:80]}"
    finally:
        torch.cuda.set_sync_debug_mode("default")


def from_shards(trainer: Trainer) -> str:
    """A training loop: images a second, and the share of the time that it waits for them."""
    device = trainer.accelerator.device
    waited, seen, began = 0.0, 0, 0.0
    for epoch in range(3):
        iterator = iter(groups(ahead(trainer.loader.batches(epoch), device), 1))
        while True:
            before = time.perf_counter()
            group = next(iterator, None)
            if group is None:
                break
            if epoch:  # the first one finds the lungs, and starts the loader's processes
                waited += time.perf_counter() - before
                seen += len(group[0].image)
            trainer.step(group, 0.5)
        wait()
        if not epoch:
            began = time.perf_counter()
    seconds = time.perf_counter() - began
    return f"{seen / seconds:.0f} images/s, waiting {100 * waited / seconds:.1f}%"


def grays(trainer: Trainer) -> str:
    """How far what the device decodes lies from what the reader does."""
    split, device = trainer.splits["train"], trainer.accelerator.device
    plan = EpochPlan(split.shard_sizes())
    both = [next(iter(Loader(split, plan, batch=16, decoder=by).batches(0))).image.cpu() for by in (None, device)]
    apart = (both[0].int() - both[1].int()).abs()
    return f"{int(apart.max())} of 255 at most, {apart.double().mean():.3f} in the mean"


def loop(backbone: str, batch: int, workers: int, root: Path) -> list[str]:
    """From shards, decoded by either; evaluation, and bare inference."""
    lines = []
    for count, decode in ((workers, "loader"), (workers, "device"), (1, "loader"), (1, "device")):
        trainer = trainer_of(root, backbone, batch, "--workers", str(count), "--decode", decode)
        lines.append(f"from shards, {count} loader processes, decoded by the {decode}: {from_shards(trainer)}")
        trainer.loader.close()
    lines.append(f"grays by the device and by the loader differ by {grays(trainer)}")
    device = trainer.accelerator.device
    trainer.evaluator.measure("val")
    wait()
    before = time.perf_counter()
    trainer.evaluator.measure("val")
    wait()
    evaluated = len(trainer.splits["val"]) / (time.perf_counter() - before)
    images = torch.rand(batch, 1, trainer.config.size, trainer.config.size, device=device)
    trainer.model.eval()
    with torch.no_grad(), trainer.accelerator.autocast():
        for turn in range(6):
            if turn == 1:
                wait()
                before = time.perf_counter()
            trainer.model(images)
    wait()
    bare = 5 * batch / (time.perf_counter() - before)
    return [*lines, f"evaluation {evaluated:.0f} images/s, bare inference {bare:.0f}"]


def main() -> None:
    """Measure in a process for each precision, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", default="pvt,resnet,vgg")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--inside", help="(a process of its own, of that precision)")
    parser.add_argument("--write", type=Path, default=HERE / "gpu.md")
    a = parser.parse_args()
    if not torch.cuda.is_available() and not a.cpu:
        sys.exit("no GPU is there; --cpu runs it all the same, slowly")
    if a.inside:
        root = Path(a.inside)
        precision = os.environ["ACCELERATE_MIXED_PRECISION"]
        for backbone in a.backbones.split(","):
            for row in steps(backbone, a.batch, a.turns, root):
                print(f"ROW | {backbone} | {precision} | {row}", flush=True)
        if precision == "bf16":
            for line in loop(a.backbones.split(",")[0], a.batch, a.workers, root):
                print(f"LINE {line}", flush=True)
        return
    text = f"# On a GPU\n\n{(__doc__ or '').partition(chr(10) * 2)[2].strip()}\n\n{processor()}; torch "
    text += f"{torch.__version__}, {date.today()}; batch {a.batch}, 224 px, files of 512 px.\n\n"
    text += "| backbone | precision | step | images/s | ratio to cross-entropy | peak, MB | waits for the GPU |\n"
    text += "|---|---|---|---|---|---|---|\n"
    lines = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        pack(Phantoms(a.images, 0, size=512, findings=FINDINGS), root / "shards", dataset="phantom")
        for precision in ("bf16", "fp16", "no") if torch.cuda.is_available() else ("bf16", "no"):
            command = [sys.executable, __file__, *sys.argv[1:], "--inside", str(root)]
            environment = os.environ | {"ACCELERATE_MIXED_PRECISION": precision}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=False)
            text += "".join(f"{row[4:]}\n" for row in done.stdout.splitlines() if row.startswith("ROW"))
            lines += [line[5:] for line in done.stdout.splitlines() if line.startswith("LINE")]
            if done.returncode:
                lines.append(f"{precision}: stopped with exit code {done.returncode}")
    text += "\n" + "".join(f"- {line}\n" for line in lines)
    a.write.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
