"""python bench/lesions.py --work DIR: do the maps lie on the lesion? Real radiographs whose lesions radiologists
marked.

Questions: Effusion, Pneumothorax, Cardiomegaly, Pneumonia and Consolidation, each against No Finding, whatever else an
image shows; several: the eight findings of BBox_List_2017 as one model. An image shows a finding where the archive's
text or a radiologist's mark says so. Patients are dealt 50/10/40 by the seed; lesions of the training images are used
by those arms alone that say so. EfficientNet-Lite0 from ImageNet weights, 224 px, AdamW with some augmentation, the
last model. Truth are the radiologists' boxes.

Beside every hit rate stands the one point that most lesions of the other images (train and val) hold, beside every
energy their mean map, beside all of it cross-entropy. A finished run is not repeated, an interrupted one is resumed.
Writes bench/lesions.md.

CXR_FOCUS_REAL_DATA names a folder with `lesions/` and `nih/meta`.
"""

import argparse
import csv
import gzip
import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import real
from real import COMMON, HERE, Seen, call, compared, floor_of_others, place, rows_of, write
from step import processor

from shards.dataset import Split
from shards.targets import MultiLabel, SingleLabel
from trainer.papers import overlap
from trainer.regions.lesions import LesionRegions

QUESTIONS = ("Effusion", "Pneumothorax", "Cardiomegaly", "Pneumonia", "Consolidation")
SEVERAL = "several"
EIGHT = ("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax")
EPOCHS = {"Effusion": 8, "Pneumothorax": 10, "Cardiomegaly": 10, "Pneumonia": 10, "Consolidation": 10, SEVERAL: 6}
BASE = real.BASE
# As the default was before this study: lambda 0.5 from the start, both sides alike
BEFORE = ["--balance.lam", "0.5", "--balance.ramp", "0", "--findings", str(HERE / "unsided.yaml")]
LESIONS = ["--findings", str(HERE / "declared.yaml"), "--attention.region", "both"]
ARMS: dict[str, list[str]] = {
    BASE: ["--balance.lam", "1", "--findings", str(HERE / "declared.yaml")],
    "rectangles": [*BEFORE[:-2], "--findings", str(HERE / "boxed.yaml")],
    "shape of the lungs": BEFORE,
    "default": ["--findings", str(HERE / "declared.yaml")],
    "both sides alike": ["--findings", str(HERE / "unsided.yaml")],
    "finer maps": ["--findings", str(HERE / "declared.yaml"), "--attention.stride", "16"],
    "lesions of 1%": LESIONS,
    "lesions of 10%": LESIONS,
    "all lesions": LESIONS,
}
ANNOTATED = {"lesions of 1%": 0.01, "lesions of 10%": 0.1}  # of the training images with a finding
SHARES = "0.5,0.1,0.4"
FEW = 5  # images that two read: fewer say nothing


def shards_of(data: Path, work: Path, question: str, seed: int) -> Path:
    """Packed once."""
    out = work / f"shards_{question}_{seed}"
    if out.exists():
        return out
    wanted = EIGHT if question == SEVERAL else (question,)
    boxes = [row for row in rows_of(data / "lesions/boxes.csv") if row["finding"] in wanted]
    marked: dict[str, set[str]] = defaultdict(set)
    for row in boxes:
        marked[row["image"]].add(row["finding"])
    table = []
    for row in rows_of(data / "lesions/labels.csv"):
        if row["set"] != "nih":
            continue
        found = {name for name in row["labels"].split("|") if name in wanted} | marked[row["image"]]
        if found or row["labels"] == "No Finding":
            label = "|".join(sorted(found)) or "No Finding"
            table.append((row["image"], label, row["patient"], row["drain"], row["view"]))
    name = work / f"{question}_{seed}"
    write(name.with_suffix(".csv"), ("path", "finding", "patient", "drain", "view"), table)
    kept, pixels = {row[0] for row in table}, []
    for row in boxes:
        if row["image"] in kept:
            edges = [min(512.0, max(0.0, 512 * float(row[edge]))) for edge in ("x0", "y0", "x1", "y1")]
            pixels.append((row["image"], row["finding"], *edges))
    write(Path(f"{name}_boxes.csv"), ("path", "finding", "x0", "y0", "x1", "y1"), pixels)
    where = ["--csv", f"{name}.csv", "--images", str(data / "lesions/images"), "--boxes", f"{name}_boxes.csv"]
    where += ["--patient-column", "patient", "--keep-column", "drain,view"]
    call("shards", "csv", *where, "--ratios", SHARES, "--seed", str(seed), "--out", str(out))
    return out


