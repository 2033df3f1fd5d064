"""python -m trainer.evaluate --run RUN --shards DIR: the figures of a finished run, again or on other shards.

Legend: N images of a split, K classes, S pixels of a side.
"""

import json
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from shards.errors import InputError, run
from shards.sample import SPLITS
from shards.store import open_store
from shards.stream import EpochPlan, Split
from trainer import __version__
from trainer.annotations import chosen, lesion_regions
from trainer.augment import resize
from trainer.checkpoint import readable
from trainer.classifier import FocusClassifier, evaluating, normalize_cam
from trainer.config import Config, from_yaml, parse
from trainer.launching import Accelerator, start
from trainer.losses import attention_term
from trainer.lungs import LungBoxes, LungSegmenter, load_segmenter
from trainer.metrics import (
    LOCALIZATION,
    THRESHOLDS,
    auc_interval,
    best_threshold,
    classification_report,
    localize,
    multiclass_auc,
    rank_correlation,
    summarize,
    wilson,
)
from trainer.probe import blurred, probed, random_twin
from trainer.regions import finding_regions, placed
from trainer.rules import Finding, Rule, read_file, read_findings, rules_of, task_findings, to_yaml

MODEL, LUNGS, FINDINGS = "model.safetensors", "lungs.safetensors", "findings.yaml"


@dataclass
class Outcome:
    """What was measured for every image of a split, in its order, on every process.

    logits float [N,K]; labels int64 [N]; term float [N], the attention term of the trained form, NaN without a region;
    expected, lesion float [N,21], columns of `metrics.localize` against the expected region and against lesion boxes, NaN
    where there is no such ground truth; similarity float [N], rank correlation with the CAM of a twin, NaN without one.
    """

    logits: torch.Tensor
    labels: torch.Tensor
    term: torch.Tensor
    expected: torch.Tensor
    lesion: torch.Tensor
    similarity: torch.Tensor

    def tables(self) -> dict[str, torch.Tensor]:
        """The two kinds of localization, which are never mixed."""
        return {"expected": self.expected, "lesion": self.lesion}

    def thresholds(self) -> dict[str, int | None]:
        """For each kind which of `metrics.THRESHOLDS` gives the best mean IoU here."""
        return {kind: best_threshold(table[~table[:, 0].isnan()]) for kind, table in self.tables().items()}

    def report(self, findings: tuple[str, ...], *, intervals: bool = False, chosen: dict[str, int | None] | None = None) -> dict[str, Any]:
        """Classification and localization figures; ``chosen``: thresholds of the IoU, from validation."""
        figures = classification_report(self.logits, self.labels)
        if intervals:
            figures |= {"accuracy_95": wilson(figures["accuracy"], len(self.labels)), "auc_95": auc_interval(self.logits, self.labels)}
        figures["localization"] = {}
        for kind, table in self.tables().items():
            at = (chosen or {}).get(kind)
            names = LOCALIZATION if at is None else (*LOCALIZATION, "iou")
            columns = list(range(len(LOCALIZATION))) + ([] if at is None else [len(LOCALIZATION) + at])
            known = ~table[:, 0].isnan()
            each = {name: summarize(table[known & (self.labels == k)][:, columns], names) for k, name in enumerate(findings)}
            figures["localization"][kind] = {"all": summarize(table[known][:, columns], names)} | {n: f for n, f in each.items() if f}
            if at is not None and known.any():
                figures["localization"][kind]["all"]["iou_threshold"] = THRESHOLDS[at]
        return figures


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: FocusClassifier,
    split: Split,
    lungs: LungBoxes | None,
    config: Config,
    rules: Mapping[str, Rule],
    *,
    look: bool = True,
    blur: str = "",
    twin: FocusClassifier | None = None,
) -> Outcome:
    """Run the model over a split, every image once over all processes.

    Args:
        model: the unwrapped model; its mode is restored.
        lungs: boxes of this split; None: no expected regions.
        rules: of the expected regions.
        look: take CAMs, of the label's class. False: logits only.
        blur: ``outside`` or ``inside``: of the expected region, before the model sees the image (see `trainer.probe`).
        twin: another model, in eval mode, on the same images, whose CAMs are compared with this one's.
    """
    device, size, findings = accelerator.device, config.size, split.classes
    classes, columns = len(findings), len(LOCALIZATION) + len(THRESHOLDS)
    table = torch.zeros(len(split), classes + 1 + 2 * (columns + 1) + 4, dtype=torch.float64)
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
            boxes = lungs(raw, batch.index) if lungs and (look or blur) else None
            if blur and boxes is not None:
                region = finding_regions(boxes, probed(names, batch.index, findings, rules), size, rules)
                images = blurred(images, region if blur == "inside" else ~region)
            expected = finding_regions(boxes, names, size, rules) if boxes is not None else none
            logits, cam = model(images, labels, cam=look)
            measured = [logits.double(), torch.ones(len(images), 1, device=device)]
            if look:
                assert cam is not None
                shown = normalize_cam(cam, size)
                lesions = lesion_regions(split, batch.index, raw.shape[-2:], size).to(device)
                for region in (expected, lesions):
                    known = placed(region)[:, None]
                    measured += [localize(shown, region, config.attention.threshold) * known, known]
                if twin is not None:
                    other = twin(images, labels, cam=True).cam
                    assert other is not None
                    similarity = rank_correlation(_grays(cam), _grays(other))
                else:
                    similarity = torch.zeros(len(images), device=device)
                measured += [similarity[:, None], torch.full((len(images), 1), float(twin is not None), device=device)]
                if config.attention.form == "published":  # its term follows the predicted class
                    cam = model(images, None, cam=True).cam
                    assert cam is not None
                region = chosen(expected, lesions, config.attention.region)
                term, known = attention_term(normalize_cam(cam, size), region, config.attention.threshold, config.attention.form), placed(region)
                measured += [(term * known)[:, None], known[:, None]]
            rows = torch.cat([m.double().cpu() for m in measured], 1)
        table[batch.index, : rows.shape[1]] += rows * batch.weight[:, None]
    model.train(training)
    table = accelerator.reduce(table.to(device) if device.type != "mps" else table, "sum").cpu()
    assert (table[:, classes] == 1).all(), "every image is evaluated exactly once"
    logits, _, *parts = table.split([classes, 1, columns, 1, columns, 1, 1, 1, 1, 1], 1)
    expected, lesion, similarity, term = (torch.where(known > 0, value, torch.nan) for value, known in zip(parts[::2], parts[1::2], strict=True))
    return Outcome(logits.float(), torch.from_numpy(split.labels.astype(np.int64)), term[:, 0], expected, lesion, similarity[:, 0])


