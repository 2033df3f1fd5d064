"""python -m trainer.train_lungs: a lung segmenter from shards with lung masks of one or several sources, under
Accelerate.

The best weights by validation Dice are kept. At the end each source is measured on its test split (val where there is
none), and sources that were left out of training on all their images.
"""

if __name__ == "__main__":  # what is wrong with the settings is said before torch is imported, which takes seconds
    from shards.errors import run as _run
    from trainer.command import parse as _parse
    from trainer.command import resumed as _resumed
    from trainer.command import there as _there
    from trainer.options import LungsTrainConfig as _Config

    def _check() -> None:
        asked = _parse(_Config, _resumed(None, "trainer.train_lungs"), prog="trainer.train_lungs")
        _there(*filter(None, map(str.strip, f"{asked.shards},{asked.test}".split(","))))

    _run(_check)

import json
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F
from tqdm import tqdm

from shards import atomic
from shards.dataset import Split
from shards.errors import InputError, run
from shards.joined import Joined, Samples
from shards.loader import Loader
from shards.plan import EpochPlan
from shards.store import open_store
from trainer import checkpoint, lung_report, presence
from trainer.augment import augment, draw, resize
from trainer.command import flat, parse, resumed, to_yaml
from trainer.launching import (
    TIMEOUT,
    Accelerator,
    close,
    loader_of,
    newest,
    on_main,
    seed_step,
    seen_by_all,
    set_threads,
    share_buffers,
    start,
    tell,
)
from trainer.lungs import LungSegmenter, load_segmenter
from trainer.lungs.paint import paint
from trainer.options import LungsTrainConfig
from trainer.schedule import one_cycle

WEIGHTS = "lung_unet.safetensors"
KEPT = 2  # checkpoints
MAY_CHANGE = {"out", "shards", "test", "workers", "batch", "lr", "resume"}  # when a run is resumed


class _Trainable(torch.nn.Module):
    """The segmenter's logits as a forward, so that one prepared module carries the gradient."""

    def __init__(self, segmenter: LungSegmenter) -> None:
        super().__init__()
        self.segmenter = segmenter

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.segmenter.logits(images)


