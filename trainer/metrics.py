"""Figures: classification, localization, and their intervals.

Legend: N images; logits float [N,K]; labels int [N]; cam float [B,S,S] in [0,1]; region bool [B,S,S].
"""

import math
from typing import Any

import numpy as np
import torch
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support, roc_auc_score, roc_curve

LOCALIZATION = ("energy", "lift", "pointing", "coverage")


def binary_report(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Figures of a task with two classes; class 1 is positive.

    Args:
        logits: [N,2]. labels: [N], 0 or 1.

    Returns:
        accuracy, auc, best_threshold (of the softmax probability, by Youden's index over the ROC curve), and at the predicted
        classes sensitivity, specificity, ppv, fdr, for, youden and dp (discriminant power with the decimal logarithm, Wu et
        al. 2026, appendix; infinite without errors). Undefined ones are NaN.
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


def classification_report(logits: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
    """Accuracy, AUC (macro one-vs-rest beyond two classes), macro averages, per class precision, recall, F1 and support.

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
        "per_class": [{"precision": float(p), "recall": float(r), "f1": float(f), "support": int(n)} for p, r, f, n in zip(*each, strict=True)],
        "confusion": confusion_matrix(truth, predicted, labels=range(classes)).tolist(),
    }
    if classes == 2:
        report["binary"] = binary_report(logits, labels)
    return report


def multiclass_auc(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Area under the ROC curve; beyond two classes the mean over classes, one against the rest. NaN if a class is missing."""
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


def localize(cam: torch.Tensor, region: torch.Tensor, threshold: float) -> torch.Tensor:
    """How a CAM lies to a region, per image: float [B,4], columns `LOCALIZATION`.

    energy: share of the CAM's sum inside the region, 0 for an all-zero CAM (Wang et al. 2020, Score-CAM, section 4.2);
    lift: energy minus the region's share of the image; pointing: 1 where the CAM's peak lies inside (Zhang et al. 2018;
    a CAM without a peak misses); coverage: share of the region with cam > threshold.
    """
    cam, inside = cam.float(), region.float()
    total = cam.sum((1, 2))
    energy = (cam * inside).sum((1, 2)) / total.clamp(min=1e-12)
    peak = cam.flatten(1).argmax(1, keepdim=True)
    pointing = inside.flatten(1).gather(1, peak)[:, 0] * (total > 0)
    coverage = ((cam > threshold) * inside).sum((1, 2)) / inside.sum((1, 2)).clamp(min=1)
    return torch.stack([energy, energy - inside.mean((1, 2)), pointing, coverage], 1)


def summarize(rows: torch.Tensor, names: tuple[str, ...] = LOCALIZATION) -> dict[str, Any] | None:
    """Mean and 95% interval of each column of [n,C]; None for n = 0.

    The interval is Wilson's for ``pointing``, a proportion (Wilson 1927), else the normal approximation of the mean.
    """
    if not len(rows):
        return None
    rows = rows.double()
    half = 1.96 * rows.std(0, correction=1 if len(rows) > 1 else 0) / math.sqrt(len(rows))
    figures: dict[str, Any] = {"images": len(rows)}
    for name, mean, h in zip(names, rows.mean(0).tolist(), half.tolist(), strict=True):
        figures[name] = mean
        figures[f"{name}_95"] = wilson(mean, len(rows)) if name == "pointing" else [mean - h, mean + h]
    return figures


def wilson(share: float, n: int) -> list[float]:
    """95% interval of a proportion seen in ``n`` cases: stays in [0, 1] and has a width at 0 and 1 (Wilson, JASA 1927)."""
    z2 = 1.96**2
    middle, half = share + z2 / (2 * n), 1.96 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return [max(0.0, (middle - half) / (1 + z2 / n)), min(1.0, (middle + half) / (1 + z2 / n))]


def auc_interval(logits: torch.Tensor, labels: torch.Tensor, resamples: int = 1000) -> list[float]:
    """95% interval of `multiclass_auc`: percentiles of a bootstrap within the classes (Efron & Tibshirani 1993, section 13.3)."""
    scores, truth = torch.softmax(logits.double(), 1).numpy(), labels.numpy()
    rng = np.random.default_rng(0)
    members = [np.flatnonzero(truth == k) for k in range(scores.shape[1])]
    if not all(map(len, members)):
        return [math.nan, math.nan]
    areas = []
    for _ in range(resamples):
        drawn = [rng.choice(m, len(m)) for m in members]
        each = []
        for k in range(1 if len(members) == 2 else 0, len(members)):
            others = np.sort(np.concatenate([scores[d, k] for j, d in enumerate(drawn) if j != k]))
            below, upto = (np.searchsorted(others, scores[drawn[k], k], side=side).mean() for side in ("left", "right"))
            each.append((below + upto) / 2 / len(others))
        areas.append(np.mean(each))
    return [float(v) for v in np.percentile(areas, [2.5, 97.5])]


def bootstrap(values: np.ndarray, resamples: int = 1000) -> list[float]:
    """95% interval of a mean: percentiles of a bootstrap over float [n], seeded (Efron & Tibshirani 1993, section 13.3)."""
    rng = np.random.default_rng(0)
    means = [float(rng.choice(values, len(values)).mean()) for _ in range(resamples)]
    return [float(v) for v in np.percentile(means, [2.5, 97.5])]
