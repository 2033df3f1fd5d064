"""Two runs on the same images: DeLong's test, Holm's p, intervals, and what the page says of it."""

import dataclasses
import json
import math
import re
import shutil

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import average_precision_score, roc_auc_score

from shards.errors import InputError
from trainer.compare import Predictions, compare, delong, holm, read_predictions, seeds_of_one, together
from trainer.report.__main__ import main as report_main


def test_delong_by_hand():
    """Two present, three absent images: the structural components are shares that can be counted."""
    truth = np.array([True, True, False, False, False])
    a = np.array([0.9, 0.4, 0.5, 0.2, 0.1])
    b = np.array([0.6, 0.6, 0.6, 0.7, 0.1])
    # a: of absent ones below 0.9 3 of 3, below 0.4 2 of 3; b: below 0.6, ties half: 0.5 + 1 = 1.5 of 3, twice
    va, vb = np.array([1, 2 / 3]), np.array([0.5, 0.5])
    # of present ones above 0.5: 1 of 2, above 0.2 and 0.1: 2 of 2; b: ties 1 of 2, none, 2 of 2
    wa, wb = np.array([0.5, 1, 1]), np.array([0.5, 0, 1])
    spread = np.var(va - vb, ddof=1) / 2 + np.var(wa - wb, ddof=1) / 3
    first, other, p = delong(truth, a, b)
    assert (first, other) == pytest.approx((va.mean(), vb.mean()))
    assert (first, other) == pytest.approx((roc_auc_score(truth, a), roc_auc_score(truth, b)))
    assert p == pytest.approx(2 * norm.sf((va.mean() - vb.mean()) / math.sqrt(spread)))
    assert delong(truth, a, a)[2] == 1
    assert math.isnan(delong(truth[:2], a[:2], b[:2])[2])


def test_delongs_p_is_uniform_where_nothing_differs():
    rng, ps = np.random.default_rng(0), []
    for _ in range(400):
        truth = rng.random(120) < 0.4
        signal = rng.normal(0, 1, 120) + truth
        ps.append(delong(truth, signal + rng.normal(0, 1, 120), signal + rng.normal(0, 1, 120))[2])
    assert np.mean(np.array(ps) < 0.05) == pytest.approx(0.05, abs=0.03)
    assert np.mean(ps) == pytest.approx(0.5, abs=0.05)


def test_holms_p_by_hand():
    assert holm([0.01, 0.04, 0.03, math.nan, 0.5]) == pytest.approx([0.04, 0.09, 0.09, math.nan, 0.5], nan_ok=True)
    assert holm([0.6, 0.7]) == [1.0, 1.0]


