"""Calibration against scikit-learn and by hand, and that val alone makes it."""

import json

import numpy as np
import pytest
import torch
from scipy.special import expit, softmax
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, log_loss

from shards.errors import InputError
from trainer import evaluate, predict
from trainer.calibration import TEMPERATURE, brier, ece, platt, reliability, temperature
from trainer.multilabel import at_point, choose


def test_a_temperature_has_the_least_loss():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 3, 4000)
    logits = rng.normal(0, 1, (4000, 3)) + 1.5 * np.eye(3)[label]
    found = temperature(3 * logits, label)
    losses = {t: log_loss(label, softmax(3 * logits / t, axis=1)) for t in (found, 0.98 * found, 1.02 * found)}
    assert min(losses, key=losses.get) == found
    assert found == pytest.approx(3 * temperature(logits, label), rel=1e-3)


def test_a_val_without_an_error_makes_nobody_surer():
    assert temperature(np.array([[2.0, -2.0], [-2.0, 2.0], [1.0, -1.0]]), np.array([0, 1, 0])) == 1


def test_platts_scaling_is_logistic_regression_on_his_targets():
    rng = np.random.default_rng(1)
    truth = rng.random(300) < 0.2
    score = rng.normal(0, 2, 300) + 3 * truth
    a, b = platt(truth, score)
    # His targets as weights: each image is there as present and as absent
    present, absent = truth.sum(), (~truth).sum()
    goal = np.where(truth, (present + 1) / (present + 2), 1 / (absent + 2))
    both = LogisticRegression(C=1e10, tol=1e-10, max_iter=1000)
    both.fit(np.tile(score, 2)[:, None], np.repeat([1, 0], 300), sample_weight=np.concatenate([goal, 1 - goal]))
    assert [a, b] == pytest.approx([both.coef_[0, 0], both.intercept_[0]], rel=1e-3)
    assert platt(truth[truth], score[truth]) is None
    assert platt(truth, -score)[0] == 0  # the order of the scores is never turned round


def test_errors_by_hand():
    truth = np.array([True, False, True, True])
    p = np.array([0.90, 0.92, 0.10, 1.0])
    # Bins of a fifteenth: 0.90 and 0.92 together (mean 0.91, share 0.5), 0.10, 1.0
    assert reliability(truth, p) == [
        (pytest.approx(0.10), 1.0, 1),
        (pytest.approx(0.91), 0.5, 2),
        (pytest.approx(1.0), 1.0, 1),
    ]
    assert ece(truth, p) == pytest.approx((0.9 + 2 * 0.41 + 0) / 4)
    assert brier(truth, p) == pytest.approx(brier_score_loss(truth, p))
    assert np.isnan(ece(truth[:0], p[:0]))


@pytest.mark.parametrize("least", [0.5, 0.8, 1.0])
def test_a_threshold_of_a_wanted_ppv_is_the_smallest_that_has_it(least):
    rng = np.random.default_rng(2)
    truth = rng.random(200) < 0.3
    score = (rng.normal(0, 1, 200) + 1.5 * truth).round(1)
    found = choose(truth, score, f"ppv={least}")
    good = [s for s in np.unique(score) if at_point(truth, score >= s)["ppv"] >= least]
    assert found == (min(good) if good else None)


def test_val_calibrates_and_chooses_and_nobody_else(trained, flags, tmp_path, capsys):
    run, shards = tmp_path / "run", flags[1]
    content = json.loads((run / "report.json").read_text())
    known = {
        split: [json.loads(line) for line in (run / f"predictions_{split}.jsonl").read_text().splitlines()]
        for split in ("val", "test")
    }
    p, y = (
        {split: np.array([get(line) for line in lines]) for split, lines in known.items()}
        for get in (lambda line: line["probability"]["Effusion"], lambda line: line["label"] == "Effusion")
    )
    z = {split: np.log(q / (1 - q)) for split, q in p.items()}
    heat = content["calibration"][TEMPERATURE][0]
    assert heat == pytest.approx(temperature(np.stack([0 * z["val"], z["val"]], 1), y["val"].astype(int)), rel=1e-2)
    of = content["test"]["calibration"]["Effusion"]
    calibrated = expit(z["test"] / heat)
    for name, q in (("", p["test"]), ("_calibrated", calibrated)):
        assert of[f"brier{name}"] == pytest.approx(brier_score_loss(y["test"], q), abs=1e-4)
        bins = np.minimum((q * 15).astype(int), 14)
        gaps = [abs(q[bins == b].mean() - y["test"][bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
        assert of[f"ece{name}"] == pytest.approx(sum(gaps), abs=1e-3)
    page = (run / "report.html").read_text()
    assert f"temperature {heat:.2f}, from val" in page
    assert "the best Youden&#39;s index on val" in page or "binary" not in content["test"]

    evaluate.main(["--run", str(run), "--shards", shards, "--workers", "0", "--operating_point", "sensitivity=1"])
    again = json.loads((run / "report.json").read_text())
    assert again["operating_point"] == "sensitivity=1"
    assert again["threshold"] == pytest.approx(p["val"][y["val"]].min(), abs=1e-5)
    assert again["calibration"] == content["calibration"]
    assert "sensitivity=1 on val" in (run / "report.html").read_text()
    capsys.readouterr()
    predict.main(["--run", str(run), "--no-overlay", shards])
    lines = {line["image"]: line for line in map(json.loads, capsys.readouterr().out.splitlines())}
    for line, q in zip(known["test"], calibrated, strict=True):
        told = lines[line["key"]]
        assert told["calibrated"]["Effusion"] == pytest.approx(q, abs=1e-3)
        assert told["positive"] == {"Effusion": told["probability"]["Effusion"] >= again["threshold"]}
    # Evaluated again without a word, it stays
    evaluate.main(["--run", str(run), "--shards", shards, "--workers", "0"])
    assert json.loads((run / "report.json").read_text())["operating_point"] == "sensitivity=1"


def test_others_do_not_choose(trained, flags, tmp_path):
    import shutil

    shutil.copytree(flags[1], tmp_path / "others")
    index = json.loads((tmp_path / "others/index.json").read_text())
    command = ["--run", str(tmp_path / "run"), "--shards", str(tmp_path / "others"), "--workers", "0"]
    with pytest.raises(InputError, match="thresholds are chosen on the run's own val, never on other images"):
        evaluate.main([*command, "--operating_point", "f1"])
    assert index["splits"]
    with pytest.raises(InputError, match="--operating_point best: expected youden, f1"):
        evaluate.main([*command, "--operating_point", "best"])


def test_a_finding_that_val_cannot_calibrate_has_no_calibrated_probability():
    from trainer.task import AnyOf

    task = AnyOf(("A", "B"))
    logits, target = torch.randn(20, 2), torch.tensor([[i % 2, 1] for i in range(20)], dtype=torch.int8)
    fitted = task.calibration(logits, target)
    assert fitted["B"] is None
    found = task.calibrated(logits, fitted)
    assert found[:, 1].isnan().all()
    a, b = fitted["A"]
    assert torch.allclose(found[:, 0], torch.sigmoid(a * logits[:, 0].double() + b))
