"""python -m trainer.evaluate --run RUN --shards DIR: the figures of a finished run, again or on other shards.

Legend: N images of a split, K classes, S pixels of a side.
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from shards.errors import InputError, run
from shards.sample import SPLITS
from shards.store import open_store
from shards.stream import EpochPlan, Split
from trainer import __version__
from trainer.augment import resize
from trainer.checkpoint import readable
from trainer.classifier import FocusClassifier, normalize_cam
from trainer.config import Config, from_yaml, parse
from trainer.launching import Accelerator, start
from trainer.losses import attention_term
from trainer.lungs import LungBoxes, LungSegmenter, load_segmenter
from trainer.metrics import LOCALIZATION, auc_interval, classification_report, localize, summarize, wilson
from trainer.regions import finding_regions, task_findings

MODEL, LUNGS = "model.safetensors", "lungs.safetensors"


@dataclass
class Outcome:
    """What was measured for every image of a split, in its order, on every process.

    logits float [N,K]; labels int64 [N]; term float [N], the attention term of the trained form, NaN without a region;
    expected, lesion float [N,4], columns `metrics.LOCALIZATION` against the expected region and against lesion boxes, NaN
    where there is no such ground truth.
    """

    logits: torch.Tensor
    labels: torch.Tensor
    term: torch.Tensor
    expected: torch.Tensor
    lesion: torch.Tensor

    def report(self, findings: tuple[str, ...], *, intervals: bool = False) -> dict[str, Any]:
        """Classification and localization figures; the two kinds of localization are never mixed."""
        figures = classification_report(self.logits, self.labels)
        if intervals:
            figures |= {"accuracy_95": wilson(figures["accuracy"], len(self.labels)), "auc_95": auc_interval(self.logits, self.labels)}
        figures["localization"] = {}
        for kind, table in (("expected", self.expected), ("lesion", self.lesion)):
            known = ~table[:, 0].isnan()
            each = {name: summarize(table[known & (self.labels == k)]) for k, name in enumerate(findings)}
            figures["localization"][kind] = {"all": summarize(table[known])} | {n: f for n, f in each.items() if f}
        return figures


@torch.no_grad()
def evaluate(accelerator: Accelerator, model: FocusClassifier, split: Split, lungs: LungBoxes | None, config: Config, *, look: bool = True) -> Outcome:
    """Run the model over a split, every image once over all processes.

    Args:
        model: the unwrapped model; its mode is restored.
        lungs: boxes of this split; None: no expected regions.
        look: take CAMs, of the label's class. False: logits only.
    """
    device, size, findings = accelerator.device, config.size, split.classes
    classes, columns = len(findings), len(LOCALIZATION)
    table = torch.zeros(len(split), classes + 1 + 2 * (columns + 1) + 2, dtype=torch.float64)
    plan = EpochPlan(split.shard_sizes(), shuffle=False)
    rank, world = accelerator.process_index, accelerator.num_processes
    training = model.training
    model.eval()
    for batch in split.batches(plan, 0, 0, batch=config.batch, rank=rank, world=world, workers=config.workers):
        raw, labels = batch.image.to(device), batch.label.to(device)
        images = resize(raw, size)
        names = [findings[k] for k in batch.label.tolist()]
        none = torch.zeros(len(images), size, size, dtype=torch.bool, device=device)
        with accelerator.autocast():
            # The boxes come first: the lungs of an image are found once, with or without a finding.
            expected = finding_regions(lungs(raw, batch.index), names, size) if lungs and look else none
            logits, cam = model(images, labels, cam=look)
            measured = [logits.double(), torch.ones(len(images), 1, device=device)]
            if look:
                assert cam is not None
                shown = normalize_cam(cam, size)
                for region in (expected, lesion_regions(split, batch.index, raw.shape[-2:], size).to(device)):
                    known = region.flatten(1).any(1, keepdim=True)
                    measured += [localize(shown, region, config.attention.threshold) * known, known]
                if config.attention.form == "published":  # its term follows the predicted class
                    cam = model(images, None, cam=True).cam
                    assert cam is not None
                term = attention_term(normalize_cam(cam, size), expected, config.attention.threshold, config.attention.form)
                known = expected.flatten(1).any(1)
                measured += [(term * known)[:, None], known[:, None]]
            rows = torch.cat([m.double().cpu() for m in measured], 1)
        table[batch.index, : rows.shape[1]] += rows * batch.weight[:, None]
    model.train(training)
    table = accelerator.reduce(table.to(device) if device.type != "mps" else table, "sum").cpu()
    assert (table[:, classes] == 1).all(), "every image is evaluated exactly once"
    logits, _, *parts = table.split([classes, 1, columns, 1, columns, 1, 1, 1], 1)
    expected, lesion, term = (torch.where(known > 0, value, torch.nan) for value, known in zip(parts[::2], parts[1::2], strict=True))
    return Outcome(logits.float(), torch.from_numpy(split.labels.astype(np.int64)), term[:, 0], expected, lesion)


def lesion_regions(split: Split, index: torch.Tensor, stored: Sequence[int], size: int) -> torch.Tensor:
    """The lesion boxes of each image's own finding, stored at (height, width), as bool [B,size,size]; empty where there are none."""
    regions = torch.zeros(len(index), size, size, dtype=torch.bool)
    for b, position in enumerate(index.tolist()):
        finding = split.classes[split.labels[position]]
        boxes = [box for box in split.meta(position)["boxes"] if box.finding == finding]
        height, width = stored
        for box in boxes:
            x0, y0, x1, y1 = box.xyxy
            left, top = int(x0 * size / width), int(y0 * size / height)
            regions[b, top : -int(-y1 * size // height), left : -int(-x1 * size // width)] = True
    return regions


def save_model(path: Path, model: FocusClassifier, config: Config, stored_size: int, epoch: int) -> None:
    """Weights with all that is needed to use them; whole or not there."""
    metadata = {
        "backbone": config.backbone,
        "findings": json.dumps(task_findings(config.task)),
        "layer": config.attention.layer,
        "size": str(config.size),
        "stored_size": str(stored_size),
        "epoch": str(epoch),
    }
    partial = path.with_name(f".{path.name}.partial")
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}, partial, metadata=metadata)
    readable(partial)
    partial.replace(path)


