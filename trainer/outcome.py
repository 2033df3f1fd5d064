"""What was measured of a split, and the figures of it."""

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from shards.dataset import Split
from trainer.calibration import Calibration
from trainer.calibration import figures as calibration_figures
from trainer.content import POINTING, Figures
from trainer.metrics import LOCALIZATION, THRESHOLDS, best_threshold, measured, summarize
from trainer.task import Pairs, Point, Task


@dataclass
class Outcome:
    """What was measured of a split, in its order, on every process: of N images, and of their P pairs.

    logits float [N,K]; target int8 [N,K]; pairs: which they are (`task.Pairs`); term float [P], the attention term of
    the trained form, NaN without a region; expected, expected_box, lesion float [P,21], columns of `metrics.localize`
    against the expected region (where its weight is a half or more), against what it was as a part of the lung box (the
    published region, else the rule's own part), and against lesions, NaN where there is no such ground truth;
    replaced bool [P], whether that part stands in for the region; similarity float [P], rank correlation with the CAM
    of a twin, NaN without one; split: whose images they are.
    """

    split: Split
    task: Task
    logits: torch.Tensor
    target: torch.Tensor
    pairs: Pairs
    term: torch.Tensor
    expected: torch.Tensor
    expected_box: torch.Tensor
    lesion: torch.Tensor
    similarity: torch.Tensor
    replaced: torch.Tensor

    def tables(self) -> dict[str, torch.Tensor]:
        """The kinds of localization, which are never mixed; ``expected_box`` has figures only where a rule follows the
        lungs' outline.
        """
        return {"expected": self.expected, "expected_box": self.expected_box, "lesion": self.lesion}

    def thresholds(self) -> dict[str, int | None]:
        """For each kind which of `metrics.THRESHOLDS` gives the best mean IoU here."""
        return {kind: best_threshold(table[measured(table)]) for kind, table in self.tables().items()}

    def patients(self) -> np.ndarray | None:
        """A number of the patient of each image, int64 [N]; one of whom nobody knows is a patient of its own. None: of
        no image it is known.
        """
        ids = self.split.ids()
        if not ids["patient"].any():
            return None
        own = np.where(ids["patient"] == 0, ids["key"], ids["patient"])
        return np.unique(own, return_inverse=True)[1]

    def operating_point(self) -> Point:
        """See `Task.operating_point`."""
        return self.task.operating_point(self.logits, self.target)

    def calibration(self) -> Calibration:
        """See `Task.calibration`."""
        return self.task.calibration(self.logits, self.target)

    def auc(self) -> float:
        """See `Task.auc`."""
        return self.task.auc(self.logits, self.target)

    def report(
        self,
        *,
        intervals: bool = False,
        chosen: dict[str, int | None] | None = None,
        threshold: Point = None,
        calibration: Calibration | None = None,
    ) -> Figures:
        """Classification and localization figures; from validation ``chosen``, thresholds of the IoU, ``threshold``,
        of the probability, and its ``calibration``.
        """
        of_labels = self.task.figures(
            self.logits, self.target, point=threshold, intervals=intervals, groups=self.patients
        )
        figures = cast(Figures, of_labels)
        figures["calibration"] = self._calibrated(calibration)
        figures["localization"], figures["pointing"] = {}, POINTING
        patients = self.patients() if intervals else None
        whose = patients[self.pairs.image.numpy()] if patients is not None else None
        for kind, table in self.tables().items():
            at = (chosen or {}).get(kind)
            names = LOCALIZATION if at is None else (*LOCALIZATION, "iou")
            columns = list(range(len(LOCALIZATION))) + ([] if at is None else [len(LOCALIZATION) + at])
            known = measured(table)
            cut = table[:, columns]
            each = {
                name: _summary(cut, known & (self.pairs.finding == k), names, whose)
                for k, name in enumerate(self.task.findings)
            }
            if kind == "expected_box" and not known.any():
                continue
            together = _summary(cut, known, names, whose)
            figures["localization"][kind] = {"all": together} | {n: f for n, f in each.items() if f}
            if at is not None and together is not None:
                together["iou_threshold"] = THRESHOLDS[at]
        return figures

    def _calibrated(self, calibration: Calibration | None) -> dict[str, dict[str, Any]]:
        """How far the probabilities of each finding are right, as they are and calibrated."""
        of = self.task.calibrated(self.logits, calibration).numpy() if calibration is not None else None
        found = {}
        for finding, truth, score in self.task.scored(self.logits, self.target):
            p = of[(self.target[:, finding] >= 0).numpy(), finding] if of is not None else None
            known = None if p is None or np.isnan(p).any() else p
            found[self.task.findings[finding]] = calibration_figures(truth.numpy(), score.numpy(), known)
        return found


def _summary(
    rows: torch.Tensor, which: torch.Tensor, names: tuple[str, ...], patients: np.ndarray | None
) -> dict[str, Any] | None:
    """`summarize` of some rows, bool [P]; ``patients``: of all of them."""
    return summarize(rows[which], names, None if patients is None else patients[which.numpy()])