def predictions(seed: int, shift: float) -> Predictions:
    """Of 300 images of 60 patients; the truth is the same for all seeds."""
    fixed, rng = np.random.default_rng(0), np.random.default_rng(seed)
    truth = {name: fixed.choice([1.0, 0.0, np.nan], 300, p=[0.3, 0.6, 0.1]) for name in "AB"}
    p = {n: 1 / (1 + np.exp(-(shift * np.nan_to_num(t) + rng.normal(0, 1, 300)))) for n, t in truth.items()}
    place = {(kind, of): {n: np.where(t == 1, rng.random(300), np.nan) for n, t in truth.items()}
             for kind in ("region", "lesion") for of in ("energy", "pointing")}  # fmt: skip
    limits = {"A": 0.6, "B": None}
    return Predictions([str(i) for i in range(300)], np.arange(300) // 5, True, truth, p, limits, place)


def test_a_comparison_is_that_of_scikit_learn():
    first, other = predictions(1, 1.0), predictions(2, 3.0)
    found = compare(first, other)
    assert found.over == "patients"
    aps = {}
    for run, which in ((first, "first"), (other, "other")):
        for name in "AB":
            known = ~np.isnan(run.truth[name])
            truth, p = run.truth[name][known], run.probability[name][known]
            assert getattr(found.auc[name][0], which) == pytest.approx(roc_auc_score(truth, p))
            aps.setdefault(which, []).append(average_precision_score(truth, p))
        assert getattr(found.figures["AUPRC"], which) == pytest.approx(np.mean(aps[which]))
        a = run.truth["A"]
        sensitivity = (run.probability["A"][a == 1] >= 0.6).mean()
        assert getattr(found.figures["sensitivity at its threshold"], which) == pytest.approx(sensitivity)
        energy = np.mean([np.nanmean(run.place["region", "energy"][name]) for name in "AB"])
        assert getattr(found.figures["energy in region"], which) == pytest.approx(energy)
    change, p, q = found.auc["A"]
    assert change.interval[0] > 0.05  # the other is far better
    assert p <= q < 0.001
    same = compare(first, first)
    assert same.auc["A"][0].interval == (0, 0)
    assert same.auc["A"][1] == same.auc["A"][2] == 1
    assert same.disagreed == []
    key, name, p, q = found.disagreed[0]
    assert (p, q) == (first.probability[name][int(key)], other.probability[name][int(key)])
    gaps = [abs(one[2] - one[3]) for one in found.disagreed]
    assert gaps == sorted(gaps, reverse=True)
    both = together([first, other])
    assert both.probability["A"] == pytest.approx((first.probability["A"] + other.probability["A"]) / 2)
    assert both.limits == {"A": pytest.approx(0.6), "B": None}
    assert "energy in region" not in compare(first, both).figures
    with pytest.raises(InputError, match="other images, findings or labels"):
        compare(first, dataclasses.replace(other, keys=other.keys[::-1]))


def test_only_what_both_have_is_compared():
    """A threshold or a map that one run alone has says nothing of a difference; other labels are no pair."""
    first, other = predictions(1, 1.0), predictions(2, 1.0)
    first = dataclasses.replace(first, limits={"A": 0.6, "B": 0.5})
    found = compare(first, other)
    a = first.truth["A"]
    assert found.figures["sensitivity at its threshold"].first == (first.probability["A"][a == 1] >= 0.6).mean()
    other.place["lesion", "energy"]["A"][:150] = np.nan
    other.place["lesion", "energy"]["B"][:] = np.nan
    shown = first.place["lesion", "energy"]["A"][150:]
    assert compare(first, other).figures["energy in lesion"].first == pytest.approx(np.nanmean(shown))
    with pytest.raises(InputError, match="labels"):
        compare(first, dataclasses.replace(other, truth={**other.truth, "A": np.nan_to_num(other.truth["A"])}))


def test_seeds_of_one_configuration_are_recognised():
    def content(**config):
        return {"config": {"seed": 0, "out": "a", "size": 64, **config}, "images": {"test": "x"}}

    runs = {"a": content(), "b": content(seed=1, out="b"), "c": content(size=32), "d": content(seed=2, workers=4)}
    assert seeds_of_one(runs) == [["a", "b", "d"]]


def test_a_page_of_two_runs_says_what_differs(trained, tmp_path, capsys):
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    path = tmp_path / "again/predictions_test.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:  # the other way round
        line["probability"]["Effusion"], line["probability"]["No Finding"] = (
            line["probability"][name] for name in ("No Finding", "Effusion")
        )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    report_main(["--out", str(tmp_path / "both.html"), str(tmp_path / "run"), str(tmp_path / "again")])
    page = (tmp_path / "both.html").read_text()
    truth = np.array([line["label"] == "Effusion" for line in lines])
    p = np.array([line["probability"]["No Finding"] for line in lines])
    first, other, value = delong(truth, p, 1 - p)
    assert "again less run" in page
    assert f"{other - first:+.3f}" in page
    assert f"{value:.3f}" in page
    assert "are one configuration with several seeds" not in page  # one seed, twice
    assert "mean of their probabilities" in page
    farthest = lines[int(np.abs(2 * p - 1).argmax())]["key"]
    assert (f"<td>{farthest}</td>" in page) == (np.abs(2 * p - 1).max() > 0.05)
    assert "again less run" in capsys.readouterr().out


def test_pointing_of_a_report_from_before_is_named_and_not_compared(trained, tmp_path, capsys):
    """It was that of the largest pixel."""
    report = json.loads((tmp_path / "run/report.json").read_text())
    now = read_predictions(tmp_path / "run", "test", report).place
    assert not np.isnan(now["region", "pointing"]["Effusion"]).all()
    for split in ("val", "test"):
        del report[split]["pointing"]
    before = read_predictions(tmp_path / "run", "test", report).place
    assert np.isnan(before["region", "pointing"]["Effusion"]).all()
    assert np.array_equal(before["region", "energy"]["Effusion"], now["region", "energy"]["Effusion"], equal_nan=True)
    report_main(["--out", str(tmp_path / "x.html"), str(tmp_path / "run")])
    assert "largest pixel, and not" not in capsys.readouterr().out
    (tmp_path / "run/report.json").write_text(json.dumps(report))
    report_main(["--out", str(tmp_path / "x.html"), str(tmp_path / "run")])
    assert "note: run: measured when a map pointed to its largest pixel" in capsys.readouterr().out


def test_two_configurations_of_several_seeds_are_compared_seed_by_seed(trained, tmp_path, capsys):
    """And an ensemble is of one configuration's seeds, not of all that is there."""
    names, rng = ("plain_0", "plain_1", "other_0", "other_1"), np.random.default_rng(0)
    for name in names:
        shutil.copytree(tmp_path / "run", tmp_path / name)
        arm, seed = name.split("_")
        report = json.loads((tmp_path / name / "report.json").read_text())
        report["config"] |= {"seed": int(seed), "batch": 4 if arm == "other" else 8}
        (tmp_path / name / "report.json").write_text(json.dumps(report))
        lines = [json.loads(line) for line in (tmp_path / name / "predictions_test.jsonl").read_text().splitlines()]
        for line in lines:
            p = float(rng.random())
            line["probability"] = {"No Finding": 1 - p, "Effusion": p}
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "predictions_test.jsonl").write_text(text)
    folders = [str(tmp_path / name) for name in names]
    report_main(["--out", str(tmp_path / "all.html"), "--images", "0", *folders])
    page, said = (tmp_path / "all.html").read_text(), capsys.readouterr().out
    for head in ("plain_1 less plain_0", "other_0 less plain_0", "other_1 less plain_1"):
        assert f"<h2>{head}</h2>" in page
        assert head in said
    assert "other_1 less plain_0" not in said
    assert "<h2>other_0, other_1 less plain_0, plain_1</h2>" in page
    pairs = ("other_0 less plain_0", "other_1 less plain_1")
    differences = [float(re.search(rf"{head}: AUROC ([+-][.\d]+)", said)[1]) for head in pairs]
    over = page.partition("<h2>other_0, other_1 less plain_0, plain_1</h2>")[2]
    mean = float(re.search(r"<td>AUROC</td><td>([+-][.\d]+)</td>", over)[1])
    assert mean == pytest.approx(np.mean(differences), abs=1.1e-3)  # of figures that were rounded
    assert page.count("<h2>Ensemble</h2>") == 2
    assert "What plain_0 and plain_1 say together" in page


