"""What a label is to training and to figures. One object knows it; nobody else asks which kind of task there is.

Legend: N images, K findings; target int8 [N,K], 1 where a finding is present (`shards.targets`); logits float [N,K].
A pair is an image and a finding that is present in it: what a CAM is taken of, and what localization figures are about.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch.nn import functional as F

from shards.sample import NO_FINDING
from shards.targets import SingleLabel, Targets
from trainer.losses import at_least_float32
from trainer.metrics import at_threshold, auc_interval, binary_report, classification_report, multiclass_auc, wilson


class Pairs(NamedTuple):
    """image, finding int64 [P]: in the order of the images, those of an image in the order of the findings."""

    image: torch.Tensor
    finding: torch.Tensor


class Scored(NamedTuple):
    """A finding against the rest: truth bool [n], score float [n]."""

    finding: int
    truth: torch.Tensor
    score: torch.Tensor


class Task(Protocol):
    """A kind of task. All methods are pure, and those of the step do not wait for a device."""

    @property
    def labels(self) -> Targets:
        """How samples become targets, for `shards.dataset.Split`."""

    @property
    def findings(self) -> tuple[str, ...]:
        """K names."""

    # -- the step -----------------------------------------------------------------------------------------------

    def attended(self, target: torch.Tensor) -> torch.Tensor:
        """The finding of each image whose CAM is taken and whose region is expected in training: int64 [B]."""

    def loss(self, logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The classification loss, summed; ``weight`` float [B] is 0 for stand-ins. What it is divided by is the sum of
        `counted`.
        """

    def counted(self, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """How many terms the loss has: scalar."""

    def may_show(self, target: torch.Tensor) -> torch.Tensor:
        """Which findings may be seen in an image: bool [B,K]."""

    def healthy(self, target: torch.Tensor) -> torch.Tensor:
        """Which images show no finding: bool [B]."""

    # -- figures ------------------------------------------------------------------------------------------------

    def pairs(self, target: torch.Tensor) -> Pairs:
        """All pairs of N images."""

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Of each finding: float64 [N,K]."""

    def predicted(self, logits: torch.Tensor) -> torch.Tensor:
        """The finding that the model names first: int64 [N]."""

    def operating_point(self, logits: torch.Tensor, target: torch.Tensor) -> float | None:
        """The probability from which on a finding is said to be there, chosen on these images; None where the task
        needs none, or none can be had.
        """

    def figures(
        self, logits: torch.Tensor, target: torch.Tensor, *, point: float | None = None, intervals: bool = False
    ) -> dict[str, Any]:
        """Of classification: always accuracy, auc, loss and images;
        ``point``, an operating point, adds figures at it.
        """

    def auc(self, logits: torch.Tensor, target: torch.Tensor) -> float:
        """The one figure that a model is measured by; NaN where it is undefined."""

    def auc_interval(
        self, logits: torch.Tensor, target: torch.Tensor, other: torch.Tensor | None = None
    ) -> list[float]:
        """95% interval of `auc`; with the ``other`` logits of the same images, of the difference."""

    def scored(self, logits: torch.Tensor, target: torch.Tensor) -> Iterator[Scored]:
        """What a ROC curve is drawn of."""

    def described(self, target: torch.Tensor) -> dict[str, Any]:
        """The targets [K] of an image, as a line of predictions has them."""


class OneOf:
    """One finding an image: cross-entropy over classes, No Finding among them. Every image has one pair.

    Args:
        findings: of the classes; class 0 first.
        among: those that an image may have beside others (`shards.targets.SingleLabel`).
    """

    def __init__(self, findings: Sequence[str], among: Sequence[str] = ()) -> None:
        self.labels = SingleLabel(findings, among)

    @property
    def findings(self) -> tuple[str, ...]:
        """See `Task`."""
        return self.labels.findings

    def attended(self, target: torch.Tensor) -> torch.Tensor:
        """See `Task`: the class."""
        return target.argmax(1)

    def loss(self, logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """See `Task`: cross-entropy."""
        return (F.cross_entropy(at_least_float32(logits), target.argmax(1), reduction="none") * weight).sum()

    def counted(self, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """See `Task`: images."""
        return weight.sum()

    def may_show(self, target: torch.Tensor) -> torch.Tensor:
        """See `Task`: the class alone."""
        return target == 1

    def healthy(self, target: torch.Tensor) -> torch.Tensor:
        """See `Task`: those of No Finding."""
        if NO_FINDING not in self.findings:
            return torch.zeros_like(target[:, 0], dtype=torch.bool)
        return target[:, self.findings.index(NO_FINDING)] == 1

    def pairs(self, target: torch.Tensor) -> Pairs:
        """See `Task`."""
        return Pairs(torch.arange(len(target)), target.argmax(1))

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """See `Task`."""
        return torch.softmax(logits.double(), 1)

    def predicted(self, logits: torch.Tensor) -> torch.Tensor:
        """See `Task`."""
        return logits.argmax(1)

    def operating_point(self, logits: torch.Tensor, target: torch.Tensor) -> float | None:
        """See `Task`: of class 1 of two, by Youden's index; None beyond two classes."""
        if logits.shape[1] != 2:
            return None
        threshold = binary_report(logits, target.argmax(1))["best_threshold"]
        return threshold if math.isfinite(threshold) else None

    def figures(
        self, logits: torch.Tensor, target: torch.Tensor, *, point: float | None = None, intervals: bool = False
    ) -> dict[str, Any]:
        """See `Task`: those of `metrics.classification_report`, and with a point `metrics.at_threshold`."""
        label = target.argmax(1)
        figures = classification_report(logits, label)
        if point is not None:
            figures["at_threshold"] = at_threshold(logits, label, point)
        if intervals:
            figures |= {"accuracy_95": wilson(figures["accuracy"], len(label)), "auc_95": auc_interval(logits, label)}
        return figures

    def auc(self, logits: torch.Tensor, target: torch.Tensor) -> float:
        """See `Task`: the mean over classes beyond two."""
        return multiclass_auc(logits, target.argmax(1))

    def auc_interval(
        self, logits: torch.Tensor, target: torch.Tensor, other: torch.Tensor | None = None
    ) -> list[float]:
        """See `Task`."""
        return auc_interval(logits, target.argmax(1), other)

    def scored(self, logits: torch.Tensor, target: torch.Tensor) -> Iterator[Scored]:
        """See `Task`: every class but the first, against the others."""
        probability = self.probabilities(logits)
        for k in range(1, len(self.findings)):
            yield Scored(k, target[:, k] == 1, probability[:, k])

    def described(self, target: torch.Tensor) -> dict[str, Any]:
        """See `Task`."""
        return {"label": self.findings[int(target.argmax())]}
