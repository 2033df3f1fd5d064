"""python bench/attention_study.py --work DIR: what trains attention, and what breaks a shortcut? Many arms, paired by
seed.

Phantoms with a planted shortcut: a marker outside the lungs that agrees with the label in all, or in 95%, of the
training images, and a tube inside a lung. Every run is the trainer's own loop (`trainer.train.build`, `Trainer.train`);
its last model is tested on three sets of other phantoms, in which the shortcut is as in training, says nothing, or is
always wrong. A run that is done has a line in bench/attention_study.jsonl and is not repeated, one that was interrupted
starts anew (a run takes one or two minutes): stop and start as you like. `--minutes` ends it early. The tables in
bench/attention_study.md are made from whatever is done.

    python bench/attention_study.py --work DIR --minutes 100                   # train, then write the tables
    python bench/attention_study.py --work DIR --cost                          # the cost of a step of each arm,
    alternating python bench/attention_study.py --work DIR --tables                        # only write the tables
"""

import argparse
import contextlib
import fcntl
import io
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import astuple, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy import stats
from step import processor, quartiles

from shards.dataset import Split
from shards.loader import Loader
from shards.pack import pack
from shards.phantom import Phantoms
from shards.plan import EpochPlan
from shards.store import open_store
from trainer.build import build
from trainer.command import parse
from trainer.config import Config
from trainer.loop import Trainer
from trainer.lungs import LungFinder, load_segmenter
from trainer.metrics import summarize
from trainer.rules import read_findings, rules_of, task_findings

HERE = Path(__file__).parent
# Pixels; training images; test images where the shortcut says nothing, half of it elsewhere
SIZE, TRAIN, TEST = (
    128,
    600,
    600,
)
CONDITIONS = {
    "marker 0.95": ("marker", 0.95),
    "marker 1.0": ("marker", 1.0),
    "tube 1.0": ("tube", 1.0),
    "tube 0.95": ("tube", 0.95),
}
TESTS = {"as in training": None, "says nothing": 0.0, "reversed": -1.0}
BACKBONES = {
    "resnet18": ["--backbone", "resnet18", "--task", "nep", "--optim.lr", "1e-3", "--epochs", "6"],
    # Two classes: from scratch it needs too many images to see a pneumothorax.
    "pvt_v2_b0": ["--backbone", "pvt_v2_b0", "--task", "ne", "--optim.lr", "5e-4", "--epochs", "6"],
    # timm's small one (0.5 M parameters), for the many arms.
    "test_resnet": ["--backbone", "test_resnet", "--task", "nep", "--optim.lr", "3e-3", "--epochs", "6"],
}
COMMON = ["--pretrained", "false", "--size", "128", "--batch", "16", "--workers", "0", "--tracker", "none"]
COMMON += [
    "--best",
    "auc",
    "--log_every",
    "20",
    "--optim.name",
    "adamw",
    "--optim.weight_decay",
    "0.01",
    "--optim.schedule",
    "cosine",
]
COMMON += ["--optim.warmup", "20"]
OFF, ON = ["--swap.probability", "0"], ["--swap.probability", "0.5"]
CLASSES, RULES = task_findings("nep"), rules_of(read_findings())
BOX = ["--findings", str(HERE / "whole_box.yaml")]
# Energy + swap of three quarters, expected regions in the shape of the lungs; all other arms: parts of the lung box
SHAPED = {"default": []}
CORE = {
    "cross-entropy": ["--balance.lam", "1", *OFF],
    "published": ["--attention.form", "published", *OFF],
    "coverage": ["--attention.form", "coverage", *OFF],
    "energy": OFF,
    "swap": ["--balance.lam", "1", *ON],
    "energy + swap": ON,
    "energy + swap of three quarters": [],
    **SHAPED,
}
FURTHER = {
    "lift + swap": ["--attention.form", "lift", *ON],
    "coverage + swap": ["--attention.form", "coverage", *ON],
    "energy in the whole box": [*BOX, *OFF],
    "energy in the whole box + swap": [*BOX, *ON],
    "energy, earlier layer + swap": ["--attention.layer", "{earlier}", *ON],
    "energy, two layers + swap": ["--attention.layer", "{both}", *ON],
    "input gradient": ["--attention.layer", "input", *OFF],
    "energy + swap, lambda 0.8": ["--balance.lam", "0.8", *ON],
    "energy + swap, lambda 0.2": ["--balance.lam", "0.2", *ON],
    "energy + swap of all": ["--swap.probability", "1"],
    "energy + swap of a quarter": ["--swap.probability", "0.25"],
    "energy + swap, lambda published": ["--balance.policy", "published", *ON],
    "energy + swap, lambda ratio": ["--balance.policy", "ratio", *ON],
    "energy + swap, lambda balanced": ["--balance.policy", "balanced", *ON],
    "energy + swap, lambda constrained": ["--balance.policy", "constrained", *ON],
}
CUT = ["--attention.region", "both", "--swap.lesions", "true"]
ANNOTATED = {
    "energy, 10% annotated": ["--attention.region", "both", "--attention.annotated", "0.1", *OFF],
    "energy + swap, 10% annotated": [*CUT, "--attention.annotated", "0.1", *ON],
    "energy + swap, all annotated": [*CUT, *ON],
}
LAYERS = {"resnet": ("layer3", "layer3,layer4"), "pvt": ("stages.2", "stages.2,stages.3")}  # an earlier one, two


