"""Context swap: what lies outside the lungs is exchanged between the images of a batch, so that it says less about the
label.

Legend: images float [B,1,S,S]; boxes int64 [B,4] x0 y0 x1 y1, ends exclusive; draws float [B] in [0,1).

Kin of it: mixing foregrounds and backgrounds to break spurious correlations (Xiao et al., "Noise or Signal", ICLR
2021); here the foreground is the lung box that the trainer knows anyway, or for an annotated image its lesions.

Who gives what to whom; "k around b" is what is kept of image b, with the rest of image k:

    ordinary       b     <-  k around b             both show their finding (or none) inside the lung box,
                                                    k's lungs lie under what is kept of b
    lesions of b   b     <-  host around lesions    host: healthy, its lungs lie like b's
                   host  <-  other around a piece   of the shape of b's lesions, so that a seam is no sign
                                                    of disease; other: healthy as well
    devices of k   b     <-  k's devices            b: healthy, without any, its lungs lie like k's

All of it is decided on the device: a list of partners on the host would wait for the device at every step, and grow
with the square of B.
"""

from typing import NamedTuple

import torch
from torch.nn import functional as F

from trainer.sections import Swap

# Share of its sides by which the edges of a lung box may differ from another's, for a lesion to be in its place there.
ALIKE = 0.2


class Swapped(NamedTuple):
    """images [B,1,S,S]; lenders int64 [B]: whose surroundings each image has, its own number where they are its own."""

    images: torch.Tensor
    lenders: torch.Tensor


