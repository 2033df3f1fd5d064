"""python bench/real.py --work DIR: the main job on real radiographs, cross-entropy beside attention, paired by seed.

CXR_FOCUS_REAL_DATA names a folder with `effusion/{train,val,test}/<class>`. Packs it and trains classifiers (No Finding against
Effusion) from scratch and from ImageNet weights; the package's own segmenter finds the lungs. Each run is one
`accelerate launch` of the ordinary commands; a finished run is not repeated, an interrupted one is resumed. The table is
appended to bench/real.md.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path

HERE = Path(__file__).parent
FIGURES = ("accuracy", "auc", "energy", "lift", "pointing")
ARMS = {"cross-entropy": "1", "energy": "0.5"}
MODELS = {
    "resnet18, from scratch": ["--backbone", "resnet18", "--pretrained", "false", "--optim.lr", "1e-3", "--epochs", "8", "--size", "160"],
    "tf_efficientnet_lite0, ImageNet": ["--backbone", "tf_efficientnet_lite0", "--pretrained", "{weights}", "--optim.lr", "3e-4", "--epochs", "5"],
}


def call(*command: str) -> None:
    """Run a command of the project; stop with it."""
    print("$", " ".join(command), flush=True)
    subprocess.run([sys.executable, "-m", *command], check=True, cwd=HERE.parent)


def launch(module: str, *flags: str) -> None:
    """The ordinary launch of an entry point."""
    call("accelerate.commands.launch", "--quiet", "--config_file", "accelerate_config.yaml", "-m", module, *flags)


def figures(run: Path) -> dict[str, float]:
    """Test figures of a finished run, localization against the expected region."""
    test = json.loads((run / "report.json").read_text())["test"]
    place = test["localization"]["expected"]["all"]
    return {"accuracy": test["accuracy"], "auc": test["auc"], **{name: place[name] for name in FIGURES[2:]}}


def main() -> None:
    """Everything, in an order that can be interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=2)
    a = parser.parse_args()
    real = os.environ.get("CXR_FOCUS_REAL_DATA")
    if not real:
        sys.exit("error: set CXR_FOCUS_REAL_DATA to the folder with effusion/")
    work, data = a.work.resolve(), Path(real)
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "effusion").exists():
        call("shards", "folder", "--path", str(data / "effusion"), "--out", str(work / "effusion"))
    weights = work / "lite0.safetensors"
    if not weights.exists():
        subprocess.run([sys.executable, str(HERE / "lite0_weights.py"), str(weights)], check=True)
    rows: dict[tuple[str, str], list[dict[str, float]]] = {}
    for seed in range(a.seeds):
        for model, flags in MODELS.items():
            for arm, lam in ARMS.items():
                run = work / f"{model.split(',')[0]}_{arm}_{seed}"
                common = ["--shards", str(work / "effusion"), "--out", str(run), "--task", "ne", "--balance.lam", lam, "--seed", str(seed)]
                common += ["--optim.name", "adamw", "--optim.weight_decay", "0.01", "--optim.schedule", "cosine", "--batch", "16", "--best", "auc"]
                common += ["--tracker", "none"]
                if not (run / "report.json").exists():
                    resume = ["--resume"] if (run / "checkpoints/last.pt").exists() else []
                    launch("trainer.train", *common, *[flag.format(weights=weights) for flag in flags], *resume)
                rows.setdefault((model, arm), []).append(figures(run))
    text = [f"\n## {date.today()}, No Finding against Effusion, 555 training and 118 test images, {a.seeds} seeds, test figures\n"]
    text += ["| model | arm | " + " | ".join(FIGURES) + " |", "|---|---|" + "---|" * len(FIGURES)]
    for (model, arm), runs in rows.items():
        cells = [f"{statistics.mean(r[n] for r in runs):.3f} ({', '.join(f'{r[n]:.3f}' for r in runs)})" for n in FIGURES]
        text.append(f"| {model} | {arm} | " + " | ".join(cells) + " |")
    print("\n".join(text))
    with (HERE / "real.md").open("a") as file:
        file.write("\n".join(text) + "\n")


if __name__ == "__main__":
    main()
