"""python -m trainer.evaluate --run RUN --shards DIR: the figures of a finished run, again or on other shards.

Legend: N images of a split, K classes, S pixels of a side.
"""

if __name__ == "__main__":  # what is wrong with the flags is said before torch is imported, which takes seconds
    from shards.errors import run as _run
    from trainer.config import EvaluateConfig as _Config
    from trainer.config import parse as _parse

    def _check() -> None:
        _parse(_Config, None, prog="trainer.evaluate")

    _run(_check)

import json
import math
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch.nn import functional as F

from shards.dataset import Split
from shards.errors import InputError, read_json, run
from shards.plan import EpochPlan
from shards.sample import SPLITS
from shards.store import open_store
from trainer import __version__
from trainer.annotations import chosen, lesion_regions
from trainer.checkpoint import save_weights
from trainer.classifier import FocusClassifier, evaluating, normalize_cam
from trainer.config import Config, EvaluateConfig, from_yaml, parse
from trainer.launching import Accelerator, close, loader_of, on_main, set_threads, start
from trainer.look import Located
from trainer.look import look as look_at
from trainer.losses import attention_term
from trainer.lungs import LungFinder, LungSegmenter, load_segmenter
from trainer.metrics import (
    LOCALIZATION,
    THRESHOLDS,
    at_threshold,
    auc_interval,
    best_threshold,
    binary_report,
    classification_report,
    localize,
    measured,
    multiclass_auc,
    rank_correlation,
    summarize,
    wilson,
    without_dead,
)
from trainer.probe import blurred, probed, random_twin
from trainer.regions import PUBLISHED, Regions, placed
from trainer.rules import Finding, Rule, read_file, read_findings, rules_of, task_findings, to_yaml

MODEL, LUNGS, FINDINGS = "model.safetensors", "lungs.safetensors", "findings.yaml"


