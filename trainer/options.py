"""The settings of the commands beside trainer.train, each checked before torch is imported."""

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Literal

from trainer.sections import Painting, Strength, wrong_point


@dataclass
class LungsTrainConfig:
    """Train a lung segmenter from shards with lung masks."""

    shards: str
    """Folders or URLs of packed shards with lung masks (python -m shards masks, or phantom), separated by commas: one
    for each source.
    """
    out: str
    """Run folder to make; lung_unet.safetensors goes there."""
    test: str = ""
    """More of them, separated by commas, that are only measured at the end, all their splits: hospitals that are left
    out of training.
    """
    init: str = ""
    """Weights to start from (file or run folder; "shipped": those of the package), for a second phase or another
    hospital; their net is taken, too.
    """
    channels: list[int] = field(default_factory=lambda: [24, 48, 96, 192, 256])
    """Of the U-Net's five levels: the default is light (3.3 M parameters, 1.6 GMAC), [64, 128, 256, 512, 1024] the
    published one (31.04 M, 193 GMAC).
    """
    patch: int = 2
    """Side of the squares of pixels that the first level takes together; published: 1."""
    size: int = 256
    """Working size in pixels, a multiple of 16 x patch: 256 is light, 512 the published one."""
    batch: int = 8
    """Images per process."""
    epochs: int = 40
    """Passes over the training images."""
    lr: float = 2e-3
    """Largest learning rate of AdamW, reached after a fifth of the steps, then down to 0 along a cosine."""
    seed: int = 0
    """Of weights, order and augmentation."""
    augment: Strength = field(
        default_factory=lambda: Strength(
            rotate=15,
            scale=0.2,
            shift=0.08,
            flip=0.3,
            contrast=0.4,
            brightness=0.15,
            gamma=0.5,
            noise=0.05,
            invert=0.15,
        )
    )
    paint: Painting = field(
        default_factory=lambda: Painting(
            opacity=0.55, gas=0.4, collapse=0.1, devices=0.35, tone=0.5, warp=0.5, frame=0.3, negative=0.12
        )
    )
    threshold: float = 0.35
    """Probability above which a pixel is lung: below 0.5 the box reaches further into the thin costophrenic angles."""
    workers: int = 2
    """Loader processes per process."""
    resume: bool = False
    """Go on with the run in --out after its last whole epoch."""

    def problems(self) -> list[str]:
        """Everything that is wrong with the values, each naming its flag."""
        found = [
            f"--{n} {getattr(self, n)}: must be at least 1"
            for n in ("patch", "batch", "epochs")
            if getattr(self, n) < 1
        ]
        if len(self.channels) != 5 or min(self.channels) < 1:
            found.append(f"--channels {self.channels}: expected five whole numbers, such as [24, 48, 96, 192, 256]")
        if self.patch > 0 and (self.size < 16 * self.patch or self.size % (16 * self.patch)):
            found.append(f"--size {self.size}: must be a multiple of 16 x --patch {self.patch}")
        if not self.lr > 0:
            found.append(f"--lr {self.lr}: must be above 0")
        if not 0 < self.threshold < 1:
            found.append(f"--threshold {self.threshold}: must lie between 0 and 1")
        if self.workers < 0 or self.seed < 0:
            found.append("--workers and --seed must not be negative")
        chances = dataclasses.asdict(self.paint) | {
            "augment.flip": self.augment.flip,
            "augment.invert": self.augment.invert,
        }
        found += [
            f"--{n if '.' in n else f'paint.{n}'} {v}: must lie in [0, 1]"
            for n, v in chances.items()
            if not 0 <= v <= 1
        ]
        return found


