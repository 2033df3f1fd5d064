"""The running mean of a model's weights over its steps."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn


class Average:
    """Exponential moving average of the parameters (Polyak and Juditsky, SIAM J. Control 1992; as timm keeps it); other
    buffers, such as running statistics, are the model's own.

    Args:
        model: unwrapped, on its device.
        decay: of a step: the mean is of about the last 1 / (1 - decay) steps. At first it is less, (1 + t) / (10 + t)
            after t steps, so that the random start is soon forgotten.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.model = model
        self.values = [p.detach().clone() for p in model.parameters()]

    @torch.no_grad()
    def update(self) -> None:
        """After a step of the optimizer; the host does not wait for the device."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.values, [p.detach() for p in self.model.parameters()], 1 - decay)
        self.steps += 1

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the model has the mean weights."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for value, parameter in zip(self.values, self.model.parameters(), strict=True):
            own = parameter.detach().clone()
            parameter.copy_(value)
            value.copy_(own)

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` takes."""
        return {"steps": self.steps, "values": self.values}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore."""
        self.steps = state["steps"]
        for value, stored in zip(self.values, state["values"], strict=True):
            value.copy_(stored)
