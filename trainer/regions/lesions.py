"""Lesion boxes and masks as regions: what a radiologist drew, where it was drawn.

Legend: regions bool [B,S,S] of a batch of B images, S pixels of a side. Where a finding of an image has masks, these
are its lesions, and its boxes are not drawn. A pixel of which any part is lesion is lesion, so that what is thinner
than a pixel does not vanish; the share of it in a cell of a coarser map is that of its area.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from shards.coarse import CUTS
from shards.dataset import Split
from trainer.augment import drawn_grids, unpacked
from trainer.upload import upload

Box = tuple[float, ...]  # x0 y0 x1 y1


class LesionRegions:
    """The lesions of a split, drawn when they are asked for.

    Args:
        share: of the images with lesions; which, ``seed`` decides, and a smaller share is part of a larger one. None:
            all of them, and nobody counts them.
        exact: masks are read with their samples, as figures want them; else they come from the index, a few bytes each,
            as training wants them.
    """

    def __init__(self, split: Split, share: float | None = None, seed: int = 0, *, exact: bool = False) -> None:
        self.split, self.limited, self.exact = split, share is not None, exact
        if share is None:
            return
        position = np.sort(np.concatenate([split.lesions().position, split.lesion_masks().position]), kind="stable")
        marked = position[np.diff(position, prepend=-1) > 0]  # in order; np.unique takes seconds for millions
        self.known = len(marked)  # images with lesions
        self.used = marked  # positions of those that are used
        if share < 1:
            order = np.random.default_rng([seed, len(split)]).permutation(marked)
            self.used = np.sort(order[: math.ceil(share * len(marked) - 1e-9)])

    def has(self, index: torch.Tensor) -> torch.Tensor:
        """Which findings have lesions in which images: bool [B,K]; ``index`` int64 [B] on the CPU."""
        found = np.zeros((len(index), len(self.split.classes)), bool)
        for every in (self.split.lesions(), self.split.lesion_masks()):
            for b, position in enumerate(index.tolist()):
                if self._used(position):
                    found[b, every.finding[_of(every.position, position)]] = True
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

    def masks(self, position: int, finding: int) -> np.ndarray:
        """The masks of a finding in an image, rows of `shards.index.MASK`; none where the image is not used."""
        every = self.split.lesion_masks()
        own = _of(every.position, position) if self._used(position) else slice(0)
        rows: np.ndarray = every.rows[own][every.finding[own] == finding]
        return rows

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
        asked = list(zip(index.tolist(), findings.tolist(), strict=True))
        masks = [self.masks(*one) for one in asked]
        boxes = [[] if len(rows) else self.boxes(*one) for one, rows in zip(asked, masks, strict=True)]
        regions = boxes_to_mask(boxes, stored, size, device)
        if not self.exact:
            return _with_masks(regions, masks, stored, size)
        owners = [b for b, rows in enumerate(masks) if len(rows)]
        if not owners:
            return regions
        return _united(regions, owners, torch.stack([self._exact(*asked[b], size) for b in owners]).to(device))

    def stored(self, position: int, finding: int, stored: tuple[int, int]) -> np.ndarray:
        """The exact lesions of a finding in an image, at the size (height, width) that it is stored at: bool [H,W]."""
        lesion = np.zeros(stored, bool)
        if len(self.masks(position, finding)):
            for runs in self.split.lesion_runs(position, finding):
                lesion |= runs.mask()
            return lesion
        for x0, y0, x1, y1 in self.boxes(position, finding):
            lesion[max(0, math.floor(y0)) : math.ceil(y1), max(0, math.floor(x0)) : math.ceil(x1)] = True
        return lesion

    def _exact(self, position: int, finding: int, size: int) -> torch.Tensor:
        """The masks of a finding in an image as its JSON has them: bool [size,size]."""
        masks = self.split.lesion_runs(position, finding)
        return torch.stack([touched(torch.from_numpy(runs.mask()), size) for runs in masks]).any(0)


class Avoided:
    """Where a map shall not lie: boxes and masks of devices, or of whatever else is no finding.

    Args:
        names: as the samples call them.
    """

    def __init__(self, split: Split, names: Sequence[str]) -> None:
        self.boxes, self.masks = split.marks(names)
        self.images = len(np.unique(np.concatenate([self.boxes.position, self.masks.position])))

    def regions(
        self, index: torch.Tensor, stored: Sequence[int], size: int, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """All of it in each image: bool [B,size,size]; ``index`` int64 [B] on the CPU, ``stored`` (height, width)."""
        positions = index.tolist()
        boxes = [list(map(tuple, self.boxes.xyxy[_of(self.boxes.position, p)].tolist())) for p in positions]
        masks = [self.masks.rows[_of(self.masks.position, p)] for p in positions]
        return _with_masks(boxes_to_mask(boxes, stored, size, device), masks, stored, size)


def _with_masks(regions: torch.Tensor, masks: Sequence[np.ndarray], stored: Sequence[int], size: int) -> torch.Tensor:
    """Regions bool [B,S,S] and the masks of each image, rows of `shards.index.MASK`."""
    owners = [b for b, rows in enumerate(masks) for _ in rows]
    if not owners:
        return regions
    return _united(regions, owners, masks_to_regions(np.concatenate(masks), stored, size, regions.device))


def _united(regions: torch.Tensor, owners: Sequence[int], drawn: torch.Tensor) -> torch.Tensor:
    """Regions bool [B,S,S] and what is drawn bool [M,S,S] of the images ``owners``."""
    found = torch.zeros_like(regions, dtype=torch.int32)
    return regions | (found.index_add_(0, upload(torch.tensor(owners), regions.device), drawn.int()) > 0)


def _of(positions: np.ndarray, position: int) -> slice:
    """The lesions of an image among sorted positions."""
    return slice(*np.searchsorted(positions, [position, position + 1]).tolist())


def touched(mask: torch.Tensor, size: int) -> torch.Tensor:
    """A mask bool [H,W] as bool [size,size]: a pixel of which any part is lesion, is."""
    return F.adaptive_max_pool2d(mask[None].float(), size)[0] > 0


def masks_to_regions(
    rows: np.ndarray, stored: Sequence[int], size: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Masks of images stored at (height, width), rows [M] of `shards.index.MASK`: bool [M,size,size].

    They travel as few bytes and are drawn on the device.
    """
    device = torch.device(device)
    scale = torch.tensor([size / stored[1], size / stored[0]], dtype=torch.float32).repeat(2)
    boxes = upload(torch.from_numpy(rows["xyxy"].astype(np.float32)) * scale, device)
    cells = unpacked(upload(torch.from_numpy(np.ascontiguousarray(rows["cells"])), device))
    cuts = upload(torch.from_numpy(rows["cut"].astype(np.float32) / CUTS), device)
    return drawn_grids(cells, boxes, (size, size), cuts)


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
