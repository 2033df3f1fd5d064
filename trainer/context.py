"""Context swap: what lies outside the lungs is exchanged between the images of a batch, so that it says less about the label.

Legend: images float [B,1,S,S]; boxes int64 [B,4] x0 y0 x1 y1, ends exclusive; draws float [B] in [0,1).

Kin of it: mixing foregrounds and backgrounds to break spurious correlations (Xiao et al., "Noise or Signal", ICLR 2021); here the
foreground is the lung box that the trainer knows anyway, or for an annotated image its lesions.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.nn import functional as F

from trainer.config import Swap

ALIKE = 0.2  # share of its sides by which the edges of a lung box may differ from another's, for a lesion to be in its place there too


class Swapped(NamedTuple):
    """images [B,1,S,S]; lenders: whose surroundings each image has, its own number where they are its own."""

    images: torch.Tensor
    lenders: list[int]


def kept_box(boxes: torch.Tensor, size: int, dilate: float, feather: float, reach: float = 0.0) -> torch.Tensor:
    """How much of each pixel stays: 1 in the dilated box, falling to 0 over ``feather`` x size pixels outside: float [B,S,S].

    Args:
        dilate: in shares of the box's sides, but at least so much that the seam ends ``reach`` beyond the box, in shares of the image's side.
    """
    low, high = boxes[:, :2].float(), boxes[:, 2:].float()
    margin = (dilate * (high - low)).clamp(min=max(0.0, reach - feather) * size)
    low, high = low - margin, high + margin
    at = torch.arange(size, device=boxes.device) + 0.5
    width = max(feather * size, 1e-6)

    def ramp(k: int) -> torch.Tensor:
        beyond = torch.maximum(low[:, k, None] - at, at - high[:, k, None])
        return (1 - beyond / width).clamp(0, 1)

    return ramp(1)[:, :, None] * ramp(0)[:, None, :]


def under(boxes: torch.Tensor, size: int, dilate: float, feather: float, reach: float = 0.0) -> list[list[bool]]:
    """[b][k]: whether box k lies under what is kept of image b, its seam included."""
    margin = (dilate * (boxes[:, 2:] - boxes[:, :2])).clamp(min=max(0.0, reach - feather) * size).repeat(1, 2) + feather * size
    outward = boxes.float() + margin * torch.tensor([-1.0, -1.0, 1.0, 1.0], device=boxes.device)
    beyond = (boxes[None, :, :2] < outward[:, None, :2]) | (boxes[None, :, 2:] > outward[:, None, 2:])
    return (~beyond.any(2)).tolist()


def kept_mask(masks: torch.Tensor, feather: float) -> torch.Tensor:
    """As `kept_box` for any shape: bool [B,S,S] -> float [B,S,S], 1 in the mask, falling to 0 around it."""
    reach = max(1, round(feather * masks.shape[-1]))
    grown = F.max_pool2d(masks[:, None].float(), 2 * reach + 1, 1, reach)
    soft = F.avg_pool2d(grown, 2 * reach + 1, 1, reach, count_include_pad=False)[:, 0]
    return torch.where(masks, 1.0, soft)


def partners(candidates: Sequence[Sequence[int]], draws: torch.Tensor, probability: float) -> list[int]:
    """For each image the one whose surroundings it gets, itself where it keeps its own.

    Args:
        candidates: for each image those that may lend theirs, none of them itself.
        draws: [B,2] on the CPU: whether, and whom.
    """
    return [
        theirs[int(whom * len(theirs))] if theirs and whether < probability else b
        for b, (theirs, (whether, whom)) in enumerate(zip(candidates, draws.tolist(), strict=True))
    ]


def blend(images: torch.Tensor, kept: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """``kept`` [B,S,S] of each image, the rest of ``others`` [B,1,S,S]."""
    return torch.lerp(others, images, kept[:, None].to(images.dtype))


def swap_context(
    images: torch.Tensor,
    boxes: torch.Tensor,
    inside: Sequence[bool],
    draws: torch.Tensor,
    settings: Swap,
    *,
    lesions: torch.Tensor | None = None,
    healthy: Sequence[bool] = (),
    reach: float = 0.0,
) -> Swapped:
    """Images [B,1,S,S] whose surroundings come, with ``settings.probability``, from another image of the batch.

    An image is changed, and lends its surroundings, only where ``inside`` says that its finding (or the lack of one) shows inside its lung
    box; and only to those under whose kept box and seam its own lung box lies, so that its lungs do not show. Labels, boxes and regions stay
    right. (Stretching it to fit would do for more pairs, but what was interpolated is a sign that the surroundings say nothing, which
    training picks up: see bench/LOG.md.) What is kept of an image with ``lesions`` (bool [B,S,S]) is those alone, in a ``healthy`` image
    whose lungs lie likewise. That image in its turn keeps a piece of the same shape, in another healthy one, so that a seam is no sign of disease.

    Args:
        draws: float [B,2] on the CPU, whether and with whom.
        reach: how far beyond the lung box a region may lie, in shares of the image's side: every kept box with its seam reaches so far, also of who has none.
    """
    assert settings.probability is not None
    every, size = range(len(images)), images.shape[-1]
    kept = kept_box(boxes, size, settings.dilate, settings.feather, reach)
    fits = under(boxes, size, settings.dilate, settings.feather, reach)
    lender = list(every)
    if lesions is not None:
        marked, around = lesions.flatten(1).any(1), kept_mask(lesions, settings.feather / 2)
        kept = torch.where(marked[:, None, None], torch.maximum(kept, around), kept)  # a lesion may reach beyond the box
        alike = under(boxes, size, ALIKE, 0.0)
        homes = [[k for k in every if healthy[k] and k != b and alike[b][k] and alike[k][b]] for b in every]
        hosts = partners([homes[b] if has else [] for b, has in enumerate(marked.tolist())], draws, settings.probability)
        others = partners(homes, draws, 1.0)
        laid = [(b, host) for b, host in enumerate(hosts) if host != b]
        for piece, b, host in [(b, b, host) for b, host in laid] + [(b, host, others[host]) for b, host in laid]:
            if host != b and lender[b] == b:
                lender[b], kept[b] = host, around[piece]
    free = [inside[b] and lender[b] == b for b in every]
    swapped = partners([[k for k in every if free[b] and inside[k] and k != b and fits[b][k]] for b in every], draws, settings.probability)
    lenders = [other if free[b] else lender[b] for b, other in enumerate(swapped)]
    return Swapped(blend(images, kept, images[lenders]), lenders)