@dataclass
class Outcome:
    """What was measured for every image of a split, in its order, on every process.

    logits float [N,K]; labels int64 [N]; term float [N], the attention term of the trained form, NaN without a region;
    expected, expected_box, lesion float [N,21], columns of `metrics.localize` against the expected region (where its weight is a half or more), against
    what it was as a part of the lung box (the published region, else the rule's own part), and against lesion boxes, NaN where there is no such ground truth;
    replaced bool [N], whether that part stands in for the region; similarity float [N], rank correlation with the CAM of a twin, NaN without one.
    """

    logits: torch.Tensor
    labels: torch.Tensor
    term: torch.Tensor
    expected: torch.Tensor
    expected_box: torch.Tensor
    lesion: torch.Tensor
    similarity: torch.Tensor
    replaced: torch.Tensor

    def tables(self) -> dict[str, torch.Tensor]:
        """The kinds of localization, which are never mixed; ``expected_box`` has figures only where a rule follows the lungs' outline."""
        return {"expected": self.expected, "expected_box": self.expected_box, "lesion": self.lesion}

    def thresholds(self) -> dict[str, int | None]:
        """For each kind which of `metrics.THRESHOLDS` gives the best mean IoU here."""
        return {kind: best_threshold(table[measured(table)]) for kind, table in self.tables().items()}

    def operating_point(self) -> float | None:
        """The probability from which on a task with two classes says class 1, by Youden's index on these images; None of other tasks."""
        if self.logits.shape[1] != 2:
            return None
        threshold = binary_report(self.logits, self.labels)["best_threshold"]
        return threshold if math.isfinite(threshold) else None

    def report(
        self, findings: tuple[str, ...], *, intervals: bool = False, chosen: dict[str, int | None] | None = None, threshold: float | None = None
    ) -> dict[str, Any]:
        """Classification and localization figures; from validation ``chosen``, thresholds of the IoU, and ``threshold``, of the probability."""
        figures = classification_report(self.logits, self.labels)
        if threshold is not None:
            figures["at_threshold"] = at_threshold(self.logits, self.labels, threshold)
        if intervals:
            figures |= {"accuracy_95": wilson(figures["accuracy"], len(self.labels)), "auc_95": auc_interval(self.logits, self.labels)}
        figures["localization"] = {}
        for kind, table in self.tables().items():
            at = (chosen or {}).get(kind)
            names = LOCALIZATION if at is None else (*LOCALIZATION, "iou")
            columns = list(range(len(LOCALIZATION))) + ([] if at is None else [len(LOCALIZATION) + at])
            known = measured(table)
            each = {name: summarize(table[known & (self.labels == k)][:, columns], names) for k, name in enumerate(findings)}
            if kind == "expected_box" and not known.any():
                continue
            figures["localization"][kind] = {"all": summarize(table[known][:, columns], names)} | {n: f for n, f in each.items() if f}
            if at is not None and known.any():
                figures["localization"][kind]["all"]["iou_threshold"] = THRESHOLDS[at]
        return figures


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: FocusClassifier,
    split: Split,
    lungs: LungFinder | None,
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
    columns = len(LOCALIZATION) + len(THRESHOLDS)
    regions = Regions(findings, rules, size, device)
    # What figures can be compared by that were measured before regions followed the lungs' outline: the published region, else the rule's part of the box.
    boxed = Regions(findings, {name: PUBLISHED.get(name, rule) for name, rule in rules.items()}, size, device)
    # What is measured of an image, in the columns of one table: figures, and for each of ``optional`` whether there are any.
    optional = {"expected": columns, "expected_box": columns, "lesion": columns, "similarity": 1, "term": 1, "replaced": 1}
    widths = {"logits": len(findings), "count": 1, **optional}
    table = torch.zeros(len(split), sum(widths.values()) + len(optional), dtype=torch.float64)
    plan = EpochPlan(split.shard_sizes(), shuffle=False)
    training = model.training
    model.eval()
    looks = look and model.has_map

    def change(located: Located) -> torch.Tensor:
        """The images, blurred in or outside the regions of findings of the task."""
        assert located.boxes is not None
        whose = torch.tensor(probed(batch.label.tolist(), batch.index, findings, rules))
        region = regions(whose, located.boxes, located.lungs).region
        return blurred(located.images, region if blur == "inside" else ~region)

    for batch in loader_of(accelerator, split, plan, batch=config.batch, workers=config.workers).batches(0):
        raw, labels = batch.image.to(device, non_blocking=True), batch.label.to(device, non_blocking=True)
        lungs_of = lungs if looks or blur else None
        changed = change if blur and lungs_of is not None else None
        seen = look_at(accelerator, model, raw, batch.index, labels, lungs_of, regions, batch.label, cam=looks, change=changed)
        # Each part of the table, and whether the image has it.
        parts = {"logits": seen.logits, "count": torch.ones(len(raw), 1, device=device)}
        known = {}
        if looks:
            assert seen.cam is not None
            assert seen.raw_cam is not None
            lesions = lesion_regions(split, batch.index, raw.shape[-2:], size).to(device)
            weight = seen.expected.weight if seen.expected is not None else torch.zeros_like(seen.images[:, 0])
            kinds = {"expected": seen.region, "lesion": lesions}
            if seen.boxes is not None and regions.uses_lungs:
                kinds["expected_box"] = boxed(batch.label, seen.boxes, None).region
            for kind, region in kinds.items():
                parts[kind] = without_dead(localize(seen.cam, region, config.attention.threshold), seen.cam)
                known[kind] = placed(region)
            if seen.expected is not None:
                known["replaced"] = seen.expected.replaced
            if twin is not None:
                with accelerator.autocast():
                    other = twin(seen.images, labels, cam=True).cam
                assert other is not None
                parts["similarity"] = rank_correlation(_grays(seen.raw_cam), _grays(other))[:, None]
                known["similarity"] = torch.ones(len(raw), dtype=torch.bool, device=device)
            cam = seen.cam
            if config.attention.form == "published":  # its term follows the predicted class
                with accelerator.autocast():
                    predicted = model(seen.images, None, cam=True).cam
                assert predicted is not None
                cam = normalize_cam(predicted, size)
            weight = chosen(weight, lesions, config.attention.region)
            parts["term"] = attention_term(cam, weight, config.attention.threshold, config.attention.form)[:, None]
            known["term"] = placed(weight)
        row = [parts[name].float() if name in parts else torch.zeros(len(raw), width, device=device) for name, width in widths.items()]
        row += [known[name][:, None].float() if name in known else torch.zeros(len(raw), 1, device=device) for name in optional]
        table[batch.index] += torch.where(batch.weight[:, None] > 0, torch.cat(row, 1).cpu().double(), 0.0)
    model.train(training)
    table = accelerator.reduce(table.to(device), "sum").cpu()
    columns_of = dict(zip([*widths, *(f"has {name}" for name in optional)], table.split([*widths.values(), *[1] * len(optional)], 1), strict=True))
    assert (columns_of["count"] == 1).all(), "every image is evaluated exactly once"
    of = {name: torch.where(columns_of[f"has {name}"] > 0, columns_of[name], torch.nan) for name in optional}
    return Outcome(
        columns_of["logits"].float(),
        torch.from_numpy(split.labels.astype(np.int64)),
        of["term"][:, 0],
        of["expected"],
        of["expected_box"],
        of["lesion"],
        of["similarity"][:, 0],
        ~of["replaced"][:, 0].isnan(),
    )


