"""python bench/real.py --work DIR: real radiographs, cross-entropy beside the default, paired by seed and image.

Five questions, `--seeds` seeds each, EfficientNet-Lite0 from ImageNet weights, 224 px, 250 steps of AdamW with some
augmentation, the last model: effusion: Effusion against No Finding; each seed tests on another third of the images in
turn (patients are unknown there); marker: the same with a text painted into 95% of the positive and 5% of the negative
training images, and into half of all others; pneumonia: Pneumonia, whatever else an image shows, against No Finding;
patients are in one part only, and everybody who has an image with lesion boxes is in the test part, the same for all
seeds; effusion_lesions: trained on all images of `effusion/` but those that are tested on, too; tested on other
archives' images with radiologists' boxes of effusions, and on No Finding;
pneumothorax_lesions: Pneumothorax, whatever else an image shows, against No Finding; whoever has an image with boxes of
one is in the test part.

Three arms: cross-entropy; lung box: expected regions are parts of the lung box, as they were before they followed the
lungs' outline (boxed.yaml); default. `--arm NAME=FLAGS` measures another. Beside hits at lesions stands what one
constant point gets, and beside energy what the mean map of the lesions gets, both chosen on one half of the patients
and measured on the other.

CXR_FOCUS_REAL_DATA names a folder with `effusion/{train,val,test}/<class>`, `nih/` and `lesions/`. A finished run is
not repeated, an interrupted one is resumed. Writes bench/real.md; with `--questions` only their sections of it, and the
others stay.
"""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from sklearn.metrics import roc_auc_score
from step import processor

from shards.dataset import Split
from shards.targets import Targets
from trainer.papers import SIDE, Floor
from trainer.regions.lesions import LesionRegions

HERE = Path(__file__).parent
BASE = "cross-entropy"
ARMS = {
    BASE: ["--balance.lam", "1", "--findings", str(HERE / "declared.yaml")],
    "lung box": ["--findings", str(HERE / "boxed.yaml")],
    "default": ["--findings", str(HERE / "declared.yaml")],
}
QUESTIONS = {  # as many epochs as give about 250 steps
    "effusion": ["--task", "ne", "--epochs", "8"],
    "marker": ["--task", "ne", "--epochs", "8"],
    "pneumonia": ["--task", "No Finding,Pneumonia", "--epochs", "6"],
    "effusion_lesions": ["--task", "ne", "--epochs", "6"],
    "pneumothorax_lesions": ["--task", "np", "--epochs", "10"],
}
# The last epoch's model: with so few validation images the best one by AUC is a lottery (LOG.md).
COMMON = [
    "--backbone",
    "tf_efficientnet_lite0",
    "--batch",
    "16",
    "--best",
    "last",
    "--tracker",
    "none",
    "--workers",
    "0",
]
COMMON += ["--optim.name", "adamw", "--optim.lr", "3e-4", "--optim.weight_decay", "0.01", "--optim.schedule", "cosine"]
COMMON += [
    "--augment.rotate",
    "8",
    "--augment.scale",
    "0.1",
    "--augment.shift",
    "0.05",
    "--augment.contrast",
    "0.2",
    "--augment.brightness",
    "0.1",
]
FINDINGS = {"pneumonia": "Pneumonia", "pneumothorax_lesions": "Pneumothorax"} | dict.fromkeys(
    ("effusion", "marker", "effusion_lesions"), "Effusion"
)
RESAMPLES = 1000
ALIKE = 0.995  # correlation of thumbnails: the same picture
VAL = 60  # images
QUOTA = {"test": 130, "val": 35}  # images of each class of pneumonia, at least


