"""A model's maps against known lesions, beside what knows nothing of the image, and beside the network without
training.

The floor of every figure is the mean lesion map of other images, whose peak is one constant point, the expected region
drawn into the map's grid, which knows the lungs' outline alone, and the same network with random weights.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from trainer.classifier import evaluating
from trainer.gather import Table
from trainer.look import look
from trainer.measure import Evaluator
from trainer.outcome import Outcome
from trainer.papers import COLUMNS, NAMES, Floor, against, box_threshold, by_finding, known_pairs, truth_of
from trainer.regions.lesions import LesionRegions
from trainer.task import Point


@torch.no_grad()
def maps(
    evaluator: Evaluator, name: str, chosen: np.ndarray, pairs: Any
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor | None, tuple[int, int]]]:
    """The raw map [h,w], on the CPU, of each of the chosen pairs of a split, numbers into ``pairs``, the weights of its
    expected region in that grid, where there is one, and the size (height, width) that its image is stored at; every
    process has its share of them.
    """
    split, accelerator = evaluator.splits[name], evaluator.accelerator
    own = chosen[accelerator.process_index :: accelerator.num_processes]
    regions = evaluator.regions(split)
    with evaluating(evaluator.model):
        for some in np.array_split(own, range(evaluator.batch, len(own), evaluator.batch)):
            groups: dict[tuple[int, int], list[tuple[int, np.ndarray]]] = {}  # of one stored size
            for number in some.tolist():
                image = split.image(int(pairs.image[number]))
                groups.setdefault((image.shape[0], image.shape[1]), []).append((number, image))
            for size, group in groups.items():
                same = torch.tensor([number for number, _ in group])
                index, finding = pairs.image[same], pairs.finding[same]
                raw = torch.from_numpy(np.stack([image for _, image in group]))[:, None].to(accelerator.device)
                finder, classes = evaluator.lungs.get(name), finding.to(raw.device)
                seen = look(accelerator, evaluator.model, raw, index, classes, finder, regions, finding)
                assert seen.raw_cam is not None
                cams = seen.raw_cam.float().cpu()
                places: list[torch.Tensor | None] = [None] * len(cams)
                if seen.expected is not None:
                    drawn = F.adaptive_avg_pool2d(seen.expected.weight, (cams.shape[1], cams.shape[2])).cpu()
                    places = [at if at.any() else None for at in drawn]
                for number, cam, place in zip(same.tolist(), cams, places, strict=True):
                    yield number, cam, place, size


def rows_of(
    evaluator: Evaluator, name: str, outcome: Outcome, chosen: np.ndarray, kinds: Sequence[str]
) -> dict[str, torch.Tensor]:
    """Figures of the chosen pairs' maps (``model``), and of their expected regions (``region``), by those of ``kinds``:
    float64 [n,34] each, see `papers.against`, NaN where there is none; the same on all processes.
    """
    lesions = LesionRegions(evaluator.splits[name])
    table = Table(len(chosen), dict.fromkeys(kinds, COLUMNS))
    place = {number: i for i, number in enumerate(chosen.tolist())}
    own = torch.ones(1, dtype=torch.bool)
    for number, raw, region, size in maps(evaluator, name, chosen, outcome.pairs):
        truth, boxes = truth_of(lesions, int(outcome.pairs.image[number]), int(outcome.pairs.finding[number]), size)
        values = {}
        for kind, drawn in (("model", raw), ("region", region)):
            if kind in kinds:
                row = against(drawn, truth, boxes) if drawn is not None else torch.full((COLUMNS,), torch.nan)
                values[kind] = row.nan_to_num(-1)[None].double()  # a figure that is unknown travels as -1
        table.write(torch.tensor([place[number]]), own, values, dict.fromkeys(values, own))
    found = table.gather(evaluator.accelerator)
    return {kind: torch.where(found[kind] < 0, torch.nan, found[kind]) for kind in kinds}


def lesion_figures(
    evaluator: Evaluator,
    outcomes: dict[str, Outcome],
    point: Point,
    known: dict[str, Any] | None,
    *,
    keep: bool = False,
) -> tuple[dict[str, dict[str, Any]], dict[str, int | None]]:
    """By split the figures of `papers.by_finding`, of the model, a constant, the expected region and random weights;
    and of these kinds the threshold of boxes that val chose, a number of `metrics.THRESHOLDS`.

    Args:
        point: from which probability on a finding is said to be there.
        known: thresholds that the run's own val chose, where there is no val here.
        keep: whether they hold where there is one, too.
    """
    thresholds: dict[str, int | None] = dict(known or {})
    content: dict[str, dict[str, Any]] = {}
    if not evaluator.model.has_map:
        return content, thresholds
    random = evaluator.random()
    floors: dict[int, Floor] = {}
    for name, outcome in outcomes.items():  # val before test
        chosen = known_pairs(outcome.split, outcome.pairs)
        if not len(chosen):
            continue
        finding = outcome.pairs.finding[chosen].numpy()
        rows = {
            **rows_of(evaluator, name, outcome, chosen, ("model", "region")),
            "random": rows_of(random, name, outcome, chosen, ("model",))["model"],
            "constant": constant(outcome, chosen, floors if name == "test" else {}),
        }
        if name == "val":
            floors = {int(k): Floor(outcome.split, int(k)) for k in np.unique(finding)}
            known_here = {
                kind: table[~table[:, NAMES.index("hit")].isnan()] for kind, table in rows.items() if kind != "constant"
            }
            chosen_here = {kind: box_threshold(table) for kind, table in known_here.items()}
            # A constant chosen on val is too good on val: figures of it are of test alone
            chosen_here["constant"] = box_threshold(constant(outcome, chosen, floors))
            thresholds = chosen_here | thresholds if keep else chosen_here
        named = outcome.task.named(outcome.logits, point)
        says = np.array(
            [
                outcome.task.findings[k] in named[int(outcome.pairs.image[i])]
                for i, k in zip(chosen, finding, strict=True)
            ]
        )
        patients = outcome.patients()
        whose = patients[outcome.pairs.image[chosen].numpy()] if patients is not None else None
        content[name] = by_finding(rows, finding, says, outcome.task.findings, thresholds, whose)
    return content, thresholds


def constant(outcome: Outcome, chosen: np.ndarray, floors: dict[int, Floor]) -> torch.Tensor:
    """Figures of the constant maps on the chosen pairs: [n,34], NaN where there is none of the finding."""
    lesions = LesionRegions(outcome.split)
    rows = torch.full((len(chosen), COLUMNS), torch.nan, dtype=torch.float64)
    for i, number in enumerate(chosen.tolist()):
        image, finding = int(outcome.pairs.image[number]), int(outcome.pairs.finding[number])
        if finding in floors:
            height, width = outcome.split.image(image).shape
            rows[i] = against(floors[finding].map, *truth_of(lesions, image, finding, (height, width)))
    return rows
