"""python bench/real_several.py --work DIR: real radiographs with several findings an image, binary cross-entropy beside
the default, paired by seed and patient.

NIH images with all their labels: the archive's text, and what radiologists boxed. The findings of nih14 with at least
20 images in train; 60/10/30 of the patients, dealt by the seed. EfficientNet-Lite0 from ImageNet weights, 224 px, AdamW
with some augmentation, the last model. Beside pointing stands its floor: the one point that most lesion boxes of train
and val hold.

CXR_FOCUS_REAL_DATA names a folder with `nih/` and `lesions/`. A finished run is not repeated, an interrupted one is
resumed. Writes bench/real_several.md.
"""

import argparse
import json
import os
import sys
from collections import Counter, defaultdict
from datetime import date
from pathlib import Path

import numpy as np
from real import COMMON, call, floor_of_others, rows_of, write
from step import processor

from shards.dataset import Split
from shards.names import lists
from shards.targets import MultiLabel
from trainer.multilabel import RESAMPLES, Cells, Sorted

HERE = Path(__file__).parent
BCE, DEFAULT = "binary cross-entropy", "default"
ARMS = {BCE: ["--balance.lam", "1"], DEFAULT: []}
LEAST, EPOCHS, SIZE = 20, 5, 224
# The archive names no region of a Hernia, which is too rare anyway; the others are in the ready-made findings.


def shards_of(data: Path, work: Path, seed: int) -> Path:
    """Packed once: all images, their patients dealt by the seed."""
    out = work / f"shards_{seed}"
    if out.exists():
        return out
    images = work / "images"
    images.mkdir(parents=True, exist_ok=True)
    labels: dict[str, set[str]] = defaultdict(set)
    for folder, table, name, text in (
        ("nih", "labels.csv", "image", "finding_labels"),
        ("lesions", "labels.csv", "image", "labels"),
    ):
        for row in rows_of(data / folder / table):
            if folder == "lesions" and row["set"] != "nih":
                continue
            labels[row[name]] |= set(row[text].split("|"))
            if not (images / row[name]).exists():
                (images / row[name]).symlink_to((data / folder / "images" / row[name]).resolve())
    boxes = []
    for row in rows_of(data / "lesions" / "boxes.csv"):
        if row["image"] in labels and row["finding"] in lists()["nih14"]:
            labels[row["image"]].add(row["finding"])
            edges = [512 * float(row[edge]) for edge in ("x0", "y0", "x1", "y1")]
            boxes.append((row["image"], row["finding"], *(min(512.0, max(0.0, edge)) for edge in edges)))
    known = {*lists()["nih14"], "No Finding"}
    table = []
    for image, found in sorted(labels.items()):
        found &= known
        if len(found) > 1:
            found.discard("No Finding")
        if found:
            table.append((image, "|".join(sorted(found)), image.split("_")[0]))
    write(work / "table.csv", ("path", "finding", "patient"), table)
    kept = {row[0] for row in table}
    write(work / "boxes.csv", ("path", "finding", "x0", "y0", "x1", "y1"), [box for box in boxes if box[0] in kept])
    where = ["--csv", str(work / "table.csv"), "--images", str(images), "--boxes", str(work / "boxes.csv")]
    call(
        "shards",
        "csv",
        *where,
        "--patient-column",
        "patient",
        "--ratios",
        "0.6,0.1,0.3",
        "--seed",
        str(seed),
        "--out",
        str(out),
    )
    return out


def findings_of(shards: Path) -> list[str]:
    """Those of nih14 with enough images in train."""
    count = Counter(name for found in Split(shards, "train").findings() for name in found)
    return [name for name in lists()["nih14"] if count[name] >= LEAST]


def train(work: Path, shards: Path, arm: str, seed: int) -> Path:
    """The run folder, finished."""
    run = work / f"{arm.replace(' ', '-')}_{seed}"
    if not (run / "report.json").exists():
        flags = ["--shards", str(shards), "--out", str(run), "--seed", str(seed), *COMMON, *ARMS[arm]]
        flags += ["--pretrained", str(work / "lite0.safetensors"), "--epochs", str(EPOCHS), "--size", str(SIZE)]
        flags += ["--labels.kind", "any", "--task", ",".join(findings_of(shards))]
        call("trainer.train", *flags, *(["--resume"] if (run / "checkpoints/last.pt").exists() else []))
    return run


# -- figures ----------------------------------------------------------------------------------------------------


def macro(runs: list[Path], often: list[np.ndarray] | None = None) -> float:
    """Mean over seeds of the macro AUROC on test; ``often``: how often each image of each seed counts."""
    values = []
    for k, run in enumerate(runs):
        sorted_, count = _sorted(run)
        weight = np.ones(count, int) if often is None else often[k]
        aucs = np.array([one.auc(weight) for one in sorted_])
        values.append(float(np.nanmean(aucs)))
    return float(np.mean(values))


CACHE: dict[Path, tuple[list[Sorted], int]] = {}


def _sorted(run: Path) -> tuple[list[Sorted], int]:
    if run not in CACHE:
        lines = lines_of(run)
        names = list(lines[0]["labels"])
        target = np.array(
            [[-1 if line["labels"][n] is None else line["labels"][n] for n in names] for line in lines], np.int8
        )
        cells = Cells(names, np.array([[line["probability"][n] for n in names] for line in lines]), target)
        CACHE[run] = [Sorted.of(*cells._scored(k, cells.probability)) for k in range(len(names))], len(lines)
    return CACHE[run]