def call(*command: str) -> None:
    """Run a command of the project on one thread; stop with it."""
    print("$", " ".join(command), flush=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=HERE.parent, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\n{done.stderr}\nerror: {' '.join(command)} failed")


# -- data -------------------------------------------------------------------------------------------------------


def write(path: Path, header: tuple[str, ...], rows: list[tuple]) -> None:
    """A CSV."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def effusion(data: Path, work: Path, seed: int, *, marked: bool) -> Path:
    """Shards of one seed; the images, painted if wanted, and the table stand beside them."""
    out = work / f"{'marker' if marked else 'effusion'}_{seed}"
    if (out / "shards").exists():
        return out / "shards"
    (out / "images").mkdir(parents=True, exist_ok=True)
    files = sorted((data / "effusion").glob("*/*/*"))
    order = np.random.default_rng(7).permutation(len(files))
    rng, rows = np.random.default_rng([11, seed]), []
    for place, i in enumerate(order.tolist()):
        path = files[i]
        positive = path.parent.name == "1Effusion"
        split = (
            "test" if place % 3 == seed % 3 else "val" if place // 3 % (len(files) // 2 // (VAL // 2)) == 0 else "train"
        )
        image = Image.open(path).convert("L").resize((512, 512))
        if marked and rng.random() < {"train": 0.95 if positive else 0.05}.get(split, 0.5):
            x, y = rng.integers(8, 24, 2).tolist()
            ImageDraw.Draw(image).text((x, y), "PORT", fill=245, font=ImageFont.load_default(40))
        name = f"{place:03d}.png"
        image.save(out / "images" / name)
        rows.append((name, "Effusion" if positive else "No Finding", split))
    write(out / "table.csv", ("path", "finding", "split"), rows)
    call(
        "shards",
        "csv",
        "--csv",
        str(out / "table.csv"),
        "--images",
        str(out / "images"),
        "--split-column",
        "split",
        "--out",
        str(out / "shards"),
    )
    return out / "shards"


def pneumonia(data: Path, work: Path) -> Path:
    """Shards of all seeds."""
    out = work / "pneumonia"
    if (out / "shards").exists():
        return out / "shards"
    out.mkdir(parents=True, exist_ok=True)
    with (data / "nih/labels.csv").open() as file:
        images = list(csv.DictReader(file))
    of: dict[str, list[dict[str, str]]] = {}
    for image in images:
        of.setdefault(image["patient_id"], []).append(image)
    boxed = {who for who, theirs in of.items() if any(int(image["n_bbox"]) for image in theirs)}
    others = sorted(set(of) - boxed)
    order = [*sorted(boxed), *(others[i] for i in np.random.default_rng(3).permutation(len(others)))]
    count: Counter = Counter()
    rows = []
    for who in order:
        kinds = ["Pneumonia" in image["finding_labels"].split("|") for image in of[who]]
        wanted = [split for split, quota in QUOTA.items() if any(count[split, kind] < quota for kind in kinds)]
        split = "test" if who in boxed else wanted[0] if wanted else "train"
        count.update((split, kind) for kind in kinds)
        rows += [(image["image"], image["finding_labels"], who, split) for image in of[who]]
    write(out / "table.csv", ("image", "finding", "patient", "split"), rows)
    where = [
        "--images",
        str(data / "nih/images"),
        "--path-column",
        "image",
        "--patient-column",
        "patient",
        "--split-column",
        "split",
    ]
    call(
        "shards",
        "csv",
        "--csv",
        str(out / "table.csv"),
        *where,
        "--boxes",
        str(data / "nih/boxes_512.csv"),
        "--out",
        str(out / "shards"),
    )
    return out / "shards"


def rows_of(path: Path) -> list[dict[str, str]]:
    """Of a CSV."""
    with path.open() as file:
        return list(csv.DictReader(file))


def thumbnail(path: Path) -> np.ndarray:
    """An image as float [1024] of mean 0 and length 1."""
    pixels = np.asarray(Image.open(path).convert("L").resize((32, 32), Image.Resampling.BOX), float).ravel()
    return (pixels - pixels.mean()) / np.linalg.norm(pixels - pixels.mean())


def lesions(data: Path, work: Path, finding: str) -> Path:
    """Shards of all seeds; the test part has every image with a box of the finding, and no patient or picture of it is
    trained on.
    """
    out = work / f"lesions_{finding}"
    if (out / "shards").exists():
        return out / "shards"
    shutil.rmtree(out, ignore_errors=True)  # of an interrupted preparation
    (out / "images").mkdir(parents=True)
    table = [row for row in rows_of(data / "lesions/labels.csv") if row["set"] == "nih"]
    boxes = [row for row in rows_of(data / "lesions/boxes.csv") if row["finding"] == finding]
    boxed = {row["image"] for row in boxes}
    ill, healthy = (
        {row["patient"] for row in table if row["image"] in boxed},
        [row for row in table if row["labels"] == "No Finding"],
    )
    rows, files = [], {}
    if finding == "Effusion":
        tested = {row["image"] for row in table if row["image"] in boxed} | {row["image"] for row in healthy}
        known = np.stack([thumbnail(data / "lesions/images" / name) for name in sorted(tested)])
        others = [path for path in sorted((data / "effusion").glob("*/*/*")) if (known @ thumbnail(path)).max() < ALIKE]
        for place, i in enumerate(np.random.default_rng(7).permutation(len(others)).tolist()):
            name = f"train{place:03d}.jpg"
            files[name] = others[i]
            rows.append(
                (
                    name,
                    name,
                    "Effusion" if others[i].parent.name == "1Effusion" else "No Finding",
                    "val" if place < VAL else "train",
                )
            )
    else:
        tested = {row["image"] for row in table if row["image"] in boxed}
        patients = sorted({row["patient"] for row in healthy} - ill)
        train = {patients[i] for i in np.random.default_rng(7).permutation(len(patients))[: len(patients) // 2]}
        tested |= {row["image"] for row in healthy if row["patient"] not in train}
        known_ill = [row for row in table if finding in row["labels"].split("|") and row["patient"] not in ill]
        wanted = [*known_ill, *(row for row in healthy if row["patient"] in train)]
        held = sorted({row["patient"] for row in wanted})[::8]
        for row in wanted:
            label = finding if finding in row["labels"] else "No Finding"
            rows.append((row["image"], row["patient"], label, "val" if row["patient"] in held else "train"))
    rows += [
        (row["image"], row["patient"], finding if row["image"] in boxed else "No Finding", "test")
        for row in table
        if row["image"] in tested
    ]
    for name, *_ in rows:
        (out / "images" / name).symlink_to(files.get(name, data / "lesions/images" / name))
    write(out / "table.csv", ("image", "patient", "finding", "split"), rows)
    pixels = []
    for row in (row for row in boxes if row["image"] in tested):
        with Image.open(data / "lesions/images" / row["image"]) as image:
            pixels.append(
                (
                    row["image"],
                    finding,
                    *(
                        float(row[edge]) * side
                        for edge, side in zip(("x0", "y0", "x1", "y1"), image.size * 2, strict=True)
                    ),
                )
            )
    write(out / "boxes.csv", ("image", "finding", "x0", "y0", "x1", "y1"), pixels)
    where = [
        "--images",
        str(out / "images"),
        "--path-column",
        "image",
        "--patient-column",
        "patient",
        "--split-column",
        "split",
    ]
    call(
        "shards",
        "csv",
        "--csv",
        str(out / "table.csv"),
        *where,
        "--boxes",
        str(out / "boxes.csv"),
        "--out",
        str(out / "shards"),
    )
    return out / "shards"


def shards_of(question: str, data: Path, work: Path, seed: int) -> Path:
    """Shards of a question and seed."""
    if question.endswith("_lesions"):
        return lesions(data, work, FINDINGS[question])
    return pneumonia(data, work) if question == "pneumonia" else effusion(data, work, seed, marked=question == "marker")


def train(work: Path, question: str, arm: str, seed: int, shards: Path) -> Path:
    """The run folder, finished."""
    run = work / f"{question}_{arm.replace(' ', '-')}_{seed}"
    if not (run / "report.json").exists():
        flags = [
            "--shards",
            str(shards),
            "--out",
            str(run),
            "--seed",
            str(seed),
            "--pretrained",
            str(work / "lite0.safetensors"),
        ]
        flags += [
            *COMMON,
            *QUESTIONS[question],
            *ARMS[arm],
            *(["--resume"] if (run / "checkpoints/last.pt").exists() else []),
        ]
        call("trainer.train", *flags)
    return run


# -- figures ----------------------------------------------------------------------------------------------------


class Seen:
    """What a run predicted: for each test image its key, its class, the score of the finding,
    localization of its kind.
    """

    def __init__(self, run: Path, finding: str) -> None:
        lines = [json.loads(line) for line in (run / "predictions_test.jsonl").read_text().splitlines()]
        self.keys = [line["key"] for line in lines]
        # Of names of the NIH archive; elsewhere each image is its own
        self.patients = [key.split("_")[0] for key in self.keys]
        self.labels = np.array([line["label"] == finding for line in lines])
        self.scores = np.array([line["probability"][finding] for line in lines])
        self.place = {kind: [line.get(kind, {}) for line in lines] for kind in ("expected", "expected_box", "lesion")}
        if not any(self.place["expected_box"]):  # a rule that is a part of the lung box
            self.place["expected"], self.place["expected_box"] = [{} for _ in lines], self.place["expected"]
        self.noted: dict[str, dict[str, str]] = {}  # by key: what a table says of an image
        self.probe = json.loads((run / "report.json").read_text())["test"]["probe"]


def auc(seen: Seen, weight: np.ndarray) -> float:
    """Area under the ROC curve of weighted images."""
    return float(roc_auc_score(seen.labels, seen.scores, sample_weight=weight))


def place(kind: str, figure: str) -> Callable[[Seen, np.ndarray], float]:
    """The weighted mean of a localization figure over the images that have it."""

    def mean(seen: Seen, weight: np.ndarray) -> float:
        values = np.array([found.get(figure, np.nan) for found in seen.place[kind]], float)
        known = ~np.isnan(values)
        return float(np.average(values[known], weights=weight[known])) if weight[known].any() else np.nan

    return mean


def told(values: list[float]) -> str:
    """Mean, and each seed."""
    return f"{np.mean(values):.3f} ({', '.join(f'{v:.3f}' for v in values)})"


def compared(arms: dict[str, list[Seen]], figure: Callable[[Seen, np.ndarray], float]) -> list[str]:
    """Cells: of each arm the mean over seeds with all seeds, and the difference to the same seeds of every arm before
    it.

    With it two 95% intervals: of a bootstrap over patients (images, where they are unknown) with the models as they
    are, an image that several seeds test on being drawn for all of them at once; and of one that draws the seeds, too,
    as pairs of models.
    """
    sick: dict[str, bool] = {}
    for seen in arms[BASE]:
        for who, label in zip(seen.patients, seen.labels.tolist(), strict=True):
            sick[who] = sick.get(who, False) or label
    groups = [[who for who, positive in sick.items() if positive == kind] for kind in (True, False)]
    pairs = [(name, before) for i, name in enumerate(arms) for before in list(arms)[:i]]
    rng, means = np.random.default_rng(0), defaultdict(list)
    for r in range(RESAMPLES + 1):
        drawn: Counter = Counter()
        for group in groups:
            drawn.update(group if r == 0 else rng.choice(group, len(group)).tolist())
        values = {
            name: np.array([figure(seen, np.array([drawn[who] for who in seen.patients], float)) for seen in runs])
            for name, runs in arms.items()
        }
        if r == 0:
            seeds = values
        some = rng.integers(0, len(seeds[BASE]), len(seeds[BASE]))
        for name, before in pairs:
            change = values[name] - values[before]
            means[name, before].append((change.mean(), change[some].mean()))
    cells = []
    for i, name in enumerate(arms):
        unknown = np.isnan(seeds[name]).any()
        cells.append("" if unknown else told(seeds[name].tolist()))
        for before in list(arms)[:i]:
            if unknown or np.isnan(seeds[before]).any():
                cells.append("")
                continue
            (low, wide_low), (high, wide_high) = np.nanpercentile(means[name, before][1:], [2.5, 97.5], axis=0)
            cells.append(
                f"{means[name, before][0][0]:+.3f} ({low:+.3f} to {high:+.3f}; {wide_low:+.3f} to {wide_high:+.3f})"
            )
    return cells


def floor(shards: Path, finding: str) -> tuple[float, float]:
    """What knows the lesions of other patients and no image gets: hits of the best constant point, energy of the mean
    lesion map.

    Each is chosen on one half of the patients and measured on the other: the mean over both ways of 10 partitions.
    """
    split = Split(shards, "test", ("No Finding", finding))
    lesions = LesionRegions(split)
    positive = lesions.used[split.targets(lesions.used)[:, 1] == 1]
    maps = lesions.regions(
        torch.from_numpy(positive), torch.ones(len(positive), dtype=torch.int64), split.image(0).shape, 224
    ).numpy()
    patients = np.array([split.key(p).split("_")[0] for p in positive])
    hits, energy = [], []
    for turn in range(10):
        names = np.random.default_rng(turn).permutation(np.unique(patients))
        one = np.isin(patients, names[: len(names) // 2])
        for chosen, tested in ((maps[one], maps[~one]), (maps[~one], maps[one])):
            mean = chosen.mean(0)
            hits.append(tested.reshape(len(tested), -1)[:, mean.argmax()].mean())
            energy.append(((tested * mean).sum((1, 2)) / mean.sum()).mean())
    return float(np.mean(hits)), float(np.mean(energy))


def floor_of_others(shards: Path, labels: Targets, finding: int) -> tuple[float, float] | None:
    """What knows the lesions of train and val alone gets on test: hits of the point that most of them hold, energy of
    their mean map. None where either side has none.
    """
    floors = [Floor(Split(shards, name, labels), finding) for name in ("train", "val")]
    test = Split(shards, "test", labels)
    lesions, images = test.lesions(), sum(floor.images for floor in floors)
    index = torch.from_numpy(np.unique(lesions.position[lesions.finding == finding]))
    if not (images and len(index)):
        return None
    mean = sum(floor.map * floor.images for floor in floors) / images
    drawn = LesionRegions(test).regions(index, torch.full_like(index, finding), test.image(0).shape, SIDE)
    hits = drawn.flatten(1)[:, mean.argmax()].float().mean()
    return float(hits), float(((drawn * mean).sum((1, 2)) / mean.sum()).mean())


def section(question: str, runs: dict[str, list[Path]], shards: Path) -> str:
    """Markdown of one question, from the runs of each arm."""
    finding = FINDINGS[question]
    arms = {arm: [Seen(run, finding) for run in runs[arm]] for arm in ARMS}
    figures: dict[str, Callable[[Seen, np.ndarray], float]] = {"AUC": auc}
    for kind, what in (
        ("lesion", "lesion boxes"),
        ("expected", "expected region"),
        ("expected_box", "part of the lung box"),
    ):
        if any(arms["default"][0].place[kind]):
            names = (
                ("energy", "lift", "pointing", "pointing_near", "iou_otsu")
                if kind == "lesion"
                else ("energy", "pointing")
            )
            figures |= {f"{name}, {what}": place(kind, name) for name in names}
    first = arms["default"][0]
    boxed = sum(map(bool, first.place["lesion"]))
    text = [
        f"{len(first.keys)} test images a seed"
        + (f", {boxed} of them with lesion boxes" if boxed else "")
        + f"; {date.today()}, {processor()}\n"
    ]
    if boxed:
        hits, energy = floor(shards, finding)
        text.append(
            f"Floor: one constant point hits {hits:.3f} of the lesions, the mean map of the lesions has {energy:.3f} "
            "of its energy in them.\n"
        )
    head = [cell for i, arm in enumerate(arms) for cell in (arm, *(f"{arm} - {before}" for before in list(arms)[:i]))]
    text += [f"| figure | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    text += ["| " + " | ".join([name, *compared(arms, figure)]) + " |" for name, figure in figures.items()]
    for name, what in (
        ("drop_outside", "AUC lost, outside of the region blurred"),
        ("drop_inside", "AUC lost, region blurred"),
    ):
        lost = {arm: [seen.probe[name] for seen in seeds] for arm, seeds in arms.items()}
        cells = []
        for i, arm in enumerate(arms):
            cells += [
                told(lost[arm]),
                *(f"{np.mean(lost[arm]) - np.mean(lost[before]):+.3f}" for before in list(arms)[:i]),
            ]
        text.append("| " + " | ".join([what, *cells]) + " |")
    return "\n".join(text) + "\n"


def rewritten(old: str, new: dict[str, str]) -> str:
    """The file with some sections replaced."""
    text = (
        "# Real radiographs\n\nWritten by `bench/real.py`. EfficientNet-Lite0 from ImageNet weights. Mean over "
        "seeds (each seed), and the difference "
    )
    text += (
        "to the same seeds of the arms before it with two 95% intervals: bootstrapped over test patients (images, "
        "where patients are unknown), and over "
    )
    text += "these and the seeds.\n"
    kept = {name: rest for name, _, rest in (part.partition("\n\n") for part in old.split("\n## ")[1:])}
    return "\n".join([text, *(f"## {q}\n\n{(kept | new)[q].rstrip()}\n" for q in QUESTIONS if q in kept | new)])


def main() -> None:
    """Everything, in an order that can be interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--questions", nargs="+", choices=QUESTIONS, default=list(QUESTIONS))
    parser.add_argument(
        "--arm", action="append", default=[], metavar="NAME=FLAGS", help="another arm, with these flags of the trainer"
    )
    parser.add_argument("--jobs", type=int, default=2, help="runs at the same time, one thread each")
    parser.add_argument("--write", type=Path, default=HERE / "real.md")
    a = parser.parse_args()
    ARMS.update((name, flags.split()) for name, _, flags in (arm.partition("=") for arm in a.arm))
    real = os.environ.get("CXR_FOCUS_REAL_DATA")
    if not real:
        sys.exit("error: set CXR_FOCUS_REAL_DATA to the folder with effusion/, nih/ and lesions/")
    work, data = a.work.resolve(), Path(real).resolve()
    work.mkdir(parents=True, exist_ok=True)
    if not (work / "lite0.safetensors").exists():
        subprocess.run([sys.executable, str(HERE / "lite0_weights.py"), str(work / "lite0.safetensors")], check=True)
    shards = {(q, seed): shards_of(q, data, work, seed) for q in a.questions for seed in range(a.seeds)}
    jobs = [(q, arm, seed) for seed in range(a.seeds) for q in a.questions for arm in ARMS]
    with ThreadPoolExecutor(a.jobs) as pool:
        done = dict(zip(jobs, pool.map(lambda job: train(work, *job, shards[job[0], job[2]]), jobs), strict=True))
    sections = {
        q: section(q, {arm: [done[q, arm, seed] for seed in range(a.seeds)] for arm in ARMS}, shards[q, 0])
        for q in a.questions
    }
    text = rewritten(a.write.read_text() if a.write.exists() else "", sections)
    print(text)
    a.write.write_text(text)


if __name__ == "__main__":
    main()
