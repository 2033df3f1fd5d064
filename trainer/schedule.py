"""The learning rate: a function of the images seen and to be seen, so that a run may go on with another batch or number
of processes.
"""

import math
from typing import Any

import torch


def cosine(seen: int, images: int, total: int, warmup: int) -> float:
    """Factor of the step that takes ``images`` more after ``seen`` of ``total``: up in a line over ``warmup`` images,
    then down to 0 along a cosine.
    """
    if seen < warmup:
        return (seen + images) / (warmup + images)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (seen - warmup) / max(1, total - warmup))))


def one_cycle(
    share: float, *, rise: float = 0.2, first: float = 1 / 25, last: float = 1e-4 / 25
) -> tuple[float, float]:
    """Factor of the learning rate and AdamW's first beta after a share of the run: cosines from ``first`` to 1 and down
    to ``last``; beta 0.95, 0.85, 0.95.

    Smith and Topin, "Super-convergence", 2018, as torch's OneCycleLR.
    """

    def between(start: float, end: float, at: float) -> float:
        return end + (start - end) / 2 * (1 + math.cos(math.pi * at))

    if share < rise:
        return between(first, 1.0, share / rise), between(0.95, 0.85, share / rise)
    at = min(1.0, (share - rise) / (1 - rise))
    return between(1.0, last, at), between(0.85, 0.95, at)


class Schedule:
    """``plateau``: times 0.1 after 10 epochs without a better figure, down to 1e-10, as published; ``cosine``: see
    above.

    Args:
        optimizer: its groups' lr are set; a group may have ``lr_scale``, by which its rate is smaller, and ``frozen``,
            whether it waits until the epochs of the head alone are over.
        kind: plateau or cosine.
        lr: the rate that cosine's factors are of.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, kind: str, lr: float) -> None:
        self.optimizer, self.kind, self.lr = optimizer, kind, lr
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=10, min_lr=1e-10)

    def before_step(self, seen: int, images: int, total: int, warmup: int, frozen: int = 0) -> None:
        """Set the rate of the step that takes ``images`` after ``seen`` of ``total``; the first ``frozen`` train the
        head alone.
        """
        if self.kind == "cosine":
            for group in self.optimizer.param_groups:
                rate = self.lr * group.get("lr_scale", 1.0)
                waits = seen < frozen and group.get("frozen", False)
                group["lr"] = 0.0 if waits else rate * cosine(seen, images, total, warmup)

    def validated(self, figure: float) -> None:
        """Tell what plateau watches, once an epoch."""
        if self.kind == "plateau":
            self.plateau.step(figure)

    def scale(self, factor: float) -> None:
        """Another rate than the run had before it was resumed."""
        for group in self.optimizer.param_groups:
            group["lr"] *= factor

    def state_dict(self) -> dict[str, Any]:
        """Plateau's; cosine has none."""
        return self.plateau.state_dict() if self.kind == "plateau" else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave, or a run of before, whose cosine counted steps."""
        if self.kind == "plateau":
            self.plateau.load_state_dict(state)
