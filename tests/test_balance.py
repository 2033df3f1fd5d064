import json
import math

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import GOLDEN

from trainer import loop
from trainer.balance import MOMENTUM, Balance, StepSums, published_lambda
from trainer.build import build
from trainer.command import resolve
from trainer.config import Config
from trainer.context import Swap
from trainer.loop import squared_norm

PUBLISHED = json.loads((GOLDEN / "published.json").read_text())


def sums(
    ce: float, attention: float, images: int, positives: int, ce_norm: float = 0.0, attention_norm: float = 0.0
) -> StepSums:
    """What a step hands to `Balance.update`, from norms that are not squared."""
    return StepSums(ce, attention, images, positives, ce_norm**2, attention_norm**2)


@pytest.mark.parametrize("epoch", PUBLISHED["lambda"])
def test_published_lambda(epoch):
    assert published_lambda(int(epoch)) == PUBLISHED["lambda"][epoch]


def test_ratio_is_a_over_ce_plus_a_clamped_and_survives():
    balance = Balance("ratio", low=0.2, high=0.9)
    assert balance.value(0) == 0.5
    balance.update(sums(6.0, 2.0, 6.0, 4.0))  # CE 1, A 0.5
    assert balance.value(0) == pytest.approx(0.5 / 1.5)
    balance.update(sums(100.0, 0.0, 1.0, 0.0))  # no positives: nothing is learnt
    assert balance.value(0) == pytest.approx(0.5 / 1.5)
    other = Balance("ratio", low=0.2, high=0.9)
    other.load_state_dict(balance.state_dict())
    assert other.value(3) == balance.value(3)
    for _ in range(500):
        balance.update(sums(0.0, 4.0, 4.0, 4.0))
    assert balance.value(0) == 0.9


def test_fixed_and_published_do_not_follow_losses():
    assert Balance("fixed", 0.25).value(40) == 0.25
    ramped = Balance("fixed", 0.8, ramp=0.5)
    assert [ramped.value(0, done) for done in (0.0, 0.25, 0.5, 0.9)] == pytest.approx([1.0, 0.9, 0.8, 0.8])
    assert ramped.value(0, 0.0) == 1.0
    assert Balance("fixed", 0.5, ramp=0.0).value(0, 0.0) == 0.5
    assert Balance("published").value(10) == published_lambda(10)
    assert not Balance("fixed").follows_losses


def test_balanced_pulls_equally_hard():
    balance = Balance("balanced", low=0.05, high=0.95)
    assert balance.follows_losses
    assert balance.follows_gradients
    assert balance.value(0) == 0.5
    balance.update(sums(8, 4, 8, 4, 3.0, 1.0))
    lam = balance.value(0)
    assert lam == 0.25
    assert lam * 3.0 == pytest.approx((1 - lam) * 1.0)
    balance.update(sums(8, 4, 8, 4, 1.0, 1.0))
    ce, attention = MOMENTUM * 3 + (1 - MOMENTUM), 1.0
    assert balance.value(0) == pytest.approx(attention / (ce + attention))


def test_balanced_leaves_out_what_says_nothing_and_stays_within_its_bounds():
    balance = Balance("balanced", low=0.3, high=0.6)
    for nothing in (sums(8, 0, 8, 0, 3.0), sums(8, 4, 8, 4, math.inf, 1.0), sums(8, 4, 8, 4, math.nan, 1.0)):
        balance.update(nothing)
        assert balance.means is None
    balance.update(sums(8, 4, 8, 4, 100.0, 1.0))
    assert balance.value(0) == 0.3
    balance.means = None
    balance.update(sums(8, 4, 8, 4, 1.0, 100.0))
    assert balance.value(0) == 0.6
    balance.means = None
    balance.update(sums(8, 4, 8, 4))  # both gradients vanished
    assert balance.value(0) == 0.5


def test_constrained_grows_while_validation_stays_and_gives_way_when_it_does_not():
    balance = Balance("constrained", low=0.1, high=0.9, epsilon=0.05)
    assert not balance.follows_losses
    assert balance.value(0) == 0.9
    weight = 0.1 / 0.9
    for loss in (0.7, 0.5, 0.54):  # the first is the best, the second better, the third within epsilon
        balance.validated(loss)
        weight *= 1.5
        assert balance.value(0) == pytest.approx(1 / (1 + weight))
    balance.validated(0.551)
    assert balance.value(0) == pytest.approx(1 / (1 + weight / 3))
    for _ in range(30):
        balance.validated(0.5)
    assert balance.value(0) == 0.1
    for _ in range(30):
        balance.validated(2.0)
    assert balance.value(0) == 0.9


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.99), (0.5, 0.5), (0.0, 0.0)])
def test_constrained_survives_the_ends(low, high):
    balance = Balance("constrained", low=low, high=high)
    for loss in (1.0, 0.5, 3.0, 0.4) * 5:
        balance.validated(loss)
        assert low <= balance.value(0) <= high


