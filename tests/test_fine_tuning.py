"""Levers of fine-tuning: rates by layer, the head first, averaged weights."""

import pytest
import torch
from jobs import Stopped, stop_at
from safetensors.torch import load_file

from shards.errors import InputError
from trainer import train as loop
from trainer.average import Average
from trainer.build import build
from trainer.command import resolve
from trainer.loop import Trainer
from trainer.run import open_run

COSINE = ["--optim.name", "adamw", "--optim.schedule", "cosine", "--optim.lr", "1e-3"]


def rates(job):
    """Parameter name -> learning rate."""
    of = {id(p): group["lr"] for group in job.optimizer.param_groups for p in group["params"]}
    return {name: of[id(p)] for name, p in job.model.net.named_parameters()}


def test_rates_fall_with_the_depth(flags):
    job = build(resolve([*flags, *COSINE, "--backbone", "resnet18", "--optim.layer_decay", "0.5"]))
    job.schedule.before_step(0, 8, 100, 0)
    rate = rates(job)
    assert len(rate) == len(list(job.model.parameters())), "every weight is trained"
    assert rate["fc.weight"] == pytest.approx(1e-3, rel=0.05)
    first, last = rate["conv1.weight"], rate["layer4.1.conv2.weight"]
    assert first < last < rate["fc.weight"]
    assert last == pytest.approx(rate["fc.weight"] / 2)


def test_the_head_is_trained_first(flags):
    own = ["--backbone", "resnet18", "--optim.frozen", "1", "--epochs", "2", "--swap.probability", "0"]
    job = build(resolve([*flags, *COSINE, *own]))
    before = {name: p.detach().clone() for name, p in job.model.net.named_parameters()}
    seen = {}
    save = job.save

    def after_an_epoch():
        if job.state.epoch == 1 and not seen:
            seen.update({name: p.detach().clone() for name, p in job.model.net.named_parameters()})
        save()

    job.save = after_an_epoch
    job.train()
    moved = {name for name, p in seen.items() if not torch.equal(p, before[name])}
    assert moved == {"fc.weight", "fc.bias"}
    assert not torch.equal(job.model.net.conv1.weight, before["conv1.weight"])


def test_the_mean_of_weights_by_hand():
    model = torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        model.weight.fill_(0.0)
    average = Average(model, 0.5)
    expected = 0.0
    for step, value in enumerate((1.0, 2.0, 4.0)):
        with torch.no_grad():
            model.weight.fill_(value)
        average.update()
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
    with average.applied():
        assert model.weight.item() == pytest.approx(expected)
    assert model.weight.item() == 4.0


def test_the_mean_is_measured_kept_and_resumed(flags, tmp_path, monkeypatch):
    given = [*flags, *COSINE, "--optim.ema", "0.9", "--epochs", "2", "--best", "last"]
    loop.main(given)
    run = tmp_path / "run"
    mean, own = load_file(run / "model.safetensors"), load_file(run / "model_last_step.safetensors")
    assert mean.keys() == own.keys()
    assert not torch.equal(mean["net.fc.weight"], own["net.fc.weight"])
    stored = torch.load(run / "checkpoints/last.pt", weights_only=True)
    assert torch.equal(stored["model"]["net.fc.weight"], own["net.fc.weight"])
    model = open_run(run).model
    names = [name for name, _ in model.named_parameters()]
    assert torch.equal(mean["net.fc.weight"], stored["average"]["values"][names.index("net.fc.weight")])
    # Interrupted and resumed, it is the same to the bit.
    again = [*given, "--save_every", "2"]
    again[again.index("--out") + 1] = str(tmp_path / "again")
    ordinary = stop_at(monkeypatch, 3)
    with pytest.raises(Stopped):
        build(resolve(again)).train()
    monkeypatch.setattr(Trainer, "step", ordinary)
    build(resolve(["--out", str(tmp_path / "again"), "--resume"])).train()
    other = load_file(tmp_path / "again/model.safetensors")
    assert all(torch.equal(mean[name], other[name]) for name in mean)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["--optim.layer_decay", "0"], "must lie above 0"),
        (["--optim.ema", "1"], r"must lie in \[0, 1\)"),
        (["--optim.frozen", "1"], "is of --optim.schedule cosine"),
        (["--optim.frozen", "2", "--optim.schedule", "cosine", "--epochs", "2"], "leaves none of 2 epochs"),
    ],
)
def test_levers_that_cannot_be(flags, given, words):
    with pytest.raises(InputError, match=words):
        resolve([*flags, *given])
