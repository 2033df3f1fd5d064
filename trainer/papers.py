"""What papers print of maps against lesions: hits and overlap at the size of the image, and boxes.

Legend: P pairs of an image and a finding whose lesions are known; map float [H,W], not negative; truth bool [H,W], the
lesion; boxes x0 y0 x1 y1, ends exclusive, in shares of the image's sides.

- ``hit``, ``iou_otsu``: CheXlocalize (Saporta et al., Nature Machine Intelligence 2022): the map is resampled to the
  image's size; whether its peak lies in the lesion, with no tolerance; intersection over union with it above Otsu's
  threshold.
- ``pointing``: the same of what the map points to, finer than its cells (`metrics.pointed`).
- T(IoU), T(IoBB): Wang et al. (CVPR 2017, "ChestX-ray8"): the share of pairs in which the box that is drawn around the
  map overlaps a lesion's box by so much, in shares of their union (IoU) or of the drawn box (IoBB). The drawn box is
  the rectangle around the largest connected part of the map above a threshold, which val chooses.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from scipy import ndimage
from torch.nn import functional as F

from shards.dataset import Split
from shards.truth import LesionMasks, Lesions
from trainer.metrics import GRAYS, THRESHOLDS, otsu, peaks, pointed_pixels, summarize
from trainer.regions.lesions import LesionRegions

T_IOU = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
T_IOBB = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
# Columns of `against`; then IoU and IoBB of the box at each of `THRESHOLDS`
NAMES = ("energy", "hit", "pointing", "iou_otsu")
COLUMNS = len(NAMES) + 2 * len(THRESHOLDS)
SIDE = 128  # pixels of a side of the mean lesion map


def against(raw: torch.Tensor, truth: np.ndarray, boxes: Sequence[Sequence[float]]) -> torch.Tensor:
    """Figures of one map [h,w], as the model gives it, against a lesion and its boxes: float64 [34]."""
    height, width = truth.shape
    full = F.interpolate(raw[None, None].float(), (height, width), mode="bilinear", align_corners=False)[0, 0]
    low, high = full.min(), full.max()
    if high <= 0 or high <= low:  # no map, or one that is the same everywhere: it says nothing
        return torch.cat([torch.tensor([torch.nan if high <= 0 else truth.mean()]), torch.zeros(COLUMNS - 1)]).double()
    inside = torch.from_numpy(truth)
    gray = ((full - low) / (high - low) * (GRAYS - 1)).long()
    histogram = torch.bincount(gray.flatten(), minlength=GRAYS)[None]
    hot = gray >= otsu(histogram)[0]
    figures = [
        float((full * inside).sum() / full.sum()),
        float(inside.flatten()[peaks(full[None])[0]]),
        float(inside.flatten()[pointed_pixels(raw[None], truth.shape)[0]]),
        float((hot & inside).sum() / (hot | inside).sum().clamp(min=1)),
    ]
    of_boxes = _overlaps(((full - low) / (high - low)).numpy(), boxes)
    return torch.cat([torch.tensor(figures, dtype=torch.float64), torch.from_numpy(of_boxes).flatten()])


def _overlaps(cam: np.ndarray, boxes: Sequence[Sequence[float]]) -> np.ndarray:
    """IoU and IoBB of the drawn box of a map [H,W] in [0,1] with the lesion's box that it overlaps most: float [2,15],
    by threshold.
    """
    found = np.zeros((2, len(THRESHOLDS)))
    for k, threshold in enumerate(THRESHOLDS):
        drawn = largest_box(cam >= threshold)
        if drawn is not None:
            both = [overlap(drawn, box) for box in boxes]
            found[:, k] = max(iou for iou, _ in both), max(iobb for _, iobb in both)
    return found


def largest_box(hot: np.ndarray) -> tuple[float, float, float, float] | None:
    """The rectangle around the largest connected part (corners connect) of bool [H,W], in shares of its sides; None
    where there is nothing.
    """
    parts, count = ndimage.label(hot, np.ones((3, 3)))
    if not count:
        return None
    largest = int(np.bincount(parts.ravel())[1:].argmax())
    rows, columns = ndimage.find_objects(parts)[largest]
    height, width = hot.shape
    return columns.start / width, rows.start / height, columns.stop / width, rows.stop / height


def overlap(drawn: Sequence[float], box: Sequence[float]) -> tuple[float, float]:
    """Intersection over union, and over the drawn box."""
    sides = [max(0.0, min(drawn[k + 2], box[k + 2]) - max(drawn[k], box[k])) for k in (0, 1)]
    areas = [(b[2] - b[0]) * (b[3] - b[1]) for b in (drawn, box)]
    shared = sides[0] * sides[1]
    return shared / max(sum(areas) - shared, 1e-12), shared / max(areas[0], 1e-12)


def box_threshold(rows: torch.Tensor) -> int | None:
    """Which of `THRESHOLDS` has the largest mean IoU of boxes over rows [n,34] of `against`; None for n = 0."""
    start = len(NAMES)
    return int(rows[:, start : start + len(THRESHOLDS)].mean(0).argmax()) if len(rows) else None


def figures(rows: torch.Tensor, threshold: int | None, patients: np.ndarray | None = None) -> dict[str, Any] | None:
    """Means of rows [n,34] of `against` with their 95% intervals, over ``patients``, int [n], where they are known;
    t_iou, t_iobb at ``threshold``. None for n = 0.
    """
    if not len(rows):
        return None
    found = summarize(rows[:, : len(NAMES)], NAMES, patients)
    assert found is not None
    found["miou"], found["miou_95"] = found.pop("iou_otsu"), found.pop("iou_otsu_95")
    if threshold is not None:
        start = len(NAMES) + threshold
        for name, column, steps in (("t_iou", start, T_IOU), ("t_iobb", start + len(THRESHOLDS), T_IOBB)):
            found[name] = {str(t): float((rows[:, column] >= t - 1e-9).double().mean()) for t in steps}
    return found


def truth_of(
    lesions: LesionRegions, position: int, finding: int, stored: tuple[int, int]
) -> tuple[np.ndarray, list[list[float]]]:
    """The lesion of a finding in an image, at the size (height, width) that it is stored at, and its boxes, in shares:
    those that are known, else the rectangles around its masks.
    """
    height, width = stored
    truth = lesions.stored(position, finding, (height, width))
    boxes = [list(box) for box in lesions.boxes(position, finding)]
    boxes = boxes or lesions.masks(position, finding)["xyxy"].astype(float).tolist()
    return truth, [[x0 / width, y0 / height, x1 / width, y1 / height] for x0, y0, x1, y1 in boxes]


class Floor:
    """What knows where lesions of a finding lie in other images, and of this one nothing: the map of their mean, whose
    peak is the one point that most of them hold.
    """

    def __init__(self, split: Split, finding: int) -> None:
        lesions = LesionRegions(split)
        every: list[Lesions | LesionMasks] = [split.lesions(), split.lesion_masks()]
        positions = np.unique(np.concatenate([e.position[e.finding == finding] for e in every]))
        self.split, self.images = split.split, len(positions)
        total = torch.zeros(SIDE, SIDE)
        for position in positions.tolist():
            stored = split.image(position).shape
            total += lesions.regions(torch.tensor([position]), torch.tensor([finding]), stored, SIDE)[0]
        self.map = total / max(1, self.images)


def known_pairs(split: Split, pairs: Any) -> np.ndarray:
    """Which of the pairs of a split have lesions that are known: their numbers, int64 [n]."""
    wanted = set()
    for every in (split.lesions(), split.lesion_masks()):
        wanted |= set(zip(every.position.tolist(), every.finding.tolist(), strict=True))
    return np.array(
        [i for i, pair in enumerate(zip(pairs.image.tolist(), pairs.finding.tolist(), strict=True)) if pair in wanted],
        np.int64,
    )


def by_finding(
    rows: Mapping[str, torch.Tensor],
    finding: np.ndarray,
    named: np.ndarray,
    names: Sequence[str],
    threshold: Mapping[str, int | None],
    patients: np.ndarray | None = None,
) -> dict[str, dict[str, Any]]:
    """Figures of all pairs, and of each finding, of several kinds of maps.

    Args:
        rows: by kind (model, constant, region, random) [n,34] of `against`, NaN where there is no such map.
        finding: int64 [n]; named: bool [n], whether the model says that the finding is there.
        names: of the findings.
        threshold: of boxes, by kind.
        patients: int [n], where they are known.
    """

    def of_some(table: torch.Tensor, which: np.ndarray, kind: str) -> dict[str, Any] | None:
        whose = None if patients is None else patients[which]
        return figures(table[torch.from_numpy(which)], threshold.get(kind), whose)

    content: dict[str, dict[str, Any]] = {}
    for name, of in (("all", np.ones(len(finding), bool)), *((n, finding == k) for k, n in enumerate(names))):
        if not of.any():
            continue
        entry: dict[str, Any] = {"images": int(of.sum())}
        for kind, table in rows.items():
            entry[kind] = of_some(table, of & ~table[:, NAMES.index("hit")].isnan().numpy(), kind)
        entry["true_positives"] = of_some(rows["model"], of & named, "model")
        content[name] = entry
    return content