def _grays(cam: torch.Tensor) -> torch.Tensor:
    """A CAM [B,h,w] in at most 16 x 16 cells of 256 grays: what differs by less, such as the last bits of a sum, is a tie of ranks."""
    side = min(cam.shape[-1], 16)
    return (normalize_cam(F.adaptive_avg_pool2d(cam, side), side) * 255).round()


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


@dataclass
class Run:
    """A run folder, opened: its best model is in eval mode; segmenter None: trained without one; metadata of the model's file."""

    config: Config
    model: FocusClassifier
    segmenter: LungSegmenter | None
    findings: dict[str, Finding]
    metadata: dict[str, str]


def open_run(path: Path) -> Run:
    """Read a run folder. InputError: it is none, or has no model yet, or its files do not belong together."""
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
    return Run(config, model.eval(), segmenter, run_findings(path, config), metadata)


def run_findings(path: Path, config: Config) -> dict[str, Finding]:
    """The findings of a run: its own copy, or, for a run from before there were such copies, the published ones."""
    own = path / FINDINGS
    known = read_file(own) if own.is_file() else read_findings("published")
    return {name: known[name] for name in task_findings(config.task) if name in known}


def among(findings: Mapping[str, Finding]) -> list[str]:
    """Findings that an image may have beside others."""
    return [name for name, finding in findings.items() if finding.images == "any"]


