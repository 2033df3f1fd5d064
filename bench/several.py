"""python bench/several.py --work DIR: what attention does where an image has any number of findings. Arms paired by
seed.

Phantoms of six findings, any number an image, a tenth of the cells unknown and a tenth uncertain; a mark in the corner
agrees with Effusion in 95% of the training images and says nothing in the test images. Every run is the trainer's own
loop; its best model by macro AUC on val is tested. Compared are Effusion's worst group (there or not, mark or not) at
the threshold that val chose, the AUC of the other findings, and where the maps of all pairs lie. A run that is done has
a line in bench/several.jsonl and is not repeated. The table in bench/several.md is made from whatever is done.
"""

import argparse
import contextlib
import json
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState, GradientState
from scipy import stats
from step import processor

from shards.dataset import Split
from shards.pack import pack
from shards.phantom import SEVERAL, SeveralPhantoms
from trainer.build import build
from trainer.command import resolve
from trainer.loop import Trainer
from trainer.multilabel import at_point
from trainer.run import open_run

HERE = Path(__file__).parent
COUNT, SIZE, SHORTCUT = 2500, 128, 0.95
RECIPE = ["--labels.kind", "any", "--task", ",".join(SEVERAL), "--backbone", "test_resnet", "--pretrained", "false"]
RECIPE += [
    "--size",
    str(SIZE),
    "--batch",
    "16",
    "--epochs",
    "16",
    "--workers",
    "0",
    "--tracker",
    "none",
    "--log_every",
    "50",
]
RECIPE += ["--optim.name", "adamw", "--optim.lr", "3e-3", "--optim.weight_decay", "0.01", "--optim.schedule", "cosine"]
RECIPE += ["--optim.warmup", "50"]
BCE, DEFAULT = "binary cross-entropy", "default"
ARMS = {
    BCE: ["--balance.lam", "1"],
    DEFAULT: [],
    "swap alone": ["--balance.lam", "1", "--swap.probability", "0.75"],
    "ramp to 0.8": ["--balance.lam", "0.8", "--balance.ramp", "0.5"],
    "lambda 0.9": ["--balance.lam", "0.9", "--balance.ramp", "0"],
    "lambda 0.85": ["--balance.lam", "0.85", "--balance.ramp", "0"],
    "lambda 0.8": ["--balance.lam", "0.8", "--balance.ramp", "0"],
    "lambda 0.5": ["--balance.lam", "0.5", "--balance.ramp", "0"],
    "lambda balanced": ["--balance.policy", "balanced"],
    "lambda ratio": ["--balance.policy", "ratio"],
}
FIGURES = {
    "worst group": "Effusion's worst group, accuracy",
    "effusion": "Effusion, AUC",
    "others": "the other five, mean AUC",
    "energy": "energy in region, mean over findings",
    "energy of the marked": "energy in region, Effusion",
    "lesion": "energy in lesion, mean over findings",
    "pointing": "pointing at lesion, mean over findings",
}


def measured(trainer: Trainer) -> dict[str, float]:
    """The figures of a trained model on its test images."""
    outcome = {name: trainer.evaluator.measure(name) for name in ("val", "test")}
    points = outcome["val"].operating_point()
    report = outcome["test"].report(threshold=points)
    split: Split = trainer.splits["test"]
    meta = [split.meta(p) for p in range(len(split))]
    there = np.array([SEVERAL[0] in m["shown"] for m in meta])
    mark = np.array([m["marker"] == 1 for m in meta])
    score = outcome["test"].task.probabilities(outcome["test"].logits)[:, 0].numpy()
    assert isinstance(points, dict)
    right = (score >= (points[SEVERAL[0]] or 0.5)) == there
    groups = [float(right[(there == a) & (mark == b)].mean()) for a in (False, True) for b in (False, True)]
    found = {kind: report["localization"][kind] for kind in ("expected", "lesion")}
    aucs = {name: report["per_finding"][name]["auc"] for name in SEVERAL}

    def mean(kind: str, name: str) -> float:
        return float(np.mean([found[kind][f][name] for f in SEVERAL if f in found[kind]]))

    energy = found["expected"][SEVERAL[0]]
    assert energy is not None
    return {
        "worst group": min(groups),
        "effusion": aucs[SEVERAL[0]],
        "others": float(np.mean([aucs[name] for name in SEVERAL[1:]])),
        "energy": mean("expected", "energy"),
        "energy of the marked": energy["energy"],
        "lesion": mean("lesion", "energy"),
        "pointing": mean("lesion", "pointing"),
        "sensitivity": at_point(there, score >= (points[SEVERAL[0]] or 0.5))["sensitivity"],
    }


