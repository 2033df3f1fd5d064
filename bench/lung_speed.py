"""python bench/lung_speed.py: what a lung box costs, side by side in one run.

The shipped segmenter with its clean-up, from 512 px images to boxes, against the published U-Net at 512 px (as
published: one image at a time, float32) and against a cross-entropy step of the classifier, alternating. Appends
medians of ratios with quartiles to bench/lung_speed.md.
"""

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from step import processor, publish, quartiles

from shards.phantom import phantom
from trainer.classifier import FocusClassifier
from trainer.lungs import LungFinder, LungSegmenter, load_segmenter
from trainer.lungs.unet import PUBLISHED_CHANNELS, PUBLISHED_SIZE


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--backbone", default="pvt")
    parser.add_argument("--write", type=Path, default=Path(__file__).with_name("lung_speed.md"))
    a = parser.parse_args()
    import numpy as np

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kinds = ("No Finding", "Effusion", "Pneumothorax", "Subcutaneous Emphysema")
    raw = np.stack([phantom(str(i), kinds[i % 4], np.random.default_rng(i), 512).image for i in range(a.batch)])
    images = torch.from_numpy(raw)[:, None].to(device)
    ours = load_segmenter().to(device).to(memory_format=torch.channels_last)
    published = (
        LungSegmenter(PUBLISHED_CHANNELS, PUBLISHED_SIZE, inputs=3, standardise=False, clean_up=False).to(device).eval()
    )
    model = (
        FocusClassifier(a.backbone, 2, size=224, pretrained="false")
        .to(device)
        .to(memory_format=torch.channels_last)
        .train()
    )
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5)
    pixels = torch.nn.functional.interpolate(images.float() / 255, (224, 224), mode="bilinear").contiguous(
        memory_format=torch.channels_last
    )
    labels = torch.arange(a.batch, device=device) % 2
    index, remembered = torch.arange(a.batch), LungFinder(ours, 224, a.batch, "x")

    def autocast(on: bool) -> contextlib.AbstractContextManager:
        return torch.autocast(device.type, torch.bfloat16) if on else contextlib.nullcontext()

    @torch.no_grad()
    def find(segmenter: LungSegmenter, some: torch.Tensor, bf16: bool = False) -> None:
        with autocast(bf16):
            segmenter.find(some.float() / 255, 224)

    def singly(segmenter: LungSegmenter, count: int) -> None:
        for i in range(count):
            find(segmenter, images[i : i + 1])

    def step() -> None:
        with autocast(True):
            loss = torch.nn.functional.cross_entropy(model(pixels, None, cam=False)[0].float(), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def look_up() -> None:
        remembered(images, index)

    look_up()
    few = min(2, a.batch)
    work: dict[str, tuple[Callable[[], None], int]] = {
        "ours, float32": (lambda: find(ours, images), a.batch),
        "ours, float32, one at a time": (lambda: singly(ours, a.batch), a.batch),
        "ours, bf16": (lambda: find(ours, images, True), a.batch),
        "ours, remembered": (look_up, a.batch),
        "published, float32, one at a time": (lambda: singly(published, few), few),
        "published, float32, batched": (lambda: find(published, images[:few]), few),
        f"{a.backbone}: cross-entropy step, bf16": (step, a.batch),
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for turn in range(a.pairs + 1):
        for name in list(work)[:: 1 if turn % 2 else -1]:
            call, count = work[name]
            begin = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn:  # the first turn warms up
                seconds[name].append((time.perf_counter() - begin) / count)

    lines = [
        f"\n## {date.today()}, batch {a.batch}, {a.pairs} alternating turns\n",
        f"{processor()}; torch {torch.__version__}; milliseconds an image, and medians of ratios within a turn with "
        "quartiles\n",
        "| | ms | published one at a time / this | this / cross-entropy step |",
        "|---|---|---|---|",
    ]
    base, classifier = seconds["published, float32, one at a time"], seconds[f"{a.backbone}: cross-entropy step, bf16"]
    for name, values in seconds.items():
        cells = []
        for (low, middle, high), digits in ((quartiles(base, values), 1), (quartiles(values, classifier), 4)):
            cells.append(f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})")
        lines.append(f"| {name} | {1000 * statistics.median(values):.2f} | {' | '.join(cells)} |")
    publish(lines, a.write)


if __name__ == "__main__":
    main()
