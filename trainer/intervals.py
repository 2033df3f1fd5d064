"""95% intervals of means and shares, over images or over patients."""

import math

import numpy as np


def wilson(share: float, n: float) -> list[float]:
    """95% interval of a proportion seen in ``n`` cases:
    stays in [0, 1] and has a width at 0 and 1 (Wilson, JASA 1927).
    """
    z2 = 1.96**2
    middle, half = share + z2 / (2 * n), 1.96 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n))
    return [max(0.0, (middle - half) / (1 + z2 / n)), min(1.0, (middle + half) / (1 + z2 / n))]


def spread(values: np.ndarray, patients: np.ndarray | None = None) -> float:
    """Standard error of the mean of float [n]; with ``patients``, int [n], the one that is robust to clusters (Cameron
    & Miller, Journal of Human Resources 2015, section II): the deviations of a patient's values count together.
    """
    if patients is None:  # one value says nothing of others
        return float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    whose = np.unique(patients, return_inverse=True)[1]
    together = np.bincount(whose, values - values.mean())
    if len(together) < 2:
        return math.nan  # one patient says nothing of others
    few = len(together) / (len(together) - 1)
    return math.sqrt(few * float((together**2).sum())) / len(values)


def proportion(values: np.ndarray, patients: np.ndarray | None = None) -> list[float]:
    """95% interval of the share of ones among n of zeros and ones: Wilson's, of as many independent values as have the
    `spread` of these.
    """
    share, count = float(values.mean()), float(len(values))
    if patients is not None:
        error, many = spread(values, patients), len(np.unique(patients))
        count = min(count, share * (1 - share) / error**2) if many > 1 and error > 1e-9 else float(many)
    return wilson(share, count)