def test_images_of_two_opinions_stand_side_by_side(trained, shards, tmp_path, monkeypatch, capsys):
    """A copy of the run says the opposite of two images; where the images have gone, the page says so."""
    other = tmp_path / "other"
    shutil.copytree(trained, other)
    file = other / "predictions_test.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    keys = []
    for line in lines[:2]:
        names = list(line["probability"])
        line["probability"] = {name: 1 - line["probability"][name] for name in names}
        keys.append(line["key"])
    for line in lines:  # and all are far from the middle
        line["probability"] = {name: float(p > 0.5) for name, p in line["probability"].items()}
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = tmp_path / "both.html"
    report_main(["--out", str(page), str(trained), str(other), "--images", "3"])
    figures = re.findall(r"<figure class=beside>.*?</figure>", page.read_text(), re.DOTALL)
    assert 1 <= len(figures) <= 3
    for figure in figures:
        assert figure.count("data:image/jpeg;base64,") == 2
        assert "run: 0." in figure
        assert "has it" in figure or "does not have it" in figure
    config = other.parent / "run/config.yaml"
    config.write_text(config.read_text().replace(str(shards), str(tmp_path / "gone")))
    report_main(["--out", str(page), str(trained), str(other)])
    assert "Their images cannot be shown" in page.read_text()
    report_main(["--out", str(page), str(trained), str(other), "--images", "0"])
    assert "cannot be shown" not in page.read_text()
    with pytest.raises(InputError, match="--images 51: must be from 0 to 50"):
        report_main(["--out", str(page), str(trained), "--images", "51"])


def test_curves_are_drawn_as_lines(trained):
    page = (trained / "report.html").read_text()
    assert "data:image/svg+xml;base64," in page
    assert (trained / "curves.svg").read_bytes().startswith(b"<?xml")
    assert (trained / "curves.png").is_file()
