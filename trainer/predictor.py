"""A finished run, ready for images: ``trainer.load``.

    cxr = trainer.load("run_effusion")
    seen = cxr.predict("radiograph.png")
    seen.probability["Effusion"], seen.threshold["Effusion"], seen.predicted
    seen.lung_box, seen.lungs, seen.cam["Effusion"], seen.region["Effusion"]    # in pixels of the file

Legend: an image is uint8 [H,W], 0 black; the square is what it is packed into for training, side x side; S pixels of
a side of the network's input; B images of a batch, K findings.
"""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from shards.errors import InputError
from shards.gray import Scale
from shards.pixels import Frame, fit, load_image
from trainer.classifier import FocusClassifier
from trainer.config import Config
from trainer.groups import limits_of
from trainer.launching import Accelerator, start
from trainer.look import energies_of, look, regions_of
from trainer.lungs import LungFinder
from trainer.regions import Regions
from trainer.rules import Finding, rules_of
from trainer.run import open_run, read_report, task_of


class AtFile(Mapping[str, np.ndarray]):
    """Maps or masks by finding, each drawn to the pixels of its file when it is asked for.

    Args:
        of: float32 or bool [S,S] by finding.
        frame: where the file lies in the square of S pixels.
        shape: of the file.
    """

    def __init__(self, of: Mapping[str, torch.Tensor], frame: Frame, shape: tuple[int, int]) -> None:
        self.of, self.frame, self.shape = of, frame, shape

    def __getitem__(self, finding: str) -> np.ndarray:
        """float32 or bool [H,W]."""
        return drawn(self.of[finding], self.frame, self.shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self.of)

    def __len__(self) -> int:
        return len(self.of)


def drawn(square: torch.Tensor, frame: Frame, shape: tuple[int, int]) -> np.ndarray:
    """What lies in the square [S,S], float32 or bool, in pixels of the file: [H,W]."""
    inside = square[frame.top : frame.top + frame.height, frame.left : frame.left + frame.width]
    full = F.interpolate(inside.float()[None, None], shape, mode="bilinear", align_corners=False)[0, 0]
    return (full >= 0.5 if square.dtype is torch.bool else full).numpy()


@dataclass(frozen=True)
class Prediction:
    """What a run makes of an image.

    Attributes:
        probability: of each finding, in [0,1].
        calibrated: the same, as the run's val corrects it (`trainer.calibration`); without those that it cannot.
        threshold: by finding the probability from which on it is there, as the run's val chose it; None, or no entry:
            val gave none.
        positive: by finding whether its probability is at its threshold or above; without a threshold no entry.
        predicted: of several findings an image those that are positive, of one the most probable class.
        lung_box: x0 y0 x1 y1 in pixels of the file, ends exclusive; None: no lungs were found, or nobody looked.
        outline: the lungs, by that name; see also ``lungs``.
        cam: float32 [H,W] in [0,1] by finding, its Grad-CAM; empty where the backbone has no map.
        region: bool [H,W] by finding, where it is expected; empty without lungs.
        energy_in_region: by finding the share of its CAM there; None where the CAM is zero everywhere.
    """

    probability: dict[str, float]
    calibrated: dict[str, float]
    threshold: dict[str, float | None]
    positive: dict[str, bool]
    predicted: list[str]
    lung_box: tuple[int, int, int, int] | None
    outline: AtFile
    cam: AtFile
    region: AtFile
    energy_in_region: dict[str, float | None]

    @property
    def lungs(self) -> np.ndarray | None:
        """bool [H,W] of the file; None: no lungs were found, or nobody looked."""
        return self.outline.get("lungs")


class Outputs(NamedTuple):
    """What a network makes of a batch, on the CPU. None, or no entry: there is no such thing."""

    logits: torch.Tensor  # float [B,K]
    cam: torch.Tensor | None  # float [B,K,S,S] in [0,1]
    boxes: torch.Tensor | None  # int64 [B,4] x0 y0 x1 y1, ends exclusive, pixels of the network's input
    lungs: torch.Tensor | None  # bool [B,S,S]
    found: torch.Tensor  # bool [B]: whether there are lungs
    regions: dict[str, torch.Tensor]  # bool [B,S,S] by finding, nowhere in an image without lungs