@dataclass
class EvaluateConfig:
    """Evaluate a finished run on its own shards or on others."""

    run: str
    """Run folder of trainer.train."""
    shards: str = ""
    """Folder or URL of packed shards with val, or test, or both; empty: those that the run was trained on."""
    out: str = ""
    """Folder for the reports; empty: the run folder for its own shards, RUN/evaluate_<dataset> for others."""
    by: str = ""
    """Columns of the samples, with commas, that figures are split by, such as drain,view."""
    per: str = ""
    """Figures of studies or patients instead of images, too: a column of the samples, or patient; of its images the
    mean probability counts, or with =max, as in study=max, the largest.
    """
    prevalence: str = ""
    """How common findings are where the model is to be used, for PPV and NPV there: 0.02, or Effusion=0.1,Mass=0.01.
    """
    operating_point: str = ""
    """How thresholds are chosen on val from now on: youden, f1, sensitivity=0.9, specificity=0.9, ppv=0.8; empty: as
    when it was trained. Of the run's own shards, whose val chooses.
    """
    maps: str = ""
    """A new folder for the maps of all pairs of test (or val, where there is no test): NPY, PNG, and as CheXlocalize's.
    """
    batch: int = 32
    """Images per process and forward."""
    workers: int = 2
    """Loader processes per process."""

    @property
    def pooled(self) -> tuple[str, str]:
        """See ``per``: the column, and how its images are pooled."""
        column, _, how = self.per.partition("=")
        return column.strip(), how.strip() or "mean"

    @property
    def prevalences(self) -> dict[str, float]:
        """See ``prevalence``; under the empty name that of all others. ValueError: not a number."""
        pairs = [part.rpartition("=") for part in self.prevalence.split(",") if part.strip()]
        return {name.strip(): float(value) for name, _, value in pairs}

    @property
    def columns(self) -> list[str]:
        """See ``by``."""
        return [name.strip() for name in self.by.split(",") if name.strip()]

    def problems(self) -> list[str]:
        """Everything that is wrong with the values, each naming its flag."""
        why = wrong_point(self.operating_point) if self.operating_point else ""
        found = [f"--operating_point {why}"] * bool(why)
        if self.per and (self.pooled[1] not in ("mean", "max") or not self.pooled[0]):
            found.append(f"--per {self.per}: expected a column, as study, or study=max")
        try:
            fine = all(0 < share < 1 for share in self.prevalences.values())
        except ValueError:
            fine = False
        if not fine:
            found.append(f"--prevalence {self.prevalence}: expected a share as 0.02, or Effusion=0.1,Mass=0.01")
        return found + [
            f"--{n} {v}: must be at least {low}"
            for n, v, low in (("batch", self.batch, 1), ("workers", self.workers, 0))
            if v < low
        ]


@dataclass
class PredictConfig:
    """Predict image files with a finished run.

    Usage: python -m trainer.predict --run RUN [--out DIR] IMAGE|FOLDER|PATTERN|SHARDS|@LIST...
    """

    run: str
    """Run folder of trainer.train."""
    out: str = ""
    """Folder for the overlays and maps; empty: RUN/predictions."""
    look_at: str = ""
    """Finding whose CAM is shown; empty: those that are predicted."""
    overlay: bool = True
    """Draw the CAM, the lungs and the expected region over each image, at its own size; --no-overlay: do not."""
    cam: Literal["", "png", "npy"] = ""
    """Write the CAMs at the image's own size, too: as gray pictures, or as float32 arrays, in [0, 1]."""
    batch: int = 16
    """Images a forward."""
    workers: int = 2
    """Threads that read images and write files."""

    def problems(self) -> list[str]:
        """Everything that is wrong with the values, each naming its flag."""
        return [
            f"--{n} {v}: must be at least 1" for n, v in (("batch", self.batch), ("workers", self.workers)) if v < 1
        ]


@dataclass
class SweepConfig:
    """A grid of trainings, one after the other, or as many at once as there are GPUs.

    Usage: python -m trainer.sweep GRID.yaml --out DIR [--part I/N]
    """

    out: str
    """Folder of the runs."""
    part: str = "1/1"
    """Which share of the grid, as 3/8, for the jobs of an array."""
    jobs: int = 0
    """Trainings at a time; 0: as many as there are GPUs, without one 1."""

    def part_of(self) -> tuple[int, int]:
        """The share's number, from 1 on, and of how many."""
        number, _, of = self.part.partition("/")
        return int(number), int(of)

    def problems(self) -> list[str]:
        """Everything that is wrong with the values, each naming its flag."""
        found = [f"--jobs {self.jobs}: must be at least 0"] if self.jobs < 0 else []
        if not re.fullmatch(r"\d{1,6}/\d{1,6}", self.part) or not 1 <= self.part_of()[0] <= self.part_of()[1]:
            found.append(f"--part {self.part}: expected I/N, as 3/8, with I from 1 to N")
        return found


@dataclass
class ExportConfig:
    """A finished run for others: an ONNX graph, weights, and a card.

    Usage: python -m trainer.export RUN --out DIR
    """

    out: str
    """Folder to write."""

    def problems(self) -> list[str]:
        """Nothing beyond the types."""
        return []


@dataclass
class ReportConfig:
    """Finished runs side by side.

    Usage: python -m trainer.report --out FILE.html RUN [RUN ...]
    """

    out: str
    """HTML file to write."""
    title: str = "cxr-focus"
    """Heading of the page."""
    about: str = ""
    """What is compared and why, a paragraph below the heading."""
    images: int = 6
    """Images of each pair of runs that are shown side by side, where they disagree most; 0: none."""
    table: Literal["", "paper"] = ""
    """paper: instead of a page the published table of these runs, backbones and tasks by lambda, with the published
    figures; --out names a .md, .csv or .tex file.
    """

    def problems(self) -> list[str]:
        """Everything that is wrong with the values, each naming its flag."""
        found = [f"--images {self.images}: must be from 0 to 50"] if not 0 <= self.images <= 50 else []
        if self.table and not self.out.endswith((".md", ".csv", ".tex")):
            found.append(f"--out {self.out}: of --table {self.table} a .md, .csv or .tex file is written")
        return found