def train(work: Path, question: str, arm: str, seed: int, shards: Path) -> Path:
    """The run folder, finished."""
    run = work / f"{question}_{arm.replace(' ', '-')}_{seed}"
    if not (run / "report.json").exists():
        task = ",".join(EIGHT) if question == SEVERAL else f"No Finding,{question}"
        flags = ["--shards", str(shards), "--out", str(run), "--seed", str(seed), "--task", task]
        flags += [*COMMON, "--epochs", str(EPOCHS[question]), "--pretrained", str(work / "lite0.safetensors")]
        flags += ["--labels.kind", "any"] if question == SEVERAL else []
        arms = ARMS[arm]
        if question == SEVERAL and "0.5" in arms:
            raise SystemExit(f"error: the arm {arm} is of one finding an image")
        if arm in ANNOTATED:
            arms = [*arms, "--attention.annotated", str(annotated(shards, question, ANNOTATED[arm]))]
        call("trainer.train", *flags, *arms, *(["--resume"] if (run / "checkpoints/last.pt").exists() else []))
        call("trainer.evaluate", "--run", str(run), "--shards", str(shards), "--workers", "0", "--by", "drain")
    return run


def annotated(shards: Path, question: str, share: float) -> float:
    """The share of the images with lesions that are so many of the training images with a finding."""
    classes = EIGHT if question == SEVERAL else ("No Finding", question)
    split = Split(shards, "train", MultiLabel(EIGHT) if question == SEVERAL else SingleLabel(classes, classes[1:]))
    targets = split.targets(np.arange(len(split)))
    positive = int((targets[:, 0 if question == SEVERAL else 1 :] == 1).any(1).sum())
    return min(1.0, math.ceil(share * positive) / len(LesionRegions(split, 1.0).used))


def second_reader(data: Path, finding: str) -> dict[str, float]:
    """The box of BBox_List_2017 against the boxes of ChestX-Det in the images that both marked, as if it were a
    model's: hits of its middle, its share that lies in them, T(IoU). No model's figure can mean more.
    """
    marked: dict[str, list[list[float]]] = defaultdict(list)
    for row in rows_of(data / "lesions/boxes.csv"):
        if row["finding"] == finding and row["source"] == "chestxdet":
            marked[row["image"].split(".")[0]].append([float(row[edge]) for edge in ("x0", "y0", "x1", "y1")])
    both = []
    with gzip.open(data / "nih/meta/BBox_List_2017.csv.gz", "rt") as file:
        for name, of, x, y, w, h, *_ in list(csv.reader(file))[1:]:
            if of.replace("Infiltrate", "Infiltration") == finding and (second := marked.get(name.split(".")[0])):
                left, top, width, height = (float(v) / 1024 for v in (x, y, w, h))
                both.append(([[left, top, left + width, top + height]], second))
    if len(both) < FEW:
        return {}
    grid = (np.arange(256) + 0.5) / 256
    hits, energy, ious = [], [], []
    for first, second in both:
        truth = np.zeros((256, 256), bool)
        for x0, y0, x1, y1 in second:
            truth |= ((grid >= y0) & (grid < y1))[:, None] & ((grid >= x0) & (grid < x1))
        x0, y0, x1, y1 = first[0]
        hits.append(truth[min(255, int((y0 + y1) * 128)), min(255, int((x0 + x1) * 128))])
        energy.append(truth[int(y0 * 256) : int(np.ceil(y1 * 256)), int(x0 * 256) : int(np.ceil(x1 * 256))].mean())
        ious.append(max(overlap(first[0], box)[0] for box in second))
    found = {"images": float(len(both)), "hit": float(np.mean(hits)), "energy": float(np.mean(energy))}
    return found | {f"t_iou {t}": float(np.mean(np.array(ious) >= t)) for t in (0.1, 0.3, 0.5)}


FIGURES = {
    "AUC": real.auc,
    "pointing at lesion": place("lesion", "pointing"),
    "energy in lesion": place("lesion", "energy"),
    "IoU at Otsu's threshold": place("lesion", "iou_otsu"),
    "pointing at expected region": place("expected", "pointing"),
}
PRINTED = ("hit", "energy", "miou", "t_iou 0.1", "t_iou 0.3", "t_iou 0.5", "t_iobb 0.5")


def printed(run: Path, finding: str) -> dict[str, float]:
    """Figures of `trainer.papers` on test."""
    found = json.loads((run / "report.json").read_text())["test"]["lesions"][finding]["model"]
    return {n: found[n] if " " not in n else found[n.split()[0]][n.split()[1]] for n in PRINTED}


