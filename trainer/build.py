"""Everything that a training consists of, checked and made, before anything is written."""

import contextlib
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from timm.optim import param_groups_layer_decay

from shards import atomic
from shards.dataset import Split
from shards.errors import InputError, listed
from shards.plan import EpochPlan, Shares
from shards.sample import NO_FINDING, SPLITS
from shards.store import open_store
from shards.targets import ABSENT, PRESENT
from trainer import checkpoint, guards
from trainer.backbone import head_names
from trainer.balance import Balance
from trainer.classifier import FocusClassifier
from trainer.command import flat, from_yaml, to_yaml
from trainer.config import Config
from trainer.launching import on_main, seen_by_all, start
from trainer.loop import Trainer
from trainer.lungs.load import load_segmenter
from trainer.lungs.memory import LungFinder
from trainer.lungs.segmenter import LungSegmenter
from trainer.regions.lesions import Avoided, LesionRegions
from trainer.report.write import rehearse
from trainer.rules import Finding, of_task, read_findings, rules_of, without_rule
from trainer.rules import to_yaml as findings_to_yaml
from trainer.run import FINDINGS, LUNGS, evaluator_of, model_options, run_findings, task_of
from trainer.schedule import Schedule
from trainer.sections import OptimConfig
from trainer.task import Task
from trainer.tracking import Tracking
from trainer.weights import Trained

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
    "decode",
    "log_every",
    "save_every",
    "keep",
    "timeout",
    "compile",
    "tracker",
    "resume",
    "dry_run",
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


def make_optimizer(model: FocusClassifier, o: OptimConfig) -> tuple[torch.optim.Optimizer, Schedule]:
    """Optimizer and schedule."""
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[o.name]
    parameters: Any = model.parameters()
    if o.layer_decay < 1 or o.frozen:
        head = tuple(head_names(model.net))
        of_head = {id(p) for name, p in model.net.named_parameters() if name.startswith(head)}
        parameters = param_groups_layer_decay(model.net, o.weight_decay, layer_decay=o.layer_decay)
        parameters = [
            {**group, "params": own, "frozen": waits, "lr": o.lr * group["lr_scale"]}
            for group in parameters
            for waits in (True, False)
            if (own := [p for p in group["params"] if (id(p) not in of_head) == waits])
        ]
    # All weights in one kernel on a GPU; elsewhere as torch sees fit
    fused = True if next(model.parameters()).device.type == "cuda" else None
    optimizer = kind(parameters, lr=o.lr, weight_decay=o.weight_decay, fused=fused)
    return optimizer, Schedule(optimizer, o.schedule, o.lr)


@dataclass
class Parts:
    """What a training is made of, checked; nothing is written yet."""

    accelerator: Accelerator
    task: Task
    findings: dict[str, Finding]
    dataset: str
    splits: dict[str, Split]
    segmenter: LungSegmenter
    model: FocusClassifier
    annotations: LesionRegions | None
    attends: bool  # whether there is an attention loss
    per_step: int  # images a step at most


def build(config: Config) -> Trainer:
    """Check everything that can be checked, claim the run folder, say what will happen, make the trainer."""
    parts = check(config)
    claim(config, parts)
    announce(config, parts)
    trainer = make(config, parts)
    announce_swap(trainer)
    if config.resume:
        trainer.restore()
    # A resume that is refused, or has nothing to do, changes nothing.
    if parts.accelerator.is_main_process and not trainer.finished:
        atomic.write(Path(config.out) / "config.yaml", to_yaml(replace(config, resume=False)))
        parts.segmenter.save(Path(config.out) / LUNGS)
    # What is really used, where a setting says nothing
    swap = replace(config.swap, probability=config.swap_probability, devices=config.lent_devices)
    trainer.tracking.start(Path(config.out), asdict(replace(config, swap=swap)))
    return trainer


