"""What tests of whole runs share."""

import json
from pathlib import Path

import pytest

from trainer.loop import Trainer

TASKS = ("ne", "np", "ns", "nep", "neps")

BACKBONES = ("pvt", "vgg", "resnet")

POLICIES = ("fixed", "published", "ratio", "balanced", "constrained")

FORMS = ("energy", "coverage", "published", "lift")

SMALL = [
    "--backbone",
    "test_resnet",
    "--pretrained",
    "false",
    "--size",
    "64",
    "--batch",
    "8",
    "--workers",
    "0",
    "--tracker",
    "none",
    "--log_every",
    "1",
]


def seeing(flags: list[str]) -> list[str]:
    """The flags with the segmenter of the package, which finds the lungs of phantoms; the untrained one finds none."""
    at = flags.index("--lungs.weights")
    return flags[:at] + flags[at + 2 :]


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


class Interrupted(Exception):
    """Stands for a signal, a crash, a power cut."""


TOGETHER = pytest.mark.xdist_group("processes")  # one after the other: they meet at the same port


def content_of(run: Path) -> dict:
    return json.loads((run / "report.json").read_text())


class Stopped(Exception):
    pass


def stop_at(monkeypatch, step: int):
    ordinary = Trainer.step

    def dies(self, group, lam):
        if self.state.step == step:
            raise Stopped
        return ordinary(self, group, lam)

    monkeypatch.setattr(Trainer, "step", dies)
    return ordinary


NAMES = [
    "No Finding",
    *(f"A rather long name of a finding, as archives have them number {i}".replace(",", ";") for i in range(21)),
]
