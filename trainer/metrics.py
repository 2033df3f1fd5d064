"""Figures: classification, localization, and their intervals.

Legend: N images; logits float [N,K]; labels int [N]; cam float [B,S,S] in [0,1]; region bool [B,S,S].
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy import stats
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, roc_auc_score, roc_curve
from torch.nn import functional as F

from trainer.intervals import proportion, spread
from trainer.multilabel import Sorted

LOCALIZATION = ("energy", "lift", "pointing", "pointing_near", "coverage", "iou_otsu")
THRESHOLDS = tuple(k / 16 for k in range(1, 16))  # at which IoU is measured, so that validation can choose one
NEAR = 15 / 224  # tolerance of pointing_near, in shares of the image's side
GRAYS = 256


def binary_report(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Figures of a task with two classes; class 1 is positive.

    Args:
        logits: [N,2]. labels: [N], 0 or 1.

    Returns:
        accuracy, auc, best_threshold (of the softmax probability, by Youden's index over the ROC curve), and at the
        predicted classes sensitivity, specificity, ppv, fdr, for, youden and dp (discriminant power with the decimal
        logarithm, Wu et al. 2026, appendix; infinite without errors). Undefined ones are NaN.
    """
    logits, labels = torch.as_tensor(logits), torch.as_tensor(labels)
    scores = torch.softmax(logits.double(), 1)[:, 1].numpy()
    truth = labels.numpy()
    (tn, fp), (fn, tp) = confusion_matrix(truth, logits.argmax(1).numpy(), labels=[0, 1]).astype(float)
    sensitivity, specificity = _ratio(tp, tp + fn), _ratio(tn, tn + fp)
    auc, threshold = math.nan, math.nan
    if 0 < truth.sum() < len(truth):
        auc = float(roc_auc_score(truth, scores))
        fpr, tpr, thresholds = roc_curve(truth, scores)
        threshold = float(thresholds[np.argmax(tpr - fpr)])
    return {
        "accuracy": _ratio(tp + tn, len(truth)),
        "auc": auc,
        "best_threshold": threshold,
        "sensitivity": sensitivity,
        "specificity": specificity,
        "ppv": _ratio(tp, tp + fp),
        "fdr": _ratio(fp, tp + fp),
        "for": _ratio(fn, tn + fn),
        "youden": sensitivity + specificity - 1,
        "dp": math.sqrt(3) / math.pi * (_log_odds(sensitivity) + _log_odds(specificity)),
    }


def at_threshold(logits: torch.Tensor, labels: torch.Tensor, threshold: float) -> dict[str, Any]:
    """Sensitivity, specificity, ppv, npv, youden, accuracy of two classes where class 1 is predicted from a probability
    of ``threshold`` on.
    """
    positive, truth = torch.softmax(logits.double(), 1)[:, 1] >= threshold, labels == 1
    tp, fp = float((positive & truth).sum()), float((positive & ~truth).sum())
    fn, tn = float((~positive & truth).sum()), float((~positive & ~truth).sum())
    sensitivity, specificity = _ratio(tp, tp + fn), _ratio(tn, tn + fp)
    figures = {
        "sensitivity": sensitivity,
        "specificity": specificity,
        "ppv": _ratio(tp, tp + fp),
        "npv": _ratio(tn, tn + fn),
    }
    return {
        "threshold": threshold,
        **figures,
        "youden": sensitivity + specificity - 1,
        "accuracy": _ratio(tp + tn, len(labels)),
    }


def classification_report(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """Accuracy, AUC (macro one-vs-rest beyond two classes), macro averages, per class precision, recall, F1 and
    support.

    With two classes also everything of `binary_report`, under ``binary``.
    """
    classes = logits.shape[1]
    truth, predicted = labels.numpy(), logits.argmax(1).numpy()
    each = precision_recall_fscore_support(truth, predicted, labels=range(classes), zero_division=0.0)
    macro = [float(np.mean(column)) for column in each[:3]]
    report: dict[str, Any] = {
        "images": len(truth),
        "accuracy": float((truth == predicted).mean()),
        "auc": multiclass_auc(logits, labels),
        "loss": float(torch.nn.functional.cross_entropy(logits.double(), labels)),
        "macro_precision": macro[0],
        "macro_recall": macro[1],
        "macro_f1": macro[2],
        "per_class": [
            {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)}
            for p, r, f, n in zip(*each, strict=True)
        ],
        "confusion": confusion_matrix(truth, predicted, labels=range(classes)).tolist(),
    }
    if classes == 2:
        report["binary"] = binary_report(logits, labels)
    return report