@pytest.mark.parametrize("policy", ["ratio", "balanced", "constrained"])
def test_state_survives_to_the_bit(policy):
    first, second = Balance(policy), Balance(policy)
    for k in range(5):
        first.update(sums(7 + k, 3, 8, 5, 1.0 + k / 3, 0.7))
        first.validated(0.6 - k / 50)
    second.load_state_dict(first.state_dict())
    for k in range(5):
        for balance in (first, second):
            balance.update(sums(5, 2 + k, 8, 4, 0.3, 0.1 * k))
            balance.validated(0.55)
        assert first.value(0).hex() == second.value(0).hex()


def test_the_norm_at_the_feature_map():
    features = torch.tensor([[3.0, 4.0]], requires_grad=True)
    loss = (features * torch.tensor([[1.0, 2.0]])).sum() / 2
    assert float(squared_norm(loss, [features])) == pytest.approx(0.5**2 + 1.0**2)
    assert features.grad is None
    # A loss that does not depend on the map has no gradient there.
    other = torch.ones(1, requires_grad=True)
    assert float(squared_norm(other.sum(), [features])) == 0.0


def test_settings_that_cannot_work_are_named():
    wrong = Config("s", "o")
    wrong.balance.policy, wrong.attention.mode = "balanced", "eval"
    assert any(
        "--balance.policy balanced: needs" in problem and "--attention.mode eval" in problem
        for problem in wrong.problems()
    )
    wrong = Config("s", "o")
    wrong.balance.policy, wrong.attention.form = "balanced", "published"
    assert any("--attention.form published" in problem for problem in wrong.problems())
    wrong = Config("s", "o")
    wrong.balance.policy, wrong.balance.high = "constrained", 1.0
    assert any("--balance.high 1" in problem for problem in wrong.problems())
    wrong = Config("s", "o")
    wrong.balance.epsilon, wrong.attention.annotated, wrong.swap = -1.0, 1.5, Swap(probability=2.0, dilate=-0.1)
    told = " ".join(wrong.problems())
    for flag in ("--balance.epsilon -1.0", "--attention.annotated 1.5", "--swap.dilate -0.1", "--swap.probability 2.0"):
        assert flag in told


def test_the_swap_is_on_where_attention_has_a_gradient():
    config = Config("s", "o")
    assert config.swap_probability == 0.75
    config.attention.form = "published"
    assert config.swap_probability == 0.0
    config.attention.form, config.balance.lam = "energy", 1.0
    assert config.swap_probability == 0.0
    config.swap = Swap(probability=0.25)
    assert config.swap_probability == 0.25


def test_devices_are_lent_where_they_are_named():
    config = Config("s", "o")
    assert config.lent_devices == 0
    config.attention.avoid = "Chest Drain"
    assert config.lent_devices == 0.5
    config.balance.lam = 1.0
    assert config.lent_devices == 0
    config.swap = Swap(devices=0.25)
    assert config.lent_devices == 0.25
    config = Config("s", "o")
    config.attention.avoid, config.attention.form = "Chest Drain", "published"
    assert config.lent_devices == 0


def test_while_lambda_falls_no_epoch_is_the_best(flags, tmp_path, monkeypatch):
    """Else a run is over, or kept, before attention has begun."""
    monkeypatch.setattr(loop, "score_of", lambda figures, best, epoch: -float(epoch))  # each worse than the one before
    job = build(resolve([*flags, "--epochs", "5", "--patience", "1", "--balance.ramp", "0.6"]))
    kept = []
    monkeypatch.setattr(job, "keep", lambda: kept.append((job.state.epoch, round(job.lam, 3))))
    job.train()
    assert kept == [(0, 0.8), (1, 0.6), (2, 0.4)]
    assert (job.state.best_epoch, job.state.epoch) == (2, 4)


def test_a_longer_run_does_not_raise_lambda_again(flags, tmp_path):
    job = build(resolve([*flags, "--epochs", "2", "--balance.ramp", "0.5"]))
    job.train()
    assert job.lam == 0.4
    AcceleratorState._reset_state(True)
    job = build(resolve(["--out", str(tmp_path / "run"), "--resume", "--epochs", "8"]))
    assert job.lam == 0.4
    assert not job.balance.falls(job.passed)