def run(work: Path, arm: str, seed: int) -> dict[str, Any]:
    """Train and test."""
    shards, out = work / f"shards_{seed}", work / f"{arm.replace(' ', '-')}_{seed}"
    if not shards.exists():
        source = SeveralPhantoms(
            COUNT, seed, size=SIZE, share=0.3, unknown=0.1, uncertain=0.1, shortcut=SHORTCUT, shortcut_test=0.0
        )
        pack(source, shards, dataset="phantom", workers=1)
    begun = ["--resume"] if (out / "config.yaml").is_file() else []
    start = time.monotonic()
    flags = ["--shards", str(shards), "--out", str(out), *RECIPE, *ARMS[arm], "--seed", str(seed)]
    with contextlib.redirect_stdout(sys.stderr):
        trainer = build(resolve([*begun, "--out", str(out)] if begun else flags))
        trainer.train()
        trainer.model.load_state_dict(open_run(out).model.state_dict())
    line = {"arm": arm, "seed": seed, "minutes": (time.monotonic() - start) / 60} | measured(trainer)
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    return line


def interval(values: list[float]) -> str:
    """95% interval of a mean over seeds (t)."""
    half = float(stats.t.ppf(0.975, len(values) - 1)) * float(np.std(values, ddof=1)) / len(values) ** 0.5
    return f"{np.mean(values) - half:+.3f} to {np.mean(values) + half:+.3f}"


def table(lines: list[dict[str, Any]]) -> str:
    """Means over seeds, and differences to binary cross-entropy of the same seeds with t intervals."""
    of = {(line["arm"], line["seed"]): line for line in lines}
    arms = [arm for arm in ARMS if any(line["arm"] == arm for line in lines)]
    rows = ["| | " + " | ".join(arms) + " |", "|---|" + "---|" * len(arms)]
    for figure, words in FIGURES.items():
        cells = []
        for arm in arms:
            seeds = sorted(seed for one, seed in of if one == arm)
            cell = f"{np.mean([of[arm, s][figure] for s in seeds]):.3f}"
            both = [s for s in seeds if (BCE, s) in of]
            if arm != BCE and len(both) > 1:
                d = [of[arm, s][figure] - of[BCE, s][figure] for s in both]
                cell += f" ({np.mean(d):+.3f}, {interval(d)})"
            cells.append(cell)
        rows.append(f"| {words} | " + " | ".join(cells) + " |")
    seeds = [str(sum(line["arm"] == arm for line in lines)) for arm in arms]
    rows.append("| seeds | " + " | ".join(seeds) + " |")
    return "\n".join(rows)


def main() -> None:
    """Train what is not done yet, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for shards and runs")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--arms", default=",".join(ARMS), help="which, separated by commas")
    parser.add_argument("--tables", action="store_true", help="only write the table")
    a = parser.parse_args()
    file = HERE / "several.jsonl"
    done = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    for seed in range(0 if a.tables else a.seeds):
        for arm in a.arms.split(","):
            if any((line["arm"], line["seed"]) == (arm, seed) for line in done):
                continue
            done.append(run(a.work, arm, seed))
            with file.open("a") as out:
                out.write(json.dumps(done[-1]) + "\n")
    said = (__doc__ or "").partition(chr(10) * 2)[2].strip()
    text = f"""# Several findings an image

{said}

{COUNT} phantoms a seed (60/20/20), {SIZE} px, timm's test_resnet from nothing, 16 epochs; {processor()},
torch {torch.__version__}, {date.today()}. In brackets the difference to
{BCE} of the same seeds, with its 95% interval over seeds (t).

{table(done)}
"""
    (HERE / "several.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
