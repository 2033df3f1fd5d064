"""Any number of findings an image, some of them unknown."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from shards.dataset import Split
from shards.errors import listed
from shards.targets import ABSENT, PRESENT, UNCERTAIN, UNKNOWN, MultiLabel
from trainer.augment import hashed
from trainer.calibration import Calibration, platt
from trainer.losses import at_least_float32, constant
from trainer.multilabel import Cells, choose
from trainer.task.one_of import FOCUS
from trainer.task.protocol import Drawn, Groups, Pairs, Point, Scored

# Intervals of smoothed targets (Pham et al., arXiv 1911.06475, section 3.3)
TOWARDS = {"smooth": (0.55, 0.85), "smooth-zeros": (0.0, 0.3)}
# What is known of an uncertain cell in training: nothing, or a target
KNOWN = {"ones": 1.0, "zeros": 0.0}
# Of the asymmetric loss (Ridnik et al., ICCV 2021, "Asymmetric loss for multi-label classification"): how much easy
# absent and present cells are discounted, and the probability below which an absent cell counts nothing.
EASY_ABSENT, EASY_PRESENT, MARGIN = 4.0, 1.0, 0.05


# What training makes of an uncertain cell, in words
TAKEN = {
    "ignore": "left out",
    "ones": "taken as present",
    "zeros": "taken as absent",
    "smooth": "taken as likely",
    "smooth-zeros": "taken as unlikely",
    "drop": "dropped with its image",
}


@dataclass(frozen=True)
class AnyOf:
    """Any number of findings an image: binary cross-entropy over cells, an image and a finding, as far as they are
    known. No Finding is none of the findings.

    Attributes:
        names: of the findings.
        uncertain: what training makes of an uncertain cell, by finding (others: ignore): ignore, ones, zeros, smooth,
            smooth-zeros, drop. It is unknown in all figures.
        unmentioned: see `shards.targets.MultiLabel`.
        mean: ``cells``: over all known cells; ``findings``: over the known cells of each finding, then over those
            findings that have some (torchxrayvision).
        kind: bce, focal (Lin et al., ICCV 2017) or asymmetric (Ridnik et al., ICCV 2021).
        weights: of present cells, by finding (others: 1); None: ``balanced``, absent over present training cells.
        threshold: how operating points are chosen: see `trainer.multilabel.choose`.
    """

    names: tuple[str, ...]
    uncertain: Mapping[str, str] = field(default_factory=dict)
    unmentioned: str = "negative"
    mean: str = "cells"
    kind: str = "bce"
    weights: Mapping[str, float] | None = field(default_factory=dict)
    threshold: str = "youden"

    several = True

    @property
    def findings(self) -> tuple[str, ...]:
        """See `Task`."""
        return self.names

    @cached_property
    def labels(self) -> MultiLabel:
        """See `Task`."""
        dropped = [name for name, what in self.uncertain.items() if what == "drop"]
        return MultiLabel(self.names, self.unmentioned, dropped, tuple(self._made))

    def weighted(self, present: np.ndarray, absent: np.ndarray) -> "AnyOf":
        """See `Task`."""
        if self.weights is not None:
            return self
        share = {
            name: float(n) / float(p) if p and n else 1.0
            for name, p, n in zip(self.names, present.tolist(), absent.tolist(), strict=True)
        }
        return dataclasses.replace(self, weights=share)

    # -- the step -----------------------------------------------------------------------------------------------

    def drawn(self, target: torch.Tensor, places: torch.Tensor, chance: torch.Tensor) -> Drawn:
        """See `Task`: one of an image's pairs whose place is known, each as likely as the others."""
        there = (target == PRESENT) & places
        count = there.sum(1)
        number = (chance.double() * count).long()  # of the pair that is taken
        taken = there & (there.cumsum(1) == number[:, None] + 1)
        return Drawn(taken.int().argmax(1), count.float())

    def loss(
        self, logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, chance: torch.Tensor
    ) -> torch.Tensor:
        """See `Task`."""
        known = self._known(target) & (weight > 0)[:, None]
        goal = self._goal(target, chance)
        # An unknown cell is nobody's: its logit has no gradient, whatever it is.
        z = at_least_float32(torch.where(known, logits, torch.zeros_like(logits)))
        each = self._each(z, goal.to(z.dtype)) * known * weight[:, None]
        return each.sum(0) if self.mean == "findings" else each.sum()[None]

    def _each(self, z: torch.Tensor, goal: torch.Tensor) -> torch.Tensor:
        """The loss of each cell, as if all were known: [B,K]."""
        weights = None
        if self.weights:
            weights = constant(tuple(self.weights.get(name, 1.0) for name in self.names), z.device).to(z.dtype)
        if self.kind == "bce":
            return F.binary_cross_entropy_with_logits(z, goal, reduction="none", pos_weight=weights)
        present, absent = -F.logsigmoid(z), -F.logsigmoid(-z)
        p = torch.sigmoid(z)
        if self.kind == "focal":
            present, absent = present * (1 - p) ** FOCUS, absent * p**FOCUS
        else:
            shifted = (p - MARGIN).clamp(min=0)
            present = present * (1 - p) ** EASY_PRESENT
            absent = -torch.log1p(-shifted.clamp(max=1 - 1e-7)) * shifted**EASY_ABSENT
        return goal * present * (1 if weights is None else weights) + (1 - goal) * absent

    def counted(self, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """See `Task`: known cells, of each finding or of all."""
        each = self._known(target) * weight[:, None]
        return each.sum(0) if self.mean == "findings" else each.sum()[None]

    def shares(self, counts: torch.Tensor) -> torch.Tensor:
        """See `Task`."""
        if self.mean == "cells":
            return torch.ones_like(counts)
        return counts.sum() / (counts.clamp(min=1) * (counts > 0).sum().clamp(min=1))

    def _known(self, target: torch.Tensor) -> torch.Tensor:
        """Which cells are trained on: bool [B,K]."""
        known = target >= ABSENT
        if self._made:
            made = constant(tuple(float(name in self._made) for name in self.names), target.device)
            known = known | ((target == UNCERTAIN) & (made > 0))
        return known

    @cached_property
    def _made(self) -> dict[str, str]:
        """The findings of which training makes something where they are uncertain."""
        return {name: what for name, what in self.uncertain.items() if what in KNOWN or what in TOWARDS}

    def _goal(self, target: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
        """What each cell shall become, where it is known: float32 [B,K]."""
        goal = (target == PRESENT).float()
        if not self._made:
            return goal
        intervals = zip(*map(self._interval, self.names), strict=True)
        low, high = (constant(tuple(edge), target.device) for edge in intervals)
        smoothed = low + (high - low) * hashed(chance, len(self.names))
        return torch.where(target == UNCERTAIN, smoothed, goal)

    def _interval(self, name: str) -> tuple[float, float]:
        what = self.uncertain.get(name, "")
        return TOWARDS.get(what, (KNOWN.get(what, 0.0),) * 2)

    def may_show(self, target: torch.Tensor) -> torch.Tensor:
        """See `Task`: what is present, and what is not known to be absent."""
        return target != ABSENT

    def healthy(self, target: torch.Tensor) -> torch.Tensor:
        """See `Task`: all are absent."""
        return (target == ABSENT).all(1)

    # -- figures ------------------------------------------------------------------------------------------------

    def pairs(self, target: torch.Tensor) -> Pairs:
        """See `Task`."""
        return Pairs(*torch.nonzero(target == PRESENT).unbind(1))

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """See `Task`: each by itself."""
        return torch.sigmoid(logits.double())

    def predicted(self, logits: torch.Tensor) -> torch.Tensor:
        """See `Task`: the most probable."""
        return logits.argmax(1)

    def named(self, logits: torch.Tensor, point: Point) -> list[list[str]]:
        """See `Task`: those from their threshold on; where none was to be had, nothing is said."""
        points = point if isinstance(point, dict) else {}
        limits = [points.get(name) for name in self.names]
        return [
            [n for n, p, limit in zip(self.names, row, limits, strict=True) if limit is not None and p >= limit]
            for row in self.probabilities(logits).tolist()
        ]

    def _cells(self, logits: torch.Tensor, target: torch.Tensor) -> Cells:
        return Cells(self.names, self.probabilities(logits).numpy(), target.numpy())

    def operating_point(self, logits: torch.Tensor, target: torch.Tensor) -> Point:
        """See `Task`: of each finding."""
        cells = self._cells(logits, target)
        return {name: choose(*cells.of(k), self.threshold) for k, name in enumerate(self.names)}

    def calibration(self, logits: torch.Tensor, target: torch.Tensor) -> Calibration:
        """See `Task`: of each finding over its known cells."""
        known = target >= ABSENT
        z = logits.double()
        return {
            name: platt((target[known[:, k], k] == PRESENT).numpy(), z[known[:, k], k].numpy())
            for k, name in enumerate(self.names)
        }

    def calibrated(self, logits: torch.Tensor, calibration: Calibration) -> torch.Tensor:
        """See `Task`."""
        scales = torch.tensor([calibration.get(name) or [torch.nan] * 2 for name in self.names], dtype=torch.float64)
        return torch.sigmoid(scales[:, 0] * logits.double() + scales[:, 1])

    def figures(
        self,
        logits: torch.Tensor,
        target: torch.Tensor,
        *,
        point: Point = None,
        intervals: bool = False,
        groups: Groups | None = None,
    ) -> dict[str, Any]:
        """See `Task`: those of `trainer.multilabel.Cells`, and binary cross-entropy over the known cells."""
        points = point if isinstance(point, dict) else {}
        known = target >= ABSENT
        each = F.binary_cross_entropy_with_logits(logits.double()[known], target[known].double(), reduction="sum")
        figures = self._cells(logits, target).figures(
            points, groups=groups() if groups and intervals else None, intervals=intervals
        )
        return {**figures, "loss": float(each) / max(1, int(known.sum()))}

    def auc(self, logits: torch.Tensor, target: torch.Tensor) -> float:
        """See `Task`: the mean over the findings that have both present and absent cells."""
        return self._cells(logits, target).macro_auc()

    def auc_interval(
        self,
        logits: torch.Tensor,
        target: torch.Tensor,
        other: torch.Tensor | None = None,
        groups: Groups | None = None,
    ) -> list[float]:
        """See `Task`: by resampling patients, or images where they are not known."""
        cells = self._cells(logits, target)
        return cells.macro_interval(
            groups() if groups else None, None if other is None else self.probabilities(other).numpy()
        )

    def scored(self, logits: torch.Tensor, target: torch.Tensor) -> Iterator[Scored]:
        """See `Task`: every finding, where it is known."""
        probability = self.probabilities(logits)
        for k in range(len(self.names)):
            known = target[:, k] >= ABSENT
            yield Scored(k, target[known, k] == PRESENT, probability[known, k])

    def lines(self, logits: torch.Tensor, target: torch.Tensor, point: Point) -> list[dict[str, Any]]:
        """See `Task`: labels are 1, 0, or null where it is unknown."""
        rows = zip(target.tolist(), self.probabilities(logits).tolist(), self.named(logits, point), strict=True)
        return [
            {
                "labels": {n: t if t >= ABSENT else None for n, t in zip(self.names, row, strict=True)},
                "uncertain": [n for n, t in zip(self.names, row, strict=True) if t == UNCERTAIN],
                "probability": {n: round(p, 9) for n, p in zip(self.names, probability, strict=True)},
                "predicted": named,
            }
            for row, probability, named in rows
        ]

    def told(self, split: Split) -> str:
        """See `Task`."""
        tallies = {what: split.tally(what).tolist() for what in (PRESENT, ABSENT, UNCERTAIN, UNKNOWN)}
        each, lacking, training = [], [], split.split == "train"
        for name, present, absent, uncertain, unknown in zip(self.names, *tallies.values(), strict=True):
            how = self.uncertain.get(name, "ignore")
            if training and how == "ones":
                present += uncertain
            elif training and how == "zeros":
                absent += uncertain
            doubt = f"uncertain, {TAKEN[how]}" if training else "uncertain"
            open_ = [f"{n} {word}" for n, word in ((uncertain, doubt), (unknown, "unknown")) if n]
            each.append(f"{name} {present} of {present + absent}{f' ({listed(open_)})' if open_ else ''}")
            if not present or not absent:
                lacking.append(name)
        silent = (
            ""
            if split.lists_absent or self.unmentioned != "negative"
            else "; what the labels do not mention is taken as absent (--labels.unmentioned)"
        )
        left = f"; {split.left_out} images left out, of which nothing is known, or that are uncertain and dropped"
        warning = (
            f"; warning: {listed(lacking)} cannot be {'learnt' if training else 'measured'} here: all known images are "
            "alike"
        )
        return (
            f"{len(split)} images, "
            f"{listed(each, 30)}{silent}{left if split.left_out else ''}{warning if lacking else ''}"
        )

    def caption(self, probability: torch.Tensor, finding: int) -> str:
        """See `Task`: the probability of that finding."""
        return f"probability {probability[finding]:.2f}"


def by_finding(policy: Mapping[str, str], findings: Sequence[str]) -> dict[str, str]:
    """A policy (`shards.names.policy`) spelt out for each finding that it says something of."""
    return {name: what for name in findings if (what := policy.get(name, policy.get("", "")))}
