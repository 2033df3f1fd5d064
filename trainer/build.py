"""Everything that a training consists of, checked and made, before anything is written."""

import contextlib
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from shards import atomic
from shards.dataset import Split
from shards.errors import InputError, listed
from shards.plan import EpochPlan, Shares
from shards.sample import NO_FINDING
from shards.store import open_store
from trainer import checkpoint
from trainer.balance import Balance
from trainer.classifier import FocusClassifier
from trainer.command import flat, from_yaml, to_yaml
from trainer.config import Config, OptimConfig
from trainer.launching import on_main, seen_by_all, start
from trainer.loop import Trainer
from trainer.lungs.load import load_segmenter
from trainer.lungs.memory import LungFinder
from trainer.regions.lesions import LesionRegions
from trainer.report.write import rehearse
from trainer.rules import Finding, read_findings, rules_of, task_findings, without_rule
from trainer.rules import to_yaml as findings_to_yaml
from trainer.run import FINDINGS, LUNGS, evaluator_of, run_findings, task_of
from trainer.schedule import Schedule
from trainer.tracking import Tracking

# Settings that a resumed run may change. All others shape the model: it would not be the one that its config.yaml
# describes.
MAY_CHANGE = {
    "shards",
    "out",
    "epochs",
    "patience",
    "batch",
    "accumulate",
    "workers",
    "log_every",
    "save_every",
    "tracker",
    "resume",
    "lungs.weights",
}
# The remedies of a loss that is not finite; weights that are in the checkpoint anyway
MAY_CHANGE |= {
    "optim.lr",
    "optim.clip",
    "pretrained",
}


def identity(config: Config, splits: dict[str, Split], segmenter: str, findings: dict[str, Finding]) -> dict[str, Any]:
    """What may not change when a run is resumed: settings, training images, the segmenter's weights, the findings'
    rules.
    """
    own = {name: value for name, value in flat(asdict(config)).items() if name not in MAY_CHANGE}
    return own | {
        "shards": splits["train"].fingerprint,
        "lungs.weights": segmenter,
        "findings": findings_to_yaml(findings),
    }


def make_optimizer(model: torch.nn.Module, o: OptimConfig) -> tuple[torch.optim.Optimizer, Schedule]:
    """Optimizer and schedule."""
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[o.name]
    optimizer = kind(model.parameters(), lr=o.lr, weight_decay=o.weight_decay)
    return optimizer, Schedule(optimizer, o.schedule, o.lr)


