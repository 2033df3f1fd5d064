"""Context swap: what lies outside the lungs is exchanged between the images of a batch, so that it says nothing about the label.

Legend: images float [B,1,S,S]; boxes int64 [B,4] x0 y0 x1 y1, ends exclusive; draws float [B] in [0,1).

Kin of it: mixing foregrounds and backgrounds to break spurious correlations (Xiao et al., "Noise or Signal", ICLR 2021); here the
foreground is the lung box that the trainer knows anyway, or for an annotated image its lesions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F


@dataclass(frozen=True)
class Swap:
    """Context swap."""

    probability: float | None = None
    """Share of the images whose surroundings come from another image of the batch; empty: 0.5 with attention, 0 without."""
    dilate: float = 0.05
    """How far the kept box reaches beyond the lung box, in shares of its sides."""
    feather: float = 0.04
    """Width of the seam, in shares of the image's side."""


def kept_box(boxes: torch.Tensor, size: int, dilate: float, feather: float) -> torch.Tensor:
    """How much of each pixel stays: 1 in the dilated box, falling to 0 over ``feather`` x size pixels outside: float [B,S,S]."""
    low, high = boxes[:, :2].float(), boxes[:, 2:].float()
    margin = dilate * (high - low)
    low, high = low - margin, high + margin
    at = torch.arange(size, device=boxes.device) + 0.5
    width = max(feather * size, 1e-6)

    def ramp(k: int) -> torch.Tensor:
        beyond = torch.maximum(low[:, k, None] - at, at - high[:, k, None])
        return (1 - beyond / width).clamp(0, 1)

    return ramp(1)[:, :, None] * ramp(0)[:, None, :]


def kept_mask(masks: torch.Tensor, feather: float) -> torch.Tensor:
    """As `kept_box` for any shape: bool [B,S,S] -> float [B,S,S], 1 in the mask, falling to 0 around it."""
    reach = max(1, round(feather * masks.shape[-1]))
    grown = F.max_pool2d(masks[:, None].float(), 2 * reach + 1, 1, reach)
    soft = F.avg_pool2d(grown, 2 * reach + 1, 1, reach, count_include_pad=False)[:, 0]
    return torch.where(masks, 1.0, soft)


def partners(able: Sequence[bool], lenders: Sequence[bool], draws: torch.Tensor, probability: float) -> list[int]:
    """For each image the one whose surroundings it gets, itself where it keeps its own.

    Args:
        able: who may be changed; lenders: whose surroundings may be taken.
        draws: [B,2] on the CPU: whether, and whom.
    """
    pool = [b for b, lends in enumerate(lenders) if lends]
    chosen = list(range(len(able)))
    for b, (whether, whom) in enumerate(draws.tolist()):
        others = [k for k in pool if k != b]
        if able[b] and others and whether < probability:
            chosen[b] = others[int(whom * len(others))]
    return chosen


def blend(images: torch.Tensor, kept: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """``kept`` [B,S,S] of each image, the rest of ``others`` [B,1,S,S]."""
    return torch.lerp(others, images, kept[:, None].to(images.dtype))


def aligned(images: torch.Tensor, boxes: torch.Tensor, to: torch.Tensor) -> torch.Tensor:
    """Images moved and stretched so that ``boxes`` come to lie on ``to``; beyond their edges the edges go on."""
    size = images.shape[-1]
    scale = (boxes[:, 2:] - boxes[:, :2]).float() / (to[:, 2:] - to[:, :2]).float()
    # In coordinates of grid_sample: -1 and 1 are the image's edges.
    centre = (boxes[:, :2] + boxes[:, 2:]).float() / size - 1
    shift = centre - scale * ((to[:, :2] + to[:, 2:]).float() / size - 1)
    theta = torch.zeros(len(images), 2, 3, device=images.device, dtype=images.dtype)
    theta[:, 0, 0], theta[:, 1, 1], theta[:, :, 2] = scale[:, 0], scale[:, 1], shift
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def swap_context(
    images: torch.Tensor,
    boxes: torch.Tensor,
    inside: Sequence[bool],
    draws: torch.Tensor,
    settings: Swap,
    *,
    lesions: torch.Tensor | None = None,
    healthy: Sequence[bool] = (),
) -> torch.Tensor:
    """Images [B,1,S,S] whose surroundings come, with ``settings.probability``, from another image of the batch.

    An image is changed, and lends its surroundings, only where ``inside`` says that its finding (or the lack of one) shows inside its lung
    box. The lender is stretched so that its lungs come to lie under the box that is kept: none of them shows, and labels, boxes and
    regions stay right. What is kept of an image with ``lesions`` (bool [B,S,S]) is those alone, in the lungs of a ``healthy``
    image of the batch. That image in its turn keeps a piece of the same shape, in another healthy one, so that a seam is no sign of disease.

    Args:
        draws: float [B,2] on the CPU, whether and with whom.
    """
    assert settings.probability is not None
    kept = kept_box(boxes, images.shape[-1], settings.dilate, settings.feather)
    lender = list(range(len(images)))
    if lesions is not None:
        marked, around = lesions.flatten(1).any(1), kept_mask(lesions, settings.feather / 2)
        kept = torch.where(marked[:, None, None], torch.maximum(kept, around), kept)  # a lesion may reach beyond the box
        hosts = partners(marked.tolist(), healthy, draws, settings.probability)
        others = partners(healthy, healthy, draws, 1.0)
        laid = [(b, host) for b, host in enumerate(hosts) if host != b]
        for piece, b, host in [(b, b, host) for b, host in laid] + [(b, host, others[host]) for b, host in laid]:
            if host != b and lender[b] == b:
                lender[b], kept[b] = host, around[piece]
    free = [able and lender[b] == b for b, able in enumerate(inside)]
    swapped = partners(free, inside, draws, settings.probability)
    lender = [other if free[b] else lender[b] for b, other in enumerate(swapped)]
    changed = [b for b, other in enumerate(lender) if other != b]
    if not changed:
        return images
    surroundings = images.clone()
    from_ = [lender[b] for b in changed]
    surroundings[changed] = aligned(images[from_], boxes[from_], boxes[changed])
    return blend(images, kept, surroundings)