@dataclass(frozen=True)
class Spec:
    """One run."""

    condition: str
    backbone: str
    arm: str
    seed: int

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.condition}_{self.backbone}_{self.arm}_{self.seed}".replace(" ", "-").replace(",", "")

    def flags(self) -> list[str]:
        """Of the trainer."""
        earlier, both = LAYERS["pvt" if self.backbone.startswith("pvt") else "resnet"]
        arm = [flag.format(earlier=earlier, both=both) for flag in {**CORE, **FURTHER, **ANNOTATED}[self.arm]]
        arm += ["--findings", "published"] if self.arm not in SHAPED and "--findings" not in arm else []
        return [*COMMON, *BACKBONES[self.backbone], *arm, "--seed", str(self.seed)]


def specs(seeds: int) -> list[Spec]:
    """All runs, what matters most first."""
    balanced = {arm: FURTHER[arm] for arm in ("energy + swap, lambda balanced",)}
    few, more = range(min(3, seeds)), range(min(3, seeds), seeds)
    short = {arm: CORE[arm] for arm in ("cross-entropy", "default")}
    every = [
        ("marker 0.95", "resnet18", CORE, range(seeds)),
        ("marker 0.95", "test_resnet", CORE, range(seeds)),
        ("marker 0.95", "pvt_v2_b0", CORE, range(seeds)),
        ("tube 1.0", "test_resnet", {**CORE, **ANNOTATED}, range(seeds)),
        ("marker 0.95", "test_resnet", FURTHER, few),
        ("tube 1.0", "test_resnet", FURTHER, few),
        ("marker 0.95", "pvt_v2_b0", balanced, few),
        ("marker 0.95", "resnet18", balanced, few),
        ("marker 1.0", "test_resnet", CORE, range(seeds)),
        ("marker 1.0", "pvt_v2_b0", CORE, range(seeds)),
        ("marker 1.0", "resnet18", short, range(seeds)),
        ("marker 0.95", "test_resnet", FURTHER, more),
        ("tube 0.95", "test_resnet", {**CORE, **ANNOTATED}, range(seeds)),
        ("tube 1.0", "test_resnet", FURTHER, more),
        ("marker 0.95", "pvt_v2_b0", balanced, more),
        ("marker 0.95", "resnet18", balanced, more),
    ]
    return [
        Spec(condition, backbone, arm, seed)
        for condition, backbone, arms, some in every
        for seed in some
        for arm in arms
    ]


