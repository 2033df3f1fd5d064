"""Two runs on the same images: what differs, and whether that is more than chance.

AUROC: DeLong's test (DeLong et al., Biometrics 1988; the fast form of Sun & Xu, IEEE SPL 2014), which takes images as
independent, and a bootstrap over patients where these are known; of the other figures the bootstrap alone. Of several
findings p-values are Holm's (Scandinavian Journal of Statistics 1979).

Legend: N images; truth, a, b over the n images where a finding is known.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import norm, rankdata

from shards.errors import InputError
from trainer.content import POINTING, Content
from trainer.groups import limits_of
from trainer.multilabel import Sorted

RESAMPLES = 1000
OWN = (
    "seed",
    "out",
    "workers",
    "resume",
    "dry_run",
    "tracker",
)  # may differ between runs that are one in kind
AGREE = 0.05  # of probability: nearer ones are one opinion


@dataclass(frozen=True)
class Predictions:
    """What a run predicted of a split.

    Attributes:
        keys: of N images; patients int [N], a number each (an image each, where they are not known).
        truth: by finding float [N]: 1, 0, NaN where it is unknown; probability: by finding float [N].
        limits: by finding its threshold, or None.
        place: by ``region`` or ``lesion``, figure and finding float [N], NaN where there is none.
    """

    keys: list[str]
    patients: np.ndarray
    known_patients: bool
    truth: dict[str, np.ndarray]
    probability: dict[str, np.ndarray]
    limits: dict[str, float | None]
    place: dict[tuple[str, str], dict[str, np.ndarray]]

    @cached_property
    def sorted(self) -> dict[str, Sorted]:
        """By finding its known images in the order of their scores."""
        found = {}
        for name, truth in self.truth.items():
            known = np.flatnonzero(~np.isnan(truth))
            found[name] = Sorted.of(known, truth[known] == 1, self.probability[name][known])
        return found


def read_predictions(folder: Path, split: str, content: Content) -> Predictions | None:
    """Of a run's folder; None where it has no such file. InputError: it is damaged."""
    path = folder / f"predictions_{split}.jsonl"
    if not path.is_file():
        return None
    names = [str(name) for name in content["findings"]]
    figures = content["test" if split == "test" else "val"]
    several = "per_finding" in figures
    comparable = {"energy": True, "pointing": figures.get("pointing") == POINTING}
    findings = names if several else names[1:]
    try:
        lines: list[dict[str, Any]] = [json.loads(line) for line in path.read_text().splitlines()]
        truth = {name: np.array([_truth(line, name) for line in lines]) for name in findings}
        probability = {name: np.array([float(line["probability"][name]) for line in lines]) for name in findings}
        place: dict[tuple[str, str], dict[str, np.ndarray]] = {}
        for kind, word in (("expected", "region"), ("lesion", "lesion")):
            for figure, known in comparable.items():
                place[word, figure] = {
                    name: np.array([_placed(line, kind, name, figure) if known else math.nan for line in lines])
                    for name in findings
                }
        keys = [str(line["key"]) for line in lines]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: is damaged ({error}); `python -m trainer.evaluate` writes it again") from error
    patients = [line.get("patient") for line in lines]
    known = None not in patients
    numbers = np.unique([str(who) for who in patients], return_inverse=True)[1] if known else np.arange(len(lines))
    limits = limits_of(names, content.get("threshold"))
    return Predictions(keys, numbers, known, truth, probability, limits, place)


def _truth(line: dict[str, Any], finding: str) -> float:
    if "labels" in line:
        state = line["labels"][finding]
        return math.nan if state is None else float(state)
    return float(line["label"] == finding)


def _placed(line: dict[str, Any], kind: str, finding: str, figure: str) -> float:
    of = line.get(kind) or {}
    if "labels" in line:
        of = of.get(finding) or {}
    elif line["label"] != finding:
        of = {}
    value = of.get(figure)
    return math.nan if value is None else float(value)


