"""What sets of findings are to a task: which samples belong to it, and their targets. What is trained on them,
`trainer.task` knows.

Legend: K findings of the task; a target is 1 where a finding is present, 0 where it is absent.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from shards.errors import listed
from shards.sample import SUPPORT_DEVICES

FindingSets = Sequence[Sequence[str]]  # the different sets of findings of an archive, as index.json lists them


class Targets(Protocol):
    """A way to make targets of findings."""

    @property
    def findings(self) -> tuple[str, ...]:
        """Those of the task, in the order of the targets."""

    def of(self, found: Sequence[str]) -> tuple[int, ...] | None:
        """The targets of an image with these findings, K numbers; None: it does not belong to the task."""

    def signature(self, targets: np.ndarray) -> np.ndarray:
        """What a split's fingerprint holds of each row of targets int8 [n,K]: an array of n rows."""

    def lacking(self, sets: FindingSets, codes: np.ndarray, count: np.ndarray) -> str:
        """What a split lacks for the task to be trained, in words; empty: nothing.

        Args:
            sets: of findings; codes int [n]: which one each sample of the split has.
            count: int [K], samples with each finding among those that belong to the task.
        """


class SingleLabel:
    """One finding an image: it belongs to class k where findings[k] is its one finding. Support Devices, which are no
    disease, may be beside it.

    Args:
        findings: of the classes.
        among: those to which an image belongs whatever else it shows, as long as it belongs to no other class.
    """

    def __init__(self, findings: Sequence[str], among: Sequence[str] = ()) -> None:
        self.findings, self.among = tuple(findings), frozenset(among)

    def of(self, found: Sequence[str]) -> tuple[int, ...] | None:
        """See `Targets`: one 1."""
        found = [name for name in found if name != SUPPORT_DEVICES or name in self.findings]
        of_task = [name for name in self.findings if name in found]
        if len(of_task) == 1 and (len(found) == 1 or of_task[0] in self.among):
            return tuple(int(name == of_task[0]) for name in self.findings)
        return None

    def signature(self, targets: np.ndarray) -> np.ndarray:
        """See `Targets`: the number of the class."""
        return targets.argmax(1).astype(np.int16)

    def lacking(self, sets: FindingSets, codes: np.ndarray, count: np.ndarray) -> str:
        """See `Targets`: every class must have images."""
        empty = [name for name, n in zip(self.findings, count.tolist(), strict=True) if not n]
        if not empty:
            return ""
        images = np.bincount(codes, minlength=len(sets)).tolist()  # of each set
        first, shared = empty[0], empty[0] in self.among
        message = f"no image {'of' if shared else 'whose one finding is'} {listed(empty)}"
        beside = sum(n for found, n in zip(sets, images, strict=True) if first in found)
        if beside and not shared:
            message += (
                f" ({beside} have {first} beside others: to take those, declare it with `images: any` in a file "
                "of --findings)"
            )
        torn = [first in found and sum(name in self.findings for name in found) > 1 for found in sets]
        several = sum(n for is_torn, n in zip(torn, images, strict=True) if is_torn)
        if several and shared:
            message += (
                f" alone of the task's classes ({several} show {first} and another of them: an image belongs to "
                "one class or to none)"
            )
        return message


class Unlabelled:
    """No task: all samples, whatever they show, with K = 0 targets, as for lung masks."""

    findings: tuple[str, ...] = ()

    def of(self, found: Sequence[str]) -> tuple[int, ...]:
        """See `Targets`."""
        return ()

    def signature(self, targets: np.ndarray) -> np.ndarray:
        """See `Targets`."""
        return np.zeros(len(targets), np.int16)

    def lacking(self, sets: FindingSets, codes: np.ndarray, count: np.ndarray) -> str:
        """See `Targets`."""
        return ""