def bce_dice(logits: torch.Tensor, masks: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy plus 1 - soft Dice, per image, weighted sum:
    logits [B,H,W], masks bool [B,H,W] -> scalar.
    """
    target = masks.float()
    bce = F.binary_cross_entropy_with_logits(logits, target, reduction="none").mean((1, 2))
    p = torch.sigmoid(logits)
    dice = (2 * (p * target).sum((1, 2)) + 1) / (p.sum((1, 2)) + target.sum((1, 2)) + 1)
    return ((bce + 1 - dice) * weight).sum()


def to_size(images: torch.Tensor, masks: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 [B,1,H,W] and bool [B,H,W] -> float [B,1,size,size] in [0,1] and bool [B,size,size]."""
    if masks.shape[-2:] != (size, size):
        masks = F.interpolate(masks[:, None].float(), (size, size), mode="bilinear", antialias=True)[:, 0] >= 0.5
    return resize(images, size), masks


@dataclass
class Trainer:
    """Everything a run consists of. The loop is `train`."""

    config: LungsTrainConfig
    accelerator: Accelerator
    train_loader: Loader
    val_loader: Loader
    segmenter: LungSegmenter
    net: Any  # the segmenter as Accelerate prepared it
    optimizer: Any
    epoch: int = 0
    step: int = 0
    best: float = -1.0
    best_epoch: int = -1
    seconds: float = 0.0

    def train(self) -> None:
        """Epochs until they are done; each ends with validation and a checkpoint."""
        c, acc, plan = self.config, self.accelerator, self.train_loader.plan
        rank, world = acc.process_index, acc.num_processes
        with tqdm(
            total=c.epochs * len(plan),
            initial=self.epoch * len(plan),
            unit="img",
            disable=not acc.is_main_process,
            mininterval=1.0 if sys.stderr.isatty() else 30.0,
            dynamic_ncols=True,
        ) as bar:  # closed before an error is told, which then has a line of its own
            while self.epoch < c.epochs:
                self.net.train()
                clock, total, seen = time.monotonic(), torch.zeros((), device=acc.device), 0
                for got in self.train_loader.batches(self.epoch):
                    assert got.mask is not None  # the split was opened with masks
                    self.set_rate((self.epoch * len(plan) + seen) / (c.epochs * len(plan)))
                    seed_step(c.seed, self.step, rank)
                    images, masks = to_size(
                        got.image.to(acc.device, non_blocking=True), got.mask.to(acc.device, non_blocking=True), c.size
                    )
                    images, masks = paint(images, masks, c.seed, self.epoch, got.index, c.paint)
                    moved = augment(images, draw(c.seed, self.epoch, got.index), c.augment, masks=masks)
                    assert moved.masks is not None
                    loss = bce_dice(self.net(moved.images), moved.masks, got.weight.to(acc.device, non_blocking=True))
                    acc.backward(loss * world / got.total)  # DDP averages over processes
                    acc.clip_grad_norm_(self.net.parameters(), 1.0)
                    self.optimizer.step()
                    self.optimizer.zero_grad()
                    total += loss.detach()
                    seen, self.step = seen + got.total, self.step + 1
                    presence.at(f"step {self.step}")
                    bar.update(got.total)
                self.seconds += time.monotonic() - clock
                self.end_epoch(acc.reduce(total, "sum").item() / len(plan), bar)
        acc.wait_for_everyone()

    def set_rate(self, share: float) -> None:
        """Learning rate and first beta after a share of the run's images, which may be cut into other batches when it
        is resumed.
        """
        factor, beta = one_cycle(share)
        for group in self.optimizer.param_groups:
            group["lr"], group["betas"] = self.config.lr * factor, (beta, group["betas"][1])

    def end_epoch(self, loss: float, bar: Any) -> None:
        """Validation, the best weights, a line of metrics.jsonl, the checkpoint. InputError: a loss or weight that is
        not finite; nothing is saved.
        """
        acc, out = self.accelerator, Path(self.config.out)
        share_buffers(self.segmenter)
        if not math.isfinite(loss) or checkpoint.not_finite(self.segmenter):
            raise InputError(
                f"the loss is not finite in epoch {self.epoch + 1}, or a weight after it; lower --lr, or launch with "
                "--mixed_precision bf16 or no. "
                "--resume with one of these goes on from the last checkpoint, which is sound"
            )
        figures = lung_report.measure(acc, self.segmenter, self.val_loader, surface=False).mean(0)
        dice, box_iou = float(figures[0]), float(figures[2])
        if dice > self.best:
            self.best, self.best_epoch = dice, self.epoch
        better = self.best_epoch == self.epoch
        line = {"epoch": self.epoch, "loss": loss, "val_dice": dice, "val_box_iou": box_iou, "seconds": self.seconds}
        bar.set_postfix(loss=f"{loss:.3f}", dice=f"{dice:.4f}", box=f"{box_iou:.3f}")
        self.epoch += 1

        def keep() -> None:
            if better:
                self.segmenter.save(out / WEIGHTS)
            atomic.append(out / "metrics.jsonl", json.dumps(line))
            checkpoint.save(out / "checkpoints" / "last.pt", self.state(), keep=KEPT)

        on_main(acc, keep)

    def state(self) -> dict[str, Any]:
        """All that `restore` needs."""
        return {
            "identity": self.identity(),
            "epoch": self.epoch,
            "step": self.step,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "seconds": self.seconds,
            "model": self.segmenter.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def identity(self) -> dict[str, Any]:
        """What may not change when a run is resumed."""
        own = {name: value for name, value in flat(asdict(self.config)).items() if name not in MAY_CHANGE}
        return own | {"shards": self.train_loader.samples.fingerprint}

    def restore(self) -> None:
        """Go on after the last whole epoch."""
        out = Path(self.config.out)
        path, damaged = newest(self.accelerator, out)
        if path is None:
            self.accelerator.print(f"{out} was stopped before its first checkpoint: it starts from the beginning")
            if self.accelerator.is_main_process:
                checkpoint.rewind(out / "metrics.jsonl", -1, "epoch")
            return
        content = checkpoint.load(path)
        checkpoint.refuse_other(out, content["identity"], self.identity(), {"shards": "other images in --shards"})
        self.segmenter.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        if self.accelerator.is_main_process:
            for one in damaged:
                tell(checkpoint.DAMAGED.format(one, checkpoint.put_aside(one).name))
        self.step = content.get("step", 0)
        self.epoch, self.best, self.best_epoch, self.seconds = (
            content[name] for name in ("epoch", "best", "best_epoch", "seconds")
        )
        if self.accelerator.is_main_process:
            checkpoint.rewind(out / "metrics.jsonl", self.epoch - 1, "epoch")
        self.accelerator.print(f"resumed after epoch {self.epoch}")


def open_sources(names: str, *, left_out: bool = False) -> dict[str, dict[str, Split]]:
    """Sources of ``--shards`` (or ``--test``), by the name their shards carry: each with its splits."""
    sources: dict[str, dict[str, Split]] = {}
    for name in filter(None, (part.strip() for part in names.split(","))):
        store = open_store(name)
        index = store.index()
        wanted = [
            split
            for split in ("train", "val", "test")
            if split in index["splits"] or (split != "test" and not left_out)
        ]
        source = str(index["dataset"])
        while source in sources:
            source += "'"
        sources[source] = {split: Split(store, split, masks=True) for split in wanted}
    return sources


def build(argv: list[str] | None) -> tuple[Trainer, dict[str, Samples]]:
    """Check everything, claim the run folder, make the parts; also the splits that the report measures."""
    config = parse(LungsTrainConfig, resumed(argv, "trainer.train_lungs"), prog="trainer.train_lungs")
    accelerator = start(config.seed, timeout=TIMEOUT)
    out = Path(config.out)
    start_from = None
    if config.init:
        start_from = load_segmenter(None if config.init == "shipped" else config.init)
        config.channels, config.patch, config.size = (
            start_from.settings[name] for name in ("channels", "patch", "size")
        )
    sources = open_sources(config.shards)
    if not sources:
        raise InputError(f"--shards {config.shards!r}: names no folder")
    measured: dict[str, Samples] = {name: splits.get("test", splits["val"]) for name, splits in sources.items()}
    for name, splits in open_sources(config.test, left_out=True).items():
        measured[name if name not in measured else f"{name} (left out)"] = Joined(list(splits.values()))
    parts = [Joined([splits[name] for splits in sources.values()]) for name in ("train", "val")]
    train, val = parts
    world = accelerator.num_processes
    if config.batch * world > len(train):
        raise InputError(
            f"--batch {config.batch} x {world} processes is more than the {len(train)} training images; lower --batch"
        )
    if not config.resume:
        checkpoint.claim(accelerator, out, {"config.yaml": to_yaml(config)})
    seen_by_all(accelerator, out)
    on_main(accelerator, lambda: checkpoint.hold(out))
    inputs = start_from.settings["inputs"] if start_from is not None else 1 if config.patch > 1 else 3
    segmenter = LungSegmenter(
        config.channels, config.size, patch=config.patch, inputs=inputs, threshold=config.threshold
    )
    if start_from is not None and not config.resume:
        segmenter.unet.load_state_dict(start_from.unet.state_dict())
    segmenter.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(segmenter.parameters(), lr=config.lr, weight_decay=1e-2)
    net, optimizer = accelerator.prepare(_Trainable(segmenter), optimizer)
    steps = config.epochs * -(-len(train) // (config.batch * world))
    loaders = (
        loader_of(
            accelerator, train, EpochPlan(train.shard_sizes(), config.seed), batch=config.batch, workers=config.workers
        ),
        loader_of(
            accelerator, val, EpochPlan(val.shard_sizes(), shuffle=False), batch=config.batch, workers=config.workers
        ),
    )
    trainer = Trainer(config, accelerator, *loaders, segmenter, net, optimizer)
    if config.resume:
        trainer.restore()
    counts = ", ".join(f"{name} {len(splits['train'])} + {len(splits['val'])}" for name, splits in sources.items())
    accelerator.print(f"training + validation images: {counts}; {config.batch} x {world} images a step, {steps} steps")
    return trainer, measured


def main(argv: list[str] | None = None) -> None:
    """Train, keep the best by validation Dice, write the report."""
    set_threads()
    trainer, measured = build(argv)
    c, acc, out = trainer.config, trainer.accelerator, Path(trainer.config.out)
    trainer.train()
    segmenter = load_segmenter(out / WEIGHTS).to(acc.device)
    figures: dict[str, np.ndarray] = {}
    for name, split in measured.items():
        loader = loader_of(acc, split, EpochPlan(split.shard_sizes(), shuffle=False), batch=c.batch, workers=c.workers)
        figures[name] = lung_report.measure(acc, segmenter, loader)
    if acc.is_main_process:
        about = (
            f"Epoch {trainer.best_epoch + 1} of {c.epochs}, the best by Dice on {len(trainer.val_loader.plan)} "
            "validation images "
            f"({trainer.best:.4f}); trained on {len(trainer.train_loader.plan)} images in {trainer.seconds / 60:.1f} "
            "minutes "
            f"by {acc.num_processes} process(es), {acc.device.type}, {acc.mixed_precision}."
        )
        content: dict[str, Any] = {
            "about": about,
            "settings": segmenter.settings,
            "sources": {name: lung_report.summary(rows) for name, rows in figures.items()},
        }
        with torch.no_grad():
            lung_report.write(out, content, lung_report.worst(segmenter, measured, figures, acc.device))
        for name, summary in content["sources"].items():
            print(lung_report.line(name, summary))
        print(f"report: {(out / 'report.html').resolve()}")
        print(f"weights: {out / WEIGHTS}; use them with --lungs.weights {out / WEIGHTS}")
    close(acc)


if __name__ == "__main__":
    run(lambda: presence.explained(main))
