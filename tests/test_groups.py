"""Figures by a column of the samples, against scikit-learn and by hand."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, recall_score, roc_auc_score

from shards.errors import InputError
from trainer.groups import at_prevalence, band, by_column, gaps, per_unit, units_of
from trainer.task import AnyOf, OneOf

POINT = {"A": 0.5, "B": None}


@pytest.fixture
def outcome():
    """Two findings of 300 images of 90 patients, some cells unknown."""
    rng = np.random.default_rng(0)
    target = torch.from_numpy(rng.choice([1, 0, -1], (300, 2), p=[0.3, 0.6, 0.1]).astype(np.int8))
    logits = torch.from_numpy(rng.normal(0, 1, (300, 2))) + target
    metas = [{"sex": "MF"[i % 2], "age": str(a), "key": str(i)} for i, a in enumerate(rng.integers(20, 95, 300))]
    metas[0] |= {"sex": "", "age": "old"}
    nobodys = {"patient": np.zeros(300, np.int64)}
    fields = {"split": "test", "meta": lambda _, i: metas[i], "__len__": lambda _: 300, "ids": lambda _: nobodys}
    split = type("Fake", (), fields)()
    nobody = torch.zeros(0, dtype=torch.int64)
    return SimpleNamespace(
        task=AnyOf(("A", "B")),
        logits=logits,
        target=target,
        split=split,
        pairs=SimpleNamespace(image=nobody, finding=nobody),
        tables=dict,
        patients=lambda: rng.integers(0, 90, 300),
        metas=metas,
    )


def test_groups_are_those_of_scikit_learn(outcome):
    groups = by_column(outcome, "sex", POINT)
    assert list(groups) == ["(empty)", "F", "M"]
    score = torch.sigmoid(outcome.logits).numpy()
    for value, of in groups.items():
        own = np.array([(meta["sex"] or "(empty)") == value for meta in outcome.metas])
        assert of["images"] == own.sum()
        for k, name in enumerate("AB"):
            known = own & (outcome.target[:, k] >= 0).numpy()
            truth, p = (outcome.target[known, k] == 1).numpy(), score[known, k]
            if not truth.any():
                assert name not in of["per_finding"]
                continue
            entry = of["per_finding"][name]
            assert (entry["present"], entry["absent"]) == (truth.sum(), (~truth).sum())
            if truth.all():
                assert math.isnan(entry["auprc"])
                continue
            assert entry["auc_within"] == pytest.approx(roc_auc_score(truth, p))
            assert entry["auprc"] == pytest.approx(average_precision_score(truth, p))
            low, high = entry["auc_within_95"]
            assert low < entry["auc_within"] < high
            if name == "A":
                assert entry["sensitivity"] == pytest.approx(recall_score(truth, p >= 0.5))
                assert entry["false_positive_rate"] == pytest.approx(1 - recall_score(~truth, p < 0.5))
                assert entry["sensitivity_95"][0] < entry["sensitivity"] < entry["sensitivity_95"][1]
            else:
                assert "sensitivity" not in entry  # it has no threshold
    aucs = {value: groups[value]["per_finding"]["A"]["auc_within"] for value in "MF"}
    assert gaps(groups)["A"] == {
        "gap": max(aucs.values()) - min(aucs.values()),
        "worst": min(aucs, key=aucs.get),
        "best": max(aucs, key=aucs.get),
    }


def test_a_gap_is_of_what_is_known():
    """Also where figures were read from a report.json, in which what is undefined is null."""
    groups = {v: {"per_finding": {"A": {"auc_within": a}}} for v, a in (("x", None), ("y", 0.7), ("z", math.nan))}
    assert gaps(groups) == {}
    groups["x"]["per_finding"]["A"]["auc_within"] = 0.9
    assert gaps(groups)["A"] == {"gap": pytest.approx(0.2), "worst": "y", "best": "x"}


def test_ages_are_bands(outcome):
    groups = by_column(outcome, "age", POINT)
    assert set(groups) == {"0-39", "40-59", "60-79", "80+", "old"}
    years = [float(meta["age"]) for meta in outcome.metas[1:]]
    assert groups["60-79"]["images"] == sum(60 <= y < 80 for y in years)
    assert [band(age) for age in ("0", "39.5", "40", "80", "105", "")] == ["0-39", "0-39", "40-59", "80+", "80+", ""]


def test_a_column_that_is_no_group_is_refused(outcome):
    with pytest.raises(InputError, match="have no such column; did you mean sex"):
        by_column(outcome, "sx")
    with pytest.raises(InputError, match="has 300 different values; expected at most 12 groups"):
        by_column(outcome, "key")


@pytest.mark.parametrize("how", ["mean", "max"])
def test_figures_of_studies_are_those_of_their_pooled_images(outcome, how):
    for i, meta in enumerate(outcome.metas):
        meta["study"] = "" if i in (5, 17) else str(i // 3)
    found = per_unit(outcome, "study", how, POINT)
    score, target = torch.sigmoid(outcome.logits).numpy(), outcome.target.numpy()
    units: dict[str, list[int]] = {}
    for i, meta in enumerate(outcome.metas):
        units.setdefault(meta["study"] or f"own {i}", []).append(i)
    assert (found["images"], found["pooled"], found["without"], found["pooling"]) == (len(units), 300, 2, how)
    for k, name in enumerate("AB"):
        truth, p = [], []
        for images in units.values():
            states = target[images, k]
            if (states >= 0).any():
                truth.append((states == 1).any())
                p.append(getattr(score[images, k], how)())
        of = found["per_finding"][name]
        assert (of["positive"], of["negative"]) == (sum(truth), len(truth) - sum(truth))
        assert of["auc"] == pytest.approx(roc_auc_score(truth, p))
        assert of["auprc"] == pytest.approx(average_precision_score(truth, p))
        assert of["auc_95"][0] < of["auc"] < of["auc_95"][1]
        assert of["auprc_95"][0] < of["auprc"] < of["auprc_95"][1]
        if name == "A":
            assert of["sensitivity"] == pytest.approx(recall_score(truth, np.array(p) >= 0.5))
    with pytest.raises(InputError, match=r"--per stdy: no test image has it; did you mean study"):
        per_unit(outcome, "stdy", how)


def test_units_without_patients(outcome):
    """Of one finding an image the first class is not measured; patients are units, too, where they are known."""
    split = outcome.split
    for meta in outcome.metas:  # CheXpert's studies are numbered by patient
        meta["study"] = "study1"
    split.ids = lambda: {"patient": np.arange(300) // 3 + 1, "key": np.arange(300)}
    assert len(set(units_of(split, "study")[0].tolist())) == 100
    split.ids = lambda: {"patient": np.array([0, 7, 7] * 100), "key": np.arange(300)}
    unit, without = units_of(split, "patient")
    assert without == 100
    assert len(set(unit.tolist())) == 101
    one = SimpleNamespace(**vars(outcome) | {"task": OneOf(("None", "A"))})
    one.target = torch.stack([torch.arange(300) % 2, 1 - torch.arange(300) % 2], 1)
    found = per_unit(one, "patient", "max", 0.5)
    assert list(found["per_finding"]) == ["A"]
    assert "sensitivity" in found["per_finding"]["A"]
    split.ids = lambda: {"patient": np.zeros(300), "key": np.arange(300)}
    with pytest.raises(InputError, match="--per patient: no test image has it"):
        units_of(split, "patient")


def test_what_a_yes_is_worth_elsewhere():
    """Altman & Bland, BMJ 1994: sensitivity .9, specificity .8."""
    figures = {"per_finding": {"A": {"sensitivity": 0.9, "specificity": 0.8}, "B": {"sensitivity": math.nan}, "C": {}}}
    found = at_prevalence(figures, ("A", "B", "C"), {"": 0.5, "A": 0.1})
    assert list(found) == ["A"]
    assert found["A"]["ppv"] == pytest.approx(0.09 / (0.09 + 0.18))
    assert found["A"]["npv"] == pytest.approx(0.72 / (0.72 + 0.01))
    one = {"at_threshold": {"sensitivity": 1.0, "specificity": 1.0}}
    assert at_prevalence(one, ("None", "A"), {"": 0.02}) == {"A": {"prevalence": 0.02, "ppv": 1.0, "npv": 1.0}}
    assert at_prevalence({}, ("None", "A"), {"": 0.02}) == {}


def test_few_images_give_wide_intervals_or_none(outcome):
    """Resamples of three images are all alike, which is no certainty."""
    few = iter(["few"] * 12)
    for i, meta in enumerate(outcome.metas):
        known = outcome.target[i, 0] >= 0
        meta["site"] = next(few, "many") if known and (outcome.target[i, 0] == 0 or i % 4) else "many"
    entry = by_column(outcome, "site", POINT)["few"]["per_finding"]["A"]
    assert 0 < min(entry["present"], entry["absent"]) < 12
    for rate in ("sensitivity", "false_positive_rate"):
        low, high = entry[f"{rate}_95"]
        assert low <= entry[rate] <= high
        assert high - low > 0.2
    assert (entry["auc_within_95"] is None) == (min(entry["present"], entry["absent"]) < 5)
