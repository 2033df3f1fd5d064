"""Images of a split with the map of one finding each: those of the panel, and those that a tracker is given."""

from collections.abc import Sequence

import numpy as np
import torch

from shards.sample import NO_FINDING
from shards.targets import PRESENT
from trainer.classifier import evaluating
from trainer.drawing import short
from trainer.gallery import interesting
from trainer.look import look
from trainer.measure import Evaluator
from trainer.outcome import Outcome
from trainer.regions.lesions import LesionRegions
from trainer.report.figures import TILES, Tile
from trainer.task import Point


def first_of_each(evaluator: Evaluator, name: str) -> list[tuple[int, int]]:
    """Up to 12 pairs of a split, image and finding, the first ones of each finding in turn."""
    task = evaluator.task
    pairs = task.pairs(torch.from_numpy(evaluator.splits[name].targets()))
    of_finding = [pairs.image[pairs.finding == k].tolist() for k in range(len(task.findings))]
    return [
        (c[i], k)
        for i in range(max(map(len, of_finding), default=0))
        for k, c in reversed(list(enumerate(of_finding)))
        if i < len(c)
    ][:TILES]


def worst_of_all(evaluator: Evaluator, outcome: Outcome, point: Point) -> list[tuple[int, int]]:
    """The images of a report's gallery, the worst first, each with the finding that it has, or is taken for."""
    task, chosen = evaluator.task, interesting(outcome, point)
    known = [k for k, finding in enumerate(task.findings) if finding != NO_FINDING]
    found = []
    for position, named in zip(chosen, task.named(outcome.logits[chosen], point), strict=True):
        there = np.flatnonzero(outcome.target[position].numpy() == PRESENT)
        taken = [task.findings.index(one) for one in named]
        asked = [k for k in (*there.tolist(), *taken) if k in known]
        found.append((position, asked[0] if asked else max(known, key=lambda k: float(outcome.logits[position, k]))))
    return found


def tiles(evaluator: Evaluator, name: str, chosen: Sequence[tuple[int, int]]) -> list[Tile]:
    """Images of a split, each with the CAM of a finding."""
    batches = [chosen[at : at + evaluator.batch] for at in range(0, len(chosen), evaluator.batch)]
    return [tile for batch in batches for tile in _tiles(evaluator, name, batch)]


def _tiles(evaluator: Evaluator, name: str, chosen: Sequence[tuple[int, int]]) -> list[Tile]:
    split, model, device, task = evaluator.splits[name], evaluator.model, evaluator.accelerator.device, evaluator.task
    index, finding = torch.tensor(chosen).reshape(-1, 2).unbind(1)
    raw = torch.from_numpy(np.stack([split.image(p) for p, _ in chosen]))[:, None].to(device)
    with evaluating(model):
        seen = look(
            evaluator.accelerator,
            model,
            raw,
            index,
            finding.to(device),
            evaluator.lungs.get(name),
            evaluator.regions(split),
            finding,
        )
    blank = torch.zeros_like(seen.images[:, 0])
    cams, lungs = (
        part.float().cpu().numpy()
        for part in (seen.cam if seen.cam is not None else blank, seen.lungs if seen.lungs is not None else blank)
    )
    lesions = LesionRegions(split, exact=True).regions(index, finding, raw.shape[-2:], evaluator.size).numpy()
    probability = task.probabilities(seen.logits).cpu()
    result = []
    for b, k in enumerate(finding.tolist()):
        title = f"{short(task.findings[k])}\n{task.caption(probability[b], k)}"
        title += "" if cams[b].any() else ", no map"
        result.append(
            Tile(
                title,
                seen.images[b, 0].float().cpu().numpy(),
                cams[b],
                seen.region[b].cpu().numpy(),
                lesions[b],
                lungs[b] > 0,
            )
        )
    return result
