"""Tensors: lung boxes, the classifier with its CAM, attention losses, training and evaluation."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.predictor import Reader

__version__ = "0.1.0"


def load(run: str | Path) -> "Reader":
    """A finished run, or its export, ready for images: see `trainer.predictor`. InputError: it is neither."""
    from trainer.export.session import EXPORTED, Exported  # torch takes seconds, and not all of this package need it
    from trainer.predictor import Predictor

    return Exported(Path(run)) if (Path(run) / EXPORTED).is_file() else Predictor(Path(run))
