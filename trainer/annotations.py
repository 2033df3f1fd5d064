"""Lesion boxes of an image as a region: what a radiologist drew, where it was drawn.

Legend: regions bool [B,S,S] of a batch of B images, S pixels of a side.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from shards.dataset import Split

Box = tuple[float, float, float, float]


def lesion_boxes(split: Split, position: int) -> list[Box]:
    """The lesion boxes of an image's own finding, x0 y0 x1 y1 in pixels of the stored image."""
    finding = split.classes[split.labels[position]]
    return [box.xyxy for box in split.meta(position)["boxes"] if box.finding == finding]


def drawn(boxes: Iterable[Box], stored: Sequence[int], size: int) -> torch.Tensor:
    """Boxes of an image that is stored at (height, width), filled: bool [size,size]; a pixel that is touched counts."""
    region = torch.zeros(size, size, dtype=torch.bool)
    height, width = stored
    for x0, y0, x1, y1 in boxes:
        left, top = max(0, math.floor(x0 * size / width)), max(0, math.floor(y0 * size / height))
        region[top : max(0, math.ceil(y1 * size / height)), left : max(0, math.ceil(x1 * size / width))] = True
    return region


def lesion_regions(split: Split, index: torch.Tensor, stored: Sequence[int], size: int) -> torch.Tensor:
    """The lesions of each image's own finding, stored at (height, width), as bool [B,size,size]; empty where there are none."""
    return torch.stack([drawn(lesion_boxes(split, position), stored, size) for position in index.tolist()])


def chosen(expected: torch.Tensor, lesions: torch.Tensor, how: str) -> torch.Tensor:
    """The regions float [B,S,S] that attention follows by ``--attention.region``: anatomy, annotation or both; ``lesions`` is bool [B,S,S]."""
    if how == "anatomy":
        return expected
    if how == "annotation":
        return lesions.to(expected.dtype)
    return torch.where(lesions.flatten(1).any(1)[:, None, None], lesions.to(expected.dtype), expected)


class Annotations:
    """The lesion boxes of a split that training may use.

    Args:
        split: the metadata of all its samples are read once, from one end to the other; of remote shards, all are fetched.
        share: of the images with boxes; which, ``seed`` decides, and a smaller share is part of a larger one.
    """

    def __init__(self, split: Split, share: float, seed: int) -> None:
        found = {position: boxes for position in range(len(split)) if (boxes := lesion_boxes(split, position))}
        self.known = len(found)
        order = np.random.default_rng([seed, len(split)]).permutation(sorted(found))
        self.boxes = {int(p): found[int(p)] for p in order[: math.ceil(share * len(found) - 1e-9)]}

    def regions(self, index: torch.Tensor, stored: Sequence[int], size: int) -> torch.Tensor:
        """As `lesion_regions`, of the images that are used."""
        return torch.stack([drawn(self.boxes.get(position, ()), stored, size) for position in index.tolist()])