def open_run(path: Path) -> tuple[Config, FocusClassifier, LungSegmenter | None, dict[str, str]]:
    """Configuration, best model in eval mode, lung segmenter (None: trained without) and the model's metadata."""
    if not (path / "config.yaml").is_file():
        raise InputError(f"--run {path}: is not a run folder (no config.yaml)")
    if (path / "lung_unet.safetensors").is_file():
        raise InputError(f"--run {path}: is a run of trainer.train_lungs; name one of trainer.train")
    if not (path / MODEL).is_file():
        raise InputError(f"--run {path}: has no {MODEL} yet; train it, or go on with `-m trainer.train --out {path} --resume`")
    config = from_yaml(Config, path / "config.yaml")
    try:
        with safe_open(path / MODEL, "pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
        model = FocusClassifier(config.backbone, len(task_findings(config.task)), size=config.size, pretrained="false", layer=config.attention.layer)
        model.load_state_dict(load_file(path / MODEL))
    except (SafetensorError, OSError, RuntimeError) as error:
        why = " ".join(str(error).split())[:200]
        raise InputError(f"{path / MODEL}: does not fit the run's config.yaml ({why}); was one of the two changed?") from error
    segmenter = load_segmenter(path / LUNGS) if (path / LUNGS).is_file() else None
    return config, model.eval(), segmenter, metadata


def finish(
    accelerator: Accelerator, model: FocusClassifier, config: Config, splits: dict[str, Split], lungs: dict[str, LungBoxes], training: dict[str, Any], out: Path
) -> dict[str, Any]:
    """Evaluate val and test and write the run's reports. Returns the content of report.json."""
    from trainer import report  # matplotlib and its fonts, only where something is drawn

    findings = task_findings(config.task)
    outcomes: dict[str, Outcome] = {name: evaluate(accelerator, model, splits[name], lungs.get(name), config) for name in ("val", "test") if name in splits}
    content: dict[str, Any] = {"findings": findings, "dataset": next(iter(splits.values())).dataset, "training": training}
    content["written"] = f"cxr-focus {__version__}, {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}"
    for name in outcomes:
        if name in lungs:
            lungs[name].share(accelerator)
    lost = {name: boxes.memory.not_found().tolist() for name, boxes in lungs.items()}
    content["lungs_not_found"] = {name: [splits[name].key(p) for p in positions] for name, positions in lost.items()}
    content |= {name: outcome.report(findings, intervals=True) for name, outcome in outcomes.items()} | {"config": asdict(config)}
    if accelerator.is_main_process:
        shown = "test" if "test" in splits else "val"
        tiles = report.tiles(accelerator, model, splits[shown], lungs.get(shown), config)
        report.write_run(out, config, content, outcomes, tiles, splits, report.whole(splits, lost))
    accelerator.wait_for_everyone()
    return content


@dataclass
class EvaluateConfig:
    """Evaluate a finished run on its own shards or on others."""

    run: str
    """Run folder of trainer.train."""
    shards: str
    """Folder or URL of packed shards with val, or test, or both."""
    out: str = ""
    """Folder for the reports; empty: the run folder for its own shards, RUN/evaluate_<dataset> for others."""
    batch: int = 32
    """Images per process and forward."""
    workers: int = 2
    """Loader processes per process."""

    def problems(self) -> list[str]:
        """Everything that is wrong with the values, each naming its flag."""
        return [f"--{n} {v}: must be at least {low}" for n, v, low in (("batch", self.batch, 1), ("workers", self.workers, 0)) if v < low]


def main(argv: list[str] | None = None) -> None:
    """Evaluate, write the reports, print where they are."""
    options = parse(EvaluateConfig, argv, prog="trainer.evaluate")
    path, store = Path(options.run), open_store(options.shards)
    config, model, segmenter, metadata = open_run(path)
    accelerator = start(config.seed)
    index = store.index()
    splits = {name: Split(store, name, task_findings(config.task)) for name in SPLITS[1:] if name in index["splits"]}
    if not splits:
        raise InputError(f"--shards {store.name}: has neither val nor test; pack one")

    own = os.path.realpath(options.shards) == os.path.realpath(config.shards)
    out = Path(options.out) if options.out else path if own else path / f"evaluate_{index['dataset']}"
    out.mkdir(parents=True, exist_ok=True)
    old = path / "report.json"
    training = json.loads(old.read_text())["training"] if old.is_file() else {"unfinished": True, "best_epoch": int(metadata["epoch"]) + 1}
    if training.get("unfinished") and accelerator.is_main_process:
        print(f"{path} has not finished: these are figures of its best model so far, of epoch {training['best_epoch']}")
    config.batch, config.workers = options.batch, options.workers
    model.to(accelerator.device)
    lungs = {}
    if segmenter is not None:
        segmenter.to(accelerator.device)
        lungs = {n: LungBoxes(segmenter, config.size, len(s), s.fingerprint) for n, s in splits.items()}
    content = finish(accelerator, model, config, splits, lungs, training, out)
    if accelerator.is_main_process:
        from trainer import report

        print(report.table({path.resolve().name: content}))
        print(f"wrote {out / 'report.html'}")


if __name__ == "__main__":
    run(main)
