"""python -m trainer.train: train a classifier that looks where the finding is.

Legend: B images of a process and micro-batch, W processes, K classes, S pixels of a side, h x w positions of the CAM.
A step is `accumulate` micro-batches; its losses are divided by the counts of the whole step over all processes, so W
processes and any accumulation give the gradient of one big batch (but for context swap, whose partners come from a micro-batch).
"""

if __name__ == "__main__":  # what is wrong with the settings is said before torch is imported, which takes seconds
    from shards.errors import run as _run
    from trainer.config import resolve as _resolve

    def _check() -> None:
        _resolve(None)

    _run(_check)

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from shards import atomic
from shards.dataset import Split
from shards.errors import InputError, finite, listed, run
from shards.loader import Batch
from shards.plan import EpochPlan, Shares
from shards.sample import NO_FINDING
from shards.store import open_store
from trainer import checkpoint
from trainer.annotations import Annotations, chosen
from trainer.augment import SWAPS, augment, draw
from trainer.balance import Balance
from trainer.classifier import FocusClassifier, normalize_cam
from trainer.config import Config, OptimConfig, flat, from_yaml, resolve, to_yaml
from trainer.context import swap_context
from trainer.evaluate import FINDINGS, LUNGS, MODEL, Outcome, among, evaluate, finish, open_run, read_report, run_findings, save_model
from trainer.launching import Accelerator, close, loader_of, on_main, seed_step, seen_by_all, set_threads, share_buffers, start
from trainer.look import locate
from trainer.losses import attention, attention_term, classification
from trainer.lungs import LungFinder, load_segmenter
from trainer.regions import Regions, placed
from trainer.rules import Finding, Rule, read_findings, rules_of, task_findings, without_rule
from trainer.rules import to_yaml as findings_to_yaml
from trainer.schedule import Schedule
from trainer.tracking import Tracking


@dataclass
class State:
    """Where the run is. All of it is saved and restored."""

    epoch: int = 0
    position: int = 0  # samples of the epoch that were trained on
    step: int = 0
    best: float = -math.inf
    best_epoch: int = -1
    since_best: int = 0  # epochs in a row without a better model
    seconds: float = 0.0  # of training, without evaluation and pauses
    images: int = 0  # trained on in those seconds
    warmup: int = 0  # images of the learning rate's warm-up, as the run began
    changes: list[dict[str, Any]] = field(default_factory=list)  # of how it is carried out, at resumes: step, what, from, to


@dataclass
class Prepared:
    """A micro-batch on the device: images float [B,1,S,S]; labels int64 [B]; region float [B,S,S] in [0,1]; weight, positive float [B]."""

    images: torch.Tensor
    labels: torch.Tensor
    region: torch.Tensor
    weight: torch.Tensor
    positive: torch.Tensor  # what counts for attention


