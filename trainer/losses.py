"""Attention terms, per image; the classification loss is the task's (`trainer.task`). The step sums both before it
divides, over all processes.

Legend: cam float [B,S,S] in [0,1]; region bool, or weights float in [0,1], [B,S,S].
"""

from functools import lru_cache

import torch
from torch.nn import functional as F

SHARPNESS = 0.1  # width of the sigmoid that softens "cam > threshold" in `coverage`
TINY = 1e-6  # a map whose total is below this is no map


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    """Half precision becomes float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


@lru_cache(maxsize=64)
def constant(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """Numbers on a device, float32; copied there once, so that no step waits for them."""
    return torch.tensor(values, device=device)


def revival(cam: torch.Tensor, region: torch.Tensor) -> torch.Tensor:
    """Zero, with a gradient that raises a raw CAM [B,h,w] in its region, bool or weights [B,S,S], where the CAM is zero
    everywhere: `attention_term` has none there, so that such a map would stay as it is. Float [B].
    """
    cam = at_least_float32(cam)
    inside = F.adaptive_avg_pool2d(region.to(cam.dtype), (cam.shape[1], cam.shape[2]))
    dead = cam.detach().amax((1, 2)) <= 0
    raised = -(cam * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=TINY)
    return torch.where(dead & (inside.sum((1, 2)) > TINY), raised, 0)


def attention_term(cam: torch.Tensor, region: torch.Tensor, threshold: float, form: str) -> torch.Tensor:
    """How far a CAM is from its region, per image, before the label mask: 0 is best, 1 worst.

    Args:
        cam: [B,S,S] in [0,1], any float type; computed in at least float32.
        region: bool [B,S,S], or weights float [B,S,S] in [0,1]: sums below then count each place by its weight.
        threshold: in [0,1].
        form: ``published``: 1 - share of the region with cam > threshold (Wu et al. 2026; its gradient is zero);
            ``coverage``: the same with sigmoid((cam - threshold) / 0.1) for the comparison;
            ``energy``: 1 - sum of cam in the region / sum of cam;
            ``lift``: that over the region's complement, (1 - share) / (1 - area): 1 for a map that is the same
                everywhere.

    Returns:
        float [B], in [0,1] but for ``lift``, which has no bound. An empty region gives 0; an all-zero CAM gives 1
        (``coverage``: nearly; ``lift``: 1); both with gradient 0.
    """
    cam = at_least_float32(cam)
    inside = region.to(cam.dtype)
    area = inside.sum((1, 2))
    total = cam.sum((1, 2))
    if form == "published":
        hot = (cam > threshold).to(cam.dtype)
        # "+ 0 * total" keeps the term in the graph: its gradient is zero, not missing.
        term = 1 - (hot * inside).sum((1, 2)) / area.clamp(min=TINY) + 0 * total
    elif form == "coverage":
        soft = torch.sigmoid((cam - threshold) / SHARPNESS)
        alive = (total > TINY)[:, None, None]
        soft = torch.where(alive, soft, soft.detach())
        term = 1 - (soft * inside).sum((1, 2)) / area.clamp(min=TINY)
    elif form in ("energy", "lift"):
        alive = total > TINY
        share = (cam * inside).sum((1, 2)) / torch.where(alive, total, 1.0)
        term = 1 - torch.where(alive, share, 0.0)
        if form == "lift":
            pixels = cam.shape[1] * cam.shape[2]
            term = torch.where(alive, term / (1 - area / pixels).clamp(min=1 / pixels), 1.0)
    else:
        raise ValueError(f"unknown attention form {form!r}, expected published, coverage, energy or lift")
    return torch.where(area > 0, term, torch.zeros_like(term))
