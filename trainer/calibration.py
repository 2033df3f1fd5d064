"""Calibration: a probability that says how often it is right. It is fitted on val and never on what is tested.

One finding an image: a temperature (Guo et al., ICML 2017), softmax(z / T). Several: Platt's scaling of each by itself
(Platt 1999, with his targets, which keep few images from being believed too much), sigmoid(a z + b).

Legend: n known cells of a finding; truth bool [n]; probability, score float [n].
"""

import math
from typing import Any

import numpy as np
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit, log_softmax

# By finding [a, b], None where val has images of one kind only; of one finding an image {TEMPERATURE: [T]}
Calibration = dict[str, list[float] | None]

TEMPERATURE = "temperature"
BINS = 15
HOTTEST = 100.0  # and 1 / HOTTEST: between them a temperature is looked for


def temperature(logits: np.ndarray, label: np.ndarray) -> float:
    """T of the least negative log-likelihood; logits float [N,K], label int [N]."""

    def loss(log_t: float) -> float:
        return -float(log_softmax(logits / math.exp(log_t), axis=1)[np.arange(len(label)), label].mean())

    limit = math.log(HOTTEST)
    if (logits.argmax(1) == label).all():  # then the colder the better, without an end
        return max(1.0, math.exp(float(minimize_scalar(loss, bounds=(-limit, limit), method="bounded").x)))
    return math.exp(float(minimize_scalar(loss, bounds=(-limit, limit), method="bounded").x))


def platt(truth: np.ndarray, score: np.ndarray) -> list[float] | None:
    """[a, b], a not negative: the order of the scores stays. None where truth is all alike. ``score``: a logit."""
    present, absent = int(truth.sum()), int((~truth).sum())
    if not present or not absent:
        return None
    goal = np.where(truth, (present + 1) / (present + 2), 1 / (absent + 2))

    def loss(ab: np.ndarray) -> tuple[float, np.ndarray]:
        z = ab[0] * score + ab[1]
        error = expit(z) - goal
        return float((np.logaddexp(0, z) - goal * z).sum()), np.array([(error * score).sum(), error.sum()])

    start = np.array([1.0, math.log((present + 1) / (absent + 1))])
    return [float(v) for v in minimize(loss, start, jac=True, bounds=[(0, None), (None, None)]).x]


def brier(truth: np.ndarray, probability: np.ndarray) -> float:
    """Mean squared error of the probability (Brier 1950)."""
    return float(((probability - truth) ** 2).mean()) if len(truth) else math.nan


def reliability(truth: np.ndarray, probability: np.ndarray) -> list[tuple[float, float, int]]:
    """For each of 15 equal bins of [0,1] that has images: its mean probability, the share that is present, images."""
    which = np.minimum((probability * BINS).astype(int), BINS - 1)
    count = np.bincount(which, minlength=BINS)
    said, is_ = (np.bincount(which, values, BINS) for values in (probability, truth.astype(float)))
    return [(float(said[b] / count[b]), float(is_[b] / count[b]), int(count[b])) for b in np.flatnonzero(count)]


def ece(truth: np.ndarray, probability: np.ndarray) -> float:
    """Expected calibration error (Naeini et al., AAAI 2015): how far the bins of `reliability` are off, by images."""
    bins = reliability(truth, probability)
    return sum(abs(said - is_) * n for said, is_, n in bins) / len(truth) if len(truth) else math.nan


def figures(truth: np.ndarray, probability: np.ndarray, calibrated: np.ndarray | None) -> dict[str, Any]:
    """ece, brier, and, where there is a calibration, the same of calibrated probabilities, and their `reliability`."""
    found: dict[str, Any] = {"ece": ece(truth, probability), "brier": brier(truth, probability)}
    found["reliability"] = reliability(truth, probability)
    if calibrated is not None:
        found |= {"ece_calibrated": ece(truth, calibrated), "brier_calibrated": brier(truth, calibrated)}
        found["reliability_calibrated"] = reliability(truth, calibrated)
    return found