def check(config: Config) -> Parts:
    """InputError where something does not fit together; one step of the model is tried."""
    trackers = None if config.tracker == "none" else config.tracker
    accelerator = start(config.seed, timeout=config.timeout, log_with=trackers, project_dir=config.out)
    store, out, findings = open_store(config.shards), Path(config.out), findings_of(config)
    task, index = task_of(config, findings), store.index()
    splits = {n: Split(store, n, task.labels) for n in SPLITS if n in index["splits"] or n != "test"}
    task = task.weighted(splits["train"].tally(PRESENT), splits["train"].tally(ABSENT))
    total, world = len(splits["train"]), accelerator.num_processes
    for note in guards.together(accelerator, config, splits):
        accelerator.print(note)
    per_step = config.batch * world * config.accumulate
    if per_step > total:
        raise InputError(
            f"--batch {config.batch} x {world} processes x --accumulate {config.accumulate} = {per_step} images a "
            f"step, but the train split has {total}; lower --batch to at most "
            f"{max(1, total // (world * config.accumulate))}"
        )
    own, named = out / LUNGS, config.lungs.weights
    # The run's copy, if the file it came from is gone.
    segmenter = load_segmenter(
        (own if config.resume and own.is_file() and not os.path.exists(named) else named) or None
    )
    # A checkpoint holds every weight: neither a file nor the hub is asked again.
    pretrained = "false" if config.resume and checkpoint.there(out / "checkpoints") else config.pretrained
    model = FocusClassifier(
        config.backbone,
        len(task.findings),
        pretrained=pretrained,
        needs_map=config.looks,
        now=Trained(config.labels.kind, task.findings),
        **model_options(config),
    )

    notes: list[str] = []

    def fits() -> None:
        if config.decode == "device":
            notes.extend(guards.decoder(splits["train"], accelerator.device))
        guards.shared_memory(config, splits["train"].image(0).shape, guards.on_this_machine())
        if not (config.resume and (out / "report.json").is_file()):  # it may have nothing left to write
            guards.room(out, model, config)

    guards.all_of(accelerator, fits)
    for note in notes:
        accelerator.print(note)
    annotations = annotated(config, splits["train"])
    attends = not config.plain and bool(rules_of(findings) or annotations)
    plan = EpochPlan(splits["train"].shard_sizes())
    smallest = Shares(plan, 0, 0, batch=config.batch, rank=0, world=world).smallest()
    model.to(accelerator.device)
    if config.compile:
        accelerator.print("the backbone is compiled, which takes a minute or two")
        model.compile_body()

    def works() -> None:
        with accelerator.autocast():
            model.try_step(config.size, min(smallest, 2), cam=attends, mode=config.attention.mode)

    guards.all_of(accelerator, works)
    dataset = index["dataset"]
    return Parts(accelerator, task, findings, dataset, splits, segmenter, model, annotations, attends, per_step)


