"""Figures by a column of the samples, such as whether a drain is seen: what an average hides.

A shortcut shows where the images with a finding are split by it and compared with the same images without the finding:
pneumothorax is found where there is a chest drain, and missed where there is none (Oakden-Rayner et al., CHIL 2020,
"Hidden stratification").
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score

from shards.dataset import Split
from shards.errors import InputError, nearest
from shards.sample import NO_FINDING
from shards.targets import ABSENT, PRESENT
from trainer.calibration import ece
from trainer.intervals import proportion
from trainer.metrics import LOCALIZATION, measured, summarize
from trainer.multilabel import RESAMPLES, Cells, Sorted
from trainer.outcome import Outcome
from trainer.task import Point

MOST = 12  # different values of a column; more are no groups
UNKNOWN = "(empty)"
AGE, BANDS = "age", (40, 60, 80)  # years at which bands of the column age begin
FEW = 5  # images with, and without, below which an AUC has no interval
RATES = ("sensitivity", "false_positive_rate")


def values_of(split: Split, column: str) -> list[str]:
    """What each image has in a column of its sample; of ages their band. InputError: none has it, or too many different
    ones.
    """
    metas = [split.meta(p) for p in range(len(split))]
    if not any(column in meta for meta in metas):
        known = _columns(metas[0]) if metas else []
        raise InputError(
            f"--by {column}: the {split.split} images have no such column; {nearest(column, known)} (shards csv "
            "--keep-column keeps columns of a table)"
        )
    found = [str(meta.get(column, "")).strip() or UNKNOWN for meta in metas]
    if column == AGE:
        found = [band(value) for value in found]
    if len(set(found)) > MOST:
        raise InputError(f"--by {column}: has {len(set(found))} different values; expected at most {MOST} groups")
    return found


def _columns(meta: Mapping[str, Any]) -> list[str]:
    """What of a sample may be a column of a table."""
    return [name for name, value in meta.items() if isinstance(value, str | int | float)]


def band(age: str) -> str:
    """``0-39``, ``40-59``, ``60-79``, ``80+``; what is no age stays as it is."""
    try:
        years = float(age)
    except ValueError:
        return age
    if not math.isfinite(years):
        return age
    low = max((edge for edge in (0, *BANDS) if edge <= years), default=0)
    return next((f"{low}-{edge - 1}" for edge in BANDS if years < edge), f"{low}+")


def by_column(outcome: Outcome, column: str, point: Point = None) -> dict[str, dict[str, Any]]:
    """For each value of a column and each finding: its images with the finding; AUC of these against all images without
    it, wherever these are, and against those of the same value; AUPRC and expected calibration error among those of the
    value; sensitivity and false-positive rate at the ``point`` that the run applies; energy and pointing of their maps
    at lesions and expected regions. AUC and rates have 95% intervals over patients, or images where patients are not
    known.
    """
    values, target = np.array(values_of(outcome.split, column)), outcome.target.numpy()
    score = outcome.task.probabilities(outcome.logits).numpy()
    image, finding = outcome.pairs.image.numpy(), outcome.pairs.finding.numpy()
    patients = outcome.patients()
    drawn, limits = resamples(patients, len(values)), limits_of(outcome.task.findings, point)
    content: dict[str, dict[str, Any]] = {}
    for value in sorted(set(values)):
        own = values == value
        of: dict[str, Any] = {}
        for k, name in enumerate(outcome.task.findings):
            present, absent = own & (target[:, k] == PRESENT), target[:, k] == ABSENT
            if name == NO_FINDING or not present.any():
                continue
            entry: dict[str, Any] = {"present": int(present.sum()), "absent": int((absent & own).sum())}
            for figure, others in (("auc", absent), ("auc_within", absent & own)):
                taken = np.flatnonzero(present | others)
                cells = Sorted.of(taken, present[taken], score[taken, k])
                area = cells.auc(np.ones(len(values), int))
                entry[figure] = area
                few = min(present.sum(), others.sum()) < FEW  # of one image resamples are all alike, which says nothing
                between = [cells.auc(often) for often in drawn] if not (few or math.isnan(area)) else []
                entry[f"{figure}_95"] = list(map(float, np.nanpercentile(between, [2.5, 97.5]))) if between else None
            inside = own & (target[:, k] >= ABSENT)
            alike = not (absent & own).any()
            truth = present[inside]
            entry["auprc"] = math.nan if alike else float(average_precision_score(truth, score[inside, k]))
            entry["ece"] = ece(truth, score[inside, k])
            if (limit := limits.get(name)) is not None:
                named = score[:, k] >= limit
                for rate, of_whom in zip(RATES, (present, absent & own), strict=True):
                    entry[rate], entry[f"{rate}_95"] = _rate(named, of_whom, patients)
            pairs = own[image] & (finding == k)
            for kind, table in outcome.tables().items():
                rows = pairs & measured(table).numpy()
                whose = patients[image[rows]] if patients is not None else None
                if found := summarize(table[rows][:, : len(LOCALIZATION)], patients=whose):
                    entry[kind] = {n: found[n] for n in ("images", "energy", "energy_95", "pointing", "pointing_95")}
            of[name] = entry
        content[value] = {"images": int(own.sum()), "per_finding": of}
    return content


def gaps(groups: dict[str, dict[str, Any]], figure: str = "auc_within") -> dict[str, dict[str, Any]]:
    """Of each finding that two values of a column have the figure of: how far the best is from the worst, and which
    these are.
    """
    of: dict[str, dict[str, float]] = {}
    for value, group in groups.items():
        for name, entry in group["per_finding"].items():
            area = entry.get(figure)  # None: read from a report.json
            if value != UNKNOWN and area is not None and not math.isnan(area):
                of.setdefault(name, {})[value] = area
    return {
        name: {"gap": max(known.values()) - min(known.values()), "worst": min(known, key=lambda v: known[v])}
        | {"best": max(known, key=lambda v: known[v])}
        for name, known in of.items()
        if len(known) > 1
    }


def units_of(split: Split, column: str) -> tuple[np.ndarray, int]:
    """The number of the study, the patient, or whatever a column tells apart, of each image: int64 [N]; an image of
    which it is not known is one of its own: how many. Some archives number studies by patient: images of two patients
    are never of one unit. InputError: no image has the column.
    """
    whose = [str(one) if one else "" for one in split.ids()["patient"].tolist()]
    values = whose
    if column != "patient":
        values = [str(split.meta(p).get(column, "")).strip() for p in range(len(split))]
    if not any(values):
        known = [name for name in (*_columns(split.meta(0)), "patient") if name != column] if len(split) else []
        raise InputError(
            f"--per {column}: no {split.split} image has it; {nearest(column, known)} (shards csv "
            "--patient-column and --keep-column take columns of a table)"
        )
    own = [f"={who}={value}" if value else f"#{p}" for p, (who, value) in enumerate(zip(whose, values, strict=True))]
    return np.unique(own, return_inverse=True)[1], values.count("")


def per_unit(outcome: Outcome, column: str, how: str, point: Point = None) -> dict[str, Any]:
    """Figures of the `units_of` a column instead of images: of its images the ``mean`` probability or the ``max``; a
    finding is there if it is in one of them, and unknown where it is in all of them. Thresholds are those of images. As
    `Cells.figures`, with ``unit``, ``pooling``, ``pooled`` images and those ``without`` a unit.
    """
    names = outcome.task.findings
    target, score = outcome.target.numpy(), outcome.task.probabilities(outcome.logits).numpy()
    unit, without = units_of(outcome.split, column)
    patients = outcome.patients()
    count = int(unit.max()) + 1
    pooled, state = np.full((count, len(names)), -np.inf), np.full((count, len(names)), target.min())
    np.maximum.at(state, unit, target)
    if how == "max":
        np.maximum.at(pooled, unit, score)
    else:
        pooled[:] = 0
        np.add.at(pooled, unit, score)
        pooled /= np.bincount(unit, minlength=count)[:, None]
    whose = np.zeros(count, np.int64)
    whose[unit] = patients if patients is not None else unit
    asked = [k for k in range(len(names)) if outcome.task.several or k > 0]
    cells = Cells([names[k] for k in asked], pooled[:, asked], state[:, asked])
    figures = cells.figures(limits_of(names, point), groups=whose, intervals=True)
    figures["resampled"] = "patients" if patients is not None else "units"
    return figures | {"unit": column, "pooling": how, "pooled": len(target), "without": without}


def at_prevalence(
    figures: Mapping[str, Any], findings: Sequence[str], prevalence: Mapping[str, float]
) -> dict[str, dict[str, float]]:
    """By finding with a threshold: PPV and NPV where so many have it as ``prevalence`` says (by finding, of all others
    under the empty name), from sensitivity and specificity by Bayes' rule; they hold where those do.
    """
    several = figures.get("per_finding")
    of = several or ({findings[1]: figures["at_threshold"]} if "at_threshold" in figures else {})
    found = {}
    for name, at in of.items():
        share, hit, spared = prevalence.get(name, prevalence.get("")), at.get("sensitivity"), at.get("specificity")
        if share is None or hit is None or spared is None or math.isnan(hit) or math.isnan(spared):
            continue
        named, passed = share * hit + (1 - share) * (1 - spared), share * (1 - hit) + (1 - share) * spared
        ppv, npv = (share * hit / named if named else math.nan), ((1 - share) * spared / passed if passed else math.nan)
        found[name] = {"prevalence": share, "ppv": ppv, "npv": npv}
    return found


def limits_of(findings: Sequence[str], point: Point) -> dict[str, float | None]:
    """Thresholds by finding; of one finding an image that of the second class."""
    return point if isinstance(point, dict) else {} if point is None else {findings[1]: point}


def resamples(patients: np.ndarray | None, images: int) -> list[np.ndarray]:
    """How many times each image counts in each of 1000 resamples of the patients, or images: uint16 [N] each."""
    rng = np.random.default_rng(0)
    groups = np.arange(images) if patients is None else patients
    many = int(groups.max()) + 1
    return [
        np.bincount(rng.integers(0, many, many), minlength=many)[groups].astype(np.uint16) for _ in range(RESAMPLES)
    ]


def _rate(named: np.ndarray, of_whom: np.ndarray, patients: np.ndarray | None) -> tuple[float, list[float] | None]:
    """The share of some images that are named, and its 95% interval."""
    if not of_whom.any():
        return math.nan, None
    values = named[of_whom].astype(float)
    return float(values.mean()), proportion(values, patients[of_whom] if patients is not None else None)
