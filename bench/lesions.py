"""python bench/lesions.py --work DIR: do the maps lie on the lesion? Real radiographs whose lesions radiologists
marked.

Questions: Effusion, Pneumothorax, Cardiomegaly, Pneumonia and Consolidation, each against No Finding, whatever else an
image shows; several: the eight findings of BBox_List_2017 as one model. An image shows a finding where the archive's
text or a radiologist's mark says so. Patients are dealt 50/10/40 by the seed; lesions of the training images are used
by those arms alone that say so. EfficientNet-Lite0 from ImageNet weights, 224 px, AdamW with some augmentation, the
last model. Truth are the radiologists' boxes. drain: Pneumothorax with a chest drain painted through a lung of 90% of
the positive and 10% of the negative images of train and val, and of half of all of test.

Beside every hit rate stands the one point that most lesions of the other images (train and val) hold, beside every
energy their mean map, beside all of it cross-entropy: the difference to it with two 95% intervals, of a bootstrap over
patients, and of one that draws the seeds, too. A finished run is not repeated, an interrupted one is resumed.
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
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import numpy as np
import real
from PIL import Image, ImageDraw
from real import COMMON, HERE, Seen, call, compared, floor_of_others, place, rows_of, write
from step import processor

from shards.dataset import Split
from shards.targets import MultiLabel, SingleLabel
from trainer.papers import overlap
from trainer.regions.lesions import LesionRegions

QUESTIONS = ("Effusion", "Pneumothorax", "Cardiomegaly", "Pneumonia", "Consolidation")
SEVERAL, DRAIN = "several", "drain"
FINDING = {DRAIN: "Pneumothorax"}  # of a question that is not called after it
EIGHT = ("Atelectasis", "Cardiomegaly", "Effusion", "Infiltration", "Mass", "Nodule", "Pneumonia", "Pneumothorax")
EPOCHS = {
    "Effusion": 8,
    "Pneumothorax": 10,
    "Cardiomegaly": 10,
    "Pneumonia": 10,
    "Consolidation": 10,
    SEVERAL: 6,
    DRAIN: 10,
}
BASE = real.BASE
# As the default was in the beginning: lambda 0.5 from the start, both sides alike
BEFORE = ["--balance.lam", "0.5", "--balance.ramp", "0", "--findings", str(HERE / "unsided.yaml")]
LESIONS = ["--findings", str(HERE / "declared.yaml"), "--attention.region", "both"]
ARMS: dict[str, list[str]] = {
    BASE: ["--balance.lam", "1", "--findings", str(HERE / "declared.yaml")],
    "rectangles": [*BEFORE[:-2], "--findings", str(HERE / "boxed.yaml")],
    "shape of the lungs": BEFORE,
    "default": ["--findings", str(HERE / "declared.yaml")],
    "falling to 0.4": ["--findings", str(HERE / "declared.yaml"), "--balance.lam", "0.4", "--balance.ramp", "0.5"],
    "default before": ["--findings", str(HERE / "halves.yaml"), "--balance.lam", "0.7", "--balance.ramp", "0.5"],
    "both sides alike": ["--findings", str(HERE / "unsided.yaml")],
    "finer maps": ["--findings", str(HERE / "declared.yaml"), "--attention.stride", "16"],
    "boxes of 1%": LESIONS,
    "boxes of 10%": LESIONS,
    "all boxes": LESIONS,
    "all boxes, finer maps": [*LESIONS, "--attention.stride", "16"],
    "all boxes, cut out": [*LESIONS, "--swap.lesions", "true"],
}
AVOID = ["--findings", str(HERE / "declared.yaml"), "--attention.avoid", "Chest Drain", "--swap.devices"]
DRAINS = {"drains avoided": [*AVOID, "0"], "drains avoided and lent": [*AVOID, "0.5"]}  # of drain alone
ALONE = ("rectangles", "shape of the lungs")  # of one finding an image alone
ANNOTATED = {"boxes of 1%": 0.01, "boxes of 10%": 0.1}  # of the training images with a finding
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


def drawn(data: Path, work: Path, seed: int) -> Path:
    """Shards of Pneumothorax, its patients dealt as there, with painted drains whose outline is known."""
    out, plain = work / f"shards_{DRAIN}_{seed}", work / f"Pneumothorax_{seed}"
    if out.exists():
        return out
    source = shards_of(data, work, "Pneumothorax", seed)
    names = ("No Finding", "Pneumothorax")
    splits = {name: Split(source, name, SingleLabel(names, names[1:])) for name in ("train", "val", "test")}
    split_of = {split.key(i): name for name, split in splits.items() for i in range(len(split))}
    folder = work / f"{DRAIN}_{seed}"
    folder.mkdir(exist_ok=True)
    rng, rows, outlines = np.random.default_rng([13, seed]), [], {}
    for row in rows_of(plain.with_suffix(".csv")):
        image = Image.open(data / "lesions/images" / row["path"]).convert("L").resize((512, 512))
        split, ill = split_of[Path(row["path"]).stem], row["finding"] == "Pneumothorax"
        has = rng.random() < (0.5 if split == "test" else 0.9 if ill else 0.1)
        if has:
            outline = tube(rng)
            over = Image.new("L", (2048, 2048))
            ImageDraw.Draw(over).polygon([(2048 * x, 2048 * y) for x, y in outline], fill=150)
            image.paste(235, mask=over.resize((512, 512), Image.Resampling.BOX))
            outlines[f"{Path(row['path']).stem}.png"] = [{"finding": "Chest Drain", "points": outline}]
        name = f"{Path(row['path']).stem}.png"
        image.save(folder / name)
        rows.append((name, row["finding"], row["patient"], split, str(int(has)), row["view"]))
    table = folder.with_suffix(".csv")
    write(table, ("path", "finding", "patient", "split", "drain", "view"), rows)
    boxes = Path(f"{folder}_boxes.csv")
    of = [(f"{Path(row['path']).stem}.png", *list(row.values())[1:]) for row in rows_of(Path(f"{plain}_boxes.csv"))]
    write(boxes, ("path", "finding", "x0", "y0", "x1", "y1"), of)
    Path(f"{folder}_drains.json").write_text(json.dumps(outlines))
    where = ["--csv", str(table), "--images", str(folder), "--boxes", str(boxes), "--devices", "Chest Drain"]
    where += ["--lesions", f"{folder}_drains.json", "--patient-column", "patient", "--split-column", "split"]
    call("shards", "csv", *where, "--keep-column", "drain,view", "--out", str(out))
    return out


def tube(rng: np.random.Generator) -> list[tuple[float, float]]:
    """The outline of a drain that comes in at the side of the chest and goes up to an apex, in shares of the image."""
    t = np.linspace(0, 1, 24)
    x0, y0, x1, y1 = rng.uniform((0.02, 0.55, 0.26, 0.15), (0.08, 0.75, 0.36, 0.3))
    x = x0 + (x1 - x0) * t + 0.05 * np.sin(np.pi * t)
    y = y0 + (y1 - y0) * t**1.5
    if rng.random() < 0.5:
        x = 1 - x
    dx, dy = np.gradient(x), np.gradient(y)
    wide = 0.007 / np.hypot(dx, dy)
    left = np.stack([x - dy * wide, y + dx * wide], 1)
    right = np.stack([x + dy * wide, y - dx * wide], 1)
    return [(float(u), float(v)) for u, v in np.clip(np.concatenate([left, right[::-1]]), 0, 1)]


def train(work: Path, question: str, arm: str, seed: int, shards: Path) -> Path:
    """The run folder, finished."""
    run = work / f"{question}_{arm.replace(' ', '-')}_{seed}"
    report = run / "report.json"
    there = json.loads(report.read_text())["test"]["lesions"] if report.exists() else None
    if there is None:
        task = ",".join(EIGHT) if question == SEVERAL else f"No Finding,{FINDING.get(question, question)}"
        flags = ["--shards", str(shards), "--out", str(run), "--seed", str(seed), "--task", task]
        flags += [*COMMON, "--epochs", str(EPOCHS[question]), "--pretrained", str(work / "lite0.safetensors")]
        flags += ["--labels.kind", "any"] if question == SEVERAL else []
        arms = ARMS[arm]
        if arm in ANNOTATED:
            arms = [*arms, "--attention.annotated", str(annotated(shards, question, ANNOTATED[arm]))]
        call("trainer.train", *flags, *arms, *(["--resume"] if (run / "checkpoints/last.pt").exists() else []))
    if there is None or any(name.split()[0] not in there["all"]["model"] for name in PRINTED):  # it is of before
        call("trainer.evaluate", "--run", str(run), "--shards", str(shards), "--workers", "0", "--by", "drain")
    return run


def annotated(shards: Path, question: str, share: float) -> float:
    """The share of the images with lesions that are so many of the training images with a finding."""
    classes = EIGHT if question == SEVERAL else ("No Finding", FINDING.get(question, question))
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


def auc_where(column: str, value: str, all_healthy: bool) -> Callable[[real.Seen, np.ndarray], float]:
    """AUC of the images whose column has the value, or of the ill ones among them and all healthy ones."""

    def figure(seen: real.Seen, weight: np.ndarray) -> float:
        there = np.array([seen.noted[key][column] == value for key in seen.keys])
        weight = weight * (there | (all_healthy & ~seen.labels))
        both = min(weight[seen.labels].sum(), weight[~seen.labels].sum())
        return real.auc(seen, weight) if both else np.nan

    return figure


FIGURES = {
    "AUC": real.auc,
    "AUC, ill with a drain and healthy": auc_where("drain", "1", True),
    "AUC, ill without a drain and healthy": auc_where("drain", "0", True),
    "AUC within AP views": auc_where("view", "AP", False),
    "AUC within PA views": auc_where("view", "PA", False),
    "pointing at lesion": place("lesion", "pointing"),
    "energy in lesion": place("lesion", "energy"),
    "IoU at Otsu's threshold": place("lesion", "iou_otsu"),
    "pointing at expected region": place("expected", "pointing"),
}
PRINTED = ("pointing", "hit", "energy", "miou", "t_iou 0.1", "t_iou 0.3", "t_iou 0.5", "t_iobb 0.5")


def printed(run: Path, finding: str) -> dict[str, float]:
    """Figures of `trainer.papers` on test."""
    found = json.loads((run / "report.json").read_text())["test"]["lesions"][finding]["model"]
    return {n: found[n] if " " not in n else found[n.split()[0]][n.split()[1]] for n in PRINTED}


def section(question: str, runs: dict[str, list[Path]], shards: list[Path], data: Path, work: Path) -> str:
    """Markdown of one question."""
    if question == SEVERAL:
        return several(runs)
    finding = FINDING.get(question, question)
    arms = {arm: [Seen(run, finding) for run in of] for arm, of in runs.items()}
    for of in arms.values():
        for seed, seen in enumerate(of):
            table = rows_of(work / f"{question}_{seed}.csv")
            seen.noted = {Path(row["path"]).stem: row for row in table}
    first = arms[BASE][0]
    floors = [
        known
        for shard in shards
        if (known := floor_of_others(shard, SingleLabel(("No Finding", finding), (finding,)), 1))
    ]
    boxed = sum(map(bool, first.place["lesion"]))
    lines = [
        f"{len(shards)} seed{'s' * (len(shards) > 1)}, about {len(first.keys)} test images each, {boxed} of them with "
        "boxes. Floor: the constant "
        f"point hits {np.mean([f[0] for f in floors]):.3f}, the mean map has {np.mean([f[1] for f in floors]):.3f} of "
        "its energy in the lesions.\n",
        f"| figure | {' | '.join(arms)} |",
        "|---" * (len(arms) + 1) + "|",
    ]
    for name, figure in FIGURES.items():
        cells, i = compared(arms, figure), 0
        row = []
        for k in range(len(arms)):  # of the differences those to the first arm
            row.append(cells[i] + (f"; {cells[i + 1]}" if k and cells[i + 1] else ""))
            i += k + 1
        if not any(row):
            continue
        lines.append(f"| {name} | {' | '.join(row)} |")
    reader = second_reader(data, finding)
    if reader:
        told = ", ".join(f"{name} {value:.3f}" for name, value in reader.items() if name != "images")
        lines[0] += f"Second reader, {reader['images']:.0f} images that two read: {told}.\n"
    for name in PRINTED:
        row = [f"{np.mean([printed(run, finding)[name] for run in of]):.3f}" for of in runs.values()]
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


def finished(work: Path, question: str, arm: str, seeds: int) -> int:
    """How many seeds, from 0 on, have a report."""
    runs = [work / f"{question}_{arm.replace(' ', '-')}_{s}" for s in range(seeds)]
    return next((s for s, run in enumerate(runs) if not (run / "report.json").exists()), seeds)


def main() -> None:
    """Train what is not done, then the tables of what all arms have."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--questions", nargs="+", choices=(*QUESTIONS, SEVERAL, DRAIN), default=[*QUESTIONS, SEVERAL, DRAIN]
    )
    parser.add_argument("--arms", default=",".join([*ARMS, *DRAINS]))
    parser.add_argument("--arm", action="append", default=[], metavar="NAME=FLAGS", help="another arm")
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, one thread each")
    parser.add_argument("--tables", action="store_true", help="only write the tables")
    a = parser.parse_args()
    ARMS.update(DRAINS)
    ARMS.update((name, flags.split()) for name, _, flags in (arm.partition("=") for arm in a.arm))
    if not (where := os.environ.get("CXR_FOCUS_REAL_DATA")):
        sys.exit("error: set CXR_FOCUS_REAL_DATA to the folder with lesions/")
    work, data = a.work.resolve(), Path(where).resolve()
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "lite0.safetensors").exists():
        subprocess.run([sys.executable, str(HERE / "lite0_weights.py"), str(work / "lite0.safetensors")], check=True)
    names = [*a.arms.split(","), *(arm.partition("=")[0] for arm in a.arm)]
    shards = {
        (q, s): drawn(data, work, s) if q == DRAIN else shards_of(data, work, q, s)
        for q in a.questions
        for s in range(a.seeds)
        if not a.tables or (work / f"shards_{q}_{s}").exists()
    }
    of_drains, of_others = (BASE, "default", *DRAINS), set(DRAINS)
    jobs = [
        (q, arm, s)
        for s in range(a.seeds)
        for q in a.questions
        for arm in dict.fromkeys(names)
        if (arm in of_drains if q == DRAIN else arm not in of_others) and not (q == SEVERAL and arm in ALONE)
    ]
    if not a.tables:
        with ThreadPoolExecutor(a.jobs) as pool:
            list(pool.map(lambda job: train(work, *job, shards[job[0], job[2]]), jobs))
    text = f"# On the lesion\n\n{(__doc__ or '').partition(chr(10) * 2)[2].strip()}\n\n{processor()}, {date.today()}.\n"
    for q in a.questions:
        done = {arm: finished(work, q, arm, a.seeds) for arm in ARMS}
        for seeds in sorted(
            set(filter(None, done.values())), reverse=True
        ):  # arms of fewer seeds in tables of their own
            of = {
                arm: [work / f"{q}_{arm.replace(' ', '-')}_{s}" for s in range(seeds)]
                for arm, count in done.items()
                if count >= seeds
            }
            if BASE in of and len(of) > 1:
                shards_ = [shards[q, s] for s in range(seeds)]
                text += f"\n## {q}\n\n{section(q, of, shards_, data, work)}"
    (HERE / "lesions.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