def _grays(cam: torch.Tensor) -> torch.Tensor:
    """A CAM [B,h,w] in at most 16 x 16 cells of 256 grays: what differs by less, such as the last bits of a sum, is a tie of ranks."""
    side = min(cam.shape[-1], 16)
    return (normalize_cam(F.adaptive_avg_pool2d(cam, side), side) * 255).round()


def save_model(path: Path, model: FocusClassifier, config: Config, stored: Mapping[str, Any], epoch: int, precision: str) -> None:
    """Weights with all that is needed to use them; whole or not there.

    Args:
        stored: how the training images were packed: size in pixels, and where they are known aspect and scales.
        precision: of the training.
    """
    metadata = {
        "backbone": config.backbone,
        "findings": json.dumps(task_findings(config.task)),
        "layer": config.attention.layer,
        "size": str(config.size),
        "stored_size": str(stored["size"]),
        "stored": json.dumps(dict(stored)),
        "epoch": str(epoch),
        "precision": precision,
    }
    save_weights(path, model.state_dict(), metadata)


@dataclass
class Run:
    """A run folder, opened: its best model is in eval mode; segmenter None: trained without one; metadata of the model's file."""

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
        options: dict[str, Any] = {"size": config.size, "pretrained": "false", "layer": config.attention.layer, "needs_map": False}
        model = FocusClassifier(config.backbone, len(task_findings(config.task)), **options)
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
    lungs: dict[str, LungFinder],
    training: dict[str, Any],
    out: Path,
    known: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Evaluate val and test, probe the model, and write the run's reports. Returns the content of report.json.

    ``known``: what a report.json of the run says already. What is not measured now stays as it is there, and where there is no val,
    thresholds are those that the run's own validation images chose.

    InputError: the report could not be written; the run is as it was.
    """
    from trainer import report  # matplotlib and its fonts, only where something is drawn

    classes, rules, known = task_findings(config.task), rules_of(findings), dict(known or {})
    outcomes: dict[str, Outcome] = {n: evaluate(accelerator, model, splits[n], lungs.get(n), config, rules) for n in ("val", "test") if n in splits}
    for name in outcomes:
        if name in lungs:
            lungs[name].share(accelerator)
    lost = {name: finder.memory.not_found().tolist() for name, finder in lungs.items()}
    content: dict[str, Any] = {"findings": classes, "dataset": next(iter(splits.values())).dataset, "training": training}
    content["images"] = known.get("images", {}) | {name: split.fingerprint for name, split in splits.items()}
    content["regions"] = to_yaml(findings)
    content["written"] = f"cxr-focus {__version__}, {datetime.now().astimezone():%Y-%m-%d %H:%M %Z}"
    without = {name: [splits[name].key(p) for p in positions] for name, positions in lost.items()}
    content["lungs_not_found"] = known.get("lungs_not_found", {}) | without
    replaced = {name: int(outcome.replaced.sum()) for name, outcome in outcomes.items()}
    content["regions_replaced"] = known.get("regions_replaced", {}) | replaced
    thresholds = outcomes["val"].thresholds() if "val" in outcomes else known.get("iou_threshold")
    point = outcomes["val"].operating_point() if "val" in outcomes else known.get("threshold")
    content["iou_threshold"], content["threshold"] = thresholds, point
    content |= {split: known[split] for split in ("val", "test") if split in known and split not in outcomes}
    content |= {name: outcome.report(classes, intervals=True, chosen=thresholds, threshold=point) for name, outcome in outcomes.items()}
    content["config"] = known.get("config") or asdict(config)
    shown = "test" if "test" in splits else "val"
    content[shown]["probe"] = probe(accelerator, model, outcomes[shown], splits[shown], lungs.get(shown), config, rules)

    def write() -> None:
        try:
            tiles = report.tiles(accelerator, model, splits[shown], lungs.get(shown), config, rules)
            report.write_run(out, config, content, outcomes, tiles, splits, report.whole(splits, lost))
        except Exception as error:  # a picture or a name that cannot be made costs the report, not the run
            why = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
            raise InputError(
                f"{out}: the report could not be written ({why}). The model is there: `python -m trainer.evaluate --run RUN` tries again"
            ) from error

    on_main(accelerator, write)
    return content


def probe(
    accelerator: Accelerator, model: FocusClassifier, seen: Outcome, split: Split, lungs: LungFinder | None, config: Config, rules: Mapping[str, Rule]
) -> dict[str, Any] | None:
    """Two tests that a localization figure cannot pass by chance; None where no finding has an expected region.

    blur: the drop in AUC when everything outside the expected region is blurred, and when everything inside is, with paired intervals:
    a model that reads the region loses by the second alone. random: the CAMs of the same network with random weights (Adebayo et al.,
    "Sanity checks for saliency maps", NeurIPS 2018): their energy and lift, and the rank correlation of its maps with the model's.
    """
    if lungs is None or not measured(seen.expected).any():
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
    known = chance.expected[:, 0] > 0  # NaN is not
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
    other = read_report(out).get("images", {})
    if any(other.get(name, split.fingerprint) != split.fingerprint for name, split in splits.items()):
        raise InputError(f"--out {out}: holds the report of other images; name another folder for this one")


def read_report(folder: Path) -> dict[str, Any]:
    """The content of a folder's report.json; nothing where there is none. InputError: it is damaged."""
    path = folder / "report.json"
    if not path.is_file():
        return {}
    content = read_json(path, f"{path}")
    if not isinstance(content, dict):
        raise InputError(f"{path}: is not a report; remove it, and the run writes it again")
    return content


