"""The training loop: L = lambda * cross-entropy / images + (1 - lambda) * attention / positives, over all processes.
With several findings an image, binary cross-entropy is divided by the number of known cells in place of images.

Legend: B images of a process and micro-batch, W processes, K classes, S pixels of a side, h x w positions of the CAM.
A step is `accumulate` micro-batches; its losses are divided by the counts of the whole step over all processes, so W
processes and any accumulation give the gradient of one big batch (but for context swap, whose partners come from a
micro-batch).
"""

import contextlib
import json
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from shards import atomic
from shards.batch import Batch
from shards.errors import InputError, finite
from shards.sample import NO_FINDING
from trainer import presence
from trainer.augment import LABELS, LENDS, PAIR, SWAPS, augment, draw
from trainer.balance import StepSums
from trainer.cam import normalize_cam
from trainer.context import lend_devices, swap_context
from trainer.launching import loader_of, plan_of, seed_step, share_buffers
from trainer.look import locate
from trainer.losses import attention_term, constant, revival
from trainer.measure import validation_figures
from trainer.regions.lesions import attended_regions
from trainer.regions.place import Regions, has_region
from trainer.rules import Rule, rules_of
from trainer.stopping import Stopped
from trainer.training import NOT_FINITE, Training
from trainer.upload import Download, ahead, upload


@dataclass
class Prepared:
    """A micro-batch on the device: images float [B,1,S,S]; target int8 [B,K]; region float [B,S,S] in [0,1]; weight,
    chance, has_region float [B].
    """

    images: torch.Tensor
    target: torch.Tensor
    attended: torch.Tensor  # int64 [B], the finding whose CAM is taken
    region: torch.Tensor  # where it is expected
    weight: torch.Tensor
    chance: torch.Tensor  # the images' random numbers for their labels
    has_region: torch.Tensor  # how many pairs attention counts, 0 or 1 with one finding an image
    swapped: torch.Tensor  # how many images got other surroundings, and how many there are: [2]


