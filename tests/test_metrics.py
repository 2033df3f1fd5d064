import json
import math

import numpy as np
import pytest
import torch
from conftest import GOLDEN
from scipy.stats import spearmanr

from trainer.intervals import wilson
from trainer.metrics import (
    LOCALIZATION,
    THRESHOLDS,
    at_threshold,
    auc_interval,
    best_threshold,
    binary_report,
    bootstrap,
    classification_report,
    localize,
    measured,
    multiclass_auc,
    otsu,
    peaks,
    pointed,
    rank_correlation,
    summarize,
    without_dead,
)

PUBLISHED = json.loads((GOLDEN / "published.json").read_text())


@pytest.mark.parametrize("i", range(len(PUBLISHED["metrics"])))
def test_published_metrics(golden, i):
    logits, labels = (torch.from_numpy(golden[f"metric{i}_{n}"]) for n in ("logits", "labels"))
    report = classification_report(logits, labels)
    figures = report | report.get("binary", {})
    for name, expected in PUBLISHED["metrics"][i].items():
        if name != "nclass" and expected is not None:
            assert figures[name] == pytest.approx(expected, abs=1e-6), name


def test_binary_report_by_hand_and_at_the_edges():
    logits = torch.tensor([[2.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    report = binary_report(logits, torch.tensor([0, 0, 1, 1]))
    assert report["sensitivity"] == 0.5
    assert report["specificity"] == 1.0
    assert report["ppv"] == 1.0
    assert report["for"] == pytest.approx(1 / 3)
    assert report["youden"] == 0.5
    assert report["dp"] == math.inf
    one_class = binary_report(logits, torch.zeros(4, dtype=torch.long))
    assert math.isnan(one_class["auc"])
    assert math.isnan(one_class["sensitivity"])


def test_localize_by_hand():
    cam = torch.zeros(3, 4, 4)
    cam[0, 0, 0], cam[0, 3, 3], cam[1, 3, 3] = 1.0, 0.5, 1.0
    region = torch.zeros(3, 4, 4, dtype=torch.bool)
    region[:, :2] = True
    rows = localize(cam, region, 0.4)
    columns = [LOCALIZATION.index(name) for name in ("energy", "lift", "pointing", "coverage")]
    assert rows[0, columns].tolist() == pytest.approx([2 / 3, 2 / 3 - 0.5, 1, 1 / 8])
    assert rows[1, columns].tolist() == pytest.approx([0, -0.5, 0, 0])
    assert rows[2, columns].tolist() == pytest.approx([0, -0.5, 0, 0])  # no CAM at all is a miss
    figures = summarize(rows[:2, : len(LOCALIZATION)])
    assert figures["pointing_95"] == wilson(0.5, 2)
    assert figures["energy"] == pytest.approx(1 / 3)
    assert figures["energy_95"][0] < 1 / 3 < figures["energy_95"][1]
    assert summarize(rows[:0]) is None
    one = summarize(rows[:1, : len(LOCALIZATION)])
    assert all(math.isnan(v) for v in one["energy_95"])  # one image says nothing of others


@pytest.mark.parametrize(
    ("share", "n", "low", "high"), [(0.5, 100, 0.4038, 0.5962), (1.0, 53, 0.9324, 1.0), (0.0, 10, 0.0, 0.2775)]
)
def test_wilson_interval(share, n, low, high):
    assert wilson(share, n) == pytest.approx([low, high], abs=1e-4)


def test_the_bootstrap_of_a_mean_is_as_wide_as_its_standard_error():
    values = np.random.default_rng(0).normal(3, 2, 400)
    low, high = bootstrap(values)
    assert (low + high) / 2 == pytest.approx(values.mean(), abs=0.02)
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert bootstrap(values) == [low, high]
    assert bootstrap(np.array([0.5])) == [0.5, 0.5]
    assert bootstrap(np.ones(3)) == [1, 1]


def test_the_bootstrap_of_the_auc_is_centred_and_as_wide_as_hanley_and_mcneil_say():
    torch.manual_seed(0)
    labels = torch.arange(400) % 2
    logits = torch.stack([torch.zeros(400), labels * 1.2 + torch.randn(400)], 1)
    auc = multiclass_auc(logits, labels)
    low, high = auc_interval(logits, labels)
    q1, q2 = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    error = math.sqrt((auc * (1 - auc) + 199 * (q1 - auc**2) + 199 * (q2 - auc**2)) / 200**2)  # Hanley & McNeil 1982
    assert (low + high) / 2 == pytest.approx(auc, abs=0.01)
    assert high - low == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert all(map(math.isnan, auc_interval(logits[:1], labels[:1])))


def test_iou_and_tolerance_by_hand():
    cam = torch.zeros(2, 224, 224)
    cam[0, 100:120, 100:120] = 1.0
    cam[0, 100:120, 120:140] = 0.3
    cam[1, 10, 50] = 1.0
    region = torch.zeros(2, 224, 224, dtype=torch.bool)
    region[:, 100:120, 110:130] = True
    rows = localize(cam, region, 0.5)
    names = dict(zip(LOCALIZATION, rows[0].tolist(), strict=False))
    assert names["iou_otsu"] == pytest.approx(200 / 600)  # Otsu parts 1.0 from 0.3 and 0
    by_threshold = dict(zip(THRESHOLDS, rows[0, len(LOCALIZATION) :].tolist(), strict=True))
    assert by_threshold[4 / 16] == pytest.approx(400 / 800)
    assert by_threshold[5 / 16] == pytest.approx(200 / 600)
    assert best_threshold(rows[:1]) == 0  # the first of those that are equally good
    assert best_threshold(rows[:0]) is None
    # The peak of the first is at its upper left corner: 10 pixels from the region, within 15; that of the second is 97
    # away.
    assert rows[:, 2].tolist() == [0, 0]
    assert rows[:, 3].tolist() == [1, 0]
    # An all-zero map hits nothing, however close.
    assert (
        localize(torch.zeros(1, 8, 8), torch.ones(1, 8, 8, dtype=torch.bool), 0.5)[0, [0, 2, 3, 4, 5]].tolist()
        == [0] * 5
    )


def test_what_a_coarse_map_points_to_is_finer_than_its_cells_and_no_tie_draws_it_into_a_corner():
    cams = torch.zeros(5, 4, 8)
    cams[0, 1, 2] = 3.0
    cams[1, 1, 2], cams[1, 1, 3], cams[1, 3, 7] = 2.0, 1.0, 1.9  # what is far away does not matter
    cams[2] = 0.5  # the same everywhere
    cams[3] = cams[1] * 1e-20
    cams[4, 0, 7], cams[4, 1, 7] = 1.0, 0.5  # at the rim
    at = pointed(cams) * torch.tensor([4, 8])
    wanted = [[1.5, 2.5], [1.5, 2.5 + 1 / 3], [1.5, 3.5], [1.5, 2.5 + 1 / 3], [0.5 + 1 / 3, 7.5]]
    assert at[[0, 1, 3, 4]].tolist() == [pytest.approx(wanted[k], abs=1e-4) for k in (0, 1, 3, 4)]
    assert ((at[2] - torch.tensor([2.0, 4.0])).abs() <= 0.5).all()
    broken = torch.full((1, 4, 8), torch.nan)  # of an overflow: it points nowhere, and ends nothing
    assert localize(torch.zeros(1, 64, 64), torch.ones(1, 64, 64) > 0, 0.5, broken)[0, 2] == 0
    # In the units of the drawn map: between the middles of two cells, where no interpolated map is largest
    drawn = torch.nn.functional.interpolate(cams[:2, None, :, :4], (64, 64), mode="bilinear")[:, 0]
    region = torch.zeros(2, 64, 64, dtype=torch.bool)
    region[:, 16:32, 42:48] = True
    assert localize(drawn, region, 0.5, cams[:2, :, :4])[:, LOCALIZATION.index("pointing")].tolist() == [0, 1]
    assert localize(drawn, region, 0.5)[:, LOCALIZATION.index("pointing")].tolist() == [0, 0]


def test_otsu_is_the_best_of_all_cuts():
    rng = np.random.default_rng(0)
    for _ in range(20):
        counts = rng.integers(1, 50, 16).astype(float)  # an empty gray would be a tie
        grays, share = np.arange(16), counts / counts.sum()
        between = [
            share[:t].sum()
            * share[t:].sum()
            * ((grays[:t] @ share[:t]) / share[:t].sum() - (grays[t:] @ share[t:]) / share[t:].sum()) ** 2
            for t in range(1, 16)
        ]
        assert int(otsu(torch.from_numpy(counts)[None])[0]) == int(np.nanargmax(between)) + 1


def test_rank_correlation_is_spearmans():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, (5, 7, 7)), rng.normal(size=(5, 7, 7))
    ours = rank_correlation(torch.from_numpy(a), torch.from_numpy(b))
    for k in range(5):
        assert float(ours[k]) == pytest.approx(spearmanr(a[k].ravel(), b[k].ravel()).statistic, abs=1e-5)
    assert rank_correlation(torch.ones(1, 3, 3), torch.rand(1, 3, 3)).tolist() == [0]


def test_the_interval_of_a_difference_is_paired():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(300) % 2
    noise = torch.randn(300, generator=generator)
    logits = torch.stack([torch.zeros(300), labels * 1.2 + noise], 1)
    slightly = torch.stack([torch.zeros(300), labels * 1.0 + noise], 1)
    low, high = auc_interval(logits, labels, slightly)
    single = auc_interval(logits, labels)
    difference = multiclass_auc(logits, labels) - multiclass_auc(slightly, labels)
    assert low <= difference <= high
    assert high - low < 0.3 * (single[1] - single[0])
    assert auc_interval(logits, labels, logits) == [0.0, 0.0]


def test_images_of_one_patient_are_no_independent_ones():
    """Every patient's images are alike: the intervals are those of a single image of each."""
    rng = np.random.default_rng(0)
    values, hits = rng.random(80), (rng.random(80) < 0.3).astype(float)
    rows = torch.from_numpy(np.stack([values, hits], 1))
    names, five = ("energy", "pointing"), np.arange(80).repeat(5)
    single, many = summarize(rows, names), summarize(rows.repeat_interleave(5, 0), names, five)
    for name in ("energy_95", "pointing_95"):
        assert many[name] == pytest.approx(single[name], abs=2e-3)
    as_images = summarize(rows.repeat_interleave(5, 0), names)
    assert as_images["energy_95"][1] - as_images["energy_95"][0] < 0.5 * (many["energy_95"][1] - many["energy_95"][0])
    apart = summarize(rows, names, np.arange(80))  # a patient an image
    assert apart["energy_95"] == pytest.approx(single["energy_95"])
    assert apart["pointing_95"] == pytest.approx(single["pointing_95"], abs=2e-3)
    alone = summarize(rows[:3], names, np.zeros(3, int))  # of one patient nothing follows for others
    assert np.isnan(alone["energy_95"]).all()
    assert alone["pointing_95"] == pytest.approx(wilson(alone["pointing"], 1))
    none = summarize(torch.zeros(80, 1), ("pointing",), np.arange(80) // 4)
    assert none["pointing_95"] == pytest.approx(wilson(0, 20))

    logits = torch.stack([torch.zeros(80), torch.from_numpy(rng.normal(0, 1, 80)) + torch.arange(80) % 2], 1)
    labels = torch.arange(80) % 2
    wide = auc_interval(logits.repeat_interleave(5, 0), labels.repeat_interleave(5), patients=five)
    narrow = auc_interval(logits.repeat_interleave(5, 0), labels.repeat_interleave(5))
    once = auc_interval(logits, labels)
    assert wide == pytest.approx(once, abs=0.03)
    assert narrow[1] - narrow[0] < 0.6 * (wide[1] - wide[0])
    assert auc_interval(logits, labels, logits, patients=np.arange(80)) == [0, 0]


def test_an_operating_point_by_hand():
    logits = torch.tensor([[0.0, 1.0], [0.0, -1.0], [0.0, 0.2], [0.0, -0.2]]).double()
    labels = torch.tensor([1, 0, 0, 1])
    found = at_threshold(logits, labels, float(torch.sigmoid(torch.tensor(-0.2))) - 1e-6)
    assert found == pytest.approx(
        {
            "threshold": found["threshold"],
            "sensitivity": 1,
            "specificity": 0.5,
            "ppv": 2 / 3,
            "npv": 1,
            "youden": 0.5,
            "accuracy": 0.75,
        },
        abs=1e-6,
    )
    # At the threshold of the best Youden's index the figures are the ones that make it the best.
    rng = np.random.default_rng(0)
    logits, labels = torch.from_numpy(rng.normal(size=(200, 2))), torch.from_numpy(rng.integers(0, 2, 200))
    best = binary_report(logits, labels)
    assert at_threshold(logits, labels, best["best_threshold"])["youden"] >= best["youden"]


def test_intervals_stay_where_figures_can_be():
    rows = torch.tensor([[0.0, -0.5, 0, 0, 0, 0], [0.01, -0.9, 0, 0, 0.008, 0], [0.0, -0.99, 1, 1, 0.0, 1]])
    found = summarize(rows)
    for name in LOCALIZATION:
        low, high = found[f"{name}_95"]
        assert (-1 if name == "lift" else 0) <= low <= found[name] <= high <= 1


def test_a_map_that_is_zero_has_no_energy_and_is_counted():
    cam = torch.zeros(3, 4, 4)
    cam[0, :2] = 1
    region = torch.zeros(3, 4, 4, dtype=torch.bool)
    region[:, :2] = True
    rows = without_dead(localize(cam, region, 0.5), cam)
    assert measured(rows).all()
    found = summarize(rows[:, : len(LOCALIZATION)])
    assert (found["images"], found["without_map"], found["energy"], found["lift"]) == (3, 2, 1.0, 0.5)
    assert found["pointing"] == pytest.approx(1 / 3)
    dead = summarize(rows[1:, : len(LOCALIZATION)])
    assert math.isnan(dead["energy"])
    assert math.isnan(dead["energy_95"][0])


def test_the_peak_of_a_plateau_is_its_middle():
    """An interpolated coarse map is flat at its rim: the first of its largest pixels would be the image's corner."""
    cam = torch.zeros(3, 9, 12)
    cam[0, 2:7, 0:5] = 1.0  # its middle is one of them
    cam[1, 1, 1] = cam[1, 7, 9] = 0.5  # of two apart one is taken
    cam[2, 4, 3] = 0.7
    found = [divmod(int(at), 12) for at in peaks(cam)]
    assert found[0] == (4, 2)
    assert found[1] in ((1, 1), (7, 9))
    assert found[2] == (4, 3)
    coarse = torch.zeros(1, 1, 4, 4)
    coarse[0, 0, 1, 0] = 1.0
    full = torch.nn.functional.interpolate(coarse, (64, 64), mode="bilinear", align_corners=False)[0]
    y, x = divmod(int(peaks(full)[0]), 64)
    assert (16 < y < 32, 0 < x < 8) == (True, True)  # inside the cell's outer half, not at its edge
