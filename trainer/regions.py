"""Where a finding is expected, given the lung box. Findings are data: a rule is a rectangle relative to the box.

Legend: boxes int64 [B,4] x0 y0 x1 y1, ends exclusive; regions bool [B,S,S].
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shards.errors import InputError, nearest
from shards.sample import EFFUSION, NO_FINDING, PNEUMOTHORAX, SUBCUTANEOUS_EMPHYSEMA, TASKS


@dataclass(frozen=True)
class Rule:
    """A rectangle in lung-box coordinates: 0 is the box's left or top edge, 1 its right or bottom edge.

    Edges are rounded half to even to pixels and cut at the image; infinity is the image's own edge. With ``outside`` the
    region is everything but the rectangle.
    """

    left: float = 0.0
    top: float = 0.0
    right: float = 1.0
    bottom: float = 1.0
    outside: bool = False


# Wu, Japkowicz, Gilbert, Corizzo (DMKD 2026). A finding that is not here has no expected region.
RULES: dict[str, Rule] = {
    EFFUSION: Rule(top=0.5),
    PNEUMOTHORAX: Rule(bottom=0.5),
    # As published: the band above the box belongs to the region, the band below it does not.
    SUBCUTANEOUS_EMPHYSEMA: Rule(bottom=math.inf, outside=True),
}


def task_findings(task: str) -> tuple[str, ...]:
    """The finding of each class of a task: one of `TASKS`, or at least two names separated by commas."""
    if task in TASKS:
        return TASKS[task]
    names = tuple(name.strip() for name in task.split(","))
    if len(names) < 2:
        raise InputError(f"--task {task}: unknown; {nearest(task, TASKS)}; or name two findings or more: --task 'No Finding,Cardiomegaly'")
    if len(set(names)) < len(names) or not all(names):
        raise InputError(f"--task {task}: expected different names of findings, separated by commas")
    return names


def without_rule(findings: Sequence[str]) -> list[str]:
    """Positive findings that have no expected region: they are trained by classification only."""
    return [name for name in findings if name != NO_FINDING and name not in RULES]


def finding_regions(boxes: torch.Tensor, findings: Sequence[str], size: int) -> torch.Tensor:
    """The expected region of ``findings[b]`` in a lung box: boxes int64 [B,4] -> bool [B,size,size].

    Empty for No Finding and for a finding without a rule. For Effusion, with y, h of the box: rows round(y + h/2) .. y+h.
    """
    nothing = Rule(right=0.0, bottom=0.0)
    rules = [RULES.get(name, nothing) for name in findings]
    edges = torch.tensor([[r.left, r.top, r.right, r.bottom] for r in rules], dtype=torch.float64).view(-1, 4)
    outside = torch.tensor([r.outside for r in rules])
    edges, outside = edges.to(boxes.device, torch.float32), outside.to(boxes.device)  # float32: exact for pixels, and MPS has no other

    origin, extent = boxes[:, [0, 1, 0, 1]].float(), (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2).float()
    pixels = torch.round((origin + edges * extent).clamp(0, size))
    at = torch.arange(size, device=boxes.device)
    columns = (at >= pixels[:, 0, None]) & (at < pixels[:, 2, None])
    rows = (at >= pixels[:, 1, None]) & (at < pixels[:, 3, None])
    return (rows[:, :, None] & columns[:, None, :]) ^ outside[:, None, None]