class Reader(ABC):
    """What radiographs go through on their way into a network, and what comes out on its way to a `Prediction`.

    Args:
        config: of the run.
        known: its findings.
        stored: how the training images were packed: size, aspect, scales.
        report: thresholds and calibration, as report.json has them.
        epoch: of its model, from 0 on.

    Attributes:
        findings: K names.
        side: pixels of a side of the square that an image is packed into.
    """

    def __init__(
        self,
        config: Config,
        known: Mapping[str, Finding],
        stored: Mapping[str, Any],
        report: Mapping[str, Any],
        epoch: int,
    ) -> None:
        self.config, self.epoch = config, epoch
        self.task = task_of(config, known)
        self.findings = self.task.findings
        self.rules = rules_of(known)
        self.point = report.get("threshold")
        self.threshold = limits_of(self.findings, self.point)
        self.calibration = report.get("calibration") or {}
        self.unfinished = bool(report.get("training", {"unfinished": True}).get("unfinished"))
        self.side, self.aspect = int(stored["size"]), str(stored.get("aspect", "stretch"))
        self.scales: list[Scale] = [(float(low), float(high)) for low, high in stored.get("scales", ())]

    @abstractmethod
    def see(self, squares: torch.Tensor) -> Outputs:
        """What the network makes of a batch, uint8 [B,side,side] on the CPU, from `packed`."""

    @property
    @abstractmethod
    def looks_for_lungs(self) -> bool:
        """Whether it has a lung segmenter."""

    @property
    def size(self) -> int:
        """S."""
        return self.config.size

    def read(self, path: Path | str) -> np.ndarray:
        """An image file, DICOM included, as bright as the training images were packed: uint8 [H,W]. InputError names
        the file.
        """
        return load_image(path, self.scales)

    def packed(self, image: np.ndarray) -> np.ndarray:
        """The square of an image, as of the training images: uint8 [side,side]."""
        return fit(image, self.side, self.aspect)

    def predict(self, image: np.ndarray | Path | str) -> Prediction:
        """What the run makes of an image file, or of gray pixels, uint8 [H,W]. InputError: it is neither."""
        if not isinstance(image, np.ndarray):
            image = self.read(image)
        if image.dtype != np.uint8 or image.ndim != 2 or not image.size:
            raise InputError(
                f"an image of {image.dtype} {list(image.shape)}: expected gray pixels, uint8 [H,W], or a file's path"
            )
        return self.look(torch.from_numpy(self.packed(image).copy())[None], [image.shape])[0]

    def look(self, squares: torch.Tensor, shapes: Sequence[tuple[int, ...]]) -> list[Prediction]:
        """What the run makes of a batch, in one forward.

        Args:
            squares: uint8 [B,side,side] on the CPU, from `packed`; shapes: height and width of their files.
        """
        seen = self.see(squares)
        probability, named = self.task.probabilities(seen.logits).tolist(), self.task.named(seen.logits, self.point)
        calibrated = self.task.calibrated(seen.logits, self.calibration).tolist()
        energies = energies_of(seen.cam, seen.regions, self.findings)
        result = []
        for i, (shape, found) in enumerate(zip(shapes, seen.found.tolist(), strict=True)):
            frame, file = Frame.of(shape, self.size, self.aspect), (shape[0], shape[1])
            of = dict(zip(self.findings, probability[i], strict=True))
            maps = {name: seen.cam[i, k] for k, name in enumerate(self.findings)} if seen.cam is not None else {}
            outline = {"lungs": seen.lungs[i]} if found and seen.lungs is not None else {}
            result.append(
                Prediction(
                    probability=of,
                    calibrated={n: p for n, p in zip(self.findings, calibrated[i], strict=True) if not math.isnan(p)},
                    threshold=dict(self.threshold),
                    positive={name: of[name] >= at for name, at in self.threshold.items() if at is not None},
                    predicted=named[i],
                    lung_box=self._at_file(seen.boxes[i], shape) if found and seen.boxes is not None else None,
                    outline=AtFile(outline, frame, file),
                    cam=AtFile(maps, frame, file),
                    region=AtFile({n: place[i] for n, place in seen.regions.items()} if found else {}, frame, file),
                    energy_in_region={name: each[i] for name, each in energies.items()},
                )
            )
        return result

    def _at_file(self, box: torch.Tensor, shape: tuple[int, ...]) -> tuple[int, int, int, int]:
        """A box int64 [4] in pixels of the network's input, in those of the file."""
        share = Frame.of(shape, self.side, self.aspect).share((box * (self.side / self.size)).tolist())
        x0, y0, x1, y1 = (round(v * s) for v, s in zip(share, (shape[1], shape[0]) * 2, strict=True))
        return x0, y0, x1, y1


class Predictor(Reader):
    """A run's best model with all that it needs to be used on any radiograph.

    Args:
        folder: of the run.
        accelerator: of the process; None: one of its own, in the precision of the training.

    Attributes:
        model: the classifier, a module in eval mode: images float [B,1,S,S] in [0,1] -> logits [B,K] and a CAM.

    InputError: it is no run folder, or has no model yet.
    """

    def __init__(self, folder: Path, accelerator: Accelerator | None = None) -> None:
        opened = open_run(folder)
        stored: dict[str, Any] = json.loads(opened.metadata.get("stored", "{}"))
        stored.setdefault("size", opened.metadata["stored_size"])
        super().__init__(opened.config, opened.findings, stored, read_report(folder), int(opened.metadata["epoch"]))
        self.accelerator = accelerator or start(opened.config.seed, opened.precision)
        device = self.accelerator.device
        self.model: FocusClassifier = opened.model.to(device)
        self.regions = Regions(self.findings, self.rules, self.size, device)
        self.segmenter = opened.segmenter.to(device) if opened.segmenter is not None else None
        self.key = self.segmenter.fingerprint() if self.segmenter is not None else ""

    @property
    def looks_for_lungs(self) -> bool:
        """Whether it has a lung segmenter."""
        return self.segmenter is not None

    def see(self, squares: torch.Tensor) -> Outputs:
        """See `Reader`."""
        count, device = len(squares), self.accelerator.device
        finder = LungFinder(self.segmenter, self.size, count, "", self.key) if self.segmenter is not None else None
        every = torch.arange(len(self.findings), device=device).expand(count, -1)
        index = torch.arange(count)
        raw = squares[:, None].to(device)
        seen = look(self.accelerator, self.model, raw, index, every, finder, self.regions, index * 0)
        boxes, lungs = (part.cpu() if part is not None else None for part in (seen.boxes, seen.lungs))
        places = regions_of(seen, self.findings, self.rules, self.regions)
        cam = seen.cam.float().cpu() if seen.cam is not None else None
        places = {name: at.cpu() for name, at in places.items()}
        return Outputs(seen.logits.cpu(), cam, boxes, lungs, seen.found, places)
