"""A model's maps against known lesions, beside what knows nothing of the image, and beside the network without
training.

The floor of every figure is the mean lesion map of other images, whose peak is one constant point, and the same network
with random weights.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from trainer.classifier import evaluating
from trainer.gather import Table
from trainer.look import look
from trainer.measure import Evaluator
from trainer.outcome import Outcome
from trainer.papers import COLUMNS, Floor, against, box_threshold, by_finding, known_pairs, truth_of
from trainer.regions.lesions import LesionRegions
from trainer.task import Point


@torch.no_grad()
def maps(
    evaluator: Evaluator, name: str, chosen: np.ndarray, pairs: Any
) -> Iterator[tuple[int, torch.Tensor, tuple[int, int]]]:
    """The raw map [h,w], on the CPU, of each of the chosen pairs of a split, numbers into ``pairs``, and the size
    (height, width) that its image is stored at; every process has its share of them.
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
                seen = look(accelerator, evaluator.model, raw, index, finding.to(raw.device), None, regions, finding)
                assert seen.raw_cam is not None
                for number, cam in zip(same.tolist(), seen.raw_cam.float().cpu(), strict=True):
                    yield number, cam, size


def rows_of(evaluator: Evaluator, name: str, outcome: Outcome, chosen: np.ndarray) -> torch.Tensor:
    """Figures of the chosen pairs: float64 [n,33], see `papers.against`; the same on all processes."""
    lesions = LesionRegions(evaluator.splits[name])
    table = Table(len(chosen), {"row": COLUMNS})
    place = {number: i for i, number in enumerate(chosen.tolist())}
    own = torch.ones(1, dtype=torch.bool)
    for number, raw, size in maps(evaluator, name, chosen, outcome.pairs):
        truth, boxes = truth_of(lesions, int(outcome.pairs.image[number]), int(outcome.pairs.finding[number]), size)
        row = against(raw, truth, boxes)
        # A figure that is unknown travels as -1
        table.write(torch.tensor([place[number]]), own, {"row": row.nan_to_num(-1)[None]}, {"row": own})
    rows = table.gather(evaluator.accelerator)["row"]
    return torch.where(rows < 0, torch.nan, rows)


def lesion_figures(
    evaluator: Evaluator,
    outcomes: dict[str, Outcome],
    point: Point,
    known: dict[str, Any] | None,
    *,
    keep: bool = False,
) -> tuple[dict[str, dict[str, Any]], dict[str, int | None]]:
    """By split the figures of `papers.by_finding`, of the model, a constant and random weights; and of these kinds the
    threshold of boxes that val chose, a number of `metrics.THRESHOLDS`.

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
            "model": rows_of(evaluator, name, outcome, chosen),
            "random": rows_of(random, name, outcome, chosen),
            "constant": constant(outcome, chosen, floors if name == "test" else {}),
        }
        if name == "val":
            floors = {int(k): Floor(outcome.split, int(k)) for k in np.unique(finding)}
            chosen_here = {kind: box_threshold(table) for kind, table in rows.items() if kind != "constant"}
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
    """Figures of the constant maps on the chosen pairs: [n,33], NaN where there is none of the finding."""
    lesions = LesionRegions(outcome.split)
    rows = torch.full((len(chosen), COLUMNS), torch.nan, dtype=torch.float64)
    for i, number in enumerate(chosen.tolist()):
        image, finding = int(outcome.pairs.image[number]), int(outcome.pairs.finding[number])
        if finding in floors:
            height, width = outcome.split.image(image).shape
            rows[i] = against(floors[finding].map, *truth_of(lesions, image, finding, (height, width)))
    return rows