def kept_box(boxes: torch.Tensor, size: int, dilate: float, feather: float, reach: float = 0.0) -> torch.Tensor:
    """How much of each pixel stays: 1 in the dilated box, falling to 0 over ``feather`` x size pixels outside: float
    [B,S,S].

    Args:
        dilate: in shares of the box's sides, but at least so much that the seam ends ``reach`` beyond the box, in
            shares of the image's side.
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


def under(boxes: torch.Tensor, size: int, dilate: float, feather: float, reach: float = 0.0) -> torch.Tensor:
    """[b,k]: whether box k lies under what is kept of image b, its seam included: bool [B,B]."""
    margin = (dilate * (boxes[:, 2:] - boxes[:, :2])).clamp(min=max(0.0, reach - feather) * size).repeat(
        1, 2
    ) + feather * size
    low, high = boxes[:, :2] - margin[:, :2], boxes[:, 2:] + margin[:, 2:]
    return ((boxes[None, :, :2] >= low[:, None]) & (boxes[None, :, 2:] <= high[:, None])).all(2)


def kept_mask(masks: torch.Tensor, feather: float) -> torch.Tensor:
    """As `kept_box` for any shape: bool [B,S,S] -> float [B,S,S], 1 in the mask, falling to 0 around it."""
    radius = max(1, round(feather * masks.shape[-1]))
    grown = F.max_pool2d(masks[:, None].float(), 2 * radius + 1, 1, radius)
    soft = F.avg_pool2d(grown, 2 * radius + 1, 1, radius, count_include_pad=False)[:, 0]
    return torch.where(masks, 1.0, soft)


def partners(candidates: torch.Tensor, draws: torch.Tensor, probability: float) -> torch.Tensor:
    """For each image the one whose surroundings it gets, itself where it keeps its own: int64 [B].

    Args:
        candidates: bool [B,B]: who may lend theirs to whom; [b,b] is false.
        draws: [B,2]: whether, and whom.
    """
    count, own = candidates.sum(1), torch.arange(len(candidates), device=candidates.device)
    whether, whom = draws.double().unbind(1)
    number = (whom * count).long()  # of the candidate that is taken
    taken = (candidates & (candidates.cumsum(1) == number[:, None] + 1)).int().argmax(1)
    return torch.where((count > 0) & (whether < probability), taken, own)


def blend(images: torch.Tensor, kept: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """``kept`` [B,S,S] of each image, the rest of ``others`` [B,1,S,S]."""
    return torch.lerp(others, images, kept[:, None].to(images.dtype))


def swap_context(
    images: torch.Tensor,
    boxes: torch.Tensor,
    inside: torch.Tensor,
    draws: torch.Tensor,
    settings: Swap,
    *,
    lesions: torch.Tensor | None = None,
    healthy: torch.Tensor | None = None,
    reach: float = 0.0,
) -> Swapped:
    """Images [B,1,S,S] whose surroundings come, with ``settings.probability``, from another image of the batch.

    An image is changed, and lends its surroundings, only where ``inside`` says that its finding (or the lack of one)
    shows inside its lung box; and only to those under whose kept box and seam its own lung box lies, so that its lungs
    do not show. Labels, boxes and regions stay right. (Stretching it to fit would do for more pairs, but what was
    interpolated is a sign that the surroundings say nothing, which
    training picks up: see bench/LOG.md.) What is kept of an image with ``lesions`` is those alone, in a healthy image.

    Args:
        inside: bool [B].
        draws: float [B,2], whether and with whom.
        lesions: bool [B,S,S], with ``healthy`` bool [B]: which images show no finding.
        reach: how far beyond the lung box a region may lie, in shares of the image's side: every kept box with its seam
            reaches so far, also of who has none.
    """
    assert settings.probability is not None
    size, own = images.shape[-1], torch.arange(len(images), device=images.device)
    other = own[:, None] != own
    kept = kept_box(boxes, size, settings.dilate, settings.feather, reach)
    lenders = own
    if lesions is not None:
        assert healthy is not None
        kept, lenders = _lay_lesions(kept, boxes, lesions, healthy & other, draws, settings)
    free = inside & (lenders == own)
    fits = under(boxes, size, settings.dilate, settings.feather, reach)
    swapped = partners(free[:, None] & inside & other & fits, draws, settings.probability)
    lenders = torch.where(free, swapped, lenders)
    return Swapped(blend(images, kept, images[lenders]), lenders)


def lend_devices(
    images: torch.Tensor,
    boxes: torch.Tensor,
    devices: torch.Tensor,
    free: torch.Tensor,
    draws: torch.Tensor,
    settings: Swap,
) -> Swapped:
    """Images [B,1,S,S] of which some have another's devices, at their place in the chest: so that a drain is no sign of
    what it treats.

    Args:
        devices: bool [B,S,S].
        free: bool [B]: which images may get some; those that have their own get none.
        draws: float [B,2], whether and whose.
    """
    alike, has = under(boxes, images.shape[-1], ALIKE, 0.0), devices.flatten(1).any(1)
    lenders = partners((free & ~has)[:, None] & has & alike & alike.T, draws, settings.devices or 0.0)
    borrows = lenders != torch.arange(len(images), device=images.device)
    lent = kept_mask(devices, settings.feather / 2)[lenders] * borrows[:, None, None]
    return Swapped(blend(images[lenders], lent, images), lenders)


def _lay_lesions(
    kept: torch.Tensor,
    boxes: torch.Tensor,
    lesions: torch.Tensor,
    candidates: torch.Tensor,
    draws: torch.Tensor,
    settings: Swap,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is kept of each image, and whose surroundings it gets, after lesions are laid into healthy images and pieces
    of these into others.

    Args:
        kept: float [B,S,S], as far as there are no lesions.
        candidates: bool [B,B]: [b,k], whether k is healthy and not b.
    """
    assert settings.probability is not None
    own, count = torch.arange(len(boxes), device=boxes.device), len(boxes)
    marked, around = lesions.flatten(1).any(1), kept_mask(lesions, settings.feather / 2)
    kept = torch.where(marked[:, None, None], torch.maximum(kept, around), kept)  # a lesion may reach beyond the box
    alike = under(boxes, kept.shape[-1], ALIKE, 0.0)
    candidates = candidates & alike & alike.T
    hosts = partners(candidates & marked[:, None], draws, settings.probability)
    has_host = hosts != own
    # A host gets a piece of the shape of the lesions that are laid into it (of the first, where there are several), in
    # another healthy image.
    guests = torch.where(has_host[:, None] & (hosts[:, None] == own), own[:, None], count).amin(0)
    others = partners(candidates, draws, 1.0)
    hosting = (guests < count) & (others != own) & ~has_host
    kept = torch.where(has_host[:, None, None], around, kept)
    kept = torch.where(hosting[:, None, None], around[guests.clamp(max=count - 1)], kept)
    return kept, torch.where(hosting, others, hosts)