@dataclass
class Trainer:
    """Everything a run consists of. The loop is `train`."""

    config: Config
    accelerator: Accelerator
    splits: dict[str, Split]
    model: FocusClassifier
    net: Any  # the model as Accelerate prepared it
    optimizer: Any
    schedule: Schedule
    balance: Balance
    lungs: dict[str, LungFinder]
    tracking: Tracking
    findings: dict[str, Finding]  # of the task
    annotations: Annotations | None  # lesion boxes that are used as regions
    identity: dict[str, Any]
    state: State = field(default_factory=State)

    def __post_init__(self) -> None:
        c = self.config
        self.rules: dict[str, Rule] = rules_of(self.findings)
        self.regions = Regions(self.splits["train"].classes, self.rules, c.size, self.accelerator.device)
        self.attends = not c.plain and bool(self.rules or self.annotations)
        self.logged = _Logged(self.accelerator.device)
        self.model.keeps = self.balance.follows_gradients
        self.swap = replace(c.swap, probability=c.swap_probability)
        # Whose region lies inside the lung box, so that what lies outside may be exchanged. No Finding shows nowhere.
        self.inside = {name for name, rule in self.rules.items() if rule.inside(c.swap.dilate)}
        self.reach = max((self.rules[name].dilate for name in self.inside), default=0.0)
        if self.inside:
            self.inside.add(NO_FINDING)
        self.swapped = np.zeros(2, int)  # images that got other surroundings, and all, of this process since the last line of the log
        self.swaps = bool(self.inside or self.annotations) and c.swap_probability > 0

    def train(self) -> None:
        """Epochs until they are done or patience ends."""
        c, acc, state = self.config, self.accelerator, self.state
        split = self.splits["train"]
        plan = EpochPlan(split.shard_sizes(), c.seed)
        loader = loader_of(acc, split, plan, batch=c.batch, workers=c.workers)
        with tqdm(
            total=c.epochs * len(plan),
            initial=state.epoch * len(plan) + state.position,
            unit="img",
            disable=not acc.is_main_process,
            mininterval=1.0 if sys.stderr.isatty() else 15.0,
            dynamic_ncols=True,
        ) as bar:  # closed before an error is told, which then has a line of its own
            while not self.done:
                self.net.train()
                clock = time.monotonic()
                for group in _groups(loader.batches(state.epoch, state.position), c.accumulate):
                    taken = sum(batch.total for batch in group)
                    self.schedule.before_step(state.epoch * len(plan) + state.position, taken, c.epochs * len(plan), state.warmup)
                    seed_step(c.seed, state.step, acc.process_index)
                    lam = self.balance.value(state.epoch) if self.attends else 1.0
                    sums = self.step(group, lam)
                    if self.balance.follows_losses:
                        self.balance.update(acc.reduce(sums, "sum").cpu())

                    # Once in a while: log, save.
                    state.position += taken
                    state.step += 1
                    state.images += taken
                    self.logged.add(sums)
                    bar.update(taken)
                    if state.step % c.log_every == 0 or state.position == len(plan):
                        state.seconds += time.monotonic() - clock
                        clock = time.monotonic()
                        self.log(bar, lam, state.epoch + state.position / len(plan))
                    if state.step % c.save_every == 0 and state.position < len(plan):
                        state.seconds += time.monotonic() - clock
                        self.save()
                        clock = time.monotonic()

                # Once an epoch: share the lungs, validate, keep the best, save.
                self.end_epoch(bar)

    def step(self, group: list[Batch], lam: float) -> torch.Tensor:
        """One optimizer step: float64 [6] on the device, this process's sums for `Balance.update`."""
        c, acc = self.config, self.accelerator
        attend = lam < 1  # lambda = 1 is plain cross-entropy and pays nothing for attention
        hard = c.attention.form == "published"  # as published: of the predicted class, without a gradient, averaged over all images

        # Where the lungs are, and so where each finding is expected. New images are segmented, known ones looked up.
        batches = [self.prepare(batch, attend) for batch in group]

        # How many images and positives the whole step has, over all processes.
        own = torch.stack([torch.stack([b.weight.sum(), b.positive.sum()]) for b in batches]).sum(0)
        images, positives = acc.reduce(own, "sum").clamp(min=1)

        # One forward gives logits and CAM; the CAM's gradient goes through the head into the backbone.
        sums, norms = torch.zeros(2, 2, dtype=torch.float64, device=acc.device)
        for i, b in enumerate(batches):
            with contextlib.nullcontext() if i == len(batches) - 1 else acc.no_sync(self.net):
                logits, cam = self.net(b.images, None if hard else b.labels, cam=attend, mode=c.attention.mode, differentiable=not hard)
                ce, _ = classification(logits, b.labels, b.weight)
                loss, term = lam * ce / images, torch.zeros_like(ce)
                if attend:
                    per_image = attention_term(normalize_cam(cam, c.size), b.region, c.attention.threshold, c.attention.form)
                    term, _ = attention(per_image, b.weight if hard else b.positive)
                    loss = loss + (1 - lam) * term / (images if hard else positives)
                    if self.balance.follows_gradients:
                        norms += torch.stack([squared_norm(x, self.model.kept) for x in (ce / images, term / positives)])
                acc.backward(loss * acc.num_processes)  # Accelerate averages gradients over processes; the sum is wanted
            sums += torch.stack([ce, term]).detach().double()
        self.model.kept = []

        if c.optim.clip:
            acc.clip_grad_norm_(self.net.parameters(), c.optim.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return torch.cat([sums, own.double(), norms])

    def prepare(self, batch: Batch, attend: bool) -> Prepared:
        """A batch on the device: resized, augmented together with its lung box, surroundings swapped, with the region of its finding."""
        c, device, findings = self.config, self.accelerator.device, self.splits["train"].classes
        raw = batch.image.to(device, non_blocking=True)
        labels, weight = batch.label.to(device, non_blocking=True), batch.weight.to(device, non_blocking=True)
        located = locate(self.accelerator, raw, batch.index, self.lungs["train"] if attend or self.swaps else None, c.size)
        lesions = self.annotations.regions(batch.index, raw.shape[-2:], c.size).to(device) if self.annotations else None
        draws = draw(c.seed, self.state.epoch, batch.index)
        outlines = located.outlines if attend and self.regions.uses_lungs else None
        images, boxes, lesions, lungs = augment(located.images, draws, c.augment, boxes=located.boxes, masks=lesions, outlines=outlines)
        if boxes is None:
            nothing = torch.zeros(len(images), 1, 1, device=device)
            return Prepared(images, labels, nothing, weight, torch.zeros_like(weight))
        region = self.regions(batch.label, boxes, lungs).weight
        if lesions is not None:
            region = chosen(region, lesions, c.attention.region)
        if self.swaps:
            names = [findings[k] for k in batch.label.tolist()]
            inside, healthy = ([f and name in kind for f, name in zip(located.found.tolist(), names, strict=True)] for kind in (self.inside, {NO_FINDING}))
            images, lenders = swap_context(images, boxes, inside, draws[:, SWAPS], self.swap, lesions=lesions, healthy=healthy, reach=self.reach)
            self.swapped += np.array([sum(lender != b for b, lender in enumerate(lenders)), len(lenders)])
        return Prepared(images, labels, region, weight, weight * placed(region))

    def log(self, bar: Any, lam: float, position: float) -> None:
        """A line of metrics.jsonl and of the tracker; stops the run at a loss that is not finite."""
        ce, term, images, positives = self.accelerator.reduce(self.logged.take(), "sum").tolist()
        state = self.state
        if not math.isfinite(ce + term):
            raise InputError(NOT_FINITE.format(step=state.step))
        counted = images if self.config.attention.form == "published" else positives
        line = {
            "step": state.step,
            "epoch": state.epoch,
            "position": position,
            "ce": ce / images,
            "attention": term / counted if counted and lam < 1 else None,
            "lambda": lam,
            "swapped": float(self.swapped[0] / self.swapped[1]) if self.swapped[1] else None,
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_s": state.images / max(state.seconds, 1e-9),
        }
        self.swapped[:] = 0
        told = {"ce": line["ce"], "att": line["attention"], "lambda": lam if self.attends else None, "swapped": line["swapped"]}
        bar.set_postfix({name: f"{value:.3f}" for name, value in told.items() if value is not None} | {"epoch": state.epoch + 1}, refresh=False)
        self.write(line)

    def write(self, line: dict[str, Any]) -> None:
        """Append to metrics.jsonl and send to the tracker, on the main process."""
        if self.accelerator.is_main_process:
            atomic.append(Path(self.config.out) / "metrics.jsonl", json.dumps(finite(line)))
            self.tracking.log({k: v for k, v in line.items() if k != "step"}, line["step"])

    def end_epoch(self, bar: Any) -> None:
        """Validation, the schedule, the best model, the checkpoint."""
        c, acc, state = self.config, self.accelerator, self.state
        share_buffers(self.model)
        self.refuse_not_finite()
        outcome = evaluate(acc, self.model, self.splits["val"], self.lungs.get("val"), c, self.rules, look=self.attends)
        figures = validation_figures(outcome, self.balance.value(state.epoch) if self.attends else 1.0, c)
        self.balance.validated(figures["val_loss"])
        self.schedule.validated(figures["val_weighted" if c.optim.watch == "weighted" else "val_loss"])
        score = {"accuracy": figures["val_accuracy"], "auc": figures["val_auc"], "loss": -figures["val_loss"], "last": state.epoch}[c.best]
        score = score if math.isfinite(score) else -math.inf
        state.since_best += 1
        if score > state.best or state.best_epoch < 0:  # the first epoch's in any case: what its figures lack, weights have
            state.best, state.best_epoch, state.since_best = score, state.epoch, 0
            on_main(acc, lambda: save_model(Path(c.out) / MODEL, self.model, c, stored_as(self.splits["train"]), state.epoch, acc.mixed_precision))
        self.write({"step": state.step, "epoch": state.epoch, **figures})
        state.epoch, state.position = state.epoch + 1, 0
        self.save()
        if acc.is_main_process:
            told = "  ".join(f"{name[4:]} {value:.3f}" for name, value in figures.items() if value is not None)
            bar.write(f"epoch {state.epoch}/{c.epochs}: {told}{'  *' if not state.since_best else ''}", file=sys.stderr)

    def refuse_not_finite(self) -> None:
        """InputError on every process where losses since the last line, or weights, are not finite: nothing of the kind is ever saved."""
        sums = self.accelerator.reduce(self.logged.sums.clone(), "sum")
        if not bool(sums.isfinite().all()) or checkpoint.not_finite(self.model):
            raise InputError(NOT_FINITE.format(step=self.state.step))

    def save(self) -> None:
        """The checkpoint that `--resume` goes on from. Every process takes part: lungs are shared first."""
        self.refuse_not_finite()
        for finder in self.lungs.values():
            finder.share(self.accelerator)
        logged = self.accelerator.reduce(self.logged.sums.clone(), "sum").tolist()
        scaler = self.accelerator.scaler
        folder = Path(self.config.out) / "checkpoints"

        def write() -> None:
            if not all(finder.memory.saved for finder in self.lungs.values()):  # after the first epoch all are
                checkpoint.save(folder / "lungs.pt", {name: finder.memory.state_dict() for name, finder in self.lungs.items()})
            content = {
                "identity": self.identity,
                "launch": self.launch(),
                "state": asdict(self.state),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else None,
                "balance": self.balance.state_dict(),
                "logged": logged,
                "swapped": self.swapped.tolist(),
            }
            checkpoint.save(folder / "last.pt", content)

        on_main(self.accelerator, write)
        for finder in self.lungs.values():
            finder.memory.saved = True
        self.accelerator.wait_for_everyone()

    def recall_lungs(self, path: Path) -> None:
        """The lungs that the run has found; what does not fit is looked for again, which is said."""
        if not path.is_file():
            return  # cross-entropy alone looks for none, and earlier versions kept boxes alone
        try:
            remembered = checkpoint.load(path)
        except InputError:
            self.accelerator.print(f"{path} is damaged: the lungs of all images are looked for again")
            return
        for name, finder in self.lungs.items():
            if name not in remembered or not finder.memory.load_state_dict(remembered[name]):
                self.accelerator.print(f"the lungs of the {name} images are looked for again: these are not the images that were segmented before")

    def launch(self) -> dict[str, Any]:
        """How the run is carried out: it may change, but not unsaid."""
        c, acc = self.config, self.accelerator
        return {
            "images a step": c.batch * acc.num_processes * c.accumulate,
            "precision": acc.mixed_precision,
            "optim.lr": c.optim.lr,
            "optim.clip": c.optim.clip,
        } | ({"epochs": c.epochs} if c.optim.schedule == "cosine" else {})  # whose rate is a function of the run's length

    def restore(self) -> None:
        """Model, optimizer, schedule, scaler, lambda, lungs, position; then the log is cut back to that step."""
        out = Path(self.config.out)
        path = out / "checkpoints" / "last.pt"
        if not path.is_file():
            self.accelerator.print(f"{out} was stopped before its first checkpoint: it starts from the beginning")
            if self.accelerator.is_main_process:
                checkpoint.rewind(out / "metrics.jsonl", -1)
            return
        content = checkpoint.load(path)
        words = {"shards": "other images in --shards", "lungs.weights": "another --lungs.weights", "findings": "other rules of its findings"}
        checkpoint.refuse_other(out, content["identity"], self.identity, words)
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        self.schedule.load_state_dict(content["schedule"])
        if content["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(content["scaler"])
        self.balance.load_state_dict(content["balance"])
        self.recall_lungs(path.with_name("lungs.pt"))
        self.state = State(**content["state"])
        was = content["launch"]
        for name, value in self.launch().items():
            if was.get(name, value) != value:
                self.accelerator.print(f"note: {name} was {was[name]} before, now it is {value}")
                self.state.changes.append({"step": self.state.step, "what": name, "from": was[name], "to": value})
        self.schedule.scale(self.config.optim.lr / was.get("optim.lr", self.config.optim.lr))
        self.state.warmup = self.state.warmup or self.config.optim.warmup * was["images a step"]
        if self.accelerator.is_main_process:  # sums of all processes since the last line of the log
            self.logged.sums += torch.tensor(content.get("logged", [0.0] * 4), dtype=torch.float64, device=self.accelerator.device)
            self.swapped += np.array(content.get("swapped", [0, 0]))
        if self.accelerator.is_main_process:
            checkpoint.rewind(out / "metrics.jsonl", self.state.step)
        self.accelerator.print(f"resumed after step {self.state.step}: {self.state.epoch} epochs and {self.state.position} images of the next are done")

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do: the epochs are done and the report is of this very checkpoint."""
        try:
            training = read_report(Path(self.config.out)).get("training", {})
        except (InputError, OSError):
            return False  # a damaged one is written again
        of = training.get("step", self.state.step) == self.state.step and training.get("epochs") == self.state.epoch
        return self.done and of and not training.get("unfinished")

    @property
    def done(self) -> bool:
        """Whether epochs or patience are used up."""
        return self.state.epoch >= self.config.epochs or self.state.since_best >= self.config.patience


class _Logged:
    """Sums since the last line: ce, attention, images, positives, on the device so that no step waits for the host."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)

    def add(self, sums: torch.Tensor) -> None:
        self.sums += sums[:4]

    def take(self) -> torch.Tensor:
        taken, self.sums = self.sums, torch.zeros_like(self.sums)
        return taken


def _groups(loader: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
    """Micro-batches by the step; the last step of an epoch may have fewer."""
    group: list[Batch] = []
    for batch in loader:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def squared_norm(loss: torch.Tensor, kept: list[torch.Tensor]) -> torch.Tensor:
    """Of a loss's gradient at the feature maps: float64 scalar. Scaled meanwhile, so that it does not vanish in half precision."""
    scale = 2.0**12
    gradients = torch.autograd.grad(loss * scale, kept, retain_graph=True, allow_unused=True)
    return torch.stack([(g.double() / scale).square().sum() for g in gradients if g is not None] or [loss.detach().double() * 0]).sum()


NOT_FINITE = (
    "the loss is not finite in one of the steps up to {step}, or a weight after them; lower --optim.lr, set --optim.clip 1, or launch with "
    "--mixed_precision bf16 or no. --resume with one of these goes on from the last checkpoint, which is sound"
)


def stored_as(split: Split) -> dict[str, Any]:
    """How images of a split were packed, so that others can be packed alike: size, and aspect and scales where the index says them."""
    return {"size": int(split.image(0).shape[0])} | {name: split.stored[name] for name in ("aspect", "scales") if name in split.stored}


def validation_figures(outcome: Outcome, lam: float, config: Config) -> dict[str, Any]:
    """Accuracy, AUC, cross-entropy; with attention also its term, the weighted loss and the energy in the region."""
    report = outcome.report(tuple(task_findings(config.task)))
    figures = {"val_accuracy": report["accuracy"], "val_auc": report["auc"], "val_loss": report["loss"]}
    known = ~outcome.term.isnan()
    if known.any():
        term = outcome.term[known].sum() / (len(known) if config.attention.form == "published" else known.sum())
        place = report["localization"]["lesion" if config.attention.region == "annotation" else "expected"]["all"]
        figures |= {"val_attention": float(term), "val_energy": place and place["energy"]}
    figures["val_weighted"] = lam * figures["val_loss"] + (1 - lam) * figures.get("val_attention", 0.0)
    return figures


# Settings that a resumed run may change. All others shape the model: it would not be the one that its config.yaml describes.
MAY_CHANGE = {"shards", "out", "epochs", "patience", "batch", "accumulate", "workers", "log_every", "save_every", "tracker", "resume", "lungs.weights"}
MAY_CHANGE |= {"optim.lr", "optim.clip", "pretrained"}  # the remedies of a loss that is not finite; weights that are in the checkpoint anyway


def identity(config: Config, splits: dict[str, Split], segmenter: str, findings: dict[str, Finding]) -> dict[str, Any]:
    """What may not change when a run is resumed: settings, training images, the segmenter's weights, the findings' rules."""
    own = {name: value for name, value in flat(asdict(config)).items() if name not in MAY_CHANGE}
    return own | {"shards": splits["train"].fingerprint, "lungs.weights": segmenter, "findings": findings_to_yaml(findings)}


def make_optimizer(model: torch.nn.Module, o: OptimConfig) -> tuple[torch.optim.Optimizer, Schedule]:
    """Optimizer and schedule."""
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[o.name]
    optimizer = kind(model.parameters(), lr=o.lr, weight_decay=o.weight_decay)
    return optimizer, Schedule(optimizer, o.schedule, o.lr)


def build(config: Config) -> Trainer:
    """Check everything that can be checked, say what will happen, claim the run folder, make the parts."""
    from trainer.report import rehearse  # matplotlib takes its time

    trackers = None if config.tracker == "none" else config.tracker
    accelerator = start(config.seed, log_with=trackers, project_dir=config.out)
    store, out, classes = open_store(config.shards), Path(config.out), task_findings(config.task)
    findings = findings_of(config)
    index = store.index()
    splits = {n: Split(store, n, classes, among=among(findings)) for n in ("train", "val", "test") if n in index["splits"] or n != "test"}
    total, world = len(splits["train"]), accelerator.num_processes
    per_step = config.batch * world * config.accumulate
    if per_step > total:
        raise InputError(
            f"--batch {config.batch} x {world} processes x --accumulate {config.accumulate} = {per_step} images a step, but the train "
            f"split has {total}; lower --batch to at most {max(1, total // (world * config.accumulate))}"
        )
    own = out / LUNGS  # the run's copy, if the file it came from is gone
    weights = own if config.resume and own.is_file() and not os.path.exists(config.lungs.weights) else config.lungs.weights
    segmenter = load_segmenter(weights or None)
    # A checkpoint holds every weight: neither a file nor the hub is asked again.
    pretrained = "false" if config.resume and (out / "checkpoints" / "last.pt").is_file() else config.pretrained
    looks = not (config.plain and not config.swap_probability)  # cross-entropy alone needs no feature map
    model = FocusClassifier(config.backbone, len(classes), size=config.size, pretrained=pretrained, layer=config.attention.layer, needs_map=looks)
    annotations = annotated(config, splits["train"])
    smallest = Shares(EpochPlan(splits["train"].shard_sizes()), 0, 0, batch=config.batch, rank=0, world=world).smallest()
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
        f"{total} training images, {-(-total // per_step)} steps an epoch; {accelerator.device.type}, {accelerator.mixed_precision}"
    )
    for told in (*([model.loaded] if model.loaded else ()), *(f"note: {unused}" for unused in config.unused())):
        accelerator.print(told)
    if not model.has_map:
        accelerator.print(f"{config.backbone} has no feature map: it is trained by cross-entropy, and the report says nothing of where it looks")
    if model.layers and not config.attention.layer and looks:
        accelerator.print(f"the CAM is taken at {', '.join(model.layers)}; another layer: --attention.layer")
    if model.map_side == 1:
        accelerator.print(f"note: {config.backbone}'s feature map is 1 x 1 at --size {config.size} and cannot say where it looks; raise --size")
    for name, split in splits.items():
        left = f"; {split.left_out} others left out (of none of the task's classes, or of several)" if split.left_out else ""
        accelerator.print(f"{name}: {', '.join(f'{n} {finding}' for finding, n in split.counts().items())}{left}")
    if config.resume and findings_changed(config, findings):
        accelerator.print(f"note: the run keeps the rules of its own {FINDINGS}; {config.findings or 'the ready-made findings'} now say others")
    if annotations:
        accelerator.print(f"{annotations.known} of {total} training images have lesion boxes of their finding, {len(annotations.boxes)} are used as regions")
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
    parts = config, accelerator, splits, accelerator.unwrap_model(net), net, optimizer, schedule, balance, lungs, tracking
    trainer = Trainer(*parts, findings, annotations, identity(config, splits, key, findings))
    fixed = [name for name in classes if name not in (*trainer.inside, NO_FINDING)]
    if config.swap_probability > 0 and trainer.attends and fixed:
        what = f"leaves out {listed(fixed)}" if trainer.swaps else "is off"
        accelerator.print(
            f"context swap {what}: the region of {listed(fixed)} is unknown, or reaches beyond the lung box, whose surroundings must then stay"
            + (" (but an image whose lesion boxes are used gets the lungs of a healthy one around them)" if annotations else "")
        )
    if trainer.swaps and config.batch == 1:
        accelerator.print("context swap does nothing with --batch 1: partners come from the same batch")
    trainer.state.warmup = config.optim.warmup * per_step
    if config.resume:
        trainer.restore()
    if accelerator.is_main_process and not trainer.finished:  # a resume that is refused, or has nothing to do, changes nothing
        atomic.write(out / "config.yaml", to_yaml(replace(config, resume=False)))
        segmenter.save(out / LUNGS)
    tracking.start(out, asdict(config))
    return trainer


def findings_of(config: Config) -> dict[str, Finding]:
    """The findings of the task as --findings says; a resumed run that is told no others keeps its own copy, whatever has become of its file or ours."""
    own = Path(config.out) / FINDINGS
    if config.resume and own.is_file() and from_yaml(Config, own.with_name("config.yaml")).findings == config.findings:
        return run_findings(Path(config.out), config)
    return {name: finding for name, finding in read_findings(config.findings).items() if name in task_findings(config.task)}


def findings_changed(config: Config, findings: dict[str, Finding]) -> bool:
    """Whether --findings, as it reads now, gives other rules than the run has."""
    with contextlib.suppress(InputError):  # the file is gone
        return any(finding != findings.get(name) for name, finding in read_findings(config.findings).items() if name in task_findings(config.task))
    return False


def annotated(config: Config, split: Split) -> Annotations | None:
    """The lesion boxes that training uses. InputError where there are none."""
    a = config.attention
    if a.region == "anatomy" or (config.plain and not config.swap_probability):
        return None
    boxes = Annotations(split, a.annotated, config.seed)
    if not boxes.boxes:
        why = (
            f"--attention.annotated {a.annotated} leaves none of {boxes.known} images with boxes"
            if boxes.known
            else "no training image has a box of its finding"
        )
        raise InputError(f"--attention.region {a.region}: {why}; pack lesion boxes (--boxes), or take --attention.region anatomy")
    return boxes


def main(argv: list[str] | None = None) -> None:
    """Parse, build, train, evaluate the best model, close."""
    set_threads()
    trainer = build(resolve(argv))
    try:
        if trainer.finished:
            out, epochs = trainer.config.out, trainer.state.epoch
            trainer.accelerator.print(f"nothing is left to train: {out} has its {epochs} epochs and its report; raise --epochs to go on")
        else:
            trainer.train()
            conclude(trainer)
    except KeyboardInterrupt:
        kept = (Path(trainer.config.out) / "checkpoints" / "last.pt").is_file()
        went = "its last checkpoint" if kept else "the beginning, there is no checkpoint yet"
        trainer.accelerator.print(f"\n{trainer.config.out}: stopped; --resume goes on from {went}", file=sys.stderr)
        raise
    finally:
        trainer.tracking.finish()
    close(trainer.accelerator)


def conclude(trainer: Trainer) -> None:
    """Evaluate the best model, write and print its report, give the tracker its figures."""
    acc, config, state, out = trainer.accelerator, trainer.config, trainer.state, Path(trainer.config.out)
    acc.wait_for_everyone()
    trainer.model.load_state_dict(open_run(out).model.state_dict())
    training = {
        "minutes": state.seconds / 60,
        "epochs": state.epoch,
        "step": state.step,
        "best_epoch": state.best_epoch + 1,
        "best": config.best,
        "images_per_s": state.images / max(state.seconds, 1e-9),
        "processes": acc.num_processes,
        "precision": acc.mixed_precision,
        "device": torch.cuda.get_device_name() if acc.device.type == "cuda" else acc.device.type,
        "map": trainer.model.has_map,
        "changes": state.changes,
    }
    content = finish(acc, trainer.model, config, trainer.findings, trainer.splits, trainer.lungs, training, out)
    if acc.is_main_process:
        from PIL import Image

        from trainer import report

        with Image.open(out / "panel.png") as panel:
            trainer.tracking.picture("panel", np.asarray(panel.convert("RGB")), state.step)
        shown = report.shown_split(content)
        figures = dict(zip(report.SUMMARY, report.summary(content), strict=True))
        trainer.tracking.log({f"{shown}/{name}": pair[0] for name, pair in figures.items() if pair is not None}, state.step)
        print(report.table({out.name: content}))
        print(f"report: {(out / 'report.html').resolve()}")


if __name__ == "__main__":
    run(main)