def multiclass_auc(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Area under the ROC curve; beyond two classes the mean over classes, one against the rest. NaN if a class is
    missing.
    """
    scores, truth = torch.softmax(logits.double(), 1).numpy(), labels.numpy()
    areas = []
    for k in range(1 if scores.shape[1] == 2 else 0, scores.shape[1]):
        if not 0 < (truth == k).sum() < len(truth):
            return math.nan
        areas.append(roc_auc_score(truth == k, scores[:, k]))
    return float(np.mean(areas))


def _ratio(part: float, whole: float) -> float:
    return float(part) / float(whole) if whole else math.nan


def _log_odds(p: float) -> float:
    """Decimal logarithm of p / (1 - p): infinite at 0 and 1, NaN for NaN."""
    if p in (0.0, 1.0):
        return math.copysign(math.inf, p - 0.5)
    return math.log10(p / (1 - p))


def localize(
    cam: torch.Tensor, region: torch.Tensor, threshold: float, raw: torch.Tensor | None = None
) -> torch.Tensor:
    """How a CAM lies to a region, per image: float [B,6 + 15], columns `LOCALIZATION`, then the IoU at each of
    `THRESHOLDS`.

    energy: share of the CAM's sum inside the region, 0 for an all-zero CAM (Wang et al. 2020, Score-CAM, section 4.2);
    lift: energy minus the region's share of the image; pointing: 1 where what the CAM points to (`pointed`) lies inside
    (Zhang et al. 2018; a CAM without a peak misses); pointing_near: 1 where it lies within 15/224 of the image's side
    of the region, the 15 pixels of Zhang et al. 2018, section 4.1; coverage: share of the region with cam > threshold;
    iou_otsu: intersection over union of the region and the CAM above its own Otsu threshold. A CAM is cut into 256
    grays for Otsu and IoU.

    Args:
        cam: [B,S,S] in [0,1]; region: bool [B,S,S].
        raw: the CAM before it was drawn at that size, [B,h,w]; None: ``cam`` itself.
    """
    cam, inside = cam.float(), region.float()
    size = cam.shape[-1]
    total = cam.sum((1, 2))
    alive = total > 0
    energy = (cam * inside).sum((1, 2)) / total.clamp(min=1e-12)
    peak = pointed_pixels(cam if raw is None else raw, (size, size))[:, None]
    pointing = inside.flatten(1).gather(1, peak)[:, 0] * alive
    at = torch.arange(size, device=cam.device)
    away = (at[None, :, None] - peak[:, :, None] // size).square() + (
        at[None, None, :] - peak[:, :, None] % size
    ).square()
    near = ((away <= (NEAR * size) ** 2) & region).flatten(1).any(1) * alive
    coverage = ((cam > threshold) * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)

    # Histograms of the CAM, whole and inside the region, give every threshold at once.
    gray = (cam * GRAYS).long().clamp(0, GRAYS - 1).flatten(1)
    histogram = torch.zeros(len(cam), GRAYS, device=cam.device).scatter_add_(
        1, gray, torch.ones_like(gray, dtype=torch.float32)
    )
    within = torch.zeros(len(cam), GRAYS, device=cam.device).scatter_add_(1, gray, inside.flatten(1))
    hot, hot_within = (h.flip(1).cumsum(1).flip(1) for h in (histogram, within))  # pixels of this gray or brighter
    iou = hot_within / (hot + inside.sum((1, 2))[:, None] - hot_within).clamp(min=1) * alive[:, None]
    chosen = torch.tensor([round(t * GRAYS) for t in THRESHOLDS], device=cam.device)
    best = iou.gather(1, otsu(histogram)[:, None])[:, 0]
    return torch.cat(
        [torch.stack([energy, energy - inside.mean((1, 2)), pointing, near, coverage, best], 1), iou[:, chosen]], 1
    )


def pointed(cams: torch.Tensor) -> torch.Tensor:
    """Where maps [B,h,w], not negative, before they are drawn large, point to: the centre of mass of the largest
    cell and its eight neighbours, less the map's minimum; in shares of height and width, float [B,2].

    What is interpolated is largest in the middle of a cell, a seventh of the image wide, though the cells beside it say
    on which side the most lies. Heat maps of joints are read finer than their cells, too (Zhang et al., CVPR 2020).
    """
    height, width = cams.shape[1:]
    cams, at = cams.double() if cams.dtype == torch.float64 else cams.float(), peaks(cams)
    mass = cams - cams.amin((1, 2), keepdim=True)
    mass = F.pad(mass / mass.amax((1, 2), keepdim=True).clamp(min=1e-30), (1, 1, 1, 1))
    row, column = at // width, at % width
    step = torch.arange(-1, 2, device=cams.device)
    each = torch.arange(len(cams), device=cams.device)[:, None, None]
    window = mass[each, (row[:, None] + step + 1)[:, :, None], (column[:, None] + step + 1)[:, None]]
    total = window.sum((1, 2)).clamp(min=1e-30)
    down, right = (window.sum(2) * step).sum(1) / total, (window.sum(1) * step).sum(1) / total
    return torch.stack([(row + 0.5 + down) / height, (column + 0.5 + right) / width], 1)


def pointed_pixels(cams: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """What maps [B,h,w] point to in images of that height and width, as an index into H x W: int64 [B]; 0 for NaN."""
    most = torch.tensor(size, device=cams.device) - 1
    at = pointed(cams)
    row, column = torch.minimum((at * (most + 1)).nan_to_num().long(), most).unbind(1)
    return row * size[1] + column


def peaks(cams: torch.Tensor) -> torch.Tensor:
    """Where maps [B,H,W] are largest, as an index into H x W: int64 [B]. Of several places, as a coarse map that was
    interpolated has them at its rim, the one that is nearest to their middle.
    """
    top = cams == cams.amax((1, 2), keepdim=True)
    rows, columns = (torch.arange(n, device=cams.device, dtype=torch.float32) for n in cams.shape[1:])
    many = top.sum((1, 2))
    y, x = (top.sum(2) * rows).sum(1) / many, (top.sum(1) * columns).sum(1) / many
    away = (rows[None, :, None] - y[:, None, None]).square() + (columns[None, None] - x[:, None, None]).square()
    return torch.where(top, away, torch.inf).flatten(1).argmin(1)


def otsu(histogram: torch.Tensor) -> torch.Tensor:
    """The gray from which on a histogram [B,G] is foreground, so that the variance between the classes is largest:
    int64 [B].

    Otsu, IEEE Trans. SMC 1979, eq. 18.
    """
    share = histogram.double() / histogram.double().sum(1, keepdim=True).clamp(min=1)
    grays = torch.arange(histogram.shape[1], device=histogram.device, dtype=share.dtype)
    below, mean = share.cumsum(1), (share * grays).cumsum(1)
    apart = (mean[:, -1:] * below - mean).square() / (below * (1 - below)).clamp(min=1e-12)
    return apart[:, :-1].argmax(1) + 1


def summarize(
    rows: torch.Tensor, names: tuple[str, ...] = LOCALIZATION, patients: np.ndarray | None = None
) -> dict[str, Any] | None:
    """Mean and 95% interval of each column of [n,C] over its figures that are not NaN; None for n = 0.

    The interval is Wilson's for pointing, a proportion (Wilson 1927), else the normal approximation of the mean, cut at
    what the figure can be. With ``patients``, int [n], whose rows these are, rows of one patient are no independent
    ones: see `spread`. ``without_map``: images whose CAM is zero everywhere, which have no energy.
    """
    if not len(rows):
        return None
    figures: dict[str, Any] = {"images": len(rows)}
    for name, column in zip(names, rows.double().unbind(1), strict=True):
        there = ~column.isnan()
        known = column[there].numpy()
        whose = patients[there.numpy()] if patients is not None else None
        mean = float(known.mean()) if len(known) else math.nan
        figures[name] = mean
        if not len(known):
            figures[f"{name}_95"] = [math.nan, math.nan]
        elif name.startswith("pointing") or name == "hit":
            figures[f"{name}_95"] = proportion(known, whose)
        else:
            low, half = -1.0 if name in ("lift", "similarity") else 0.0, 1.96 * spread(known, whose)
            cut = [max(low, mean - half), min(1.0, mean + half)]
            figures[f"{name}_95"] = [math.nan, math.nan] if math.isnan(half) else cut
        if name == "energy":
            figures["without_map"] = len(rows) - len(known)
    return figures


def without_dead(rows: torch.Tensor, cam: torch.Tensor) -> torch.Tensor:
    """Rows [B,6 + 15] of `localize` in which a CAM [B,S,S] that is zero everywhere has neither energy nor lift (NaN):
    it lies nowhere.
    """
    dead = (cam.flatten(1) == 0).all(1)
    about_energy = torch.tensor(
        [name in ("energy", "lift") for name in LOCALIZATION] + [False] * len(THRESHOLDS), device=rows.device
    )
    return torch.where(dead[:, None] & about_energy, torch.nan, rows)


def measured(rows: torch.Tensor) -> torch.Tensor:
    """Which rows [n,6 + 15] of a table of `localize` have a ground truth: bool [n]. (Their energy may be unknown all
    the same.)
    """
    return ~rows[:, LOCALIZATION.index("pointing")].isnan()


def best_threshold(rows: torch.Tensor) -> int | None:
    """Which of `THRESHOLDS` has the largest mean IoU over the rows [n,6 + 15] of `localize`; None for n = 0."""
    return int(rows[:, len(LOCALIZATION) :].mean(0).argmax()) if len(rows) else None


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Spearman's rank correlation of maps [B,h,w], per image: float [B]; 0 where one of them is constant."""

    def ranks(maps: torch.Tensor) -> torch.Tensor:
        flat = maps.flatten(1).float()
        below = (flat[:, None, :] < flat[:, :, None]).sum(2)
        ties = (flat[:, None, :] == flat[:, :, None]).sum(2)
        r = below + (ties - 1) / 2
        return r - r.mean(1, keepdim=True)

    x, y = ranks(a), ranks(b)
    return (x * y).sum(1) / (x.norm(dim=1) * y.norm(dim=1)).clamp(min=1e-12)


def auc_interval(
    logits: torch.Tensor,
    labels: torch.Tensor,
    other: torch.Tensor | None = None,
    resamples: int = 1000,
    patients: np.ndarray | None = None,
) -> list[float]:
    """95% interval of `multiclass_auc`: percentiles of a bootstrap within the classes (Efron & Tibshirani 1993, section
    13.3), or, with ``patients``, int [N], of them: all images of one are drawn together.

    With ``other``, logits of the same images: the interval of the difference, ``logits`` minus ``other``, paired by
    image.
    """
    scores = [torch.softmax(x.double(), 1).numpy() for x in (logits, other) if x is not None]
    truth, rng = labels.numpy(), np.random.default_rng(0)
    if patients is not None:
        return _over_patients(scores, truth, patients, resamples)
    members = [np.flatnonzero(truth == k) for k in range(logits.shape[1])]
    if not all(map(len, members)):
        return [math.nan, math.nan]
    areas = []
    for _ in range(resamples):
        drawn = [rng.choice(m, len(m)) for m in members]
        both = [_drawn_auc(s, drawn) for s in scores]
        areas.append(both[0] - both[1] if other is not None else both[0])
    return [float(v) for v in np.percentile(areas, [2.5, 97.5])]


def _over_patients(scores: list[np.ndarray], truth: np.ndarray, patients: np.ndarray, resamples: int) -> list[float]:
    """`auc_interval` of patients; resamples that lack a class are left out."""
    whose, rng = np.unique(patients, return_inverse=True)[1], np.random.default_rng(0)
    many, everyone = int(whose.max()) + 1, np.arange(len(truth))
    classes = range(1 if scores[0].shape[1] == 2 else 0, scores[0].shape[1])
    cells = [[Sorted.of(everyone, truth == k, score[:, k]) for k in classes] for score in scores]
    areas = []
    for _ in range(resamples):
        often = np.bincount(rng.integers(0, many, many), minlength=many)[whose]
        both = [float(np.mean([cell.auc(often) for cell in of])) for of in cells]
        areas.append(both[0] - both[1] if len(both) > 1 else both[0])
    known = [area for area in areas if not math.isnan(area)]
    return [float(v) for v in np.percentile(known, [2.5, 97.5])] if known else [math.nan, math.nan]


def _drawn_auc(scores: np.ndarray, drawn: list[np.ndarray]) -> float:
    each = []
    for k in range(1 if len(drawn) == 2 else 0, len(drawn)):
        others = np.sort(np.concatenate([scores[d, k] for j, d in enumerate(drawn) if j != k]))
        below, upto = (np.searchsorted(others, scores[drawn[k], k], side=side).mean() for side in ("left", "right"))
        each.append((below + upto) / 2 / len(others))
    return float(np.mean(each))


def bootstrap(values: np.ndarray, resamples: int = 1000) -> list[float]:
    """95% interval of the mean of float [n]: percentiles of a bootstrap, seeded (Efron & Tibshirani 1993, section
    13.3).
    """
    if len(values) == 1:
        return [float(values[0])] * 2
    at_once = max(1, 10**7 // len(values))  # resamples: what fits into 80 MB
    options = {"n_resamples": resamples, "method": "percentile", "batch": at_once, "rng": 0}
    return [float(v) for v in stats.bootstrap((values,), np.mean, **options).confidence_interval]
