"""Writing an export, and holding it against the run that it is of."""

import contextlib
import importlib.util
import json
import math
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

import trainer
from shards import atomic
from shards.errors import InputError
from shards.phantom import Phantoms
from trainer.command import to_yaml
from trainer.export.card import card
from trainer.export.graph import Graph
from trainer.export.session import EXPORTED, EXTRA, GRAPH, OPSET, Exported
from trainer.launching import start
from trainer.predictor import Outputs, Predictor
from trainer.rules import to_yaml as findings_to_yaml
from trainer.run import FINDINGS, LUNGS, MODEL, read_report, run_findings, shareable

CARD, PARTIAL = "README.md", ".partial-"
# How far the graph may be from the run, on images of every kind: see `distance`
LIMITS = {
    "probability": 1e-4,
    "calibrated": 1e-4,
    "cam": 2e-3,
    "one_cam": 0.05,
    "found": 0.0,
    "lung_box": 1.0,
    "lungs": 0.01,
    "region": 0.01,
}
WORDS = {
    "probability": "probabilities",
    "calibrated": "calibrated",
    "cam": "maps",
    "one_cam": "the map that is farthest",
    "found": "images with lungs in one alone",
    "lung_box": "lung boxes, in pixels",
    "lungs": "lungs, share of other pixels",
    "region": "regions, share of other pixels",
}
PHANTOMS, NOISE = 6, 2  # images that both are tried on
FILES = {GRAPH, MODEL, LUNGS, "config.yaml", FINDINGS, EXPORTED, CARD}
TOO_LARGE = 2**31 - 2**20  # bytes of a graph, which is one message of protobuf


def export(folder: Path, out: Path) -> list[str]:
    """Write the export of a run folder; what is said of it, line by line.

    InputError: it is no finished run, its network has a part that ONNX has not, or comes out otherwise there; there are
    other files in ``out``.
    """
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: is a file; name a folder")
    if out.is_dir() and {one.name for one in out.iterdir() if not one.name.startswith(PARTIAL)} - FILES:
        raise InputError(f"--out {out}: holds other files; name another folder")
    if out.is_dir() and not (out / GRAPH).exists() and any((out / name).exists() for name in FILES):
        raise InputError(f"--out {out}: holds files of these names that are of no export; name another folder")
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"an export needs {', '.join(missing)}, which is not installed: {EXTRA}")
    if (folder / EXPORTED).is_file():
        raise InputError(f"{folder}: is an export; name the run that it is of")
    cxr = Predictor(folder, start(0, cpu=True, mixed_precision="no"))
    content = read_report(folder)
    if cxr.unfinished or not content:
        raise InputError(f"{folder}: has not finished; go on with `-m trainer.train --out {folder} --resume`")
    graph = Graph(cxr).eval()
    data = to_onnx(graph)
    stored = {"size": cxr.side, "aspect": cxr.aspect, "scales": cxr.scales}
    description: dict[str, Any] = {
        "written": f"cxr-focus {trainer.__version__}",
        "findings": list(cxr.findings),
        "labels": cxr.config.labels.kind,
        "input": f"images: uint8 [B,{cxr.side},{cxr.side}], 0 black, packed with --aspect {cxr.aspect}",
        "size": cxr.size,
        "outputs": graph.names,
        "regions": graph.regions,
        "stored": stored,
        "epoch": cxr.epoch,
        "threshold": cxr.point,
        "calibration": cxr.calibration,
        "training": {"unfinished": False},
    }
    place = out.resolve()
    new = not place.exists()
    try:
        place.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=PARTIAL, dir=place) as folder_:  # which may be a disk of its own
            partial = Path(folder_)
            (partial / GRAPH).write_bytes(data)
            for name in (MODEL, LUNGS):
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, partial / name)
            (partial / "config.yaml").write_text(to_yaml(shareable(cxr.config)))
            (partial / FINDINGS).write_text(findings_to_yaml(run_findings(folder, cxr.config)))
            (partial / EXPORTED).write_text(json.dumps(description, indent=1))
            description["distance"] = distance(cxr, Exported(partial))
            said = checked(description["distance"], out)
            (partial / EXPORTED).write_text(json.dumps(description, indent=1))
            (partial / CARD).write_text(card(content, asdict(cxr.config), description, cxr.segmenter))
            _put(partial, place)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror})") from error
    finally:
        if new:
            with contextlib.suppress(OSError):
                place.rmdir()  # nothing came of it
    return [*said, f"export: {place}", f"its card: {place / CARD}"]


def _put(partial: Path, out: Path) -> None:
    """Move what was checked to where it is wanted; an export that was there before is whole until then."""
    (out / EXPORTED).unlink(missing_ok=True)  # what is half there is no export
    for name in sorted(FILES - {EXPORTED}):
        if not (partial / name).is_file():
            (out / name).unlink(missing_ok=True)
    for name in (GRAPH, *sorted(FILES - {GRAPH, EXPORTED}), EXPORTED):  # by the first one an export is known
        if (partial / name).is_file():
            atomic.sync(partial / name)
            (partial / name).replace(out / name)
    atomic.sync(out)


