"""Tensors: lung boxes, the classifier with its CAM, attention losses, training and evaluation."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.predictor import Predictor

__version__ = "0.1.0"


def load(run: str | Path) -> "Predictor":
    """A finished run, ready for images: see `trainer.predictor`. InputError: it is no run folder."""
    from trainer.predictor import Predictor  # torch takes seconds, and not all who import this package need it

    return Predictor(Path(run))