def folder_of(run_folder: Path, dataset: str) -> Path:
    """Where the evaluation of other shards goes; a dataset's name cannot lead out of the run folder."""
    from trainer.report import file_name

    return run_folder / file_name(f"evaluate_{dataset}")


def main(argv: list[str] | None = None) -> None:
    """Evaluate, write the reports, print where they are."""
    options = parse(EvaluateConfig, argv, prog="trainer.evaluate")
    path, store = Path(options.run), open_store(options.shards)
    set_threads()
    opened = open_run(path)
    config, model, segmenter = opened.config, opened.model, opened.segmenter
    accelerator = start(config.seed, opened.precision)
    index = store.index()
    splits = {name: Split(store, name, task_findings(config.task), among=among(opened.findings)) for name in SPLITS[1:] if name in index["splits"]}
    if not splits:
        raise InputError(f"--shards {store.name}: has neither val nor test; pack one")

    own = os.path.realpath(options.shards) == os.path.realpath(config.shards) or options.shards.rstrip("/") == config.shards.rstrip("/")
    old = read_report(path)
    # The run's own shards, if they are still those that it was trained on.
    own = own and all(old.get("images", {}).get(name, split.fingerprint) == split.fingerprint for name, split in splits.items())
    out = Path(options.out) if options.out else path if own else folder_of(path, index["dataset"])
    if out.resolve() != path.resolve():
        refuse_to_overwrite(out, path, splits)
    out.mkdir(parents=True, exist_ok=True)
    training = old.get("training", {"unfinished": True, "best_epoch": int(opened.metadata["epoch"]) + 1})
    if training.get("unfinished") and accelerator.is_main_process:
        print(f"{path} has not finished: these are figures of its best model so far, of epoch {training['best_epoch']}")
    if not own and accelerator.is_main_process:
        tell_overlap(config, old.get("images", {}).get("train"), opened.findings, splits)
    asked = replace(config, batch=options.batch, workers=options.workers)
    model.to(accelerator.device)
    lungs = {}
    if segmenter is not None and model.has_map:
        segmenter.to(accelerator.device)
        lungs = {n: LungFinder(segmenter, config.size, len(s), s.fingerprint) for n, s in splits.items()}
    known: dict[str, Any] = (
        {"config": asdict(config)} | old
        if own
        else {"config": asdict(config)} | {name: old[name] for name in ("iou_threshold", "threshold", "config") if name in old}
    )
    content = finish(accelerator, model, asked, opened.findings, splits, lungs, training, out, known)
    if accelerator.is_main_process:
        from trainer import report

        print(report.table({path.resolve().name: content}))
        print(f"wrote {out / 'report.html'}")
    close(accelerator)


if __name__ == "__main__":
    run(main)