def lines_of(run: Path) -> list[dict]:
    """Predictions of the test images."""
    return [json.loads(line) for line in (run / "predictions_test.jsonl").read_text().splitlines()]


def interval(arms: dict[str, list[Path]]) -> tuple[float, float]:
    """95% of the difference of macro AUROC, default less binary cross-entropy, by resampling patients, the same for all
    seeds, and seeds.
    """
    patients = [[line["key"].split("_")[0] for line in lines_of(run)] for run in arms[BCE]]
    everybody = sorted({who for of_seed in patients for who in of_seed})
    number = {who: i for i, who in enumerate(everybody)}
    index = [np.array([number[who] for who in of_seed]) for of_seed in patients]
    rng, found = np.random.default_rng(0), []
    for _ in range(RESAMPLES):
        drawn = np.bincount(rng.integers(0, len(everybody), len(everybody)), minlength=len(everybody))
        seeds = rng.integers(0, len(index), len(index))
        often = [drawn[index[s]] for s in seeds]
        both = [macro([arms[arm][s] for s in seeds], often) for arm in (DEFAULT, BCE)]
        found.append(both[0] - both[1])
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def table(work: Path, arms: dict[str, list[Path]], shards: list[Path]) -> str:
    """Markdown."""
    names = findings_of(shards[0])
    floors = [
        {name: known[0] for k, name in enumerate(names) if (known := floor_of_others(shard, MultiLabel(names), k))}
        for shard in shards
    ]
    reports = {
        arm: [json.loads((run / "report.json").read_text())["test"] for run in runs] for arm, runs in arms.items()
    }

    def mean(values: list[float | None]) -> str:
        known = [v for v in values if v is not None]
        return f"{np.mean(known):.3f}" if known else ""

    def place(report: dict, kind: str, name: str, figure: str) -> float | None:
        found = report["localization"][kind].get(name)
        return found and found[figure]

    head = ["finding", "test images", "boxed"]
    head += [
        f"{what}, {arm}"
        for what in ("AUROC", "energy in region", "energy in lesion", "pointing at lesion")
        for arm in arms
    ]
    rows = [[*head, "floor of pointing"]]
    for name in (*names, "all"):
        first = reports[BCE]
        cells = [name]
        if name == "all":
            cells += [mean([r["images"] for r in first]), ""]
        else:
            cells += [mean([r["per_finding"][name]["positive"] for r in first])]
            cells += [mean([place(r, "lesion", name, "images") for r in first])]
        cells += [
            mean([r["auc"] if name == "all" else r["per_finding"][name]["auc"] for r in reports[arm]]) for arm in arms
        ]
        for kind, figure in (("expected", "energy"), ("lesion", "energy"), ("lesion", "pointing")):
            cells += [mean([place(r, kind, name, figure) for r in reports[arm]]) for arm in arms]
        pairs = (
            [(f[n], (place(r, "lesion", n, "images") or 0)) for f, r in zip(floors, first, strict=True) for n in f]
            if name == "all"
            else []
        )
        cells += [
            f"{sum(f * n for f, n in pairs) / sum(n for _, n in pairs):.3f}"
            if pairs
            else mean([f.get(name) for f in floors])
        ]
        rows.append(cells)
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * (len(head) + 1), *lines[1:]])


def main() -> None:
    """Train what is not done, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--tables", action="store_true", help="only write the table, of seeds that all arms have")
    a = parser.parse_args()
    if "CXR_FOCUS_REAL_DATA" not in os.environ:
        sys.exit("error: CXR_FOCUS_REAL_DATA must name the folder with nih/ and lesions/")
    data = Path(os.environ["CXR_FOCUS_REAL_DATA"])
    a.work.mkdir(parents=True, exist_ok=True)
    if not (a.work / "lite0.safetensors").exists():
        import subprocess

        subprocess.run([sys.executable, str(HERE / "lite0_weights.py"), str(a.work / "lite0.safetensors")], check=True)
    for seed in range(0 if a.tables else a.seeds):
        for arm in a.arms.split(","):
            train(a.work, shards_of(data, a.work, seed), arm, seed)
    seeds = [
        s for s in range(a.seeds) if all((a.work / f"{arm.replace(' ', '-')}_{s}/report.json").exists() for arm in ARMS)
    ]
    arms = {arm: [a.work / f"{arm.replace(' ', '-')}_{s}" for s in seeds] for arm in ARMS}
    if not seeds:
        return
    low, high = interval(arms)
    of = {arm: macro(runs) for arm, runs in arms.items()}
    text = f"""# Real radiographs, several findings an image

{(__doc__ or "").partition(chr(10) * 2)[2].strip()}

{len(seeds)} seeds, {EPOCHS} epochs; {processor()}, {date.today()}.

Macro AUROC: {BCE} {of[BCE]:.3f}, default {of[DEFAULT]:.3f}, difference {of[DEFAULT] - of[BCE]:+.3f} ({low:+.3f} to
{high:+.3f}, 95%, over patients and seeds). All figures are means over seeds, of test.

{table(a.work, arms, [a.work / f"shards_{s}" for s in seeds])}
"""
    (HERE / "real_several.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
