"""One finding an image."""

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from shards.dataset import Split
from shards.sample import NO_FINDING
from shards.targets import SingleLabel
from trainer.calibration import TEMPERATURE, Calibration, temperature
from trainer.drawing import short
from trainer.intervals import proportion
from trainer.losses import at_least_float32, constant
from trainer.metrics import at_threshold, auc_interval, binary_report, classification_report, multiclass_auc
from trainer.multilabel import Cells, at_point, choose, intervals_at
from trainer.task.protocol import Drawn, Groups, Pairs, Point, Scored

FOCUS = 2.0  # gamma of the focal loss (Lin et al., ICCV 2017)


class OneOf:
    """One finding an image: cross-entropy over classes, No Finding among them. Every image has one pair.

    Args:
        findings: of the classes; class 0 first.
        among: those that an image may have beside others (`shards.targets.SingleLabel`).
        weights: of the classes in the loss, a number for each name, 1 for others; None: ``balanced``, as many times as
            its images are fewer than the mean of the classes.
        focal: the focal loss in place of cross-entropy (Lin et al., ICCV 2017).
        threshold: how that of class 1 of two is chosen (`trainer.multilabel.choose`).
    """

    several = False

    def __init__(
        self,
        findings: Sequence[str],
        among: Sequence[str] = (),
        *,
        weights: Mapping[str, float] | None = {},
        focal: bool = False,
        threshold: str = "youden",
    ) -> None:
        self.labels = SingleLabel(findings, among)
        self.balanced, self.focal, self.threshold = weights is None, focal, threshold
        self.weights = tuple(weights.get(name, 1.0) for name in findings) if weights else None

    def weighted(self, present: np.ndarray, absent: np.ndarray) -> "OneOf":
        """See `Task`."""
        if not self.balanced:
            return self
        mean = {n: present.mean() / max(1, k) for n, k in zip(self.findings, present.tolist(), strict=True)}
        return OneOf(self.findings, tuple(self.labels.among), weights=mean, focal=self.focal, threshold=self.threshold)

    @property
    def findings(self) -> tuple[str, ...]:
        """See `Task`."""
        return self.labels.findings

    def drawn(self, target: torch.Tensor, places: torch.Tensor, chance: torch.Tensor) -> Drawn:
        """See `Task`: the class, there or not."""
        return Drawn(target.argmax(1), torch.ones(len(target)))

    def loss(
        self, logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, chance: torch.Tensor
    ) -> torch.Tensor:
        """See `Task`: cross-entropy."""
        each = F.cross_entropy(at_least_float32(logits), target.argmax(1), reduction="none")
        if self.focal:
            each = each * (1 - torch.exp(-each)) ** FOCUS
        return (each * self._counts(target, weight)).sum()[None]

    def counted(self, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """See `Task`: images, each as often as its class weighs."""
        return self._counts(target, weight).sum()[None]

    def _counts(self, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return weight if self.weights is None else weight * constant(self.weights, weight.device)[target.argmax(1)]

    def shares(self, counts: torch.Tensor) -> torch.Tensor:
        """See `Task`."""
        return torch.ones_like(counts)

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

    def named(self, logits: torch.Tensor, point: Point) -> list[list[str]]:
        """See `Task`: the predicted class."""
        return [[self.findings[k]] for k in self.predicted(logits).tolist()]

    def operating_point(self, logits: torch.Tensor, target: torch.Tensor) -> Point:
        """See `Task`: of class 1 of two; None beyond two classes."""
        if logits.shape[1] != 2:
            return None
        if self.threshold != "youden":
            return choose((target[:, 1] == 1).numpy(), self.probabilities(logits)[:, 1].numpy(), self.threshold)
        threshold = binary_report(logits, target.argmax(1))["best_threshold"]
        return threshold if math.isfinite(threshold) else None

    def calibration(self, logits: torch.Tensor, target: torch.Tensor) -> Calibration:
        """See `Task`: a temperature."""
        return {TEMPERATURE: [temperature(logits.double().numpy(), target.argmax(1).numpy())]}

    def calibrated(self, logits: torch.Tensor, calibration: Calibration) -> torch.Tensor:
        """See `Task`."""
        known = calibration.get(TEMPERATURE)
        return torch.softmax(logits.double() / (known[0] if known else math.nan), 1)

    def figures(
        self,
        logits: torch.Tensor,
        target: torch.Tensor,
        *,
        point: Point = None,
        intervals: bool = False,
        groups: Groups | None = None,
    ) -> dict[str, Any]:
        """See `Task`: those of `metrics.classification_report`, and with a point `metrics.at_threshold`."""
        label = target.argmax(1)
        figures = classification_report(logits, label)
        if isinstance(point, float):
            figures["at_threshold"] = at_threshold(logits, label, point)
        if intervals:
            patients = groups() if groups else None
            right = (logits.argmax(1) == label).double().numpy()
            figures["accuracy_95"] = proportion(right, patients)
            figures["auc_95"] = auc_interval(logits, label, patients=patients)
            figures["resampled"] = "images" if patients is None else "patients"
            probability, truth = self.probabilities(logits).numpy(), target.numpy()
            figures |= Cells(self.findings[1:], probability[:, 1:], truth[:, 1:]).areas(patients)
            each = Cells(self.findings, probability, truth).figures({}, groups=patients, intervals=True)["per_finding"]
            predicted = self.predicted(logits).numpy()
            for k, (row, of) in enumerate(zip(figures["per_class"], each.values(), strict=True)):
                named, is_ = predicted == k, truth[:, k] == 1
                row |= {name: of[name] for name in ("auc", "auc_95", "auprc", "auprc_95")}
                row |= at_point(is_, named) | {"f1": row["f1"]} | intervals_at(is_, named, patients)
            if isinstance(point, float):
                figures["at_threshold"] |= intervals_at(truth[:, 1] == 1, probability[:, 1] >= point, patients)
        return figures

    def auc(self, logits: torch.Tensor, target: torch.Tensor) -> float:
        """See `Task`: the mean over classes beyond two."""
        return multiclass_auc(logits, target.argmax(1))

    def auc_interval(
        self,
        logits: torch.Tensor,
        target: torch.Tensor,
        other: torch.Tensor | None = None,
        groups: Groups | None = None,
    ) -> list[float]:
        """See `Task`."""
        return auc_interval(logits, target.argmax(1), other, patients=groups() if groups else None)

    def scored(self, logits: torch.Tensor, target: torch.Tensor) -> Iterator[Scored]:
        """See `Task`: every class but the first, against the others."""
        probability = self.probabilities(logits)
        for k in range(1, len(self.findings)):
            yield Scored(k, target[:, k] == 1, probability[:, k])

    def lines(self, logits: torch.Tensor, target: torch.Tensor, point: Point) -> list[dict[str, Any]]:
        """See `Task`."""
        return [
            {
                "label": self.findings[label],
                "probability": {name: round(p, 6) for name, p in zip(self.findings, row, strict=True)},
            }
            for label, row in zip(target.argmax(1).tolist(), self.probabilities(logits).tolist(), strict=True)
        ]

    def told(self, split: Split) -> str:
        """See `Task`."""
        left = f"; {split.left_out} others left out (of none of the task's classes, or of several)"
        counts = ", ".join(f"{n} {finding}" for finding, n in split.counts().items())
        return f"{counts}{left if split.left_out else ''}"

    def caption(self, probability: torch.Tensor, finding: int) -> str:
        """See `Task`: the class that is predicted."""
        guess = int(probability.argmax())
        return f"predicted {short(self.findings[guess])} {probability[guess]:.2f}"
