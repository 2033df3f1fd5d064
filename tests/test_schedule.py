"""The learning rate by hand."""

import pytest
import torch

from trainer.schedule import cosine, one_cycle


def test_cosine_by_hand():
    assert [cosine(seen, 10, 100, 20) for seen in (0, 10)] == [1 / 3, 2 / 3]
    assert [cosine(seen, 10, 100, 20) for seen in (20, 60, 100)] == pytest.approx([1, 0.5, 0])
    reference = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(reference, 1.0, total_steps=101, pct_start=0.2)
    for step in range(100):
        factor, beta = one_cycle(step / 100)
        assert factor == pytest.approx(reference.param_groups[0]["lr"], abs=0.04)
        assert beta == pytest.approx(reference.param_groups[0]["betas"][0], abs=0.01)
        reference.step()
        schedule.step()


def test_durations_are_words():
    from trainer.training import duration

    assert [duration(s) for s in (0.2, 100, 130, 5000, 9000, 360000)] == [
        "a few seconds",
        "about 100 seconds",
        "about 2 minutes",
        "about 83 minutes",
        "about 2.5 hours",
        "about 100 hours",
    ]
