"""What `trainer.export` wrote, read again and run by onnxruntime.

Legend: see `trainer.export.graph`.
"""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shards.cores import cores
from shards.errors import InputError, read_json
from trainer.command import from_yaml
from trainer.config import Config
from trainer.predictor import Outputs, Reader
from trainer.run import run_findings

EXPORTED, GRAPH = "export.json", "model.onnx"
OPSET = 18
PROVIDERS = ("CUDAExecutionProvider", "CPUExecutionProvider")
EXTRA = "pip install '.[onnx]' in its checkout"


class Exported(Reader):
    """An export, ready for images: `trainer.load` and `trainer.predict` take it as they take a run.

    InputError: onnxruntime is not installed; files are missing, or do not belong together.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        content = read_json(folder / EXPORTED)
        try:
            outputs, self.regions = list(content["outputs"]), list(content["regions"])
            config = from_yaml(Config, folder / "config.yaml")
            known = run_findings(folder, config)
            super().__init__(config, known, content["stored"], content, int(content["epoch"]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, InputError):
                raise
            raise InputError(f"{folder / EXPORTED}: is not of an export ({error!r}); export the run again") from error
        self.session = session_of(folder / GRAPH)
        if [one.name for one in self.session.get_outputs()] != outputs:
            raise InputError(f"{folder / GRAPH}: gives not what {EXPORTED} says; export the run again")
        self.outputs = outputs

    @property
    def looks_for_lungs(self) -> bool:
        """Whether it has a lung segmenter."""
        return "lung_box" in self.outputs

    def see(self, squares: torch.Tensor) -> Outputs:
        """See `Reader`."""
        got = self.run(squares.numpy())
        found = got.get("found", torch.zeros(len(squares), dtype=torch.bool))
        regions = {name: got["region"][:, k] for k, name in enumerate(self.regions)}
        return Outputs(got["logits"], got.get("cam"), got.get("lung_box"), got.get("lungs"), found, regions)

    def run(self, squares: np.ndarray) -> Mapping[str, torch.Tensor]:
        """All that the graph gives of uint8 [B,side,side], by name."""
        values = self.session.run(None, {"images": squares})
        return {name: torch.from_numpy(value) for name, value in zip(self.outputs, values, strict=True)}


def session_of(path: Path) -> Any:
    """An onnxruntime session, on a GPU where onnxruntime has one. InputError: it cannot be had."""
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.intra_op_num_threads = cores()
    options.log_severity_level = 3  # its warnings are about its own optimisations
    try:
        there = [name for name in PROVIDERS if name in ort.get_available_providers()]
        return ort.InferenceSession(str(path), options, providers=there)
    except Exception as error:  # onnxruntime's own kinds
        raise InputError(f"{path}: onnxruntime cannot open it ({' '.join(str(error).split())[:200]})") from error


@functools.cache
def onnxruntime() -> Any:
    """The package. InputError: it is not installed."""
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise InputError(f"onnxruntime is not installed, which runs an export: {EXTRA}") from error
    return ort
