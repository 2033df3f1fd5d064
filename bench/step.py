"""python bench/step.py: what attention costs, side by side in one run.

One training step of plain cross-entropy, one with attention and remembered boxes, one with new boxes, alternating, by
the trainer's own `Trainer.step` on phantoms. With `--several` a step of cross-entropy over 14 classes, one of binary
cross-entropy over 14 findings, one of the default of several findings an image. Prints medians of ratios with their
quartiles and appends them, dated and with the hardware, to bench/step.md.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path

import torch

from shards.batch import Batch
from shards.loader import Loader
from shards.names import lists
from shards.pack import pack
from shards.phantom import Phantoms, SeveralPhantoms
from shards.plan import EpochPlan
from trainer.build import build
from trainer.command import resolve
from trainer.config import Config
from trainer.loop import Trainer
from trainer.regions import PUBLISHED, Regions
from trainer.sections import AttentionConfig
from trainer.task import OneOf


def processor() -> str:
    """The processor's name and what of it counts here, and the GPU's if there is one."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    name = next(
        (line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")),
        platform.processor(),
    )
    gpu = f"{torch.cuda.get_device_name()}, " if torch.cuda.is_available() else ""
    return f"{gpu}{name}{', AMX' if 'amx_bf16' in text else ''}, {torch.get_num_threads()} threads"


def step(trainer: Trainer, batch: Batch, lam: float) -> float:
    """Seconds of one optimizer step."""
    begin = time.perf_counter()
    trainer.step([batch], lam)
    if trainer.accelerator.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def quartiles(values: list[float], base: list[float]) -> list[float]:
    """Quartiles and median of the ratios within each turn."""
    return statistics.quantiles([v / b for v, b in zip(values, base, strict=True)], n=4)


def publish(lines: list[str], path: Path) -> None:
    """Print and append."""
    text = "\n".join(lines) + "\n"
    print(text)
    with path.open("a") as file:
        file.write(text)


def several(a: argparse.Namespace, root: Path) -> tuple[str, dict[str, list[float]]]:
    """Seconds of the steps of 14 classes and of 14 findings, lungs remembered."""
    source = SeveralPhantoms(max(40, 5 * a.batch), 0, size=512)
    pack(source, root / "shards", dataset="phantom")
    index = json.loads((root / "shards/index.json").read_text())
    index["asked"] = list(dict.fromkeys((*index["asked"], *lists()["nih14"])))
    (root / "shards/index.json").write_text(json.dumps(index))
    common = [
        "--shards",
        str(root / "shards"),
        "--backbone",
        a.backbone,
        "--pretrained",
        "false",
        "--size",
        str(a.size),
    ]
    common += [
        "--batch",
        str(a.batch),
        "--tracker",
        "none",
        "--workers",
        "0",
        "--labels.kind",
        "any",
        "--task",
        "nih14",
    ]
    base = "binary cross-entropy, 14 findings"
    arms = {"cross-entropy, 14 classes": ["--balance.lam", "1"], base: ["--balance.lam", "1"], f"{base} again": []}
    arms |= {"default, lambda 0.5": ["--balance.lam", "0.5"], "default": []}
    trainers: dict[str, Trainer] = {}
    for number, (name, flags) in enumerate(arms.items()):
        if name.endswith("again"):
            trainers[name] = trainers[base]
            continue
        trainers[name] = build(resolve([*common, "--out", str(root / f"run{number}"), *flags]))
        trainers[name].net.train()
    first = next(iter(arms))
    trainers[first].task = _Classes(lists()["nih14"])
    split = trainers[base].splits["train"]
    batch = next(iter(Loader(split, EpochPlan(split.shard_sizes()), batch=a.batch, workers=0).batches(0)))
    times: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(a.pairs + 2):
        for name in list(times) if turn % 2 else list(times)[::-1]:
            seconds = step(trainers[name], batch, 1.0 if "cross-entropy" in name else 0.5)
            if turn >= 2:
                times[name].append(seconds)
    return base, times


class _Classes(OneOf):
    """Cross-entropy over as many classes, whatever the labels are."""

    def loss(
        self, logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, chance: torch.Tensor
    ) -> torch.Tensor:
        return super().loss(logits, (target == 1).to(torch.int8), weight, chance)


def tell(a: argparse.Namespace, base: str, times: dict[str, list[float]]) -> None:
    """Print and append the table."""
    lines = [
        f"\n## {date.today()}, {a.backbone} at {a.size} px, batch {a.batch}, {a.precision}, {a.pairs} alternating "
        "pairs",
        f"\n{processor()}; torch {torch.__version__}\n",
        f"| step | median seconds | median ratio to {base} | quartiles |",
        "|---|---|---|---|",
    ]
    for name, seconds in times.items():
        low, middle, high = quartiles(seconds, times[base])
        lines.append(f"| {name} | {statistics.median(seconds):.3f} | {middle:.3f} | {low:.3f} to {high:.3f} |")
    publish(lines, a.write)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="pvt")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--precision", default="bf16", choices=("no", "bf16"))
    parser.add_argument("--several", action="store_true", help="several findings an image")
    parser.add_argument("--write", type=Path, default=Path(__file__).with_name("step.md"))
    a = parser.parse_args()
    import os

    os.environ["ACCELERATE_MIXED_PRECISION"] = a.precision
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if a.several:
            tell(a, *several(a, root))
            return
        pack(
            Phantoms(max(40, 5 * a.batch), 0, size=512, findings=("No Finding", "Effusion")),
            root / "shards",
            dataset="phantom",
        )
        config = Config(
            str(root / "shards"),
            str(root / "run"),
            backbone=a.backbone,
            pretrained="false",
            batch=a.batch,
            size=a.size,
            tracker="none",
            workers=0,
            attention=AttentionConfig(form="energy"),
        )
        trainer = build(config)
        trainer.net.train()
        split = trainer.splits["train"]
        batch = next(iter(Loader(split, EpochPlan(split.shard_sizes()), batch=a.batch, workers=0).batches(0)))
        memory = trainer.lungs["train"].memory
        shaped, boxed = trainer.regions, Regions(split.classes, PUBLISHED, a.size, trainer.accelerator.device)
        names = (
            "cross-entropy",
            "cross-entropy again",
            "remembered, parts of the lung box",
            "remembered lungs",
            "new lungs",
        )
        times: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(a.pairs + 2):
            order = list(times)
            for name in order if turn % 2 else order[::-1]:
                trainer.regions = boxed if "box" in name else shaped
                if name == "new lungs":
                    memory.table[:] = 0
                seconds = step(trainer, batch, 1.0 if name.startswith("cross") else 0.5)
                if turn >= 2:  # the first two warm up
                    times[name].append(seconds)
    tell(a, "cross-entropy", times)


if __name__ == "__main__":
    main()