class Trainer(Training):
    """The loop. What it consists of, and its checkpoint: see `Training`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.paced = False
        config, device = self.config, self.accelerator.device
        split = self.splits["train"]
        self.plan = plan_of(config.sampler, split, config.seed)
        self.loader = loader_of(
            self.accelerator,
            split,
            self.plan,
            batch=config.batch,
            workers=config.workers,
            timeout=config.timeout,
            decode=config.decode,
        )
        self.rules: dict[str, Rule] = rules_of(self.findings)
        self.regions = Regions(split.classes, self.rules, config.size, device)
        self.model.keeps = self.balance.follows_gradients
        # Whose region lies inside the lung box, so that what lies outside may be exchanged. No Finding shows nowhere.
        self.swap = replace(config.swap, probability=config.swap_probability, devices=config.lent_devices)
        self.inside = {name for name, rule in self.rules.items() if rule.inside(config.swap.dilate)}
        self.reach = max((self.rules[name].dilate for name in self.inside), default=0.0)
        if self.inside:
            self.inside.add(NO_FINDING)
        self.swaps = bool(self.inside or (self.annotations and config.swap.lesions)) and config.swap_probability > 0
        self.lends = self.avoided is not None and config.lent_devices > 0
        self.has_rule = torch.tensor([name in self.rules for name in split.classes])
        self.shows_outside = torch.tensor([name not in self.inside for name in split.classes], device=device)

    def train(self) -> None:
        """Epochs until they are done or patience ends."""
        config, state, images = self.config, self.state, len(self.plan)
        # The bar is closed before an error is told, which then has a line of its own
        with self._progress() as bar, self.stop.between_batches():
            self.settle()
            self.clock.start()
            while not self.done:
                self.net.train()
                batches = ahead(self.loader.batches(state.epoch, state.position), self.accelerator.device)
                for group in groups(batches, config.accumulate):
                    # A step: its learning rate, its random numbers, its lambda.
                    taken = sum(batch.total for batch in group)
                    done, whole = state.epoch * images + state.position, config.epochs * images
                    self.schedule.before_step(done, taken, whole, state.warmup, config.optim.frozen * images)
                    seed_step(config.seed, state.step, self.accelerator.process_index)
                    lam = self.lam
                    sums = self.step(group, lam)
                    self.tell_balance(sums)

                    state.position += taken
                    state.step += 1
                    presence.at(f"step {state.step}")
                    state.images += taken
                    self.logged += sums
                    bar.update(taken)

                    # Once in a while: log, save; where a signal asks for it, leave.
                    if state.step % config.log_every == 0 or state.position == images:
                        self.log(bar, lam, state.epoch + state.position / images)
                    if self.asked_to_end(at_once=state.position == images):
                        self.leave()
                    if state.step % config.save_every == 0 and state.position < images:
                        with self.clock.paused():
                            self.save()

                # Once an epoch: share the lungs, validate, keep the best, save.
                with self.clock.paused():
                    self.end_epoch(bar)

    @property
    def lam(self) -> float:
        """Lambda of the next step; 1 is plain cross-entropy and pays nothing for attention."""
        return self.balance.value(self.state.epoch, self.passed) if self.attends else 1.0

    @property
    def passed(self) -> float:
        """The share that is done of the run as it began, whatever a resume makes of its length."""
        return (self.state.epoch * len(self.plan) + self.state.position) / self.state.length

    def _progress(self) -> Any:
        """The bar of the run."""
        images = len(self.plan)
        return tqdm(
            total=self.config.epochs * images,
            initial=min(self.config.epochs * images, self.state.epoch * images + self.state.position),
            unit="img",
            disable=not self.accelerator.is_main_process,
            mininterval=1.0 if sys.stderr.isatty() else 15.0,
            dynamic_ncols=True,
        )

    def step(self, group: list[Batch], lam: float) -> torch.Tensor:
        """One optimizer step; the host does not wait for the device in it. Returns this process's `StepSums` as float64
        [8] on the device.
        """
        config, accelerator = self.config, self.accelerator
        attend = lam < 1  # lambda = 1 is plain cross-entropy and pays nothing for attention
        # As published: of the predicted class, without a gradient, averaged over all images
        hard = config.attention.form == "published"

        # Each batch: find the lungs (new images are segmented, known ones looked up), augment, say where the finding is
        # expected, swap surroundings.
        batches = [self.prepare(batch, attend) for batch in group]

        # How many images and positives the whole step has, over all processes.
        own = torch.stack(
            [
                torch.cat([self.task.counted(batch.target, batch.weight), batch.has_region.sum()[None]])
                for batch in batches
            ]
        ).sum(0)
        # With it goes whether a process was asked to end: all learn of it at the same step
        asked = constant((float(bool(self.stop.asked)),), accelerator.device).to(own.dtype)
        counts, self.asked = accelerator.reduce(torch.cat([own, asked]), "sum").split([len(own), 1])
        shares = self.task.shares(counts[:-1])
        images, positives = counts[:-1].sum(), counts[-1].clamp(min=1)
        images = torch.where(images > 0, images, torch.ones_like(images))

        # One forward gives logits and CAM; the CAM's gradient goes through the head into the backbone.
        losses, norms = torch.zeros(2, 2, dtype=torch.float64, device=accelerator.device)
        for i, batch in enumerate(batches):
            with contextlib.nullcontext() if i == len(batches) - 1 else accelerator.no_sync(self.net):
                logits, cam = self.net(
                    batch.images,
                    None if hard else batch.attended,
                    cam=attend,
                    mode=config.attention.mode,
                    differentiable=not hard,
                )
                ce = (self.task.loss(logits, batch.target, batch.weight, batch.chance) * shares).sum()
                loss, term = lam * ce / images, torch.zeros_like(ce)
                if attend:
                    per_image = attention_term(
                        normalize_cam(cam, config.size), batch.region, config.attention.threshold, config.attention.form
                    )
                    if not hard:
                        per_image = per_image + revival(cam, batch.region)
                    term = (per_image * (batch.weight if hard else batch.has_region)).sum()
                    loss = loss + (1 - lam) * term / (images if hard else positives)
                    if self.balance.follows_gradients:
                        norms += torch.stack(
                            [squared_norm(x, self.model.kept) for x in (ce / images, term / positives)]
                        )
                # Accelerate averages gradients over processes; the sum is wanted
                accelerator.backward(loss * accelerator.num_processes)
            losses += torch.stack([ce, term]).detach().double()
        self.model.kept = []

        if config.optim.clip:
            accelerator.clip_grad_norm_(self.net.parameters(), config.optim.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.average:
            self.average.update()
        swapped = torch.stack([batch.swapped for batch in batches]).sum(0)
        terms = torch.stack([own[:-1].sum(), own[-1]])
        return torch.cat([losses, terms.double(), norms, swapped.double()])

    def prepare(self, batch: Batch, attend: bool) -> Prepared:
        """A batch on the device: resized, augmented together with its lung box, surroundings swapped, with the region
        of its finding.
        """
        config, device = self.config, self.accelerator.device
        raw, target, weight = upload(batch.image, device), upload(batch.target, device), upload(batch.weight, device)
        chances = draw(config.seed, self.state.epoch, batch.index, batch.times)
        # The host knows whose CAM is taken: lesions are looked up by it.
        pair = self.task.drawn(batch.target, self.places(batch.index), chances[:, PAIR])
        finder = self.lungs["train"] if attend or self.swaps or self.lends else None
        located = locate(self.accelerator, raw, batch.index, finder, config.size)
        lesions = (
            self.annotations.regions(batch.index, pair.finding, raw.shape[-2:], config.size, device)
            if self.annotations
            else None
        )
        if self.avoided:
            avoided = self.avoided.regions(batch.index, raw.shape[-2:], config.size, device)
            lesions = torch.stack([avoided, torch.zeros_like(avoided) if lesions is None else lesions], 1)
        attended, pairs, draws = (upload(x, device) for x in (*pair, chances))
        chance = draws[:, LABELS]
        outlines = located.outlines if attend and self.regions.uses_lungs else None
        images, boxes, lesions, lungs = augment(
            located.images, draws, config.augment, boxes=located.boxes, masks=lesions, outlines=outlines
        )
        swapped = torch.zeros(2, device=device)
        if boxes is None:
            nothing = torch.zeros(len(images), 1, 1, device=device)
            return Prepared(images, target, attended, nothing, weight, chance, 0 * weight, swapped)
        region = self.regions(attended, boxes, lungs).weight
        if self.swaps or self.lends:
            found = upload(located.found, device)
            healthy = found & self.task.healthy(target)
        if self.avoided and lesions is not None:
            avoided, lesions = lesions.unbind(1)
            region = region.masked_fill(avoided, 0)
            if self.lends:
                images = lend_devices(images, boxes, avoided, healthy, draws[:, LENDS], config.swap).images
        if self.annotations and lesions is not None:
            region = attended_regions(region, lesions, config.attention.region)
        if self.swaps:
            inside = found & ~(self.task.may_show(target) & self.shows_outside).any(1)
            if not (self.annotations and self.swap.lesions):
                lesions = None
            if lesions is not None:  # what else an image may show must stay where it is
                lesions = lesions & (self.task.may_show(target).sum(1) == 1)[:, None, None]
            images, lenders = swap_context(
                images, boxes, inside, draws[:, SWAPS], self.swap, lesions=lesions, healthy=healthy, reach=self.reach
            )
            others = lenders != torch.arange(len(lenders), device=device)
            swapped = torch.stack([others.sum(), torch.ones_like(lenders).sum()]).float()
        return Prepared(images, target, attended, region, weight, chance, weight * pairs * has_region(region), swapped)

    def places(self, index: torch.Tensor) -> torch.Tensor:
        """In which images it is known where which finding is: bool [B,K], or [K] where the images do not matter."""
        if self.annotations is None:
            return self.has_rule
        drawn = self.annotations.has(index)
        return drawn if self.config.attention.region == "annotation" else drawn | self.has_rule

    def tell_balance(self, sums: torch.Tensor) -> None:
        """Give lambda the sums of the step before, which have arrived on the host, and send those of this step on their
        way.
        """
        if self.balance.follows_losses:
            if self.unseen is not None:
                self.balance.update(StepSums(*self.unseen.get().tolist()))
            self.unseen = Download(self.accelerator.reduce(sums.clone(), "sum"))

    def log(self, bar: Any, lam: float, position: float) -> None:
        """A line of metrics.jsonl and of the tracker; stops the run at a loss that is not finite."""
        state, sums = self.state, StepSums(*self.accelerator.reduce(self.logged, "sum").tolist())
        self.logged = torch.zeros_like(self.logged)
        if not math.isfinite(sums.ce + sums.attention):
            raise InputError(NOT_FINITE.format(step=state.step))
        counted = sums.images if self.config.attention.form == "published" else sums.positives
        state.seconds = self.clock.seconds
        line = {
            "step": state.step,
            "epoch": state.epoch,
            "position": position,
            "ce": sums.ce / sums.images if sums.images else None,  # no known cell
            "attention": sums.attention / counted if counted and lam < 1 else None,
            "lambda": lam,
            "swapped": sums.swapped / sums.swappable if sums.swappable else None,
            "lr": self.optimizer.param_groups[0]["lr"],
            "images_per_s": state.images / max(state.seconds, 1e-9),
        }
        shown = {
            "ce": line["ce"],
            "att": line["attention"],
            "lambda": lam if self.attends else None,
            "swapped": line["swapped"],
        }
        bar.set_postfix(
            {name: f"{value:.3f}" for name, value in shown.items() if value is not None} | {"epoch": state.epoch + 1},
            refresh=False,
        )
        self.write(line)
        if not self.paced and self.accelerator.is_main_process:
            self.paced = True
            self.tell_pace(bar)

    def write(self, line: dict[str, Any]) -> None:
        """Append to metrics.jsonl and send to the tracker, on the main process."""
        if self.accelerator.is_main_process:
            atomic.append(Path(self.config.out) / "metrics.jsonl", json.dumps(finite(line)))
            self.tracking.log({k: v for k, v in line.items() if k != "step"}, line["step"])

    def end_epoch(self, bar: Any) -> None:
        """Validation, the schedule, the best model, the checkpoint."""
        config, accelerator, state = self.config, self.accelerator, self.state
        if state.step - self.saved_at >= config.save_every / 5:
            self.save()  # what is stopped while it validates has not trained for nothing
        share_buffers(self.model)
        self.refuse_not_finite()
        try:
            with self.averaged():
                outcome = self.evaluator.measure("val", cams=self.attends)
        except Stopped:
            if self.saved_at < state.step:
                self.save()
            raise
        lam = self.lam
        figures = validation_figures(outcome, lam, config.attention)
        self.balance.validated(figures["val_loss"])
        self.schedule.validated(figures["val_weighted" if config.optim.watch == "weighted" else "val_loss"])
        state.since_best += 1
        # While lambda falls, no model is what the run is for: the latest is kept, and nothing is waited for
        early = self.attends and self.balance.falls(self.passed)
        score = -math.inf if early else score_of(figures, config.chosen_by, state.epoch)
        # The first in any case: what its figures lack, weights have
        if early or score > state.best or state.best_epoch < 0:
            state.best, state.best_epoch, state.since_best = score, state.epoch, 0
            self.keep()
        self.write({"step": state.step, "epoch": state.epoch, **figures})
        state.epoch, state.position = state.epoch + 1, 0
        self.save()
        if accelerator.is_main_process:
            summary = "  ".join(f"{name[4:]} {value:.3f}" for name, value in figures.items() if value is not None)
            bar.write(
                f"epoch {state.epoch}/{config.epochs}: {summary}{'  *' if not state.since_best else ''}",
                file=sys.stderr,
            )


def score_of(figures: dict[str, Any], best: str, epoch: int) -> float:
    """By what ``--best`` chooses: the larger, the better; an undefined figure is the worst."""
    kinds = {
        "accuracy": figures.get("val_accuracy", math.nan),
        "auc": figures["val_auc"],
        "loss": -figures["val_loss"],
        "last": epoch,
    }
    return kinds[best] if math.isfinite(kinds[best]) else -math.inf


def groups(loader: Iterable[Batch], size: int) -> Iterator[list[Batch]]:
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
    """Of a loss's gradient at the feature maps: float64 scalar. Scaled meanwhile, so that it does not vanish in half
    precision.
    """
    scale = 2.0**12
    gradients = torch.autograd.grad(loss * scale, kept, retain_graph=True, allow_unused=True)
    return torch.stack(
        [(g.double() / scale).square().sum() for g in gradients if g is not None] or [loss.detach().double() * 0]
    ).sum()
