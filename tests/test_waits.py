"""In a step the host does not wait for the device: nothing that needs a value of it is asked for, by whatever policy,
form and option.
"""

import traceback
from pathlib import Path

import pytest
import torch
from curves import MOVING
from jobs import SMALL
from torch.utils._python_dispatch import TorchDispatchMode

from shards.loader import Loader
from trainer.build import build
from trainer.command import resolve

# What returns a number, or something of a size that the device knows alone.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "unique_dim", "_unique2", "is_nonzero", "equal"}
# Who may ask for the values of a tensor: of what the loader made, of lambda's means, and of sums that have been sent to
# the host a step before.
HOST = {"draw", "has", "unknown", "read", "regions", "value", "update", "__init__", "tell_balance"}
OURS = str(Path(__file__).parents[1] / "trainer")


class Waits(TorchDispatchMode):
    """Where the host would wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.on = False

    def __enter__(self):
        self.on = True
        return super().__enter__()

    def __exit__(self, *error):
        self.on = False
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        places = args[1] if name in ("index", "index_put", "index_put_", "_index_put_impl_") else []
        if name in WAITING or any(place is not None and place.dtype in (torch.bool, torch.uint8) for place in places):
            self.tell(name)
        return func(*args, **(kwargs or {}))

    def tell(self, what: str) -> None:
        stack = traceback.extract_stack()
        own = [frame for frame in stack if frame.filename.startswith(OURS)]
        counted = any("torch/optim" in frame.filename for frame in stack)  # Adam counts its steps on the host
        if own and own[-1].name not in HOST and not counted:
            self.found.append(f"{what} in {own[-1].filename}:{own[-1].lineno}: {own[-1].line}")


@pytest.fixture
def waits(monkeypatch):
    """A mode in which values of tensors that are asked for are told, too: of a tensor on the CPU torch reads them
    without an operation.
    """
    mode = Waits()
    for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__"):
        ordinary = getattr(torch.Tensor, name)

        def asked(self, *args, name=name, ordinary=ordinary, **kwargs):
            if mode.on:
                mode.tell(name)
            return ordinary(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, asked)
    for name in ("tensor", "as_tensor"):  # a constant that is made on the host: its copy to a GPU waits
        ordinary = getattr(torch, name)

        def made(*args, name=name, ordinary=ordinary, **kwargs):
            if mode.on:
                mode.tell(name)
            return ordinary(*args, **kwargs)

        monkeypatch.setattr(torch, name, made)
    return mode


SEVERAL = ["--labels.kind", "any", "--task", "Effusion,Pneumothorax"]
CUT = ["--attention.region", "both", "--swap.lesions", "true"]
OPTIONS = {
    "default": [],
    "accumulate": ["--accumulate", "2", *MOVING],
    "published": ["--findings", "published", "--attention.form", "published", "--balance.policy", "published"],
    "ratio, coverage": ["--balance.policy", "ratio", "--attention.form", "coverage"],
    "balanced, lift": ["--balance.policy", "balanced", "--attention.form", "lift"],
    "constrained, lesions": [
        "--balance.policy",
        "constrained",
        "--attention.region",
        "both",
        "--swap.lesions",
        "true",
        *MOVING,
    ],
    "lesions alone": ["--attention.region", "annotation"],
    "eval mode": ["--attention.mode", "eval"],
    "two layers": ["--attention.layer", "layer3,layer4"],
    "input gradient": ["--attention.layer", "input"],
    "no swap, no clipping": ["--swap.probability", "0", "--optim.clip", "0"],
    "cross-entropy, swap": ["--balance.lam", "1", "--swap.probability", "0.5"],
    "cross-entropy": ["--balance.lam", "1"],
    "several findings": [*SEVERAL, "--labels.uncertain", "smooth"],
    "several, by finding": [
        *SEVERAL,
        "--loss.mean",
        "findings",
        "--loss.kind",
        "focal",
        "--loss.pos_weight",
        "balanced",
    ],
    "several, balanced": [
        *SEVERAL,
        "--balance.policy",
        "balanced",
        "--attention.region",
        "both",
        "--sampler",
        "balanced",
    ],
    "classes with weights": ["--loss.pos_weight", "balanced"],
}


@pytest.mark.parametrize("option", OPTIONS)
def test_no_step_waits(shards, tmp_path, waits, option):
    flags = ["--shards", str(shards), "--out", str(tmp_path / "run"), *SMALL, "--task", "nep", *OPTIONS[option]]
    job = build(resolve(flags))
    job.state.epoch = 5  # the published lambda begins at 1
    job.net.train()
    loader = Loader(job.splits["train"], job.plan, batch=8, workers=0)
    group = [batch for batch, _ in zip(loader.batches(0), range(job.config.accumulate), strict=False)]
    for _ in range(2):  # the lungs are found, lambda has something to go by
        job.tell_balance(job.step(group, job.balance.value(5)))
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("error")
    try:
        with waits:
            job.tell_balance(job.step(group, job.balance.value(5)))
    finally:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")
    assert not waits.found, "\n".join(waits.found)


def test_what_waits_is_seen(waits):
    code = "def place(torch, waits):\n x = torch.arange(4.0)\n with waits:\n  x[x > 1] = 0\n  return float(x.sum())"
    found: dict = {}
    exec(compile(code, OURS + "/x.py", "exec"), found)
    found["place"](torch, waits)
    assert [line.partition(" in ")[0] for line in waits.found] == ["index_put_", "__float__", "_local_scalar_dense"]
