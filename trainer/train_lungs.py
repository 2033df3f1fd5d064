"""python -m trainer.train_lungs: a lung segmenter from shards with lung masks, under Accelerate."""

import json
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from torchvision.ops import box_iou
from tqdm import tqdm

from shards.errors import InputError, run
from shards.stream import EpochPlan, Split
from trainer.augment import augment, draw, resize
from trainer.checkpoint import claim
from trainer.config import LungsTrainConfig, parse, to_yaml
from trainer.launching import Accelerator, start
from trainer.lungs import LungSegmenter, lung_boxes


class _Trainable(torch.nn.Module):
    """The segmenter's logits as a forward, so that one prepared module carries the gradient."""

    def __init__(self, segmenter: LungSegmenter) -> None:
        super().__init__()
        self.segmenter = segmenter

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.segmenter.logits(images)


def bce_dice(logits: torch.Tensor, masks: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Binary cross-entropy plus 1 - soft Dice, per image, weighted sum: logits [B,H,W], masks bool [B,H,W] -> scalar."""
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


@torch.no_grad()
def validate(accelerator: Accelerator, segmenter: LungSegmenter, split: Split, batch: int, workers: int) -> dict[str, float]:
    """Mean Dice and box IoU at the stored size, over all processes, each image once."""
    segmenter.eval()
    table = torch.zeros(len(split), 3, device=accelerator.device)  # Dice, box IoU, counted
    plan = EpochPlan(split.shard_sizes(), shuffle=False)
    rank, world = accelerator.process_index, accelerator.num_processes
    for got in split.batches(plan, 0, 0, batch=batch, rank=rank, world=world, workers=workers):
        assert got.mask is not None
        truth = got.mask.to(accelerator.device)
        with accelerator.autocast():
            found = segmenter(got.image.to(accelerator.device).float() / 255)
        overlap = (found & truth).sum((1, 2)).float()
        dice = (2 * overlap + 1) / (found.sum((1, 2)) + truth.sum((1, 2)) + 1)
        size = truth.shape[-1]
        iou = box_iou(lung_boxes(found, size).float(), lung_boxes(truth, size).float()).diagonal()
        rows = torch.stack([dice, iou, torch.ones_like(dice)], 1) * got.weight[:, None].to(accelerator.device)
        table.index_add_(0, got.index.to(accelerator.device), rows)
    table = accelerator.reduce(table, "sum")
    assert (table[:, 2] == 1).all(), "every image is read exactly once"
    dice, iou = table[:, 0], table[:, 1]
    return {"dice": dice.mean().item(), "dice_worst": dice.min().item(), "box_iou": iou.mean().item(), "box_iou_worst": iou.min().item()}


def main(argv: list[str] | None = None) -> None:
    """Train, keep the best by validation Dice, write the report."""
    config = parse(LungsTrainConfig, argv, prog="trainer.train_lungs")
    accelerator = start(config.seed)
    out = Path(config.out)
    train, val = (Split(config.shards, name, masks=True) for name in ("train", "val"))
    rank, world = accelerator.process_index, accelerator.num_processes
    if config.batch * world > len(train):
        raise InputError(f"--batch {config.batch} x {world} processes is more than the {len(train)} training images; lower --batch")
    claim(accelerator, out, to_yaml(config), resumable=False)

    segmenter = LungSegmenter(config.width, config.size).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(segmenter.parameters(), lr=config.lr, weight_decay=1e-2)
    model, optimizer = accelerator.prepare(_Trainable(segmenter), optimizer)
    plan = EpochPlan(train.shard_sizes(), config.seed)
    steps = config.epochs * -(-len(plan) // (config.batch * world))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer.optimizer, config.lr, total_steps=steps, pct_start=0.2)
    accelerator.print(f"{len(train)} training and {len(val)} validation images; {config.batch} x {world} images a step, {steps} steps")

    best, clock = -1.0, time.monotonic()
    bar = tqdm(total=config.epochs * len(plan), unit="img", disable=not accelerator.is_main_process, mininterval=2.0, dynamic_ncols=True)
    for epoch in range(config.epochs):
        model.train()
        total = torch.zeros((), device=accelerator.device)
        for got in train.batches(plan, epoch, 0, batch=config.batch, rank=rank, world=world, workers=config.workers):
            assert got.mask is not None  # the split was opened with masks
            images, masks = to_size(got.image.to(accelerator.device), got.mask.to(accelerator.device), config.size)
            moved = augment(images, draw(config.seed, epoch, got.index), config.augment, masks=masks)
            weight = got.weight.to(accelerator.device)
            seen = accelerator.reduce(weight.sum(), "sum")
            assert moved.masks is not None
            loss = bce_dice(model(moved.images), moved.masks, weight)
            accelerator.backward(loss * world / seen)  # DDP averages over processes
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            total += loss.detach()
            bar.update(int(seen))
        figures = validate(accelerator, segmenter, val, config.batch, config.workers)
        figures |= {"epoch": epoch, "loss": accelerator.reduce(total, "sum").item() / len(plan), "seconds": time.monotonic() - clock}
        if accelerator.is_main_process:
            bar.set_postfix(loss=f"{figures['loss']:.3f}", dice=f"{figures['dice']:.4f}", box=f"{figures['box_iou']:.3f}")
            with (out / "metrics.jsonl").open("a") as log:
                log.write(json.dumps(figures) + "\n")
            if figures["dice"] > best:
                segmenter.save(out / "lung_unet.safetensors")
                (out / "report.json").write_text(json.dumps(figures, indent=1))
        best = max(best, figures["dice"])
    bar.close()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        chosen = json.loads((out / "report.json").read_text())
        print(
            f"best epoch {chosen['epoch']}: Dice {chosen['dice']:.4f} (worst {chosen['dice_worst']:.3f}), "
            f"box IoU {chosen['box_iou']:.4f} (worst {chosen['box_iou_worst']:.3f}) on {len(val)} validation images"
        )
        print(f"wrote {out / 'lung_unet.safetensors'}; use it with --lungs.weights {out / 'lung_unet.safetensors'}")
    accelerator.end_training()


if __name__ == "__main__":
    run(main)
