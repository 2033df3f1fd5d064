"""--compile: the network up to its map runs compiled, and nothing else changes."""

from functools import partial

import pytest
import torch

from shards.errors import InputError
from trainer import checkpoint
from trainer import train as loop
from trainer.classifier import FocusClassifier

IMAGES = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(0))


def both(backbone):
    """The same step of a network as it is and compiled: logits, CAM, gradients by name; names of the weights."""
    torch.manual_seed(0)
    model = FocusClassifier(backbone, 3, size=64, pretrained="false")
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    steps = []
    for compiled in (False, True):
        model.load_state_dict(weights)
        if compiled:
            model.compile_body()
        model.zero_grad()
        torch.manual_seed(0)  # dropout
        seen = model(IMAGES, torch.tensor([2, 0]), cam=True)
        (seen.logits.square().sum() + seen.cam.sum()).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        steps.append((seen.logits.detach(), seen.cam.detach(), gradients))
    assert list(model.state_dict()) == list(weights)
    return steps


def agree(plain, compiled, share):
    for a, b in zip(plain[:2], compiled[:2], strict=True):
        assert torch.allclose(a, b, rtol=share, atol=share * float(a.abs().max()))
    assert plain[2].keys() == compiled[2].keys()
    for name, value in plain[2].items():
        assert torch.allclose(value, compiled[2][name], rtol=share, atol=share * float(value.abs().max())), name
    assert any(value.any() for value in plain[2].values())


@pytest.mark.parametrize("backbone", ["resnet18", "vgg11", "pvt_v2_b0"])
def test_the_two_halves_are_the_network(backbone, monkeypatch):
    """Traced, but run as it is: no compiler is needed."""
    calls = []

    def traced(part):
        calls.append(part)
        return torch_compile(part, backend="eager")

    torch_compile = torch.compile
    monkeypatch.setattr(torch, "compile", traced)
    agree(*both(backbone), share=1e-5)
    assert len(calls) == 1


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["resnet18", "vgg11", "pvt_v2_b0"])
def test_a_compiled_step_is_the_step(backbone):
    agree(*both(backbone), share=1e-4)


def test_a_map_in_the_midst_is_refused():
    model = FocusClassifier("resnet18", 3, size=64, pretrained="false", layer="layer3")
    with pytest.raises(InputError, match="taken in its midst, at layer3; leave --attention"):
        model.compile_body()


def test_a_compiled_run_goes_on_without(flags, tmp_path, monkeypatch, capsys):
    """Weights have their own names in the checkpoint, and the flag may change."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    loop.main([*flags, "--epochs", "1", "--compile"])
    assert "the backbone is compiled" in capsys.readouterr().out
    saved = checkpoint.load(tmp_path / "run/checkpoints/last.pt")
    assert not [name for name in saved["model"] if "_orig_mod" in name]
    loop.main(["--out", str(tmp_path / "run"), "--resume", "--epochs", "2", "--compile", "false"])
    assert "the backbone is compiled" not in capsys.readouterr().out
    assert checkpoint.load(tmp_path / "run/checkpoints/last.pt")["state"]["epoch"] == 2
