"""What every kind of task answers.

Legend: N images, B of them in a batch, K findings; target int8 [N,K] (`shards.targets`): 1 present, 0 absent, -1
unknown,
-2 uncertain; logits float [N,K]. A pair is an image and a finding that is present in it: what a CAM is taken of, and
what localization figures are about. C sums of a loss: one, or one for each finding.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from shards.dataset import Split
from shards.targets import Targets
from trainer.calibration import Calibration

# The probability from which on a finding is said to be there: of one, or by name of each of several. None: the task
# needs none, or none can be had.
Point = float | dict[str, float | None] | None


# Which patient each image is of, int64 [N], or None where that is not known; asked for where it is needed.
Groups = Callable[[], np.ndarray | None]


class Pairs(NamedTuple):
    """image, finding int64 [P]: in the order of the images, those of an image in the order of the findings."""

    image: torch.Tensor
    finding: torch.Tensor


class Drawn(NamedTuple):
    """The pair of each image that a step attends to: finding int64 [B]; standing float [B], for how many pairs of the
    image it stands, 0 where it has none.
    """

    finding: torch.Tensor
    standing: torch.Tensor


class Scored(NamedTuple):
    """A finding against the rest, where it is known: truth bool [n], score float [n]."""

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

    @property
    def threshold(self) -> str:
        """How an operating point is chosen: see `trainer.multilabel.choose`."""

    @property
    def several(self) -> bool:
        """Whether an image may have several findings: predictions then are lists of names."""

    def weighted(self, present: np.ndarray, absent: np.ndarray) -> "Task":
        """The task with the weights of its loss, where they follow the training images: int64 [K], how many have each
        finding and how many have not.
        """

    # -- the step -----------------------------------------------------------------------------------------------

    def drawn(self, target: torch.Tensor, places: torch.Tensor, chance: torch.Tensor) -> Drawn:
        """The pairs that are attended to; on the CPU.

        Args:
            places: bool [B,K] or [K], whether it is known where a finding is in an image.
            chance: float [B] in [0,1), the images' own random numbers.
        """

    def loss(
        self, logits: torch.Tensor, target: torch.Tensor, weight: torch.Tensor, chance: torch.Tensor
    ) -> torch.Tensor:
        """The classification loss, summed: [C]. What it is divided by follows from the sums of `counted`.

        Args:
            weight: float [B], 0 for stand-ins.
            chance: float [B] in [0,1), the images' own random numbers.
        """

    def counted(self, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """How many terms the loss has: [C]."""

    def shares(self, counts: torch.Tensor) -> torch.Tensor:
        """[C]: the mean of a step is the sum of loss times share, divided by the sum of counts.
        ``counts`` [C]: of the whole step.
        """

    def may_show(self, target: torch.Tensor) -> torch.Tensor:
        """Which findings may be seen in an image: bool [B,K]."""

    def healthy(self, target: torch.Tensor) -> torch.Tensor:
        """Which images show no finding for certain: bool [B]."""

    # -- figures ------------------------------------------------------------------------------------------------

    def pairs(self, target: torch.Tensor) -> Pairs:
        """All pairs of N images."""

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """Of each finding: float64 [N,K]."""

    def predicted(self, logits: torch.Tensor) -> torch.Tensor:
        """The finding that the model names first: int64 [N]."""

    def named(self, logits: torch.Tensor, point: Point) -> list[list[str]]:
        """The findings that the model says are there, of each image."""

    def operating_point(self, logits: torch.Tensor, target: torch.Tensor) -> Point:
        """Chosen on these images."""

    def calibration(self, logits: torch.Tensor, target: torch.Tensor) -> Calibration:
        """Fitted on these images."""

    def calibrated(self, logits: torch.Tensor, calibration: Calibration) -> torch.Tensor:
        """`probabilities` as the calibration corrects them: float64 [N,K]; NaN of a finding that has none."""

    def figures(
        self,
        logits: torch.Tensor,
        target: torch.Tensor,
        *,
        point: Point = None,
        intervals: bool = False,
        groups: Groups | None = None,
    ) -> dict[str, Any]:
        """Of classification: always auc, loss and images; ``point`` adds figures at it; intervals are over ``groups``
        (None: images), where the task knows how.
        """

    def auc(self, logits: torch.Tensor, target: torch.Tensor) -> float:
        """The one figure that a model is measured by; NaN where it is undefined."""

    def auc_interval(
        self,
        logits: torch.Tensor,
        target: torch.Tensor,
        other: torch.Tensor | None = None,
        groups: Groups | None = None,
    ) -> list[float]:
        """95% interval of `auc`; with the ``other`` logits of the same images, of the difference."""

    def scored(self, logits: torch.Tensor, target: torch.Tensor) -> Iterator[Scored]:
        """What a ROC curve is drawn of."""

    def lines(self, logits: torch.Tensor, target: torch.Tensor, point: Point) -> list[dict[str, Any]]:
        """What a line of predictions has of each image: its labels and the probabilities."""

    # -- words --------------------------------------------------------------------------------------------------

    def told(self, split: Split) -> str:
        """What a split has of each finding."""

    def caption(self, probability: torch.Tensor, finding: int) -> str:
        """What a picture of a pair says of probabilities [K]."""
