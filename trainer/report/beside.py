"""The images on which two runs are of another opinion, side by side: what each says of them, and its map."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from shards.dataset import Split
from shards.errors import InputError
from shards.pixels import encode_image
from shards.store import open_store
from trainer.drawing import overlay
from trainer.launching import start
from trainer.predictor import Prediction, Predictor
from trainer.report.words import shown_split
from trainer.run import read_report

SIDE = 320  # pixels of a picture


@dataclass(frozen=True)
class Beside:
    """An image: its name, a finding, what is known of it, and for each run its name, what it says, and a JPEG of its
    map.
    """

    key: str
    finding: str
    known: str
    views: list[tuple[str, str, bytes]]


class Runs:
    """Runs whose models and images are opened once, when they are asked for.

    Args:
        folders: by name.
    """

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders = folders
        self.opened: dict[str, Predictor] = {}
        self.split: Split | None = None
        self.positions: dict[str, int] = {}

    def beside(self, names: Sequence[str], wanted: Sequence[tuple[str, str]]) -> list[Beside]:
        """Images by key and finding, seen by each of the runs. InputError: images or a model are not there any more."""
        if self.split is None:
            self._open(names[0])
        assert self.split is not None
        found = []
        for key, finding in wanted:
            if key not in self.positions:
                continue
            position = self.positions[key]
            pixels = self.split.image(position)
            views = []
            for name in names:
                cxr = self._run(name)
                seen = cxr.look(torch.from_numpy(cxr.packed(pixels).copy())[None], [pixels.shape])[0]
                views.append((name, _said(seen, finding), _drawn(pixels, seen, finding)))
            k = self.opened[names[0]].findings.index(finding)
            state = int(self.split.targets()[position, k])
            known = "has it" if state == 1 else "does not have it" if state == 0 else "unknown"
            found.append(Beside(key, finding, known, views))
        return found

    def _run(self, name: str) -> Predictor:
        if name not in self.opened:
            self.opened[name] = Predictor(self.folders[name], start(0, cpu=True, mixed_precision="no"))
        return self.opened[name]

    def _open(self, name: str) -> None:
        cxr = self._run(name)
        report = read_report(self.folders[name])
        shown = shown_split(report)
        split = Split(open_store(cxr.config.shards), shown, cxr.task.labels)
        if report.get("images", {}).get(shown) != split.fingerprint:
            raise InputError(f"{cxr.config.shards}: has other {shown} images now than {name} was measured on")
        self.split, self.positions = split, {split.key(i): i for i in range(len(split))}


def _said(seen: Prediction, finding: str) -> str:
    at = seen.threshold.get(finding)
    return f"{seen.probability[finding]:.2f}" + (f", from {at:.2f} on" if at is not None else "")


def _drawn(pixels: np.ndarray, seen: Prediction, finding: str) -> bytes:
    cam = seen.cam[finding] if seen.cam else np.zeros(pixels.shape, np.float32)
    drawn = overlay(pixels, cam, lungs=seen.lungs, region=seen.region.get(finding))
    picture = Image.fromarray(drawn)
    picture.thumbnail((SIDE, SIDE))
    return encode_image(np.asarray(picture), "jpg")
