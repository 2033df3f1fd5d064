"""What the labels of images are to a task: which samples belong to it, and their targets. What is trained on them,
`trainer.task` knows.

Legend: K findings of the task; a target is one of `PRESENT`, `ABSENT`, `UNKNOWN`, `UNCERTAIN`. Uncertain is unknown,
but training may make something of it.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from shards.errors import listed
from shards.names import exact_or_known_as, known_as, same_as
from shards.sample import NO_FINDING, SILENT, SUPPORT_DEVICES, Asked, Labels

PRESENT, ABSENT, UNKNOWN, UNCERTAIN = 1, 0, -1, -2

Target = tuple[int, ...]


class Targets(Protocol):
    """A way to make targets of labels."""

    @property
    def findings(self) -> tuple[str, ...]:
        """Those of the task, in the order of the targets."""

    def reader(
        self, names: Sequence[str], asked: Asked, training: bool, where: str
    ) -> Callable[[Labels], Target | None]:
        """What gives the targets of an image, K numbers; None: it does not belong to the task.

        Args:
            names: all findings that the set knows; asked: see there.
            training: whether the images are trained on; others are measured on.

        Raises:
            InputError: a finding of the task that is two of the set.
        """

    def must_be_asked(self, training: bool) -> bool:
        """Whether a finding of the task that a set was not asked for is an error."""

    def signature(self, targets: np.ndarray) -> np.ndarray:
        """What a split's fingerprint holds of each row of targets int8 [n,K]: an array of n rows."""

    def lacking(self, rows: Sequence[Labels], images: np.ndarray, targets: np.ndarray, training: bool) -> str:
        """What a split lacks for the task to be trained, in words; empty: nothing.

        Args:
            rows: the different labels; images int [rows]: how many samples of the split have each, of the task or not.
            targets: int8 [rows,K], of those of the task; others have no 1.
        """


class SingleLabel:
    """One finding an image: it belongs to class k where findings[k] is its one finding. Support Devices, which are no
    disease, may be beside it. Uncertain findings must not, nor is a finding that may be there its own.

    Args:
        findings: of the classes.
        among: those to which an image belongs whatever else it shows, as long as it belongs to no other class.
    """

    def __init__(self, findings: Sequence[str], among: Sequence[str] = ()) -> None:
        self.findings, self.among = tuple(findings), frozenset(among)

    def reader(
        self, names: Sequence[str], asked: Asked, training: bool, where: str
    ) -> Callable[[Labels], Target | None]:
        """See `Targets`: one 1."""
        own = {exact_or_known_as(name, names, where) or name: name for name in self.findings}

        def read(said: Labels) -> Target | None:
            return self._target(
                [own.get(name, name) for name in said.present or _healthy(said, asked)],
                [own.get(name, name) for name in said.uncertain],
            )

        return read

    def _target(self, present: Sequence[str], uncertain: Sequence[str]) -> Target | None:
        found, open_ = (
            [name for name in said if name != SUPPORT_DEVICES or name in self.findings] for said in (present, uncertain)
        )
        of_task = [name for name in self.findings if name in found]
        if len(of_task) != 1 or any(name in self.findings for name in open_):
            return None
        if (len(found) == 1 and not open_) or of_task[0] in self.among:
            return tuple(int(name == of_task[0]) for name in self.findings)
        return None

    def must_be_asked(self, training: bool) -> bool:
        """See `Targets`: always."""
        return True

    def signature(self, targets: np.ndarray) -> np.ndarray:
        """See `Targets`: the number of the class."""
        return targets.argmax(1).astype(np.int16)

    def lacking(self, rows: Sequence[Labels], images: np.ndarray, targets: np.ndarray, training: bool) -> str:
        """See `Targets`: every class must have images."""
        count = images @ (targets == PRESENT)
        empty = [name for name, n in zip(self.findings, count.tolist(), strict=True) if not n]
        if not empty:
            return ""
        sets = [said.present for said in rows]
        first, shared = empty[0], empty[0] in self.among
        message = f"no image {'of' if shared else 'whose one finding is'} {listed(empty)}"
        beside = sum(n for found, n in zip(sets, images.tolist(), strict=True) if first in found)
        if beside and not shared:
            message += (
                f" ({beside} have {first} beside others: to take those, declare it with `images: any` in a file "
                "of --findings, or train several findings an image with --labels.kind any)"
            )
        torn = [first in found and sum(name in self.findings for name in found) > 1 for found in sets]
        several = sum(n for is_torn, n in zip(torn, images.tolist(), strict=True) if is_torn)
        if several and shared:
            message += (
                f" alone of the task's classes ({several} show {first} and another of them: an image belongs to "
                "one class or to none)"
            )
        return message