def to_onnx(graph: Graph) -> bytes:
    """The graph as an ONNX file, for any number of images. InputError: ONNX has no operator for a part of it."""
    example = torch.zeros(2, graph.cxr.side, graph.cxr.side, dtype=torch.uint8)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch and onnxscript about themselves
            program: Any = torch.onnx.export(
                graph,
                (example,),
                dynamo=True,
                dynamic_shapes=({0: torch.export.Dim("images")},),
                opset_version=OPSET,
                input_names=["images"],
                output_names=graph.names,
                verbose=False,
            )
            data: bytes = program.model_proto.SerializeToString()
    except Exception as error:  # torch's exporter raises many kinds
        why = next((line for line in reversed(str(error).splitlines()) if "No ONNX function" in line), str(error))
        raise InputError(
            f"--backbone {graph.cxr.config.backbone}: cannot be written as ONNX ({' '.join(why.split())[:300]}); its "
            "weights are in the run folder, and `trainer.load` gives it to Python"
        ) from error
    if len(data) > TOO_LARGE:
        raise InputError(f"--backbone {graph.cxr.config.backbone}: is too large for one ONNX file (2 GB)")
    return data


def distance(cxr: Predictor, exported: Exported) -> dict[str, float]:
    """How far the two are from each other on phantoms, noise and a black image, in batches of several sizes: the
    largest difference of probabilities, of calibrated ones and of maps but that of one image, of lung boxes in pixels,
    the largest share of other pixels of the lungs and of a region, and how many images have lungs in one of the two
    only. One map may be farther: where a unit of the head is as near to the kink of its ReLU as rounding, one of the
    two counts it and the other does not, and either is right.
    """
    source = Phantoms(20, 0, size=max(64, cxr.side))
    images = [cxr.packed(source.load(item).image) for item in source.items[:PHANTOMS]]
    rng = np.random.default_rng(0)
    images += [rng.integers(0, 256, (cxr.side, cxr.side)).astype(np.uint8) for _ in range(NOISE)]
    images.append(np.zeros((cxr.side, cxr.side), np.uint8))
    squares = torch.from_numpy(np.stack(images))
    far: dict[str, float] = {}
    for part in (squares, squares[:1], squares[-3:]):
        ours, theirs, given = cxr.see(part), exported.see(part), exported.run(part.numpy())
        for name, value in _apart(cxr, ours, theirs, given).items():
            far[name] = max(far.get(name, 0.0), value if math.isfinite(value) else math.inf)
    return far


def _apart(cxr: Predictor, ours: Outputs, theirs: Outputs, given: Mapping[str, torch.Tensor]) -> dict[str, float]:
    task = cxr.task
    wanted = {
        "probability": task.probabilities(ours.logits),
        "calibrated": task.calibrated(ours.logits, cxr.calibration),
    }
    found = {name: _most(value - given[name], value.isnan() & given[name].isnan()) for name, value in wanted.items()}
    found["probability"] = max(found["probability"], _most(wanted["probability"] - task.probabilities(theirs.logits)))
    if ours.cam is not None and theirs.cam is not None:
        each = (ours.cam - theirs.cam).abs().nan_to_num(math.inf).flatten(1).amax(1).sort().values
        found["one_cam"] = float(each[-1])
        if len(each) > 3:  # of one image or few nothing is left out, and no more is asked
            found["cam"] = float(each[-2])
    if ours.boxes is not None and theirs.boxes is not None and ours.lungs is not None and theirs.lungs is not None:
        found["found"] = float((ours.found != theirs.found).sum())
        found["lung_box"] = _most((ours.boxes - theirs.boxes).double())
        found["lungs"] = _most((ours.lungs != theirs.lungs).double().mean((1, 2)))
    if ours.regions.keys() != theirs.regions.keys():
        found["region"] = math.inf
    elif ours.regions:
        shares = [_most((at != theirs.regions[name]).double().mean((1, 2))) for name, at in ours.regions.items()]
        found["region"] = max(shares)
    return found


def _most(difference: torch.Tensor, equal: torch.Tensor | None = None) -> float:
    """The largest; ``equal``: where there is none to be had. NaN counts as infinitely far."""
    far = difference.abs() if equal is None else difference.abs().masked_fill(equal, 0.0)
    return float(far.nan_to_num(math.inf).max())


def checked(far: dict[str, float], out: Path) -> list[str]:
    """What is said of the distance. InputError: it is too far."""
    told = ", ".join(f"{WORDS[name]} {value:.1g}" for name, value in far.items())
    if any(value > LIMITS[name] for name, value in far.items()):
        raise InputError(f"--out {out}: the graph comes out otherwise than the run ({told}); it is no export")
    return [f"largest difference between the graph and the run, on {PHANTOMS + NOISE + 1} images: {told}"]