def claim(config: Config, parts: Parts) -> None:
    """Make the run folder this run's own. InputError where it cannot be, or a report could not be written into it."""
    accelerator, out = parts.accelerator, Path(config.out)

    def undo() -> None:
        """Nothing was trained: the folder goes as it came."""
        for name in (FINDINGS, "config.yaml", ".lock"):
            (out / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            out.rmdir()

    if not config.resume:
        files = {FINDINGS: findings_to_yaml(parts.findings), "config.yaml": to_yaml(config)}
        checkpoint.claim(accelerator, out, files)
    try:
        seen_by_all(accelerator, out)
    except InputError:
        if accelerator.is_main_process and not config.resume:
            undo()
        raise

    def begin() -> None:
        try:
            checkpoint.hold(out)
            rehearse(config, parts.dataset, parts.task.findings, out)
        except InputError:
            if not config.resume:
                undo()
            raise

    on_main(accelerator, begin)


def announce(config: Config, parts: Parts) -> None:
    """Say what will be trained, and what will not."""
    accelerator, model, annotations = parts.accelerator, parts.model, parts.annotations
    say, total = accelerator.print, len(parts.splits["train"])
    say(
        f"{config.batch} images x {accelerator.num_processes} processes x {config.accumulate} accumulated = "
        f"{parts.per_step} a step at most; {total} training images, {-(-total // parts.per_step)} steps an epoch; "
        f"{accelerator.device.type}, "
        f"{'float32' if accelerator.mixed_precision == 'no' else accelerator.mixed_precision}"
    )
    for line in (*([model.loaded] if model.loaded else ()), *(f"note: {unused}" for unused in config.unused())):
        say(line)
    if not model.has_map:
        say(
            f"{config.backbone} has no feature map: it is trained by cross-entropy, and the report says nothing of "
            "where it looks"
        )
    if model.layers and not config.attention.layer and config.looks:
        say(f"the CAM is taken at {', '.join(model.layers)}; another layer: --attention.layer")
    if model.map_side == 1:
        say(
            f"note: {config.backbone}'s feature map is 1 x 1 at --size {config.size} and cannot say where it looks; "
            "raise --size"
        )
    for name, split in parts.splits.items():
        say(f"{name}: {parts.task.told(split)}")
    if parts.attends and config.balance.ramp and not config.resume:  # of the run as it began
        say(
            f"lambda falls from 1 to {config.lam:g} over {config.balance.ramp * config.epochs:g} of {config.epochs} "
            "epochs; the best model and patience begin there"
        )
    if config.resume and findings_changed(config, parts.findings):
        say(
            f"note: the run keeps the rules of its own {FINDINGS}; {config.findings or 'the ready-made findings'} now "
            "say others"
        )
    if annotations:
        say(
            f"{annotations.known} of {total} training images have lesions of their finding, "
            f"{len(annotations.used)} are used as regions"
        )
    unplaced = without_rule(parts.task.findings, rules_of(parts.findings))
    if unplaced and config.attention.region != "annotation":
        say(
            f"no region is known for {listed(unplaced)}: classification only, no attention loss for them; "
            "declare one with --findings FILE"
        )


def make(config: Config, parts: Parts) -> Trainer:
    """The trainer at its start, everything on its device."""
    accelerator, task, findings, splits = parts.accelerator, parts.task, parts.findings, parts.splits
    segmenter = parts.segmenter.to(accelerator.device)
    key, out = segmenter.fingerprint(), Path(config.out)
    lungs = {name: LungFinder(segmenter, config.size, len(s), s.fingerprint, key, out) for name, s in splits.items()}
    raw, schedule = make_optimizer(parts.model, config.optim)
    net, optimizer = accelerator.prepare(parts.model, raw)
    model = accelerator.unwrap_model(net)
    trainer = Trainer(
        config=config,
        accelerator=accelerator,
        splits=splits,
        model=model,
        net=net,
        optimizer=optimizer,
        schedule=schedule,
        balance=Balance(**asdict(config.balance)),
        lungs=lungs,
        evaluator=evaluator_of(accelerator, model, config, task, findings, splits, lungs),
        tracking=Tracking(accelerator, config.tracker),
        task=task,
        findings=findings,
        annotations=parts.annotations,
        avoided=avoided(config, splits["train"]),
        attends=parts.attends,
        identity=identity(config, splits, key, findings),
    )
    trainer.state.warmup = config.optim.warmup * parts.per_step
    trainer.state.length = config.epochs * len(splits["train"])
    return trainer


def announce_swap(trainer: Trainer) -> None:
    """Say whose surroundings stay as they are."""
    config, say = trainer.config, trainer.accelerator.print
    fixed = [name for name in trainer.task.findings if name not in (*trainer.inside, NO_FINDING)]
    if config.swap_probability > 0 and trainer.attends and fixed:
        what = f"leaves out {listed(fixed)}" if trainer.swaps else "is off"
        but = " (but an image whose lesions are used gets the lungs of a healthy one around them)"
        say(
            f"context swap {what}: the region of {listed(fixed)} is unknown, or reaches beyond the lung box, whose "
            f"surroundings must then stay{but if trainer.annotations and config.swap.lesions else ''}"
        )
    if trainer.avoided and config.lent_devices:
        say(
            f"{trainer.avoided.images} of {len(trainer.splits['train'])} training images have devices "
            f"({config.attention.avoid}), which are lent to {config.lent_devices:g} of those without a finding"
        )
    if trainer.swaps and config.batch == 1:
        say("context swap does nothing with --batch 1: partners come from the same batch")


def findings_of(config: Config) -> dict[str, Finding]:
    """The findings of the task as --findings says; a resumed run that is told no others keeps its own copy, whatever
    has become of its file or ours.
    """
    own = Path(config.out) / FINDINGS
    if config.resume and own.is_file() and from_yaml(Config, own.with_name("config.yaml")).findings == config.findings:
        return run_findings(Path(config.out), config)
    return of_task(read_findings(config.findings), config.classes)


def findings_changed(config: Config, findings: dict[str, Finding]) -> bool:
    """Whether --findings, as it reads now, gives other rules than the run has."""
    with contextlib.suppress(InputError):  # the file is gone
        now = of_task(read_findings(config.findings), config.classes)
        return any(finding != findings.get(name) for name, finding in now.items())
    return False


def avoided(config: Config, split: Split) -> Avoided | None:
    """What --attention.avoid names. InputError: no training image has such a box or mask."""
    names = [name.strip() for name in config.attention.avoid.split(",") if name.strip()]
    if not names or (config.plain and not config.lent_devices):
        return None
    found = Avoided(split, names)
    if not found.images:
        raise InputError(
            f"--attention.avoid {config.attention.avoid}: no training image has a box or mask of that name; pack them "
            "(--boxes, --lesions), or leave it out"
        )
    return found


def annotated(config: Config, split: Split) -> LesionRegions | None:
    """The lesions that training uses. InputError where there are none."""
    a = config.attention
    if a.region == "anatomy" or (config.plain and not config.swap_probability):
        return None
    boxes = LesionRegions(split, a.annotated, config.seed)
    if not len(boxes.used):
        why = (
            f"--attention.annotated {a.annotated} leaves none of {boxes.known} images with lesions"
            if boxes.known
            else "no training image has a lesion of its finding"
        )
        raise InputError(
            f"--attention.region {a.region}: {why}; pack lesions (--boxes, --lesions), or take --attention.region "
            "anatomy"
        )
    return boxes