class MultiLabel:
    """Any number of findings an image, some of them unknown. No Finding is no finding of it. Images are measured on
    whose source was not asked for some of the findings; they are not trained on.

    Args:
        findings: of the task.
        unmentioned: what a finding is of which a source that was asked for it says nothing, where it would not list all
            that is absent: ``negative`` or ``ignore``. With the latter its No Finding says that all others are absent,
            but not Support Devices.
        drop: findings that are not trained on where they are uncertain: the whole image is left out. It is measured on.
        made: findings of which training makes something where they are uncertain.
    """

    def __init__(
        self,
        findings: Sequence[str],
        unmentioned: str = "negative",
        drop: Sequence[str] = (),
        made: Sequence[str] = (),
    ) -> None:
        self.findings = tuple(findings)
        self.unmentioned, self.drop, self.made = unmentioned, frozenset(drop), frozenset(made)

    def reader(
        self, names: Sequence[str], asked: Asked, training: bool, where: str
    ) -> Callable[[Labels], Target | None]:
        """See `Targets`: an image belongs where one of the task's findings at least is known."""
        of_set = [known_as(name, names, where) or name for name in self.findings]
        healthy = known_as(NO_FINDING, names, where) or NO_FINDING
        device = [same_as(name) == same_as(SUPPORT_DEVICES) for name in self.findings]
        rest = [
            UNKNOWN if name not in asked.names or not (asked.absent or self.unmentioned == "negative") else ABSENT
            for name in of_set
        ]

        def read(said: Labels) -> Target | None:
            if said == SILENT:
                return None
            present, absent, uncertain = map(frozenset, said)
            well = healthy in present
            target = tuple(
                PRESENT
                if name in present
                else UNCERTAIN
                if name in uncertain
                else ABSENT
                if name in absent or (well and not is_device)
                else unlisted
                for name, unlisted, is_device in zip(of_set, rest, device, strict=True)
            )
            if training and any(
                t == UNCERTAIN and name in self.drop for t, name in zip(target, self.findings, strict=True)
            ):
                return None
            made = training and any(
                t == UNCERTAIN and name in self.made for t, name in zip(target, self.findings, strict=True)
            )
            return target if made or any(t in (PRESENT, ABSENT) for t in target) else None

        return read

    def must_be_asked(self, training: bool) -> bool:
        """See `Targets`: in training."""
        return training

    def signature(self, targets: np.ndarray) -> np.ndarray:
        """See `Targets`: all of it."""
        return targets

    def lacking(self, rows: Sequence[Labels], images: np.ndarray, targets: np.ndarray, training: bool) -> str:
        """See `Targets`: something must be known of every finding that is trained."""
        if not training:
            return "" if len(targets) and ((targets == PRESENT) | (targets == ABSENT))[images > 0].any() else _NOTHING
        known = images @ ((targets == PRESENT) | (targets == ABSENT))
        empty = [name for name, n in zip(self.findings, known.tolist(), strict=True) if not n]
        return f"nothing known of {listed(empty)}: every image leaves it open" if empty else ""


_NOTHING = "no image of which anything is known"


def _healthy(said: Labels, asked: Asked) -> tuple[str, ...]:
    """Where nothing is present: No Finding, if the source lists all that is, nothing is uncertain, and it does not say
    that this is no healthy image.
    """
    lists_all = asked.absent and asked.names and not said.uncertain
    return (NO_FINDING,) if lists_all and not any(same_as(n) == same_as(NO_FINDING) for n in said.absent) else ()


class Unlabelled:
    """No task: all samples, whatever they show, with K = 0 targets, as for lung masks."""

    findings: tuple[str, ...] = ()

    def reader(
        self, names: Sequence[str], asked: Asked, training: bool, where: str
    ) -> Callable[[Labels], Target | None]:
        """See `Targets`."""
        return lambda said: ()

    def must_be_asked(self, training: bool) -> bool:
        """See `Targets`: never."""
        return False

    def signature(self, targets: np.ndarray) -> np.ndarray:
        """See `Targets`."""
        return np.zeros(len(targets), np.int16)

    def lacking(self, rows: Sequence[Labels], images: np.ndarray, targets: np.ndarray, training: bool) -> str:
        """See `Targets`."""
        return ""