def delong(truth: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[float, float, float]:
    """AUROC of ``a``, of ``b``, and the two-sided p of their being one; NaN where truth is all alike. bool [n], float
    [n], float [n].
    """
    present, absent = int(truth.sum()), int((~truth).sum())
    if not present or not absent:
        return math.nan, math.nan, math.nan
    areas, of_present, of_absent = [], [], []
    for score in (a, b):
        x, y = score[truth], score[~truth]
        both = rankdata(np.concatenate([x, y]))
        v10 = (both[:present] - rankdata(x)) / absent  # of each present one, the share of absent ones below it
        v01 = 1 - (both[present:] - rankdata(y)) / present
        areas.append(float(v10.mean()))
        of_present.append(v10)
        of_absent.append(v01)
    spread = sum(
        float(np.var(v[0] - v[1], ddof=1)) / len(v[0]) if len(v[0]) > 1 else math.inf for v in (of_present, of_absent)
    )
    change = areas[0] - areas[1]
    p = 1.0 if change == 0 else float(2 * norm.sf(abs(change) / math.sqrt(spread))) if spread > 0 else math.nan
    return areas[0], areas[1], p


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's p-values of several tests; NaN ones are no tests."""
    order = sorted((i for i, p in enumerate(ps) if not math.isnan(p)), key=lambda i: ps[i])
    adjusted, so_far = [math.nan] * len(ps), 0.0
    for rank, i in enumerate(order):
        so_far = max(so_far, min(1.0, (len(order) - rank) * ps[i]))
        adjusted[i] = so_far
    return adjusted


@dataclass(frozen=True)
class Change:
    """A figure of two runs: of the first, of the other, the other's less the first's with its 95% interval."""

    first: float
    other: float
    change: float
    interval: tuple[float, float]


@dataclass(frozen=True)
class Comparison:
    """auc by finding with DeLong's p and Holm's of it; figures: means over the findings that have them, by name;
    disagreed: the keys of the images where the two are of another opinion of a finding, the farthest apart first.
    """

    auc: dict[str, tuple[Change, float, float]]
    figures: dict[str, Change]
    disagreed: list[tuple[str, str, float, float]]
    over: str


def compare(first: Predictions, other: Predictions) -> Comparison:
    """The other against the first. InputError: they are not of the same images and findings."""
    alike = first.keys == other.keys and list(first.truth) == list(other.truth)
    if not alike or any(not np.array_equal(t, other.truth[n], equal_nan=True) for n, t in first.truth.items()):
        raise InputError("are of other images, findings or labels")
    first, other = _paired(first, other), _paired(other, first)
    findings, rng = list(first.truth), np.random.default_rng(0)
    many = int(first.patients.max()) + 1 if len(first.keys) else 0
    drawn = [
        np.bincount(rng.integers(0, many, many), minlength=many)[first.patients]
        for _ in range(RESAMPLES if many else 0)
    ]
    auc: dict[str, tuple[Change, float, float]] = {}
    tests = []
    for name in findings:
        known = ~np.isnan(first.truth[name])
        truth = first.truth[name][known] == 1
        _, _, p = delong(truth, first.probability[name][known], other.probability[name][known])
        if math.isnan(p):
            continue
        change = _change(lambda run, often, n=name: run.sorted[n].auc(often), first, other, drawn)  # type: ignore[misc]
        auc[name] = (change, p, math.nan)
        tests.append(p)
    auc = {name: (*of[:2], q) for (name, of), q in zip(auc.items(), holm(tests), strict=True)}
    figures: dict[str, Change] = {}
    for words, figure in _figures(findings).items():
        change = _change(figure, first, other, drawn)
        if not math.isnan(change.change):
            figures[words] = change
    return Comparison(auc, figures, _disagreed(first, other), "patients" if first.known_patients else "images")


Figure = Callable[[Predictions, np.ndarray], float]


def _paired(run: Predictions, other: Predictions) -> Predictions:
    """A run as far as the other has the same: thresholds of the same findings, maps of the same pairs."""
    limits = {name: at if other.limits.get(name) is not None else None for name, at in run.limits.items()}
    place = {
        kind: {name: np.where(np.isnan(other.place[kind][name]), math.nan, values) for name, values in of.items()}
        for kind, of in run.place.items()
    }
    return replace(run, limits=limits, place=place)


def _figures(findings: Sequence[str]) -> dict[str, Figure]:
    """Means over findings, of images that count ``often`` int [N]."""

    def mean(of: Callable[[Predictions, str, np.ndarray], float]) -> Figure:
        def figure(run: Predictions, often: np.ndarray) -> float:
            known = [v for name in findings if not math.isnan(v := of(run, name, often))]
            return float(np.mean(known)) if known else math.nan

        return figure

    def rate(which: str) -> Callable[[Predictions, str, np.ndarray], float]:
        def of(run: Predictions, name: str, often: np.ndarray) -> float:
            limit, truth = run.limits.get(name), run.truth[name]
            if limit is None:
                return math.nan
            at = truth == (1 if which == "sensitivity" else 0)
            right = (run.probability[name] >= limit) == (which == "sensitivity")
            whole = float(often[at].sum())
            return float(often[at & right].sum()) / whole if whole else math.nan

        return of

    def placed(kind: str, figure: str) -> Callable[[Predictions, str, np.ndarray], float]:
        def of(run: Predictions, name: str, often: np.ndarray) -> float:
            values = run.place[kind, figure][name]
            known = ~np.isnan(values) & (often > 0)
            return float(np.average(values[known], weights=often[known])) if known.any() else math.nan

        return of

    found = {
        "AUROC": mean(lambda run, name, often: run.sorted[name].auc(often)),
        "AUPRC": mean(lambda run, name, often: run.sorted[name].average_precision(often)),
        "sensitivity at its threshold": mean(rate("sensitivity")),
        "specificity at its threshold": mean(rate("specificity")),
    }
    for kind in ("region", "lesion"):
        found[f"energy in {kind}"] = mean(placed(kind, "energy"))
        found[f"pointing at {kind}"] = mean(placed(kind, "pointing"))
    return found


def _change(figure: Figure, first: Predictions, other: Predictions, drawn: Sequence[np.ndarray]) -> Change:
    once = np.ones(len(first.keys), int)
    a, b = figure(first, once), figure(other, once)
    if math.isnan(a) or math.isnan(b):
        return Change(a, b, math.nan, (math.nan, math.nan))
    between = [figure(other, often) - figure(first, often) for often in drawn]
    low, high = np.nanpercentile(between, [2.5, 97.5])
    return Change(a, b, b - a, (float(low), float(high)))


def _disagreed(first: Predictions, other: Predictions) -> list[tuple[str, str, float, float]]:
    """key, finding, both probabilities, of those where one is at its threshold or above (0.5 without one), the other
    not.
    """
    found = []
    for name, p in first.probability.items():
        q = other.probability[name]
        limits = [0.5 if (at := run.limits.get(name)) is None else at for run in (first, other)]
        for i in np.flatnonzero(((p >= limits[0]) != (q >= limits[1])) & (np.abs(p - q) > AGREE)).tolist():
            found.append((first.keys[i], name, float(p[i]), float(q[i])))
    return sorted(found, key=lambda line: -abs(line[2] - line[3]))


def together(runs: Sequence[Predictions]) -> Predictions:
    """The mean of the probabilities of runs on the same images: an ensemble, with the mean of their thresholds. It has
    no maps.
    """
    first = runs[0]
    mean = {name: np.mean([run.probability[name] for run in runs], 0) for name in first.probability}
    limits: dict[str, float | None] = {}
    for name in mean:
        of = [run.limits.get(name) for run in runs]
        limits[name] = None if None in of else float(np.mean([at for at in of if at is not None]))
    nowhere = np.full(len(first.keys), math.nan)
    place = {kind: dict.fromkeys(mean, nowhere) for kind in first.place}
    return Predictions(first.keys, first.patients, first.known_patients, first.truth, mean, limits, place)


def seeds_of_one(runs: dict[str, Content]) -> list[list[str]]:
    """Groups of two runs or more that differ in their seed alone, by name."""
    groups: dict[str, list[str]] = {}
    for name, content in runs.items():
        config = {k: v for k, v in content["config"].items() if k not in OWN}
        groups.setdefault(json.dumps([config, content.get("images")], sort_keys=True, default=str), []).append(name)
    return [names for names in groups.values() if len({runs[name]["config"]["seed"] for name in names}) > 1]
