"""python bench/lungs.py [--weights FILE] [--pictures DIR]: how far the lung segmenter can be trusted.

CXR_FOCUS_REAL_DATA names a folder with `lungs/{images,masks}` (CHN* is Shenzhen, MCU* is Montgomery),
`effusion/*/<class>` and `nih/images`. Measured on the images that `python -m shards masks --val-share 0.1 --test-share
0.15` keeps for test, which the shipped weights have not seen: masks and boxes, the same exposed otherwise, with disease
painted on, with each step of the clean-up left out; then on real images without masks: where the boxes of Effusion end
beside those of No Finding, and how many images have no box. Writes bench/lungs.md.
"""

import argparse
import csv
import os
import tempfile
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from shards.pixels import fit, load_image
from shards.sources.folders import image_masks
from trainer import lung_report
from trainer.lungs import LungSegmenter, cleanup, load_segmenter, lung_boxes
from trainer.lungs.paint import collapse, gas, negative, opacity, sides

SOURCES = {"Shenzhen": "CHN", "Montgomery": "MCU"}
SIZE = 512


def held_out(data: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Images uint8 [n,1,512,512] and masks bool [n,512,512] of the test part of each source."""
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, prefix in SOURCES.items():
            for kind in ("images", "masks"):
                target = Path(folder) / name / kind
                target.mkdir(parents=True)
                for path in (data / "lungs" / kind).glob(f"{prefix}*"):
                    (target / path.name).symlink_to(path.resolve())
            source = image_masks(Path(folder) / name / "images", Path(folder) / name / "masks", 0.1, 0.15)
            samples = [source.load(item) for item in source.items if item.split == "test"]
            images = torch.from_numpy(np.stack([s.image for s in samples]))[:, None]
            found[name] = images, torch.from_numpy(np.stack([s.mask for s in samples if s.mask is not None])) > 0
    return found


def batches(images: torch.Tensor, size: int = 16) -> Iterator[torch.Tensor]:
    """uint8 [n,1,H,W] -> float [b,1,H,W] in [0,1]."""
    for start in range(0, len(images), size):
        yield images[start : start + size].float() / 255


def segment(segmenter: LungSegmenter, images: torch.Tensor) -> torch.Tensor:
    """uint8 or float [n,1,H,W] -> masks bool [n,H,W]."""
    if images.dtype != torch.uint8:
        return torch.cat([segmenter(images[i : i + 16]) for i in range(0, len(images), 16)])
    return torch.cat([segmenter(part) for part in batches(images)])


def row(name: str, found: torch.Tensor, truth: torch.Tensor) -> str:
    """A line of the table of masks and boxes."""
    s = lung_report.summary(
        np.concatenate([lung_report.compare(found, truth).numpy(), np.full((len(found), 1), np.nan)], 1)
    )
    edges = " | ".join(f"{100 * s[e]['bias']:+.1f} ± {100 * s[e]['deviation']:.1f}" for e in lung_report.EDGES)
    dice, box = (
        f"{s[k]:.4f} ({s[f'{k}_interval'][0]:.4f} to {s[f'{k}_interval'][1]:.4f})" for k in ("dice", "box_iou")
    )
    return (
        f"| {name} | {s['images']} | {dice} | {box} | {s['box_iou_worst']:.3f} | {edges} | "
        f"{100 * s['bottom_within_4_percent']:.0f}% | {s['fallback']} |"
    )


HEAD = (
    "| images | n | Dice | box IoU | worst | left | top | right | bottom | bottom within 4% | no box "
    "|\n|---|---|---|---|---|---|---|---|---|---|---|"
)


def diseases() -> dict[str, Callable[[torch.Tensor, torch.Tensor, np.random.Generator], torch.Tensor]]:
    """What is painted on held-out images; the mask stays whole."""

    def one(mask: torch.Tensor, rng: np.random.Generator) -> list:
        lungs = sides(mask)
        return [lungs[int(rng.integers(len(lungs)))]] if lungs else []

    def opaque(kind: str, strength: float, level: float = 0.5, both: bool = False) -> Callable:
        def apply(image: torch.Tensor, mask: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
            for side in sides(mask) if both else one(mask, rng):
                image = opacity(image, mask, side, rng, kind=kind, strength=strength, level=level)
            return image

        return apply

    def pneumothorax(image: torch.Tensor, mask: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
        for side in one(mask, rng):
            image = collapse(image, side, rng)
        return image

    return {
        "one lung white": opaque("whiteout", 1.0),
        "one lung half white": opaque("effusion", 1.0, 0.5),
        "small effusion": opaque("effusion", 0.8, 0.2),
        "effusions on both sides": opaque("effusion", 0.9, 0.3, both=True),
        "consolidations": opaque("consolidation", 0.9),
        "haze": opaque("haze", 0.6),
        "pneumothorax": pneumothorax,
        "gas below the diaphragm": lambda image, mask, rng: gas(image, mask, rng),
    }


def painted(images: torch.Tensor, masks: torch.Tensor, apply: Callable) -> torch.Tensor:
    """float [n,1,S,S], each image with its own seed."""
    done = [apply(images[i, 0].float() / 255, masks[i], np.random.default_rng([11, i])) for i in range(len(images))]
    return torch.stack(done)[:, None]


def ablation(
    segmenter: LungSegmenter, images: torch.Tensor, truth: torch.Tensor
) -> dict[str, tuple[float, float, int]]:
    """Mean box IoU, mean absolute edge error and images without a box after each further step of the clean-up."""
    logits = torch.cat(
        [segmenter.logits(part if part.is_floating_point() else part.float() / 255) for part in images.split(16)]
    ).float()
    probability = torch.sigmoid(logits)
    raw = probability > segmenter.settings["threshold"]
    two, count = cleanup.two_largest(raw)
    filled = cleanup.fill_holes(two)
    mirrored = cleanup.complete(filled, count)
    stages = {
        "every pixel": raw,
        "two largest components": two,
        "holes filled": filled,
        "missing lung mirrored": mirrored,
    }
    stages["no box where it is not believed"] = cleanup.clean(raw, probability)
    result = {}
    for name, masks in stages.items():
        up = torch.nn.functional.interpolate(masks[:, None].float(), (SIZE, SIZE), mode="bilinear")[:, 0] >= 0.5
        figures = lung_report.compare(up, truth)
        dice = figures[:, 0].mean().item()
        result[name] = figures[:, 2].mean().item(), figures[:, 3:7].abs().mean().item(), int(figures[:, 7].sum()), dice
    return result


def real_boxes(segmenter: LungSegmenter, paths: list[Path]) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes in shares of the image, float [n,4], masks bool [n,512,512] of image files."""
    boxes, masks = [], []
    for start in range(0, len(paths), 16):
        images = torch.from_numpy(np.stack([fit(load_image(path), SIZE) for path in paths[start : start + 16]]))[
            :, None
        ]
        masks.append(segmenter(images.float() / 255))
        boxes.append(lung_boxes(masks[-1], SIZE).float() / SIZE)
    return torch.cat(boxes), torch.cat(masks)


def lower_edges(masks: torch.Tensor) -> np.ndarray:
    """Lowest row of each lung, left and right of the image, in shares of its height: [n,2], NaN where there is none."""
    small = torch.nn.functional.interpolate(masks[:, None].float(), (256, 256), mode="area")[:, 0] >= 0.5
    edges = np.full((len(masks), 2), np.nan)
    for i, mask in enumerate(small):
        lungs = sides(mask)
        if len(lungs) == 2:
            edges[i] = [(int(torch.nonzero(lung.mask.any(1))[-1, 0]) + 1) / 256 for lung in lungs]
    return edges


def by_view(table: Path, paths: list[Path], where: torch.Tensor, masks: torch.Tensor) -> list[str]:
    """Boxes of Effusion, of other findings and of No Finding among the NIH images, apart for each view: who lies down
    breathes in less.
    """
    with table.open(newline="") as file:
        rows = {row["image"]: row for row in csv.DictReader(file)}
    there = masks.flatten(1).any(1).numpy()
    found = [rows[path.name]["finding_labels"].split("|") for path in paths]
    groups = {
        "Effusion": np.array(["Effusion" in names for names in found]),
        "other findings": np.array(["Effusion" not in names and names != ["No Finding"] for names in found]),
        "No Finding": np.array([names == ["No Finding"] for names in found]),
    }
    view = np.array([rows[path.name]["view"] for path in paths])
    lines = [
        "\nBy view, NIH images, means in percent of the image:\n",
        "| view | images | n | top | bottom | width | height | bottom minus No Finding "
        "|\n|---|---|---|---|---|---|---|---|",
    ]
    for v in ("PA", "AP"):
        plain = where[there & groups["No Finding"] & (view == v), 3]
        for name, group in groups.items():
            some = where[there & group & (view == v)]
            difference = 100 * float(some[:, 3].mean() - plain.mean())
            error = 100 * float((some[:, 3].var() / len(some) + plain.var() / len(plain)) ** 0.5)
            sizes = [100 * float(some[:, k].mean()) for k in (1, 3)] + [
                100 * float((some[:, k + 2] - some[:, k]).mean()) for k in (0, 1)
            ]
            told = f"{difference:+.1f} ± {1.96 * error:.1f}" if name != "No Finding" else ""
            lines.append(f"| {v} | {name} | {len(some)} | {' | '.join(f'{value:.1f}' for value in sizes)} | {told} |")
    return lines


def sheet(paths: list[Path], masks: torch.Tensor, target: Path, columns: int = 10) -> None:
    """A contact sheet of boxes."""
    rows = -(-len(paths) // columns)
    figure = Figure(figsize=(2 * columns, 2.1 * rows), layout="constrained")
    for k, (path, mask) in enumerate(zip(paths, masks, strict=True)):
        axes = figure.add_subplot(rows, columns, k + 1)
        lung_report.draw_lungs(axes, fit(load_image(path), SIZE)[::2, ::2], mask[::2, ::2].numpy())
        axes.set_title(path.stem[:20], fontsize=5)
    figure.savefig(target, dpi=60)


@torch.no_grad()
def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights")
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--write", type=Path, default=Path(__file__).with_name("lungs.md"))
    a = parser.parse_args()
    real = os.environ.get("CXR_FOCUS_REAL_DATA")
    if not real:
        raise SystemExit("error: set CXR_FOCUS_REAL_DATA to the folder with lungs/, effusion/ and nih/")
    data, segmenter = Path(real), load_segmenter(a.weights)
    sources = held_out(data)
    images, truth = (torch.cat([part[k] for part in sources.values()]) for k in (0, 1))
    parts = [
        f"# The lung segmenter\n\n{date.today()}, {a.weights or 'the shipped weights'}. `python bench/lungs.py`; "
        "edges: found minus true, in percent of",
        "the image's side, bias ± deviation; a negative bottom is a box that ends too high. Intervals: 95%, bootstrap "
        "over images.\n",
        "## Held-out images\n",
        HEAD,
    ]
    parts += [row(name, segment(segmenter, pixels), masks) for name, (pixels, masks) in sources.items()]
    plain = segment(segmenter, images)
    parts.append(row("both", plain, truth))

    parts += ["\n## The same images exposed otherwise\n", HEAD]
    from torchvision.transforms.functional import rotate

    parts.append(row("inverted", segment(segmenter, 255 - images), truth))
    parts.append(row("half exposure", segment(segmenter, images // 2), truth))
    for degrees in (-10, 10):
        turned = rotate(truth[:, None].float(), degrees)[:, 0] >= 0.5
        parts.append(row(f"turned by {degrees} degrees", segment(segmenter, rotate(images, degrees)), turned))

    parts += ["\n## Disease painted on\n", HEAD]
    ablations = {"as they are": ablation(segmenter, images, truth)}
    for name, apply in diseases().items():
        sick = painted(images, truth, apply)
        parts.append(row(name, segment(segmenter, sick), truth))
        if name in ("one lung white", "gas below the diaphragm"):
            ablations[name] = ablation(segmenter, sick, truth)

    parts += [
        "\n## What each step of the clean-up is worth\n",
        "Box IoU, mean absolute error of the edges in percent, Dice, images without a box.\n",
    ]
    stages = list(next(iter(ablations.values())))
    parts.append("| images | " + " | ".join(stages) + " |\n|---|" + "---|" * len(stages))
    for name, result in ablations.items():
        parts.append(
            f"| {name} | "
            + " | ".join(
                f"{iou:.4f}, {100 * error:.2f}, {dice:.4f}, {lost}" for iou, error, lost, dice in result.values()
            )
            + " |"
        )

    none = torch.stack(
        [negative(images[i, 0].float() / 255, truth[i], np.random.default_rng([12, i])) for i in range(len(images))]
    )[:, None]
    boxes = int(segment(segmenter, none).flatten(1).any(1).sum())
    parts.append(
        f"\n{len(none)} images made of these that are no frontal chest (turned, a part, from the side, a limb, "
        f"nothing): a box on {boxes}."
    )

    parts += [
        "\n## Real images without masks\n",
        "| images | n | left | top | right | bottom | lower edges of the two lungs differ by | no box "
        "|\n|---|---|---|---|---|---|---|---|",
    ]
    bottoms = {}
    for name in ("0NoFinding", "1Effusion"):
        paths = sorted(data.glob(f"effusion/*/{name}/*"))
        where, masks = real_boxes(segmenter, paths)
        there = masks.flatten(1).any(1)
        bottoms[name] = where[there, 3].numpy()
        edges = lower_edges(masks)
        gap = np.abs(edges[:, 0] - edges[:, 1])
        means = " | ".join(f"{100 * v:.1f}" for v in where[there].mean(0).tolist())
        parts.append(f"| {name[1:]} | {len(paths)} | {means} | {100 * np.nanmean(gap):.1f} | {int((~there).sum())} |")
        if a.pictures:
            a.pictures.mkdir(parents=True, exist_ok=True)
            some = [int(k) for k in np.linspace(0, len(paths) - 1, 60)]
            sheet([paths[k] for k in some], masks[some], a.pictures / f"{name[1:]}.png")
    difference = float(bottoms["1Effusion"].mean() - bottoms["0NoFinding"].mean())
    rng = np.random.default_rng(0)
    draws = []
    for _ in range(1000):
        sick, well = (rng.choice(bottoms[name], len(bottoms[name])).mean() for name in ("1Effusion", "0NoFinding"))
        draws.append(sick - well)
    low, high = np.percentile(draws, [2.5, 97.5])
    parts.append(
        f"\nLower edge, Effusion minus No Finding: {100 * difference:+.1f}% of the image ({100 * low:+.1f} to "
        f"{100 * high:+.1f})."
    )
    paths = sorted((data / "nih/images").iterdir())
    where, masks = real_boxes(segmenter, paths)
    lost = (~masks.flatten(1).any(1)).nonzero()[:, 0].tolist()
    parts.append(f"{len(paths)} NIH images: no box on {len(lost)} ({', '.join(paths[k].stem for k in lost[:20])}).")
    parts += by_view(data / "nih/labels.csv", paths, where, masks)
    if a.pictures:
        for start in range(0, len(paths), 200):
            sheet(paths[start : start + 200], masks[start : start + 200], a.pictures / f"nih-{start}.png", 20)
    text = "\n".join(parts) + "\n"
    a.write.write_text(text)
    print(text)


if __name__ == "__main__":
    main()
