import json
import math

import pytest
import torch
from conftest import GOLDEN

from trainer.balance import Balance, published_lambda
from trainer.metrics import auc_interval, binary_report, classification_report, localize, multiclass_auc, summarize, wilson

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
    assert rows[0].tolist() == pytest.approx([2 / 3, 2 / 3 - 0.5, 1, 1 / 8])
    assert rows[1].tolist() == pytest.approx([0, -0.5, 0, 0])
    assert rows[2].tolist() == pytest.approx([0, -0.5, 0, 0])  # no CAM at all is a miss
    figures = summarize(rows[:2])
    assert figures["energy"] == pytest.approx(1 / 3)
    assert figures["energy_95"][0] < 1 / 3 < figures["energy_95"][1]
    assert summarize(rows[:0]) is None


@pytest.mark.parametrize("epoch", PUBLISHED["lambda"])
def test_published_lambda(epoch):
    assert published_lambda(int(epoch)) == PUBLISHED["lambda"][epoch]


def test_ratio_is_a_over_ce_plus_a_clamped_and_survives():
    balance = Balance("ratio", low=0.2, high=0.9)
    assert balance.value(0) == 0.5
    balance.update(torch.tensor([6.0, 2.0, 6.0, 4.0], dtype=torch.float64))  # CE 1, A 0.5
    assert balance.value(0) == pytest.approx(0.5 / 1.5)
    balance.update(torch.tensor([100.0, 0.0, 1.0, 0.0], dtype=torch.float64))  # no positives: nothing is learnt
    assert balance.value(0) == pytest.approx(0.5 / 1.5)
    other = Balance("ratio", low=0.2, high=0.9)
    other.load_state_dict(balance.state_dict())
    assert other.value(3) == balance.value(3)
    for _ in range(500):
        balance.update(torch.tensor([0.0, 4.0, 4.0, 4.0], dtype=torch.float64))
    assert balance.value(0) == 0.9


def test_fixed_and_published_do_not_follow_losses():
    assert Balance("fixed", 0.25).value(40) == 0.25
    assert Balance("published").value(10) == published_lambda(10)
    assert not Balance("fixed").follows_losses


@pytest.mark.parametrize(("share", "n", "low", "high"), [(0.5, 100, 0.4038, 0.5962), (1.0, 53, 0.9324, 1.0), (0.0, 10, 0.0, 0.2775)])
def test_wilson_interval(share, n, low, high):
    assert wilson(share, n) == pytest.approx([low, high], abs=1e-4)


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