def finish(
    accelerator: Accelerator,
    model: FocusClassifier,
    config: Config,
    findings: Mapping[str, Finding],
    splits: dict[str, Split],
    lungs: dict[str, LungBoxes],
    training: dict[str, Any],
    out: Path,
    thresholds: dict[str, int | None] | None = None,
) -> dict[str, Any]:
    """Evaluate val and test, probe the model, and write the run's reports. Returns the content of report.json.

    ``thresholds`` of the IoU, as the run's own validation images chose them, are used where there is no val.
    """
    from trainer import report  # matplotlib and its fonts, only where something is drawn

    classes, rules = task_findings(config.task), rules_of(findings)
    outcomes: dict[str, Outcome] = {n: evaluate(accelerator, model, splits[n], lungs.get(n), config, rules) for n in ("val", "test") if n in splits}
    content: dict[str, Any] = {"findings": classes, "dataset": next(iter(splits.values())).dataset, "training": training}
    content["images"] = {name: split.fingerprint for name, split in splits.items()}
    content["regions"] = to_yaml(findings)
    content["written"] = f"cxr-focus {__version__}, {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}"
    for name in outcomes:
        if name in lungs:
            lungs[name].share(accelerator)
    lost = {name: boxes.memory.not_found().tolist() for name, boxes in lungs.items()}
    content["lungs_not_found"] = {name: [splits[name].key(p) for p in positions] for name, positions in lost.items()}
    thresholds = outcomes["val"].thresholds() if "val" in outcomes else thresholds
    content["iou_threshold"] = thresholds
    content |= {name: outcome.report(classes, intervals=True, chosen=thresholds) for name, outcome in outcomes.items()} | {"config": asdict(config)}
    shown = "test" if "test" in splits else "val"
    content[shown]["probe"] = probe(accelerator, model, outcomes[shown], splits[shown], lungs.get(shown), config, rules)
    if accelerator.is_main_process:
        tiles = report.tiles(accelerator, model, splits[shown], lungs.get(shown), config, rules)
        report.write_run(out, config, content, outcomes, tiles, splits, report.whole(splits, lost))
    accelerator.wait_for_everyone()
    return content


def probe(
    accelerator: Accelerator, model: FocusClassifier, seen: Outcome, split: Split, lungs: LungBoxes | None, config: Config, rules: Mapping[str, Rule]
) -> dict[str, Any] | None:
    """Two tests that a localization figure cannot pass by chance; None where no finding has an expected region.

    blur: the drop in AUC when everything outside the expected region is blurred, and when everything inside is, with paired intervals:
    a model that reads the region loses by the second alone. random: the CAMs of the same network with random weights (Adebayo et al.,
    "Sanity checks for saliency maps", NeurIPS 2018): their energy and lift, and the rank correlation of its maps with the model's.
    """
    if lungs is None or seen.expected[:, 0].isnan().all():
        return None
    found: dict[str, Any] = {"auc": multiclass_auc(seen.logits, seen.labels)}
    for where in ("outside", "inside"):
        changed = evaluate(accelerator, model, split, lungs, config, rules, look=False, blur=where)
        drop = found["auc"] - multiclass_auc(changed.logits, changed.labels)
        found[f"drop_{where}"], found[f"drop_{where}_95"] = drop, auc_interval(seen.logits, seen.labels, changed.logits)
    twin = random_twin(model, config).to(accelerator.device)
    with evaluating(model):
        chance = evaluate(accelerator, twin, split, lungs, config, rules, twin=model)
    # A map that is zero everywhere, which some networks have before they are trained, is no map to compare with: nothing is in the region.
    known = chance.expected[:, 0] > 0
    figures = summarize(chance.expected[known][:, : len(LOCALIZATION)])
    similarity = summarize(chance.similarity[known][:, None], ("similarity",))
    names = ("images", "energy", "energy_95", "lift", "lift_95", "similarity", "similarity_95")
    found["random"] = {name: value for name, value in {**figures, **similarity}.items() if name in names} if figures and similarity else None
    return found


