"""From a net's foreground to the lungs of one chest: specks and holes go, a lung that is missing is mirrored, and what
is no chest is said to be none.

Legend: masks bool [B,S,S] at the segmenter's working size, where x runs to the image's right and y down; areas and
lengths in shares of the image. Everything is batched and stays on the device.
"""

from dataclasses import dataclass

import numpy as np
import torch
from kornia.contrib import connected_components_union_find
from scipy import ndimage
from torch._higher_order_ops import while_loop

# A second component below this share of the largest is a speck, not a lung.
SPECK = 0.12
# A pair of lungs covers this share of the image.
LEAST_AREA, MOST_AREA = 0.03, 0.65
# Its box has at least these sides.
LEAST_WIDTH, LEAST_HEIGHT = 0.2, 0.15
# Width of the pair over its height, in an image that was made square.
LEAST_ASPECT, MOST_ASPECT = 0.5, 2.4
# The smaller lung's area and height over the larger's.
LEAST_AREA_RATIO, LEAST_HEIGHT_RATIO = 0.1, 0.28
# Pixels in the emptiest column between the lungs over those of the fullest: more, and they are one blob.
MOST_BRIDGE = 0.55
# Mean probability of the foreground.
LEAST_CONFIDENCE = 0.8
# Share of a lung alone that may lie beyond the middle of the image.
MOST_ACROSS = 0.2
# From a lung's inner edge to the midline, in widths of the lung: the median of 600 pairs.
INNER_GAP = 0.13


EIGHT = np.ones((3, 3))  # neighbours: corners, too


