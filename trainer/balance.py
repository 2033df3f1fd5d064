"""Lambda: how much cross-entropy weighs against attention, L = lambda CE + (1 - lambda) A. The same bits everywhere."""

from typing import Any

import torch

MOMENTUM = 0.98  # of the running means of `ratio`: about the last 50 steps


def published_lambda(epoch: int) -> float:
    """The published schedule (isAdaptive): max(0.2, 1 - 0.023 epoch), epoch from 0. Wu et al. 2026."""
    return max(0.2, 1 - 0.023 * epoch)


class Balance:
    """Lambda by a policy.

    Args:
        policy: ``fixed``: ``lam``; ``published``: `published_lambda`; ``ratio``: A / (CE + A) of running means, clamped,
            so that both terms pull with the same weight.
        lam: for ``fixed``.
        low, high: clamp of ``ratio``.
    """

    def __init__(self, policy: str, lam: float = 0.5, low: float = 0.2, high: float = 0.95) -> None:
        self.policy, self.lam, self.low, self.high = policy, lam, low, high
        self.means: torch.Tensor | None = None  # float64 [2] on the CPU: CE, A

    def value(self, epoch: int) -> float:
        """Lambda of the next step."""
        if self.policy == "fixed":
            return self.lam
        if self.policy == "published":
            return published_lambda(epoch)
        if self.means is None:
            return min(max(0.5, self.low), self.high)
        ce, attention = self.means.tolist()
        ratio = attention / (ce + attention) if ce + attention > 0 else 0.5
        return min(max(ratio, self.low), self.high)

    @property
    def follows_losses(self) -> bool:
        """Whether `update` must be called after each step."""
        return self.policy == "ratio"

    def update(self, sums: torch.Tensor) -> None:
        """Take one step's losses: float64 [4] on the CPU, sums of CE and A and their counts, added over all processes.

        A step without positives says nothing about the ratio and is left out.
        """
        ce_sum, attention_sum, images, positives = sums.tolist()
        if images and positives:
            now = torch.tensor([ce_sum / images, attention_sum / positives], dtype=torch.float64)
            self.means = now if self.means is None else MOMENTUM * self.means + (1 - MOMENTUM) * now

    def state_dict(self) -> dict[str, Any]:
        """The running means."""
        return {"means": self.means}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the running means."""
        self.means = state["means"]