def overlap(train: Split, split: Split) -> tuple[int, int]:
    """How many images of ``split`` have the key or the bytes of a training image, and how many others the ID of a patient of theirs."""
    keys = {train.key(p) for p in range(len(train))}
    patients = {train.meta(p).get("patient") for p in range(len(train))} - {None}
    of_length: dict[int, list[int]] = defaultdict(list)
    for p in range(len(train)):
        of_length[train.image_length(p)].append(p)

    def known(p: int) -> bool:
        return split.key(p) in keys or any(train.image_bytes(q) == split.image_bytes(p) for q in of_length[split.image_length(p)])

    others = [p for p in range(len(split)) if not known(p)]
    return len(split) - len(others), sum(split.meta(p).get("patient") in patients for p in others)


def tell_overlap(config: Config, trained_on: str | None, findings: Mapping[str, Finding], splits: Mapping[str, Split]) -> None:
    """Say how many images of other shards the run has most likely been trained on: figures on those prove nothing."""
    try:
        train = Split(open_store(config.shards), "train", task_findings(config.task), among=among(findings)) if os.path.isdir(config.shards) else None
    except InputError:
        train = None
    if train is None or trained_on not in (None, train.fingerprint):
        print(f"note: the images that the run was trained on are not in {config.shards} any more, so it was not checked whether some are among these")
        return
    for name, split in splits.items():
        images, patients = overlap(train, split)
        told = f"of the {len(split)} {name} images {images or 'none'} have the name or the bytes of a training image of this run, "
        told += f"{patients or 'none'} more the ID of a patient" if train.meta(0).get("patient") is not None else "patients are not known"
        print(f"WARNING: {told}: if they are the same, the figures say nothing about new ones" if images or patients else told)


def refuse_to_overwrite(out: Path, path: Path, splits: Mapping[str, Split]) -> None:
    """InputError where ``out`` is another run, or holds the evaluation of other images."""
    if (out / "config.yaml").is_file() and out.resolve() != path.resolve():
        raise InputError(f"--out {out}: is another run's folder, whose report would be overwritten; name another folder")
    if (out / "report.json").is_file():
        other = json.loads((out / "report.json").read_text()).get("images", {})
        if any(other.get(name, split.fingerprint) != split.fingerprint for name, split in splits.items()):
            raise InputError(f"--out {out}: holds the report of other images; name another folder for this one")


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
    opened = open_run(path)
    config, model, segmenter = opened.config, opened.model, opened.segmenter
    accelerator = start(config.seed)
    index = store.index()
    splits = {name: Split(store, name, task_findings(config.task), among=among(opened.findings)) for name in SPLITS[1:] if name in index["splits"]}
    if not splits:
        raise InputError(f"--shards {store.name}: has neither val nor test; pack one")

    own = os.path.realpath(options.shards) == os.path.realpath(config.shards) or options.shards.rstrip("/") == config.shards.rstrip("/")
    out = Path(options.out) if options.out else path if own else path / f"evaluate_{index['dataset']}"
    if not own:
        refuse_to_overwrite(out, path, splits)
    out.mkdir(parents=True, exist_ok=True)
    old = json.loads((path / "report.json").read_text()) if (path / "report.json").is_file() else {}
    training = old.get("training", {"unfinished": True, "best_epoch": int(opened.metadata["epoch"]) + 1})
    if training.get("unfinished") and accelerator.is_main_process:
        print(f"{path} has not finished: these are figures of its best model so far, of epoch {training['best_epoch']}")
    if not own and accelerator.is_main_process:
        tell_overlap(config, old.get("images", {}).get("train"), opened.findings, splits)
    config.batch, config.workers = options.batch, options.workers
    model.to(accelerator.device)
    lungs = {}
    if segmenter is not None:
        segmenter.to(accelerator.device)
        lungs = {n: LungBoxes(segmenter, config.size, len(s), s.fingerprint) for n, s in splits.items()}
    content = finish(accelerator, model, config, opened.findings, splits, lungs, training, out, old.get("iou_threshold"))
    if accelerator.is_main_process:
        from trainer import report

        print(report.table({path.resolve().name: content}))
        print(f"wrote {out / 'report.html'}")


if __name__ == "__main__":
    run(main)
