"""Lambda: how much cross-entropy weighs against attention, L = lambda CE + (1 - lambda) A. The same bits everywhere."""

import math
from typing import Any, NamedTuple

import torch

MOMENTUM = 0.98  # of the running means of `ratio` and `balanced`: about the last 50 steps
STEP = 1.5  # by which `constrained` moves attention's weight relative to cross-entropy's after an epoch
BACK = 3.0  # and by which it takes it back where the constraint is broken


def published_lambda(epoch: int) -> float:
    """The published schedule (isAdaptive): max(0.2, 1 - 0.023 epoch), epoch from 0. Wu et al. 2026."""
    return max(0.2, 1 - 0.023 * epoch)


class StepSums(NamedTuple):
    """What one step adds up over its images; on the device a float64 vector in this order."""

    ce: float  # cross-entropy
    attention: float  # the attention term
    images: float
    positives: float  # that count for attention
    ce_norm2: float = (
        0.0  # squared norms of the gradients of the two means at the feature map, where lambda follows them
    )
    attention_norm2: float = 0.0
    swapped: float = 0.0  # images that got other surroundings
    swappable: float = 0.0  # images that context swap looked at


class Balance:
    """Lambda by a policy.

    Args:
        policy: ``fixed``: ``lam``; ``published``: `published_lambda`;
            ``ratio``: A / (CE + A) of running means, clamped, so that both terms pull with the same weight;
            ``balanced``: |dA| / (|dCE| + |dA|), the norms of both terms' gradients at the feature map that the CAM is
                of, by running means, clamped: both pull equally hard (kin to GradNorm, Chen et al., ICML 2018, at the
                one place where they meet);
            ``constrained``: attention as strong as validation allows. After an epoch whose validation cross-entropy is
                within ``epsilon`` of the best so far, attention's weight (1 - lambda) / lambda grows by 1.5, otherwise
                it is divided by 3 (kin to Rezende & Viola, "Taming VAEs", 2018: a constraint met by moving a
                multiplier). It begins at ``high``.
        lam: for ``fixed``.
        ramp: for ``fixed``: the share of the run in which lambda falls from 1 to ``lam``, so that what a finding looks
            like is learnt before where it is.
        low, high: clamp of the adaptive ones.
        epsilon: for ``constrained``, in nats.
    """

    def __init__(
        self,
        policy: str,
        lam: float = 0.5,
        low: float = 0.2,
        high: float = 0.95,
        epsilon: float = 0.05,
        ramp: float = 0.0,
    ) -> None:
        self.policy, self.lam, self.ramp = policy, lam, ramp
        self.low, self.high, self.epsilon = low, high, epsilon
        self.means: torch.Tensor | None = None  # float64 [2] on the CPU: CE, A or the norms of their gradients
        self.current, self.best = high, math.inf  # of `constrained`

    def value(self, epoch: int, done: float = 1.0) -> float:
        """Lambda of the next step; ``done``: share of the run before it."""
        if self.policy == "fixed":
            return 1 - (1 - self.lam) * done / self.ramp if self.falls(done) else self.lam
        if self.policy == "published":
            return published_lambda(epoch)
        if self.policy == "constrained":
            return self.current
        if not self.follows_losses:
            raise ValueError(f"unknown policy of lambda {self.policy!r}")
        if self.means is None:
            return self._clamp(0.5)
        ce, attention = self.means.tolist()
        return self._clamp(attention / (ce + attention) if ce + attention > 0 else 0.5)

    def falls(self, done: float) -> bool:
        """Whether lambda is still on its way down to ``lam``."""
        return self.policy == "fixed" and done < self.ramp

    def _clamp(self, lam: float) -> float:
        return min(max(lam, self.low), self.high)

    @property
    def follows_losses(self) -> bool:
        """Whether `update` must be called after each step."""
        return self.policy in ("ratio", "balanced")

    @property
    def follows_gradients(self) -> bool:
        """Whether `update` needs the norms of the gradients."""
        return self.policy == "balanced"

    def update(self, sums: StepSums) -> None:
        """Take one step's sums, of all processes together.

        A step without positives says nothing about the ratio and is left out, and so is one whose gradients are not
        finite.
        """
        if not (sums.images and sums.positives):
            return
        if self.policy == "balanced":
            now = torch.tensor([sums.ce_norm2, sums.attention_norm2], dtype=torch.float64).sqrt()
            if not torch.isfinite(now).all():
                return
        else:
            now = torch.tensor([sums.ce / sums.images, sums.attention / sums.positives], dtype=torch.float64)
        self.means = now if self.means is None else MOMENTUM * self.means + (1 - MOMENTUM) * now

    def validated(self, loss: float) -> None:
        """Take an epoch's validation cross-entropy, the same on every process."""
        if self.policy != "constrained":
            return
        self.best = min(self.best, loss)
        weight = (1 - self.current) / max(self.current, 1e-6)
        weight = weight * STEP if loss <= self.best + self.epsilon else weight / BACK
        self.current = self._clamp(1 / (1 + weight))

    def state_dict(self) -> dict[str, Any]:
        """The running means, and where `constrained` is."""
        return {"means": self.means, "current": self.current, "best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.means = state["means"]
        self.current, self.best = state["current"], state["best"]