class Data:
    """Shards and lungs of one condition and seed, made once."""

    def __init__(self, work: Path, spec: Spec) -> None:
        self.root = work / "data" / f"{spec.condition}_{spec.seed}".replace(" ", "-")
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (self.root / "lungs").exists():
                with contextlib.redirect_stderr(io.StringIO()):
                    self._make(*CONDITIONS[spec.condition], spec.seed)

    def _make(self, kind: str, correlation: float, seed: int) -> None:
        for name, value in TESTS.items():
            if not (self.root / name).exists():
                of_test = correlation if value is None else value
                source = Phantoms(
                    TEST * 5,
                    1000 + seed,
                    size=SIZE,
                    findings=CLASSES,
                    shortcut=correlation,
                    shortcut_test=of_test,
                    kind=kind,
                )
                source.items = [item for item in source.items if item.split == "test"][
                    : TEST if value == 0.0 else TEST // 2
                ]
                pack(source, self.root / name, dataset="phantom", workers=1)
        if not (self.root / "train").exists():
            source = Phantoms(TRAIN * 5 // 3, seed, size=SIZE, findings=CLASSES, shortcut=correlation, kind=kind)
            source.items = [item for item in source.items if item.split != "test"]
            pack(source, self.root / "train", dataset="phantom", workers=1)
        # The lungs of every image are found once, for all three classes.
        segmenter = load_segmenter().to(memory_format=torch.channels_last)
        partial = self.root / "lungs.partial"
        partial.mkdir(exist_ok=True)
        for name, part in (("train", "train"), ("train", "val"), ("says nothing", "test")):
            split = Split(open_store(self.root / name), part, CLASSES)
            finder = LungFinder(segmenter, SIZE, len(split), split.fingerprint)
            for batch in Loader(split, EpochPlan(split.shard_sizes(), shuffle=False), batch=25, workers=0).batches(0):
                finder(batch.image, batch.index)
            torch.save((split.rows.tolist(), torch.from_numpy(finder.memory.table)), partial / f"{part}.pt")
        partial.rename(self.root / "lungs")

    def remember(self, finder: LungFinder, split: Split, part: str) -> None:
        """Give ``finder`` of ``split``, which may have fewer classes, what is known."""
        rows, table = torch.load(self.root / "lungs" / f"{part}.pt", weights_only=True)
        at = {row: i for i, row in enumerate(rows)}
        finder.memory.table = table[[at[row] for row in split.rows.tolist()]].numpy()


def trained(work: Path, data: Data, spec: Spec) -> Trainer:
    """The trainer of a run, with the lungs known."""
    out = work / "runs" / spec.name
    if out.exists():
        subprocess.run(["rm", "-rf", str(out)], check=True)
    config = parse(Config, ["--shards", str(data.root / "train"), "--out", str(out), *spec.flags()])
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = build(config)
    for part in ("train", "val"):
        data.remember(trainer.lungs[part], trainer.splits[part], part)
    return trainer


def run(work: Path, spec: Spec) -> dict[str, Any]:
    """Train and test."""
    data = Data(work, spec)
    trainer = trained(work, data, spec)
    begin = time.monotonic()
    with contextlib.redirect_stderr(io.StringIO()):
        trainer.train()
    result: dict[str, Any] = {
        "seconds": time.monotonic() - begin,
        "lambda": trainer.balance.value(trainer.state.epoch - 1),
    }
    lungs = trainer.lungs["train"]
    for name in TESTS:
        split = Split(open_store(data.root / name), "test", trainer.splits["train"].classes)
        finder = LungFinder(lungs.segmenter, SIZE, len(split), split.fingerprint)
        look = name == "says nothing"
        if look:
            data.remember(finder, split, "test")
        seen = replace(trainer.evaluator, rules=RULES, splits={name: split}, lungs={name: finder}).measure(
            name, cams=look
        )
        right = (seen.logits.argmax(1) == seen.pairs.finding).float()
        result[name] = {"accuracy": float(right.mean()), "auc": seen.auc()}
        if look:
            markers = torch.tensor([split.meta(p)["marker"] for p in range(len(split))])
            groups = [
                right[(seen.pairs.finding == k) & (markers == m)].mean()
                for k in range(len(split.classes))
                for m in range(len(split.classes))
            ]
            result[name]["worst"] = float(min(groups))
            for kind, table in seen.tables().items():
                figures = summarize(table[~table[:, 0].isnan()][:, :6])
                if figures is None:  # no rule of the task follows the lungs' outline
                    continue
                result[name] |= {f"{kind}_{n}": figures[n] for n in ("energy", "lift", "pointing", "iou_otsu")}
    subprocess.run(["rm", "-rf", trainer.config.out], check=True)
    return result


def known(results: Path) -> dict[Spec, dict[str, Any]]:
    """What is done."""
    lines = map(json.loads, results.read_text().splitlines()) if results.exists() else ()
    return {Spec(*line["run"]): line for line in lines}


@contextlib.contextmanager
def claimed(work: Path, results: Path, spec: Spec) -> Iterator[bool]:
    """Whether this process has the run to itself, and nobody has done it."""
    with (work / "locks" / spec.name).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield spec not in known(results)


def worker(work: Path, results: Path, seeds: int, until: float, arms: list[str]) -> None:
    """Do what nobody else does, until the time is over; of these arms, or of all."""
    torch.set_num_threads(1)
    for spec in (spec for spec in specs(seeds) if not arms or spec.arm in arms):
        if time.time() > until:
            return
        with claimed(work, results, spec) as mine:
            if mine:
                result = {"run": astuple(spec)} | run(work, spec)
                with results.open("a") as file:  # one write of a line: processes do not mix
                    file.write(json.dumps(result) + "\n")
                nothing = result["says nothing"]
                told = (
                    f"{nothing['accuracy']:.3f} (in distribution {result['as in training']['accuracy']:.3f}), "
                    f"energy {nothing['expected_energy']:.3f}"
                )
                print(f"{time.strftime('%H:%M:%S')} {spec.name}: {told}, {result['seconds']:.0f} s", flush=True)


# -- tables -----------------------------------------------------------------------------------------------------


def boxed(result: dict[str, Any], figure: str) -> float:
    """A figure against the part of the lung box where the finding is expected: for all arms the same, whatever they
    were trained with.
    """
    seen = result["says nothing"]
    return seen.get(f"expected_box_{figure}", seen[f"expected_{figure}"])


FIGURES = {
    "accuracy": lambda r: r["says nothing"]["accuracy"],
    "worst group": lambda r: r["says nothing"]["worst"],
    "AUC": lambda r: r["says nothing"]["auc"],
    "accuracy, reversed": lambda r: r["reversed"]["accuracy"],
    "AUC in distribution": lambda r: r["as in training"]["auc"],
    "energy": lambda r: boxed(r, "energy"),
    "lift": lambda r: boxed(r, "lift"),
    "pointing": lambda r: boxed(r, "pointing"),
    "energy, lesion": lambda r: r["says nothing"].get("lesion_energy", math.nan),
    "lift, lesion": lambda r: r["says nothing"]["lesion_lift"],
    "pointing, lesion": lambda r: r["says nothing"]["lesion_pointing"],
}


def interval(values: list[float]) -> str:
    """Mean and 95% interval (Student's t) in points; of fewer than three values, whose interval says nothing, the mean
    alone.
    """
    mean = 100 * statistics.mean(values)
    if len(values) < 3:
        return f"{mean:.1f}"
    half = 100 * float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{mean:.1f} ± {half:.1f}"


def tables(results: Path) -> str:
    """Markdown: for each condition and backbone the figures of every arm,
    then the paired differences to cross-entropy.
    """
    done: dict[tuple[str, str], dict[str, dict[int, dict]]] = defaultdict(lambda: defaultdict(dict))
    ended = known(results)
    for spec in specs(1 + max((s.seed for s in ended), default=0)):
        if spec in ended:
            done[spec.condition, spec.backbone][spec.arm][spec.seed] = ended[spec]
    text = []
    for (condition, backbone), arms in done.items():
        text += [
            f"\n### {condition}, {backbone}\n",
            "| arm | seeds | " + " | ".join(FIGURES) + " |",
            "|---|---|" + "---|" * len(FIGURES),
        ]
        for arm, runs in arms.items():
            text.append(
                f"| {arm} | {len(runs)} | "
                + " | ".join(interval([f(r) for r in runs.values()]) for f in FIGURES.values())
                + " |"
            )
        base = arms.get("cross-entropy", {})
        text += [
            "\nMinus cross-entropy, paired by seed:\n",
            "| arm | seeds | " + " | ".join(FIGURES) + " |",
            "|---|---|" + "---|" * len(FIGURES),
        ]
        for arm, runs in arms.items():
            both = sorted(set(runs) & set(base))
            if arm != "cross-entropy" and both:
                text.append(
                    f"| {arm} | {len(both)} | "
                    + " | ".join(interval([f(runs[s]) - f(base[s]) for s in both]) for f in FIGURES.values())
                    + " |"
                )
    return "\n".join(text)


def cost(work: Path, turns: int) -> str:
    """Seconds of a step of each arm, alternating, as ratios to cross-entropy within each turn."""
    torch.set_num_threads(1)
    text = []
    for backbone in BACKBONES:
        trainers = {}
        for arm in [*CORE, *FURTHER]:
            spec = Spec("marker 0.95", backbone, arm, 0)
            data = Data(work, spec)
            trainers[arm] = trained(work / "cost", data, spec)
            trainers[arm].net.train()
        split = trainers["cross-entropy"].splits["train"]
        batch = next(iter(Loader(split, EpochPlan(split.shard_sizes()), batch=16, workers=0).batches(0)))
        times: dict[str, list[float]] = {arm: [] for arm in trainers}
        rng = np.random.default_rng(0)
        for turn in range(turns + 2):
            for arm in rng.permutation(list(trainers)):
                trainer = trainers[arm]
                begin = time.perf_counter()
                trainer.step([batch], trainer.balance.value(0) if trainer.attends else 1.0)
                if turn >= 2:
                    times[arm].append(time.perf_counter() - begin)
        text += [
            f"\n### Cost of a step, {backbone}, batch 16, {turns} turns\n",
            "| arm | median ratio to cross-entropy | quartiles |",
            "|---|---|---|",
        ]
        for arm, seconds in times.items():
            low, middle, high = quartiles(seconds, times["cross-entropy"])
            text.append(f"| {arm} | {middle:.2f} | {low:.2f} to {high:.2f} |")
    return "\n".join(text)


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--minutes", type=float, default=140)
    parser.add_argument("--arms", nargs="+", default=[], help="train only these")
    parser.add_argument("--turns", type=int, default=15, help="of --cost")
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--tables", action="store_true")
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)
    parser.add_argument(
        "--results", type=Path, default=HERE / "attention_study.jsonl", help="a line for each run that is done"
    )
    parser.add_argument("--write", type=Path, default=HERE / "attention_study.md")
    a = parser.parse_args()
    work = a.work.resolve()
    for folder in ("locks", "runs"):
        (work / folder).mkdir(parents=True, exist_ok=True)
    os.environ |= {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_USE_CPU": "true"}
    if a.worker:
        worker(work, a.results, a.seeds, a.worker, a.arms)
        return
    if a.cost:
        (work / "cost.md").write_text(cost(work, a.turns))
    elif not a.tables:
        until = str(time.time() + 60 * a.minutes)
        command = [
            sys.executable,
            str(Path(__file__).resolve()),
            "--work",
            str(work),
            "--seeds",
            str(a.seeds),
            "--results",
            str(a.results),
            "--worker",
            until,
        ]
        command += ["--arms", *a.arms] if a.arms else []
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        helpers = [subprocess.Popen(command, env=environment, cwd=HERE.parent) for _ in range(a.workers)]
        if any(helper.wait() for helper in helpers):
            sys.exit("error: a worker failed; its message is above; what is done is kept")
    text = tables(a.results)
    if (work / "cost.md").exists():
        text += "\n" + (work / "cost.md").read_text()
    head = (
        f"# Attention study\n\nWritten by `bench/attention_study.py`, {date.today()}; {processor()}; torch "
        f"{torch.__version__}. {SIZE} px, {TRAIN} training "
        f"and {TEST} test images a seed. Points (100 = all), mean over seeds ± half of the 95% interval (Student's "
        "t).\n\nUnless said otherwise a figure is of "
        "the test set in which the shortcut says nothing. Energy, lift and pointing: of the positives' CAM in the half "
        "of the lung box where the finding is "
        "expected; the default alone was trained with regions in the shape of the lungs.\n"
    )
    a.write.write_text(head + text + "\n")
    print(f"wrote {a.write}")


if __name__ == "__main__":
    main()