def section(question: str, runs: dict[str, list[Path]], shards: list[Path], data: Path) -> str:
    """Markdown of one question."""
    if question == SEVERAL:
        return several(runs)
    arms = {arm: [Seen(run, question) for run in of] for arm, of in runs.items()}
    first = arms[BASE][0]
    floors = [
        known
        for shard in shards
        if (known := floor_of_others(shard, SingleLabel(("No Finding", question), (question,)), 1))
    ]
    boxed = sum(map(bool, first.place["lesion"]))
    lines = [
        f"{len(shards)} seeds, about {len(first.keys)} test images each, {boxed} of them with boxes. Floor: the "
        "constant "
        f"point hits {np.mean([f[0] for f in floors]):.3f}, the mean map has {np.mean([f[1] for f in floors]):.3f} of "
        "its energy in the lesions.\n",
        f"| figure | {' | '.join(arms)} |",
        "|---" * (len(arms) + 1) + "|",
    ]
    for name, figure in FIGURES.items():
        cells, i = compared(arms, figure), 0
        row = []
        for k in range(len(arms)):  # of the differences those to the first arm
            row.append(cells[i] + (f"; {cells[i + 1]}" if k else ""))
            i += k + 1
        lines.append(f"| {name} | {' | '.join(row)} |")
    reader = second_reader(data, question)
    if reader:
        told = ", ".join(f"{name} {value:.3f}" for name, value in reader.items() if name != "images")
        lines[0] += f"Second reader, {reader['images']:.0f} images that two read: {told}.\n"
    for name in PRINTED:
        row = [f"{np.mean([printed(run, question)[name] for run in of]):.3f}" for of in runs.values()]
        lines.append(f"| {name} (papers) | {' | '.join(row)} |")
    return "\n".join(lines) + "\n"


def several(runs: dict[str, list[Path]]) -> str:
    """Markdown of the model of eight findings: means over seeds, beside Wang et al. 2017."""
    lines = [f"| finding | {' | '.join(f'{arm}: {name}' for arm in runs for name in PRINTED)} |"]
    lines.append("|---" * (1 + len(runs) * len(PRINTED)) + "|")
    each: dict[str, list[list[float]]] = {}
    for finding in EIGHT:
        each[finding] = [
            [float(np.mean([printed(run, finding)[name] for run in of])) for name in PRINTED] for of in runs.values()
        ]
        lines.append(f"| {finding} | {' | '.join(f'{v:.3f}' for row in each[finding] for v in row)} |")
    means = np.mean([np.concatenate(each[finding]) for finding in EIGHT], 0)
    lines.append(f"| mean | {' | '.join(f'{v:.3f}' for v in means)} |")
    lines.append(
        "\nT(IoU) at 0.1, 0.3, 0.5 of others: Wang et al. 2017 .568, .221, .062; CLARiTy .81, .59, .32; random maps "
        ".29, "
        ".10, .03."
    )
    return "\n".join(lines) + "\n"


def main() -> None:
    """Train what is not done, then the tables of what all arms have."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--questions", nargs="+", choices=(*QUESTIONS, SEVERAL), default=[*QUESTIONS, SEVERAL])
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--arm", action="append", default=[], metavar="NAME=FLAGS", help="another arm")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, one thread each")
    parser.add_argument("--tables", action="store_true", help="only write the tables")
    a = parser.parse_args()
    ARMS.update((name, flags.split()) for name, _, flags in (arm.partition("=") for arm in a.arm))
    if not (where := os.environ.get("CXR_FOCUS_REAL_DATA")):
        sys.exit("error: set CXR_FOCUS_REAL_DATA to the folder with lesions/")
    work, data = a.work.resolve(), Path(where).resolve()
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "lite0.safetensors").exists():
        subprocess.run([sys.executable, str(HERE / "lite0_weights.py"), str(work / "lite0.safetensors")], check=True)
    names = [*a.arms.split(","), *(arm.partition("=")[0] for arm in a.arm)]
    shards = {(q, s): shards_of(data, work, q, s) for q in a.questions for s in range(a.seeds)}
    jobs = [(q, arm, s) for s in range(a.seeds) for q in a.questions for arm in dict.fromkeys(names)]
    if not a.tables:
        with ThreadPoolExecutor(a.jobs) as pool:
            list(pool.map(lambda job: train(work, *job, shards[job[0], job[2]]), jobs))
    text = f"# On the lesion\n\n{(__doc__ or '').partition(chr(10) * 2)[2].strip()}\n\n{processor()}, {date.today()}.\n"
    for q in a.questions:
        of: dict[str, Any] = {}
        for arm in ARMS:
            folders = [work / f"{q}_{arm.replace(' ', '-')}_{s}" for s in range(a.seeds)]
            if all((run / "report.json").exists() for run in folders):
                of[arm] = folders
        if BASE in of:
            text += f"\n## {q}\n\n{section(q, of, [shards[q, s] for s in range(a.seeds)], data)}"
    (HERE / "lesions.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
