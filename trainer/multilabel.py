"""Figures of several findings an image, over the cells that are known.

Legend: N images, K findings, n known cells of one of them; probability float [N,K]; target int8 [N,K], 1 present, 0
absent, below 0 unknown. AUROC and AUPRC (average precision) are scikit-learn's; they are NaN where all known cells are
alike, and such findings are left out of means.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from shards.names import lists, same_as
from trainer.intervals import proportion

RESAMPLES = 1000
MANY = 2 * 10**6  # cells
CHEXPERT5 = "chexpert5"


def choose(truth: np.ndarray, score: np.ndarray, how: str) -> float | None:
    """The threshold, a score from which on a finding is said to be there.

    Args:
        truth: bool [n]; score: float [n].
        how: ``youden``: sensitivity + specificity is largest; ``f1``: F1 is; ``sensitivity=S``: the largest with at
            least that sensitivity; ``specificity=S``: the smallest with at least that specificity; ``ppv=P``: the
            smallest of which at least that share of those that are named are right.

    Returns:
        None where truth is all alike, or no score will do.
    """
    if not 0 < truth.sum() < len(truth):
        return None
    if how == "f1":
        precision, recall, thresholds = precision_recall_curve(truth, score)
        f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
        return float(thresholds[np.argmax(f1[:-1])])
    false, true, thresholds = roc_curve(truth, score, drop_intermediate=False)
    kind, _, least = how.partition("=")
    if kind == "ppv":
        right, named = true * truth.sum(), true * truth.sum() + false * (~truth).sum()
        enough = np.flatnonzero((named > 0) & (right >= (float(least) - 1e-12) * named))
        return float(thresholds[enough[-1]]) if len(enough) else None
    if kind == "sensitivity":
        at = int(np.argmax(true >= float(least) - 1e-12))
    elif kind == "specificity":
        at = int(np.flatnonzero(1 - false >= float(least) - 1e-12)[-1])
    else:  # of real scores, however bad the best is; the first threshold is beyond all
        at = 1 + int(np.argmax((true - false)[1:]))
    return float(thresholds[at]) if math.isfinite(thresholds[at]) else None


def at_point(truth: np.ndarray, positive: np.ndarray) -> dict[str, float]:
    """sensitivity, specificity, ppv, npv, f1 of bool [n]; NaN where undefined."""
    tp, fp = float((positive & truth).sum()), float((positive & ~truth).sum())
    fn, tn = float((~positive & truth).sum()), float((~positive & ~truth).sum())

    def ratio(part: float, whole: float) -> float:
        return part / whole if whole else math.nan

    return {
        "sensitivity": ratio(tp, tp + fn),
        "specificity": ratio(tn, tn + fp),
        "ppv": ratio(tp, tp + fp),
        "npv": ratio(tn, tn + fn),
        "f1": ratio(2 * tp, 2 * tp + fp + fn),
    }


AT_POINT = ("sensitivity", "specificity", "ppv", "npv", "f1")


def intervals_at(truth: np.ndarray, named: np.ndarray, groups: np.ndarray | None = None) -> dict[str, list[float]]:
    """95% intervals of sensitivity, specificity, ppv and npv, as ``sensitivity_95``; truth, named bool [n]; groups: the
    patient of each, int64 [n]. A figure over nothing has none.
    """
    over = {"sensitivity": (truth, named), "specificity": (~truth, ~named), "ppv": (named, truth)}
    over["npv"] = (~named, ~truth)
    return {
        f"{name}_95": proportion(hit[among].astype(float), groups[among] if groups is not None else None)
        for name, (among, hit) in over.items()
        if among.any()
    }


@dataclass(frozen=True)
class Cells:
    """Images and findings, with probability and target [N,K]."""

    findings: Sequence[str]
    probability: np.ndarray
    target: np.ndarray

    def of(self, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Truth bool [n] and probability [n] of the known cells of a finding."""
        known = self.target[:, k] >= 0
        return self.target[known, k] == 1, self.probability[known, k]

    def aucs(self) -> list[float]:
        """AUROC of each finding."""
        return [_of_both(roc_auc_score, *self.of(k)) for k in range(len(self.findings))]

    def macro_auc(self) -> float:
        """Mean AUROC over the findings where it is defined; NaN where there is none."""
        return _mean(self.aucs())

    def figures(
        self, points: Mapping[str, float | None], *, groups: np.ndarray | None = None, intervals: bool = False
    ) -> dict[str, Any]:
        """All figures.

        Args:
            points: threshold by finding; without one it has no figures at it.
            groups: int64 [N], patients, for the intervals; None: images.
        """
        names, aucs = self.findings, self.aucs()
        each: dict[str, dict[str, Any]] = {}
        for k, name in enumerate(names):
            truth, score = self.of(k)
            point = points.get(name)
            each[name] = {
                "positive": int(truth.sum()),
                "negative": int((~truth).sum()),
                "unknown": len(self.target) - len(truth),
                "auc": aucs[k],
                "auprc": _of_both(average_precision_score, truth, score),
                "threshold": point,
            } | ({} if point is None else at_point(truth, score >= point))
        defined = [name for name, auc in zip(names, aucs, strict=True) if not math.isnan(auc)]
        at_points = {f: [each[name].get(f, math.nan) for name in defined] for f in AT_POINT}
        figures: dict[str, Any] = {
            "images": len(self.target),
            "cells": int((self.target >= 0).sum()),
            "auc": _mean(aucs),
            "auprc": _mean([each[name]["auprc"] for name in names]),
            "defined": len(defined),
            "per_finding": each,
            "macro": {f: _mean(at) for f, at in at_points.items()},
            "macro_findings": {f: sum(not math.isnan(value) for value in at) for f, at in at_points.items()},
            "micro": self._micro(points),
        }
        five = {same_as(name) for name in lists()[CHEXPERT5]}
        of_five = [auc for name, auc in zip(names, aucs, strict=True) if same_as(name) in five]
        if len(of_five) == len(five):
            figures[CHEXPERT5] = float(np.mean(of_five))  # NaN, too, where one of them is undefined
        if intervals:
            figures["resampled"] = "images" if groups is None else "patients"
            drawn, precise = self._resampled(groups, [self.probability], both=True).swapaxes(0, 1)
            figures |= {"auc_95": _percentiles(_row_means(drawn)), "auprc_95": _percentiles(_row_means(precise))}
            for k, name in enumerate(names):
                each[name] |= {"auc_95": _percentiles(drawn[:, k]), "auprc_95": _percentiles(precise[:, k])}
                if (point := points.get(name)) is not None:
                    known = self.target[:, k] >= 0
                    truth, score = self.of(k)
                    each[name] |= intervals_at(truth, score >= point, groups[known] if groups is not None else None)
        return figures

    def _micro(self, points: Mapping[str, float | None]) -> dict[str, float]:
        """Of all known cells together."""
        known = self.target >= 0
        truth, score = self.target[known] == 1, self.probability[known]
        micro = {name: _of_both(of, truth, score) for name, of in _AREAS.items()}
        limit = np.array([points.get(name) if points.get(name) is not None else math.nan for name in self.findings])
        has_point = known & ~np.isnan(limit)
        if has_point.any():
            micro |= at_point(self.target[has_point] == 1, (self.probability >= limit)[has_point])
        return micro

    def areas(self, groups: np.ndarray | None) -> dict[str, Any]:
        """Mean AUPRC over the findings where it is defined, and its interval over ``groups`` int64 [N], or images."""
        each = [_of_both(average_precision_score, *self.of(k)) for k in range(len(self.findings))]
        drawn = self._resampled(groups, [self.probability], both=True)[:, 1]
        return {"auprc": _mean(each), "auprc_95": _percentiles(_row_means(drawn))}

    def macro_interval(self, groups: np.ndarray | None, other: np.ndarray | None = None) -> list[float]:
        """95% interval of `macro_auc`; with the ``other`` probabilities of the same images, of the difference."""
        scores = [self.probability] if other is None else [self.probability, other]
        drawn = self._resampled(groups, scores)
        means = [_row_means(drawn[:, i]) for i in range(len(scores))]
        return _percentiles(means[0] if other is None else means[0] - means[1])

    def _resampled(self, groups: np.ndarray | None, scores: Sequence[np.ndarray], *, both: bool = False) -> np.ndarray:
        """AUROC [R,scores,K] of each of R = 1000 (of very many cells 200) resamples of the patients, or images (Efron &
        Tibshirani 1993, section 13.3); the same ones for all scores. With ``both`` of one score AUROC and AUPRC.
        """
        resamples = RESAMPLES if self.target.size < MANY else RESAMPLES // 5  # a thousand would take minutes
        who = np.arange(len(self.target)) if groups is None else np.unique(groups, return_inverse=True)[1]
        rng, patients = np.random.default_rng(0), int(who.max()) + 1 if len(who) else 0
        sorted_ = [[Sorted.of(*self._scored(k, score)) for k in range(len(self.findings))] for score in scores]
        drawn = []
        for _ in range(resamples):
            often = np.bincount(rng.integers(0, patients, patients), minlength=patients)[who]
            rows = [[one.auc(often) for one in of_score] for of_score in sorted_]
            drawn.append(rows + ([[one.average_precision(often) for one in sorted_[0]]] if both else []))
        return np.array(drawn)

    def _scored(self, k: int, score: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        known = np.flatnonzero(self.target[:, k] >= 0)
        return known, self.target[known, k] == 1, score[known, k]


@dataclass(frozen=True)
class Sorted:
    """Cells of a finding by their score, for AUROCs in which an image counts several times, or not."""

    image: np.ndarray  # of each cell
    truth: np.ndarray
    ties: np.ndarray  # the first cell of each score

    @classmethod
    def of(cls, image: np.ndarray, truth: np.ndarray, score: np.ndarray) -> "Sorted":
        """Of cells: the image of each, whether it is present, its score."""
        order = np.argsort(score, kind="stable")
        score = score[order]
        ties = np.flatnonzero(np.concatenate([[True], score[1:] != score[:-1]])) if len(score) else np.zeros(0, int)
        return cls(image[order], truth[order], ties)

    def auc(self, often: np.ndarray) -> float:
        """``often`` int [N]: how many times each image counts. NaN where all cells that count are alike."""
        if not len(self.ties):
            return math.nan
        weight = often[self.image].astype(np.int64)
        present, absent = (np.add.reduceat(weight * side, self.ties) for side in (self.truth, ~self.truth))
        whole = float(present.sum()) * float(absent.sum())
        below = np.cumsum(absent) - absent / 2
        return float((present * below).sum() / whole) if whole else math.nan

    def average_precision(self, often: np.ndarray) -> float:
        """AUPRC as `auc` takes it: the mean precision where recall rises."""
        if not len(self.ties):
            return math.nan
        weight = often[self.image].astype(np.int64)
        present, absent = (np.add.reduceat(weight * side, self.ties)[::-1] for side in (self.truth, ~self.truth))
        if not present.any() or not absent.any():
            return math.nan
        right, named = np.cumsum(present), np.cumsum(present + absent)
        return float((present * right / np.maximum(named, 1)).sum() / right[-1])


def _of_both(figure: Any, truth: np.ndarray, score: np.ndarray) -> float:
    """A figure that needs cells of both kinds; else NaN."""
    return float(figure(truth, score)) if 0 < truth.sum() < len(truth) else math.nan


_AREAS = {"auc": roc_auc_score, "auprc": average_precision_score}


def _mean(values: Sequence[float]) -> float:
    """Over those that are defined; NaN where none is."""
    known = [value for value in values if not math.isnan(value)]
    return float(np.mean(known)) if known else math.nan


def _row_means(rows: np.ndarray) -> np.ndarray:
    """`_mean` of each row [R,K]: [R]."""
    known = ~np.isnan(rows)
    return np.where(known.any(1), np.where(known, rows, 0).sum(1) / np.maximum(known.sum(1), 1), math.nan)


def _percentiles(values: np.ndarray) -> list[float]:
    known = values[~np.isnan(values)]
    return [float(v) for v in np.percentile(known, [2.5, 97.5])] if len(known) else [math.nan, math.nan]
