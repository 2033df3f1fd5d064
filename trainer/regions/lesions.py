"""Lesion boxes of an image as a region: what a radiologist drew, where it was drawn.

Legend: regions bool [B,S,S] of a batch of B images, S pixels of a side.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from shards.dataset import Split
from trainer.upload import upload

Box = tuple[float, float, float, float]


def lesion_boxes(split: Split, position: int) -> list[Box]:
    """The lesion boxes of an image's own finding, x0 y0 x1 y1 in pixels of the stored image."""
    finding = split.classes[split.labels[position]]
    return [box.xyxy for box in split.meta(position)["boxes"] if box.finding == finding]


def drawn(boxes: Sequence[Sequence[Box]], stored: Sequence[int], size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The boxes of each image of a batch, stored at (height, width), filled: bool [B,size,size]; a pixel that is touched counts.

    They travel as numbers and are drawn on the device.
    """
    height, width = stored
    most = max([1, *map(len, boxes)])
    edges = np.zeros((len(boxes), most, 4), np.int64)  # left, top, right, bottom, ends exclusive; of an empty box in the padding nothing is drawn
    for b, of_image in enumerate(boxes):
        for k, (x0, y0, x1, y1) in enumerate(of_image):
            edges[b, k] = [math.floor(x0 * size / width), math.floor(y0 * size / height), math.ceil(x1 * size / width), math.ceil(y1 * size / height)]
    left, top, right, bottom = upload(torch.from_numpy(edges), torch.device(device)).unsqueeze(3).unbind(2)
    at = torch.arange(size, device=device)
    columns, rows = (at >= left) & (at < right), (at >= top) & (at < bottom)
    return (rows[..., :, None] & columns[..., None, :]).any(1)


def lesion_regions(split: Split, index: torch.Tensor, stored: Sequence[int], size: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """The lesions of each image's own finding, stored at (height, width), as bool [B,size,size]; empty where there are none."""
    return drawn([lesion_boxes(split, position) for position in index.tolist()], stored, size, device)


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

    def regions(self, index: torch.Tensor, stored: Sequence[int], size: int, device: torch.device | str = "cpu") -> torch.Tensor:
        """As `lesion_regions`, of the images that are used."""
        return drawn([self.boxes.get(position, ()) for position in index.tolist()], stored, size, device)