def build(config: Config) -> Trainer:
    """Check everything that can be checked, say what will happen, claim the run folder, make the parts."""
    trackers = None if config.tracker == "none" else config.tracker
    accelerator = start(config.seed, log_with=trackers, project_dir=config.out)
    store, out, findings = open_store(config.shards), Path(config.out), findings_of(config)
    task, index = task_of(config, findings), store.index()
    classes = task.findings
    splits = {n: Split(store, n, task.labels) for n in ("train", "val", "test") if n in index["splits"] or n != "test"}
    total, world = len(splits["train"]), accelerator.num_processes
    per_step = config.batch * world * config.accumulate
    if per_step > total:
        raise InputError(
            f"--batch {config.batch} x {world} processes x --accumulate {config.accumulate} = {per_step} images a "
            "step, but the train "
            f"split has {total}; lower --batch to at most {max(1, total // (world * config.accumulate))}"
        )
    own = out / LUNGS  # the run's copy, if the file it came from is gone
    weights = (
        own if config.resume and own.is_file() and not os.path.exists(config.lungs.weights) else config.lungs.weights
    )
    segmenter = load_segmenter(weights or None)
    # A checkpoint holds every weight: neither a file nor the hub is asked again.
    pretrained = "false" if config.resume and (out / "checkpoints" / "last.pt").is_file() else config.pretrained
    looks = not (config.plain and not config.swap_probability)  # cross-entropy alone needs no feature map
    model = FocusClassifier(
        config.backbone,
        len(classes),
        size=config.size,
        pretrained=pretrained,
        layer=config.attention.layer,
        needs_map=looks,
    )
    annotations = annotated(config, splits["train"])
    smallest = Shares(
        EpochPlan(splits["train"].shard_sizes()), 0, 0, batch=config.batch, rank=0, world=world
    ).smallest()
    attends = not config.plain and bool(rules_of(findings) or annotations) and model.has_map
    model.to(accelerator.device)
    with accelerator.autocast():
        model.try_step(config.size, min(smallest, 2), cam=attends, mode=config.attention.mode)

    def undo() -> None:
        """Nothing was trained: the folder goes as it came."""
        for name in (FINDINGS, "config.yaml", ".lock"):
            (out / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            out.rmdir()

    if not config.resume:
        checkpoint.claim(accelerator, out, {FINDINGS: findings_to_yaml(findings), "config.yaml": to_yaml(config)})
    try:
        seen_by_all(accelerator, out)
    except InputError:
        if accelerator.is_main_process and not config.resume:
            undo()
        raise

    def begin() -> None:
        try:
            checkpoint.hold(out)
            rehearse(config, index["dataset"], classes, out)
        except InputError:
            if not config.resume:
                undo()
            raise

    on_main(accelerator, begin)

    accelerator.print(
        f"{config.batch} images x {world} processes x {config.accumulate} accumulated = {per_step} a step at most; "
        f"{total} training images, {-(-total // per_step)} steps an epoch; {accelerator.device.type}, "
        f"{accelerator.mixed_precision}"
    )
    for line in (*([model.loaded] if model.loaded else ()), *(f"note: {unused}" for unused in config.unused())):
        accelerator.print(line)
    if not model.has_map:
        accelerator.print(
            f"{config.backbone} has no feature map: it is trained by cross-entropy, and the report says nothing of "
            "where it looks"
        )
    if model.layers and not config.attention.layer and looks:
        accelerator.print(f"the CAM is taken at {', '.join(model.layers)}; another layer: --attention.layer")
    if model.map_side == 1:
        accelerator.print(
            f"note: {config.backbone}'s feature map is 1 x 1 at --size {config.size} and cannot say where it looks; "
            "raise --size"
        )
    for name, split in splits.items():
        left = (
            f"; {split.left_out} others left out (of none of the task's classes, or of several)"
            if split.left_out
            else ""
        )
        accelerator.print(f"{name}: {', '.join(f'{n} {finding}' for finding, n in split.counts().items())}{left}")
    if config.resume and findings_changed(config, findings):
        accelerator.print(
            f"note: the run keeps the rules of its own {FINDINGS}; {config.findings or 'the ready-made findings'} now "
            "say others"
        )
    if annotations:
        accelerator.print(
            f"{annotations.known} of {total} training images have lesion boxes of their finding, "
            f"{len(annotations.used)} are used as regions"
        )
    unplaced = without_rule(classes, rules_of(findings))
    if unplaced and config.attention.region != "annotation":
        accelerator.print(
            f"no region is known for {listed(unplaced)}: classification only, no attention loss for them; "
            "declare one, of exactly that name, with --findings FILE"
        )

    segmenter.to(accelerator.device).to(memory_format=torch.channels_last)
    key = segmenter.fingerprint()
    lungs = {name: LungFinder(segmenter, config.size, len(s), s.fingerprint, key, out) for name, s in splits.items()}
    raw, schedule = make_optimizer(model, config.optim)
    net, optimizer = accelerator.prepare(model, raw)
    balance = Balance(**asdict(config.balance))
    tracking = Tracking(accelerator, config.tracker)
    model = accelerator.unwrap_model(net)
    trainer = Trainer(
        config=config,
        accelerator=accelerator,
        splits=splits,
        model=model,
        net=net,
        optimizer=optimizer,
        schedule=schedule,
        balance=balance,
        lungs=lungs,
        evaluator=evaluator_of(accelerator, model, config, task, findings, splits, lungs),
        tracking=tracking,
        task=task,
        findings=findings,
        annotations=annotations,
        identity=identity(config, splits, key, findings),
    )
    fixed = [name for name in classes if name not in (*trainer.inside, NO_FINDING)]
    if config.swap_probability > 0 and trainer.attends and fixed:
        what = f"leaves out {listed(fixed)}" if trainer.swaps else "is off"
        accelerator.print(
            f"context swap {what}: the region of {listed(fixed)} is unknown, or reaches beyond the lung box, whose "
            "surroundings must then stay"
            + (
                " (but an image whose lesion boxes are used gets the lungs of a healthy one around them)"
                if annotations
                else ""
            )
        )
    if trainer.swaps and config.batch == 1:
        accelerator.print("context swap does nothing with --batch 1: partners come from the same batch")
    trainer.state.warmup = config.optim.warmup * per_step
    if config.resume:
        trainer.restore()
    # A resume that is refused, or has nothing to do, changes nothing
    if accelerator.is_main_process and not trainer.finished:
        atomic.write(out / "config.yaml", to_yaml(replace(config, resume=False)))
        segmenter.save(out / LUNGS)
    tracking.start(out, asdict(config))
    return trainer


def findings_of(config: Config) -> dict[str, Finding]:
    """The findings of the task as --findings says; a resumed run that is told no others keeps its own copy, whatever
    has become of its file or ours.
    """
    own = Path(config.out) / FINDINGS
    if config.resume and own.is_file() and from_yaml(Config, own.with_name("config.yaml")).findings == config.findings:
        return run_findings(Path(config.out), config)
    return {
        name: finding for name, finding in read_findings(config.findings).items() if name in task_findings(config.task)
    }


def findings_changed(config: Config, findings: dict[str, Finding]) -> bool:
    """Whether --findings, as it reads now, gives other rules than the run has."""
    with contextlib.suppress(InputError):  # the file is gone
        return any(
            finding != findings.get(name)
            for name, finding in read_findings(config.findings).items()
            if name in task_findings(config.task)
        )
    return False


def annotated(config: Config, split: Split) -> LesionRegions | None:
    """The lesion boxes that training uses. InputError where there are none."""
    a = config.attention
    if a.region == "anatomy" or (config.plain and not config.swap_probability):
        return None
    boxes = LesionRegions(split, a.annotated, config.seed)
    if not len(boxes.used):
        why = (
            f"--attention.annotated {a.annotated} leaves none of {boxes.known} images with boxes"
            if boxes.known
            else "no training image has a box of its finding"
        )
        raise InputError(
            f"--attention.region {a.region}: {why}; pack lesion boxes (--boxes), or take --attention.region anatomy"
        )
    return boxes