def components(masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """8-connected components: labels int64 [B,S,S], 0 outside, from 1 in each image; and the area in pixels of each,
    int64 [B,N] (0 beyond them).
    """
    if torch.compiler.is_exporting():
        labels, most = _labelled_by_spreading(masks), masks.shape[1] * masks.shape[2]
    else:
        labels = _labelled_by_scipy(masks) if masks.device.type == "cpu" else _labelled_by_kornia(masks)
        most = int(labels.max()) if labels.numel() else 0
    # `two_largest` takes two
    area = torch.zeros(masks.shape[0], most + 3, dtype=torch.int64, device=masks.device)
    area = area.scatter_add(1, labels.flatten(1), torch.ones_like(labels.flatten(1)))
    area[:, 0] = 0
    return labels, area


def _labelled_by_spreading(masks: torch.Tensor) -> torch.Tensor:
    """For an exported graph, which has no functions beside torch's: each pixel takes the largest number around it, and
    that of the pixel which it is called after, until nothing changes. Labels are not from 1 on.
    """
    height, width = masks.shape[1:]
    within = masks.float()
    own = within * torch.arange(1, height * width + 1, device=masks.device).view(height, width)

    def changed(before: torch.Tensor, labels: torch.Tensor, within: torch.Tensor) -> torch.Tensor:
        return (before != labels).any()

    def spread(before: torch.Tensor, labels: torch.Tensor, within: torch.Tensor) -> tuple[torch.Tensor, ...]:
        grown = torch.nn.functional.max_pool2d(labels[:, None], 3, 1, 1)[:, 0] * within
        named = grown.flatten(1).gather(1, (grown.flatten(1).long() - 1).clamp(min=0)).view_as(grown) * within
        return labels.clone(), named, within.clone()

    _, labels, _ = while_loop(changed, spread, (torch.zeros_like(own), own, within))
    return labels.long()


def _labelled_by_scipy(masks: torch.Tensor) -> torch.Tensor:
    """For the CPU, where the other takes ten times as long."""
    labels = [ndimage.label(mask, EIGHT)[0] for mask in masks.numpy()]
    return (
        torch.from_numpy(np.stack(labels).astype(np.int64)) if labels else torch.zeros(masks.shape, dtype=torch.int64)
    )


def _labelled_by_kornia(masks: torch.Tensor) -> torch.Tensor:
    """For all other devices."""
    labels = connected_components_union_find(masks[:, None].float())[:, 0].long()
    # Whatever numbers the labels are: those that occur, image by image, are counted from 1.
    image = torch.arange(len(masks), device=masks.device)[:, None, None].expand_as(labels)
    _, numbers = (
        torch.unique(image[masks] * (labels.max() + 1) + labels[masks], return_inverse=True)
        if masks.any()
        else (None, labels[masks])
    )
    first = torch.full((len(masks),), numbers.numel(), device=masks.device).scatter_reduce_(
        0, image[masks], numbers, "amin"
    )
    return torch.zeros_like(labels).masked_scatter_(masks, 1 + numbers - first[image[masks]])


def two_largest(masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """At most two components of each mask, a second one only if it is no speck: bool [B,S,S], and how many are left,
    int64 [B].
    """
    labels, area = components(masks)
    top = area.topk(2, dim=1)
    wanted = (top.values > 0) & (top.values >= SPECK * top.values[:, :1])
    keep = torch.zeros_like(area, dtype=torch.bool).scatter_(1, top.indices, wanted)
    keep[:, 0] = False
    return keep.gather(1, labels.flatten(1)).view_as(masks), wanted.sum(1)


def fill_holes(masks: torch.Tensor) -> torch.Tensor:
    """Background that does not reach the image's edge becomes lung: bool [B,S,S]."""
    labels, area = components(~masks)
    edge = torch.cat([labels[:, 0], labels[:, -1], labels[:, :, 0], labels[:, :, -1]], 1)
    outside = torch.zeros_like(area, dtype=torch.bool).scatter_(1, edge, True)
    outside[:, 0] = True
    return masks | ~outside.gather(1, labels.flatten(1)).view_as(masks)


def tidy(masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """At most two components without holes, and how many: bool [B,S,S], int64 [B]."""
    kept, count = two_largest(masks)
    return fill_holes(kept), count


@dataclass
class Shape:
    """The foreground cut into left and right at its emptiest column in the middle. All float [B], in shares of the
    image; sides [B,2].
    """

    x0: torch.Tensor
    y0: torch.Tensor
    x1: torch.Tensor
    y1: torch.Tensor
    area: torch.Tensor  # of each side
    height: torch.Tensor  # of each side
    overlap: torch.Tensor  # rows that both sides have, over the smaller side's
    bridge: torch.Tensor  # pixels of the emptiest middle column over those of the fullest column

    @staticmethod
    def of(masks: torch.Tensor) -> "Shape":
        """Measure masks; an empty one has zeros everywhere."""
        size = masks.shape[-1]
        columns, rows = masks.sum(1), masks.any(2)
        x0, x1 = ends(columns > 0)
        y0, y1 = ends(rows)
        x = torch.arange(size, device=masks.device)[None]
        width = x1 - x0
        middle = (x >= (x0 + 0.3 * width)[:, None]) & (x < (x0 + 0.7 * width)[:, None])
        valley = torch.where(middle, columns, size + 1).min(1)
        left = masks & (x < valley.indices[:, None])[:, None]
        area = torch.stack([left.sum((1, 2)), masks.sum((1, 2)) - left.sum((1, 2))], 1)
        of_sides = [ends(left.any(2)), ends((masks & ~left).any(2))]
        height = torch.stack([bottom - top for top, bottom in of_sides], 1)
        shared = torch.minimum(of_sides[0][1], of_sides[1][1]) - torch.maximum(of_sides[0][0], of_sides[1][0])
        return Shape(
            x0 / size,
            y0 / size,
            x1 / size,
            y1 / size,
            area / size**2,
            height / size,
            shared.clamp(min=0) / height.amin(1).clamp(min=1),
            valley.values.clamp(max=size) / columns.amax(1).clamp(min=1),
        )


def complete(masks: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """Where one lung alone is left, on one side of the image, add its mirror image about the midline beside it: bool
    [B,S,S].
    """
    shape, size = Shape.of(masks), masks.shape[-1]
    on_left = masks[:, :, : size // 2].sum((1, 2)) / masks.sum((1, 2)).clamp(min=1)
    # In the middle it is both lungs from the side, or none
    aside = torch.minimum(on_left, 1 - on_left) <= MOST_ACROSS
    single = (count == 1) & (shape.bridge > MOST_BRIDGE) & aside
    x0, x1 = shape.x0.double(), shape.x1.double()
    gap = INNER_GAP * (x1 - x0)
    midline = torch.where(on_left > 0.5, x1 + gap, x0 - gap)[:, None]
    source = (2 * midline * size - 1 - torch.arange(size, device=masks.device)).round().long()
    inside = (source >= 0) & (source < size)
    mirrored = masks.gather(2, source.clamp(0, size - 1)[:, None].expand_as(masks)) & inside[:, None]
    return masks | (mirrored & single[:, None, None])


def believable(masks: torch.Tensor, confidence: torch.Tensor) -> torch.Tensor:
    """Whether the foreground can be a pair of lungs: bool [B]; ``confidence`` float [B] is the mean probability of the
    foreground.
    """
    s = Shape.of(masks)
    width, height, area = s.x1 - s.x0, s.y1 - s.y0, s.area.sum(1)
    aspect = width / height.clamp(min=1e-6)
    small = 1e-6
    touching = (s.x0 <= 0).int() + (s.y0 <= 0) + (s.x1 >= 1) + (s.y1 >= 1)
    return (
        (area >= LEAST_AREA) & (area <= MOST_AREA) & (width >= LEAST_WIDTH) & (height >= LEAST_HEIGHT)
        & (aspect >= LEAST_ASPECT) & (aspect <= MOST_ASPECT) & (touching < 4)
        & (s.area.amin(1) / s.area.amax(1).clamp(min=small) >= LEAST_AREA_RATIO)
        & (s.height.amin(1) / s.height.amax(1).clamp(min=small) >= LEAST_HEIGHT_RATIO)
        & (s.overlap >= 0.5) & (s.bridge <= MOST_BRIDGE) & (confidence >= LEAST_CONFIDENCE)
    )  # fmt: skip


def clean(masks: torch.Tensor, probability: torch.Tensor) -> torch.Tensor:
    """All of it: bool [B,S,S]; an image that shows no believable pair of lungs has no foreground."""
    tidied, count = tidy(masks)
    confidence = (probability * tidied).sum((1, 2)) / tidied.sum((1, 2)).clamp(min=1)
    completed = complete(tidied, count)
    return completed & believable(completed, confidence)[:, None, None]


def ends(hit: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First and one past the last True of bool [B,S]; 0 and 0 without any."""
    size = hit.shape[1]
    some = hit.any(1)
    first = hit.int().argmax(1)
    return torch.where(some, first, 0), torch.where(some, size - hit.flip(1).int().argmax(1), 0)
