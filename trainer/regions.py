"""Where a finding is expected, given the lung box. Hides the geometry; the rules are data (`trainer.rules`).

Legend: boxes int64 [B,4] x0 y0 x1 y1, ends exclusive; regions bool [B,S,S].

python -m trainer.regions show | learn: the rules drawn on a radiograph; a rule from one annotated radiograph.
"""

from collections.abc import Mapping, Sequence

import torch

from shards.errors import run
from shards.sample import TASKS
from trainer.rules import Rule, read_findings, rules_of, task_findings, without_rule

__all__ = ["PUBLISHED", "TASKS", "Rule", "finding_regions", "task_findings", "without_rule"]

PUBLISHED = rules_of(read_findings("published"))


def finding_regions(boxes: torch.Tensor, findings: Sequence[str], size: int, rules: Mapping[str, Rule] = PUBLISHED) -> torch.Tensor:
    """The expected region of ``findings[b]`` in a lung box: boxes int64 [B,4] -> bool [B,size,size].

    Empty for No Finding and for a finding without a rule. For Effusion, with y, h of the box: rows round(y + h/2) .. y+h.

    Args:
        rules: by finding; without it the three of Wu et al. (DMKD 2026).
    """
    chosen = [rules.get(name, Rule()) for name in findings]
    count = max([1, *(len(rule.rectangles) for rule in chosen)])
    edges = torch.zeros(len(chosen), count, 4, dtype=torch.float64)
    for b, rule in enumerate(chosen):
        if rule.rectangles:
            edges[b, : len(rule.rectangles)] = torch.tensor(rule.rectangles, dtype=torch.float64)
    outside = torch.tensor([rule.outside for rule in chosen], device=boxes.device)
    edges = edges.to(boxes.device, torch.float32)  # float32: exact for pixels, and MPS has no other

    origin, extent = boxes[:, None, [0, 1, 0, 1]].float(), (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)[:, None].float()
    pixels = torch.round((origin + edges * extent).clamp(0, size))
    at = torch.arange(size, device=boxes.device)
    columns = (at >= pixels[..., 0, None]) & (at < pixels[..., 2, None])
    rows = (at >= pixels[..., 1, None]) & (at < pixels[..., 3, None])
    inside = (rows[..., :, None] & columns[..., None, :]).any(1)
    return inside ^ outside[:, None, None]


def placed(region: torch.Tensor) -> torch.Tensor:
    """Which regions [B,S,S] say something about where to look: bool [B], false for nowhere and for everywhere (the lungs of an image without)."""
    flat = region.flatten(1)
    return flat.any(1) & ~flat.all(1)


if __name__ == "__main__":
    from trainer.learn_regions import main

    run(main)
