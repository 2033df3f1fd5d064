"""``evaluate --maps OUT``: the map of every pair of an image and a finding, for whoever measures them elsewhere.

OUT/maps.csv                   a line each: image, finding, probability, whether it is said to be there, where
                               it points to, the files
OUT/000012_<key>_<finding>.npy the map as the model gives it, float32 [h,w], not normalised
OUT/000012_<key>_<finding>.png at stored size, in 256 grays from its least to its largest value
OUT/chexlocalize/              <image>_<finding>_map.pkl, segmentations.json (above Otsu's threshold, empty where
                               the model does not say that the finding is there) and truth.json, as CheXlocalize's
                               evaluation reads them (rajpurkarlab/cheXlocalize: eval.py)
"""

import csv
import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from shards import atomic
from shards.errors import InputError
from shards.names import known_as, lists
from shards.pixels import encode_image
from shards.rle import Runs
from trainer.lesion_figures import maps
from trainer.measure import Evaluator
from trainer.metrics import GRAYS, otsu, pointed_pixels
from trainer.outcome import Outcome
from trainer.papers import known_pairs
from trainer.regions.lesions import LesionRegions
from trainer.report.words import file_name
from trainer.task import Point

TASKS = "chexlocalize"  # the list of findings as their evaluation calls them
COLUMNS = ("image", "finding", "probability", "named", "x", "y", "width", "height", "map", "picture")


def write_maps(evaluator: Evaluator, name: str, outcome: Outcome, point: Point, out: Path) -> int:
    """Write the maps of all pairs of a split; every process writes its own, the first one the tables. Returns how many.

    InputError: the folder has files.
    """
    accelerator, split, task = evaluator.accelerator, evaluator.splits[name], outcome.task
    refuse_full(out)
    theirs = out / "chexlocalize"
    if accelerator.is_main_process:
        theirs.mkdir(parents=True, exist_ok=True)
    accelerator.wait_for_everyone()
    named = task.named(outcome.logits, point)
    probability = task.probabilities(outcome.logits)
    lesions, marked = LesionRegions(split), set(known_pairs(split, outcome.pairs).tolist())
    part: list[dict[str, Any]] = []
    for number, raw, _, (height, width) in maps(evaluator, name, np.arange(len(outcome.pairs.image)), outcome.pairs):
        image, k = int(outcome.pairs.image[number]), int(outcome.pairs.finding[number])
        finding, key = task.findings[k], split.key(image)
        full = F.interpolate(raw[None, None], (height, width), mode="bilinear", align_corners=False)[0, 0]
        low, high = full.min(), full.max()
        gray = ((full - low) / (high - low).clamp(min=1e-12) * (GRAYS - 1)).long()
        says = finding in named[image]
        stem = file_name(f"{number:06d}_{key}_{finding}".replace("/", "_"), ".npy").removesuffix(".npy")
        array = io.BytesIO()
        np.save(array, raw.numpy())
        atomic.write(out / f"{stem}.npy", array.getvalue())
        atomic.write(out / f"{stem}.png", encode_image(gray.numpy().astype(np.uint8), "png"))
        img, called = file_name(key.replace("/", "_")), _their_name(finding)
        info = {
            "map": raw[None, None],
            "prob": float(probability[image, k]),
            "task": called,
            "cxr_dims": (width, height),
        }
        atomic.write(theirs / f"{img}_{called}_map.pkl", pickle.dumps(info))
        hot = gray >= otsu(torch.bincount(gray.flatten(), minlength=GRAYS)[None])[0]
        row, column = divmod(int(pointed_pixels(raw[None], (height, width))[0]), width)
        entry: dict[str, Any] = {
            "number": number,
            "line": [key, finding, round(float(probability[image, k]), 6), int(says), column, row],
            "image": img,
            "task": called,
            "hot": _runs((hot & says & bool(high > low)).numpy()),
        }
        entry["line"] += [width, height, f"{stem}.npy", f"{stem}.png"]
        if number in marked:
            entry["truth"] = _runs(lesions.stored(image, k, (height, width)))
        part.append(entry)
    mine = out / f".part{accelerator.process_index}.json"
    atomic.write(mine, json.dumps(part))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        _gathered(out, theirs, accelerator.num_processes)
    accelerator.wait_for_everyone()
    return len(outcome.pairs.image)


def _gathered(out: Path, theirs: Path, processes: int) -> None:
    """The tables of all processes as one."""
    parts = [out / f".part{rank}.json" for rank in range(processes)]
    entries = sorted((e for path in parts for e in json.loads(path.read_text())), key=lambda entry: entry["number"])
    text = io.StringIO()
    csv.writer(text).writerows([COLUMNS, *(entry["line"] for entry in entries)])
    atomic.write(out / "maps.csv", text.getvalue())
    for name, kind in (("segmentations", "hot"), ("truth", "truth")):
        content: dict[str, dict[str, Any]] = {}
        for entry in entries:
            if kind in entry:
                content.setdefault(entry["image"], {})[entry["task"]] = entry[kind]
        atomic.write(theirs / f"{name}.json", json.dumps(content))
    for path in parts:
        path.unlink()


def refuse_full(out: Path) -> None:
    """InputError: the folder has files, which these would be mixed with."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--maps {out}: is there and not an empty folder; name another")


def _their_name(finding: str) -> str:
    """As CheXlocalize calls it; its files are cut at underscores."""
    return (known_as(finding, lists()[TASKS], "") or finding).replace("_", " ").replace("/", " ")


def _runs(mask: np.ndarray) -> dict[str, Any]:
    runs = Runs.drawn(mask)
    return {"size": list(runs.size), "counts": runs.counts}
