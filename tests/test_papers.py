"""What papers print of maps against lesions."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from shards.dataset import Split
from trainer import evaluate
from trainer.metrics import THRESHOLDS
from trainer.papers import (
    COLUMNS,
    NAMES,
    Floor,
    against,
    box_threshold,
    by_finding,
    figures,
    known_pairs,
    largest_box,
    overlap,
)


def test_the_box_is_around_the_largest_part_and_corners_connect():
    hot = np.zeros((10, 20), bool)
    hot[1:4, 2:6] = True
    hot[4, 6] = True  # at a corner of it
    hot[7:9, 15:18] = True
    assert largest_box(hot) == (2 / 20, 1 / 10, 7 / 20, 5 / 10)
    assert largest_box(np.zeros((4, 4), bool)) is None


def test_overlap_of_boxes_by_hand():
    iou, iobb = overlap((0, 0, 0.4, 0.4), (0.2, 0.2, 0.6, 0.6))
    assert iou == pytest.approx(0.04 / 0.28)
    assert iobb == pytest.approx(0.25)
    assert overlap((0, 0, 0.1, 0.1), (0.5, 0.5, 0.6, 0.6)) == (0, 0)
    assert overlap((0.2, 0.2, 0.3, 0.3), (0, 0, 1, 1)) == pytest.approx((0.01, 1.0))


def bump(y, x, size=8):
    raw = torch.zeros(size, size)
    raw[y, x] = 2.0
    return raw


def test_figures_of_one_map_by_hand():
    truth = np.zeros((64, 96), bool)  # not square
    truth[16:24, 36:48] = True  # the cell of row 2, column 3
    row = dict(zip(NAMES, against(bump(2, 3), truth, [[36 / 96, 16 / 64, 48 / 96, 24 / 64]]).tolist(), strict=False))
    assert row["hit"] == row["pointing"] == 1
    assert 0.3 < row["energy"] < 1  # bilinear: a tent wider than its cell
    assert 0.3 < row["iou_otsu"] <= 1
    miss = against(bump(6, 6), truth, [[36 / 96, 16 / 64, 48 / 96, 24 / 64]])
    assert miss[NAMES.index("hit")] == 0
    assert not miss[len(NAMES) :].any()
    between = bump(2, 3) + 0.9 * bump(2, 4)  # of two cells' seam, which no cell's middle lies in
    seam = np.zeros((64, 96), bool)
    seam[16:24, 45:51] = True
    row = dict(zip(NAMES, against(between, seam, [[45 / 96, 16 / 64, 51 / 96, 24 / 64]]).tolist(), strict=False))
    assert (row["hit"], row["pointing"]) == (0, 1)


def test_a_perfect_box_has_an_iou_of_one():
    raw = torch.zeros(64, 64)
    raw[10:30, 20:50] = 1
    truth = raw.numpy() > 0
    row = against(raw, truth, [[20 / 64, 10 / 64, 50 / 64, 30 / 64]])
    assert row[: len(NAMES)].tolist() == pytest.approx([1, 1, 1, 1])
    assert row[len(NAMES) :].tolist() == pytest.approx([1.0] * 2 * len(THRESHOLDS))
    two = against(raw, truth, [[0, 0, 0.1, 0.1], [20 / 64, 10 / 64, 50 / 64, 30 / 64]])
    assert torch.allclose(row, two), "of several boxes the one that it overlaps most"


def test_maps_that_say_nothing():
    truth = np.zeros((8, 8), bool)
    truth[:4] = True
    dead, flat = against(torch.zeros(4, 4), truth, [[0, 0, 1, 0.5]]), against(torch.ones(4, 4), truth, [[0, 0, 1, 0.5]])
    assert torch.isnan(dead[0])
    assert not dead[1:].any()
    assert flat[0] == 0.5
    assert not flat[1:].any()


def test_shares_at_the_threshold_that_val_chose():
    rows = torch.zeros(4, COLUMNS, dtype=torch.float64)
    rows[:, len(NAMES) + 5] = torch.tensor([0.05, 0.1, 0.35, 0.8])
    assert box_threshold(rows) == 5
    assert box_threshold(rows[:0]) is None
    found = figures(rows, 5)
    assert found["t_iou"] == {"0.1": 0.75, "0.2": 0.5, "0.3": 0.5, "0.4": 0.25, "0.5": 0.25, "0.6": 0.25, "0.7": 0.25}
    assert set(found["t_iobb"].values()) == {0.0}
    assert "t_iou" not in figures(rows, None)
    assert figures(rows[:0], 5) is None


def test_by_finding_and_where_the_model_says_so():
    rows = torch.zeros(4, COLUMNS, dtype=torch.float64)
    rows[:, 1] = torch.tensor([1.0, 0.0, 1.0, 1.0])
    constant = torch.full((4, COLUMNS), torch.nan, dtype=torch.float64)
    constant[:2] = 0
    found = by_finding(
        {"model": rows, "constant": constant},
        np.array([0, 0, 1, 1]),
        np.array([True, False, True, False]),
        ("a", "b", "c"),
        {"model": 3, "constant": None},
    )
    assert list(found) == ["all", "a", "b"]
    assert found["all"]["model"]["hit"] == 0.75
    assert found["all"]["true_positives"]["hit"] == 1.0
    assert found["all"]["true_positives"]["images"] == 2
    assert found["a"]["constant"]["hit"] == 0.0
    assert found["b"]["constant"] is None, "no floor is known of it"


def test_the_floor_is_the_mean_lesion(shards):
    split = Split(shards, "val", ("No Finding", "Effusion", "Pneumothorax"))
    floor = Floor(split, 1)
    assert floor.images == int((split.targets()[:, 1] == 1).sum())
    assert 0 < floor.map.max() <= 1
    assert floor.map[64:].sum() > floor.map[:64].sum(), "effusions lie low"
    image, finding = np.nonzero(split.targets() == 1)
    numbers = known_pairs(split, SimpleNamespace(image=torch.from_numpy(image), finding=torch.from_numpy(finding)))
    assert (finding[numbers] > 0).all()
    assert len(numbers) == int((finding > 0).sum())


def test_a_report_has_them_beside_their_floors(one_epoch, shards, tmp_path):
    report = json.loads((one_epoch / "report.json").read_text())
    assert set(report["box_threshold"]) == {"model", "random", "constant", "region"}
    test = report["test"]["lesions"]
    assert set(test) == {"all", "Effusion"}
    for kind in ("model", "constant", "region", "random"):
        assert 0 <= test["all"][kind]["hit"] <= 1
        assert 0 <= test["all"][kind]["pointing"] <= 1
        assert list(test["all"][kind]["t_iou"]) == ["0.1", "0.2", "0.3", "0.4", "0.5", "0.6", "0.7"]
    assert report["val"]["lesions"]["all"]["constant"] is None, "a constant chosen on val is too good there"
    # The maps of figures are those of the report: peaks in lesions, at another size.
    pointing = report["test"]["localization"]["lesion"]["all"]["pointing"]
    assert abs(test["all"]["model"]["pointing"] - pointing) < 0.35
    assert "lesions, " in (one_epoch / "report.html").read_text()
    out = tmp_path / "again"
    evaluate.main(["--run", str(one_epoch), "--shards", str(shards), "--workers", "0", "--out", str(out)])
    again = json.loads((out / "report.json").read_text())
    assert again["test"]["lesions"] == test
