"""How good lung masks and their boxes are: figures per image and per source, and the report of a segmenter.

Legend: masks bool [B,H,W]; errors of the box's edges are signed, in shares of the image's side: left, top, right,
bottom, found minus true, so that a negative bottom is a box that ends too high.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.ndimage import binary_erosion, distance_transform_edt
from torchvision.ops import box_iou

from shards import atomic
from shards.joined import Samples
from shards.loader import Loader
from trainer.drawing import LUNGS, REGION
from trainer.launching import Accelerator
from trainer.lungs import LungSegmenter, lung_boxes
from trainer.metrics import bootstrap
from trainer.report.figures import png
from trainer.report.template import render, stacked

EDGES = ("left", "top", "right", "bottom")
COLUMNS = ("dice", "iou", "box_iou", *EDGES, "fallback", "surface")
WORST = 12


def compare(found: torch.Tensor, truth: torch.Tensor) -> torch.Tensor:
    """Dice, IoU, box IoU, four edge errors and whether the whole image stands in for a box: float32 [B,8]."""
    overlap = (found & truth).sum((1, 2)).float()
    total = (found.sum((1, 2)) + truth.sum((1, 2))).float()
    size = truth.shape[-1]
    boxes, true = lung_boxes(found, size).float(), lung_boxes(truth, size).float()
    box = box_iou(boxes, true).diagonal()
    figures = [(2 * overlap + 1) / (total + 1), (overlap + 1) / (total - overlap + 1), box]
    return torch.cat([torch.stack(figures, 1), (boxes - true) / size, (~found.flatten(1).any(1))[:, None].float()], 1)


def surface_distance(found: np.ndarray, truth: np.ndarray) -> float:
    """95th percentile of the distances between the two outlines, both ways, in shares of the image's side; NaN where
    one is empty.
    """
    if not found.any() or not truth.any():
        return float("nan")
    outlines = [mask & ~binary_erosion(mask) for mask in (found, truth)]
    to = [distance_transform_edt(~outline) for outline in outlines]
    distances = np.concatenate([to[1][outlines[0]], to[0][outlines[1]]])
    return float(np.percentile(distances, 95) / len(truth))


@torch.no_grad()
def measure(accelerator: Accelerator, segmenter: LungSegmenter, loader: Loader, *, surface: bool = True) -> np.ndarray:
    """Figures of every image of a loader's split with lung masks, at the stored size, over all processes: float32 [n,
    COLUMNS].
    """
    segmenter.eval()
    table = torch.zeros(len(loader.plan), len(COLUMNS) + 1, device=accelerator.device)
    for got in loader.batches(0):
        assert got.mask is not None
        truth = got.mask.to(accelerator.device, non_blocking=True)
        with accelerator.autocast():
            found = segmenter(got.image.to(accelerator.device, non_blocking=True).float() / 255)
        rows = torch.zeros(len(truth), len(COLUMNS) + 1, device=accelerator.device)
        rows[:, :8] = compare(found, truth)
        if surface:
            distances = [surface_distance(f, t) for f, t in zip(found.cpu().numpy(), got.mask.numpy(), strict=True)]
            rows[:, 8] = torch.tensor(distances, device=accelerator.device)
        rows[:, 9] = 1
        rows = torch.where(got.weight.to(accelerator.device)[:, None] > 0, rows, 0.0)
        table.index_add_(0, got.index.to(accelerator.device), rows)
    table = accelerator.reduce(table, "sum")
    assert (table[:, -1] == 1).all(), "every image is read exactly once"
    figures: np.ndarray = table[:, :-1].cpu().numpy()
    return figures


def summary(figures: np.ndarray) -> dict[str, Any]:
    """Means with their 95% bootstrap intervals, the worst, bias and spread of each edge, and how many bottom edges are
    within 4%.
    """
    by = {name: figures[:, k].astype(float) for k, name in enumerate(COLUMNS)}
    result: dict[str, Any] = {"images": len(figures), "fallback": int(by["fallback"].sum())}
    for name in ("dice", "iou", "box_iou", "surface"):
        values = by[name][~np.isnan(by[name])]
        result[name] = float(values.mean()) if len(values) else None
        result[f"{name}_interval"] = bootstrap(values) if len(values) else None
        result[f"{name}_worst"] = float(values.max() if name == "surface" else values.min()) if len(values) else None
    for name in EDGES:
        result[name] = {
            "bias": float(by[name].mean()),
            "deviation": float(by[name].std()),
            "mean_absolute": float(np.abs(by[name]).mean()),
        }
    result["bottom_within_4_percent"] = float((np.abs(by["bottom"]) <= 0.04).mean())
    return result


def worst(
    segmenter: LungSegmenter,
    splits: Mapping[str, Samples],
    figures: dict[str, np.ndarray],
    device: torch.device,
    count: int = WORST,
) -> Figure:
    """Images of the lowest box IoU of all sources: truth green, found blue, and their boxes."""
    ranked = sorted((float(figures[name][i, 2]), name, i) for name in splits for i in range(len(figures[name])))[:count]
    columns = 4
    rows = max(1, -(-len(ranked) // columns))
    sheet = Figure(figsize=(3.2 * columns, 3.4 * rows), layout="constrained")
    for k, (iou, name, i) in enumerate(ranked):
        image, truth = splits[name].image(i), splits[name].mask(i)
        with torch.no_grad():
            found = segmenter(torch.from_numpy(image.copy())[None, None].to(device).float() / 255)[0].cpu()
        axes = sheet.add_subplot(rows, columns, k + 1)
        draw_lungs(axes, image, found.numpy(), truth)
        axes.set_title(f"{name} {splits[name].key(i)}\nbox IoU {iou:.3f}, Dice {figures[name][i, 0]:.3f}", fontsize=7)
    return sheet


def draw_lungs(axes: Any, image: np.ndarray, found: np.ndarray, truth: np.ndarray | None = None) -> None:
    """A radiograph with the outline of the lungs found (blue), the true one (green) and the boxes of both."""
    from matplotlib.patches import Rectangle

    axes.imshow(image, cmap="gray", vmin=0, vmax=255)
    size = len(image)
    for mask, colour in ((truth, REGION), (found, LUNGS)):
        if mask is None:
            continue
        if mask.any():
            axes.contour(mask.astype(float), levels=[0.5], colors=[colour], linewidths=0.7)
        x0, y0, x1, y1 = lung_boxes(torch.from_numpy(mask)[None], size)[0].tolist()
        axes.add_patch(
            Rectangle(
                (x0 - 0.5, y0 - 0.5),
                x1 - x0,
                y1 - y0,
                fill=False,
                color=colour,
                linewidth=0.9,
                linestyle="-" if mask.any() else ":",
            )
        )
    axes.axis("off")


def line(name: str, s: dict[str, Any]) -> str:
    """One line of a summary for the terminal."""
    bottom = s["bottom"]
    return (
        f"{name}: {s['images']} images, Dice {s['dice']:.4f} (worst {s['dice_worst']:.3f}), box IoU {s['box_iou']:.4f} "
        f"(worst {s['box_iou_worst']:.3f}), "
        f"lower edge {100 * bottom['bias']:+.1f} ± {100 * bottom['deviation']:.1f}% of the image, {s['fallback']} "
        "without lungs"
    )


def write(out: Path, content: dict[str, Any], sheet: Figure) -> None:
    """report.json, worst.png and report.html."""
    picture = png(sheet)
    atomic.write(out / "worst.png", picture)
    head = [
        "source",
        "images",
        "Dice",
        "IoU",
        "box IoU",
        "95% surface distance",
        *(f"{e} edge" for e in EDGES),
        "bottom within 4%",
        "no lungs",
    ]
    rows = [_row(name, s) for name, s in content["sources"].items()]
    atomic.write(
        out / "report.html",
        render("lungs.html", title="Lung segmenter", about=content["about"], head=head, rows=rows, sheet=picture),
    )
    atomic.write(out / "report.json", json.dumps(content, indent=1))


def _row(name: str, s: dict[str, Any]) -> list[str]:
    def mean(key: str, scale: float = 1.0, digits: int = 3) -> str:
        if s[key] is None:
            return "-"
        low, high = s[f"{key}_interval"]
        m, low, high, extreme = (f"{scale * v:.{digits}f}" for v in (s[key], low, high, s[f"{key}_worst"]))
        return stacked(m, f"{low} to {high}", extreme)

    edges = [stacked(f"{100 * s[e]['bias']:+.1f}", f"± {100 * s[e]['deviation']:.1f}") for e in EDGES]
    figures = [mean("dice"), mean("iou"), mean("box_iou"), mean("surface", 100, 1), *edges]
    return [name, str(s["images"]), *figures, f"{100 * s['bottom_within_4_percent']:.0f}%", str(s["fallback"])]
