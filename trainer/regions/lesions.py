"""Lesion boxes as regions: what a radiologist drew, where it was drawn.

Legend: regions bool [B,S,S] of a batch of B images, S pixels of a side.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch

from shards.dataset import Split
from trainer.upload import upload

Box = tuple[float, ...]  # x0 y0 x1 y1


class LesionRegions:
    """The lesion boxes of a split, drawn when they are asked for.

    Args:
        share: of the images with boxes; which, ``seed`` decides, and a smaller share is part of a larger one. None: all
            of them, and nobody counts them.
    """

    def __init__(self, split: Split, share: float | None = None, seed: int = 0) -> None:
        self.split, self.limited = split, share is not None
        if share is None:
            return
        position = split.lesions().position
        with_boxes = position[np.diff(position, prepend=-1) > 0]  # in order; np.unique takes seconds for millions
        self.known = len(with_boxes)  # images with boxes
        self.used = with_boxes  # positions of those that are used
        if share < 1:
            order = np.random.default_rng([seed, len(split)]).permutation(with_boxes)
            self.used = np.sort(order[: math.ceil(share * len(with_boxes) - 1e-9)])

    def has(self, index: torch.Tensor) -> torch.Tensor:
        """Which findings have boxes in which images: bool [B,K]; ``index`` int64 [B] on the CPU."""
        every, found = self.split.lesions(), np.zeros((len(index), len(self.split.classes)), bool)
        for b, position in enumerate(index.tolist()):
            if self._used(position):
                first, last = np.searchsorted(every.position, [position, position + 1]).tolist()
                found[b, every.finding[first:last]] = True
        return torch.from_numpy(found)

    def _used(self, position: int) -> bool:
        if not self.limited:
            return True
        at = int(np.searchsorted(self.used, position))
        return at < len(self.used) and bool(self.used[at] == position)

    def boxes(self, position: int, finding: int) -> list[Box]:
        """The boxes of a finding in an image, x0 y0 x1 y1 in pixels of the stored image; none where the image is not
        used.
        """
        return self.split.lesion_boxes(position, finding) if self._used(position) else []

    def regions(
        self,
        index: torch.Tensor,
        findings: torch.Tensor,
        stored: Sequence[int],
        size: int,
        device: torch.device | str = "cpu",
    ) -> torch.Tensor:
        """The lesions of one finding of each image as bool [B,size,size], empty where there are none.

        Args:
            index, findings: int64 [B] on the CPU, positions in the split and numbers of the task's findings.
            stored: height and width of the stored images.
        """
        boxes = [
            self.boxes(position, finding) for position, finding in zip(index.tolist(), findings.tolist(), strict=True)
        ]
        return boxes_to_mask(boxes, stored, size, device)


def boxes_to_mask(
    boxes: Sequence[Sequence[Box]], stored: Sequence[int], size: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """The boxes of each image of a batch, stored at (height, width), filled: bool [B,size,size]; a pixel that is
    touched counts.

    They travel as numbers and are drawn on the device.
    """
    height, width = stored
    most = max([1, *map(len, boxes)])
    # Left, top, right, bottom, ends exclusive; of an empty box in the padding nothing is drawn
    edges = np.zeros((len(boxes), most, 4), np.int64)
    for b, of_image in enumerate(boxes):
        for k, (x0, y0, x1, y1) in enumerate(of_image):
            edges[b, k] = [
                math.floor(x0 * size / width),
                math.floor(y0 * size / height),
                math.ceil(x1 * size / width),
                math.ceil(y1 * size / height),
            ]
    left, top, right, bottom = upload(torch.from_numpy(edges), torch.device(device)).unsqueeze(3).unbind(2)
    at = torch.arange(size, device=device)
    columns, rows = (at >= left) & (at < right), (at >= top) & (at < bottom)
    return (rows[..., :, None] & columns[..., None, :]).any(1)


def attended_regions(expected: torch.Tensor, lesions: torch.Tensor, how: str) -> torch.Tensor:
    """The regions float [B,S,S] that attention follows by ``--attention.region``: anatomy, annotation or both;
    ``lesions`` is bool [B,S,S].
    """
    if how == "anatomy":
        return expected
    if how == "annotation":
        return lesions.to(expected.dtype)
    return torch.where(lesions.flatten(1).any(1)[:, None, None], lesions.to(expected.dtype), expected)
