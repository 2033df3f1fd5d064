"""A run folder: the names of its files, writing its model, opening it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from shards.dataset import Split
from shards.errors import InputError, read_json
from shards.names import known_as
from trainer.checkpoint import save_weights
from trainer.classifier import FocusClassifier
from trainer.command import from_yaml, run_at
from trainer.config import Config, arguments
from trainer.content import Content
from trainer.lungs.load import load_segmenter
from trainer.lungs.memory import LungFinder
from trainer.lungs.segmenter import LungSegmenter
from trainer.measure import Evaluator
from trainer.rules import Finding, of_task, read_file, read_findings, rules_of
from trainer.task import AnyOf, OneOf, Task
from trainer.task.any_of import by_finding

LAST_STEP = "model_last_step.safetensors"  # beside a model of averaged weights: those of the last step themselves
MODEL, LUNGS, FINDINGS = "model.safetensors", "lungs.safetensors", "findings.yaml"


def save_model(
    path: Path, model: FocusClassifier, config: Config, stored: Mapping[str, Any], epoch: int, precision: str
) -> None:
    """Weights with all that is needed to use them; whole or not there.

    Args:
        stored: how the training images were packed: size in pixels, and where they are known aspect and scales.
        precision: of the training.
    """
    metadata = {
        "backbone": config.backbone,
        "findings": json.dumps(config.classes),
        "labels": config.labels.kind,
        "layer": config.attention.layer,
        "size": str(config.size),
        "stored_size": str(stored["size"]),
        "stored": json.dumps(dict(stored)),
        "epoch": str(epoch),
        "precision": precision,
    }
    save_weights(path, model.state_dict(), metadata)


def model_options(config: Config) -> dict[str, Any]:
    """What a model is made of beside its backbone, and how its CAM is taken, as `FocusClassifier` takes it."""
    a = config.attention
    normal = (config.mean, config.std) if config.mean is not None and config.std is not None else None
    maps = {"layer": a.layer, "kind": a.map, "fuse": a.fuse, "stride": a.stride}
    return {"size": config.size, "arguments": arguments(config.backbone_args), "normal": normal, **maps}


@dataclass
class Run:
    """A run folder, opened: its best model is in eval mode; segmenter None: trained without one; metadata of the
    model's file.
    """

    config: Config
    model: FocusClassifier
    segmenter: LungSegmenter | None
    findings: dict[str, Finding]
    metadata: dict[str, str]

    @property
    def precision(self) -> str:
        """What it was trained in; empty where that was not written down."""
        return self.metadata.get("precision", "")


def open_run(path: Path) -> Run:
    """Read a run folder. InputError: it is none, or has no model yet, or its files do not belong together."""
    run_at(path)
    if not (path / MODEL).is_file():
        raise InputError(
            f"--run {path}: has no {MODEL} yet; train it, or go on with `-m trainer.train --out {path} --resume`"
        )
    config = from_yaml(Config, path / "config.yaml")
    try:
        with safe_open(path / MODEL, "pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
        options: dict[str, Any] = {
            "pretrained": "false",
            "needs_map": False,
            **model_options(config),
        }
        model = FocusClassifier(config.backbone, len(config.classes), **options)
        model.load_state_dict(load_file(path / MODEL))
    except (SafetensorError, OSError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200]
        raise InputError(
            f"{path / MODEL}: does not fit the run's config.yaml ({why}); was one of the two changed?"
        ) from error
    trained = json.loads(metadata.get("findings", "[]"))
    if trained and tuple(trained) != config.classes:
        raise InputError(
            f"{path / MODEL}: was trained for {', '.join(trained)}, config.yaml says {config.task}; was it changed?"
        )
    segmenter = load_segmenter(path / LUNGS) if (path / LUNGS).is_file() else None
    return Run(config, model.eval(), segmenter, run_findings(path, config), metadata)


def shareable(config: Config) -> Config:
    """The settings of a run for others: paths of the machine that trained it are nobody's business."""
    plain = replace(config, shards="", out="", pretrained="false", findings="published", resume=False)
    return replace(plain, lungs=replace(config.lungs, weights=""))


def run_findings(path: Path, config: Config) -> dict[str, Finding]:
    """The findings of a run: its own copy, or, for a run from before there were such copies, the published ones."""
    own = path / FINDINGS
    known = read_file(own) if own.is_file() else read_findings("published")
    return of_task(known, config.classes)


def task_of(config: Config, findings: Mapping[str, Finding]) -> Task:
    """What labels are to a run."""
    names, weights = config.classes, config.pos_weight
    if config.labels.kind == "any":
        uncertain = {known_as(name, names, "") or name: what for name, what in config.uncertain.items()}
        return AnyOf(
            names,
            by_finding(uncertain, names),
            config.labels.unmentioned,
            config.loss.mean,
            config.loss.kind,
            weights and _each(weights, names),
            config.labels.operating_point,
        )
    among = [name for name, finding in findings.items() if finding.images == "any"]
    if weights and "" in weights:  # of every class but the first
        weights = {names[0]: 1.0} | weights
    weighed = weights and _each(weights, names)
    focal = config.loss.kind == "focal"
    return OneOf(names, among, weights=weighed, focal=focal, threshold=config.labels.operating_point)


def _each(weights: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """Spelt out for each finding."""
    own = {known_as(name, names, "") or name: weight for name, weight in weights.items()}
    return {name: own.get(name, own.get("", 1.0)) for name in names}


def read_report(folder: Path) -> Content:
    """The content of a folder's report.json; nothing where there is none. InputError: it is damaged."""
    path = folder / "report.json"
    if not path.is_file():
        return {}
    content = read_json(path, f"{path}")
    if not isinstance(content, dict):
        raise InputError(f"{path}: is not a report; remove it, and the run writes it again")
    return cast(Content, content)


def evaluator_of(
    accelerator: Accelerator,
    model: FocusClassifier,
    config: Config,
    task: Task,
    findings: Mapping[str, Finding],
    splits: Mapping[str, Split],
    lungs: Mapping[str, LungFinder],
) -> Evaluator:
    """The evaluator of a run's model, as its configuration says."""
    return Evaluator(
        accelerator,
        model,
        task=task,
        attention=config.attention,
        size=config.size,
        seed=config.seed,
        rules=rules_of(findings),
        splits=splits,
        lungs=lungs,
        batch=config.batch,
        workers=config.workers,
        timeout=config.timeout,
    )


def stored_as(split: Split) -> dict[str, Any]:
    """How images of a split were packed, so that others can be packed alike: size, and aspect and scales where the
    index says them.
    """
    return {"size": int(split.image(0).shape[0])} | {
        name: split.stored[name] for name in ("aspect", "scales") if name in split.stored
    }
