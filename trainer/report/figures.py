"""Pictures: the panel of CAMs, images without lungs, curves."""

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from sklearn.metrics import auc, precision_recall_curve, roc_curve

from shards.dataset import Split
from trainer.calibration import reliability
from trainer.drawing import LESION, LUNGS, REGION, short
from trainer.outcome import Outcome

TILES = 12
LARGEST = 400_000  # bytes of an SVG


@dataclass
class Tile:
    """One image of a panel: image and cam float [S,S] in [0,1]; region, lesion and lungs bool [S,S]."""

    title: str
    image: np.ndarray
    cam: np.ndarray
    region: np.ndarray
    lesion: np.ndarray
    lungs: np.ndarray


def panel(shown: list[Tile], columns: int = 4, cam_of: str = "the finding in the title") -> Figure:
    """Each image beside itself with its CAM; the outlines of lungs cyan, of the expected region green, of lesions
    red, as far as there are any.
    """
    drawn = (
        ("cyan: lungs", any(t.lungs.any() for t in shown)),
        ("green: expected region", any(t.region.any() for t in shown)),
    )
    words = [word for word, there in (*drawn, ("red: lesion", any(t.lesion.any() for t in shown))) if there]
    legend = "   ".join([*words, f"right half: Grad-CAM of {cam_of}"])
    columns = min(columns, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(3.7 * columns, 2.35 * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax, tile in zip(axes.flat, shown, strict=False):
        draw(ax, tile)
    for ax in axes.flat:
        ax.axis("off")
    figure.supxlabel(legend, fontsize=9 if columns > 1 else 6)
    return figure


def without_lungs(splits: Mapping[str, Split], lost: Mapping[str, Sequence[int]]) -> Figure | None:
    """Up to 12 of the images without believable lungs, by split; None where there are none.
    ``lost``: their positions.
    """
    images = [(name, position) for name, positions in lost.items() for position in positions]
    if not images:
        return None
    chosen = [images[i] for i in np.unique(np.linspace(0, len(images) - 1, TILES).astype(int))]
    figure = Figure(figsize=(12, 2.3 * math.ceil(len(chosen) / 6)), layout="constrained")
    for k, (name, position) in enumerate(chosen):
        ax = figure.add_subplot(math.ceil(len(chosen) / 6), 6, k + 1)
        ax.imshow(splits[name].image(position), cmap="gray", vmin=0, vmax=255)
        ax.set_title(f"{name} {splits[name].key(position)}", fontsize=7)
        ax.axis("off")
    return figure


def draw(ax: Any, tile: Tile) -> None:
    """The tile's image and, to its right, the same with the CAM over it."""
    size = tile.image.shape[0]
    gray = np.repeat(tile.image[..., None], 3, 2)
    heat = matplotlib.colormaps["inferno"](tile.cam)[..., :3]
    alpha = 0.65 * tile.cam[..., None]
    ax.imshow(np.concatenate([gray, (1 - alpha) * gray + alpha * heat], 1), vmin=0, vmax=1)
    for shift in (0, size):
        for mask, colour in ((tile.lungs, LUNGS), (tile.region, REGION), (tile.lesion, LESION)):
            if mask.any():
                ax.contour(
                    np.arange(size) + shift, np.arange(size), mask, levels=[0.5], colors=[colour], linewidths=0.9
                )
    ax.set_title(tile.title, fontsize=8)


def curves(
    history: list[dict[str, Any]],
    outcomes: dict[str, Outcome],
    findings: Sequence[str],
    measured: Mapping[str, Mapping[str, Any]] | None = None,
) -> Figure:
    """Losses, lambda and validation figures by epoch, where there is a history; then ROC and precision-recall of each
    split, and how far probabilities are right, dotted with val's correction. ``findings`` names them, of classes class
    0 first. Of many findings those of the last split alone.

    Args:
        measured: figures by split.
    """
    rows = 2 if history else 1
    figure = Figure(figsize=(11, 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, 3).ravel()
    if history:
        _of_training(axes[:3], history)
    axes = axes[-3:]
    axes[0].set_title("ROC, and its area")
    axes[1].set_title("precision and recall, colours as left")
    axes[2].set_title("calibration; dotted: corrected")
    for ax in (axes[0], axes[2]):
        ax.plot([0, 1], [0, 1], ":", color="gray", lw=0.8)
    for split, outcome in outcomes.items():
        scored = list(outcome.task.scored(outcome.logits, outcome.target))
        if len(scored) > 4 and split != list(outcomes)[-1]:
            continue
        for finding, truth, score in scored:
            if 0 < truth.sum() < len(truth):
                false, true, _ = roc_curve(truth.numpy(), score.numpy())
                precision, recall, _ = precision_recall_curve(truth.numpy(), score.numpy())
                name = split if len(scored) == 1 else f"{split}, {short(findings[finding])}"
                (line,) = axes[0].plot(false, true, lw=1, label=f"{name}: {auc(false, true):.3f}")
                axes[1].plot(recall, precision, lw=1)
                said, is_, _ = zip(*reliability(truth.numpy(), score.numpy()), strict=True)
                axes[2].plot(said, is_, "o-", ms=2, lw=1, color=line.get_color())
                of = (measured or {}).get(split, {}).get("calibration", {}).get(findings[finding], {})
                if corrected := of.get("reliability_calibrated"):
                    axes[2].plot(*list(zip(*corrected, strict=True))[:2], ":", lw=1, color=line.get_color())
    for ax, label in zip(axes, ("1 - specificity", "recall", "probability"), strict=True):
        ax.set_xlabel(label)
    for ax in figure.axes:
        ax.grid(alpha=0.3)
        if ax.get_legend_handles_labels()[0]:
            entries = len(ax.get_legend_handles_labels()[0])
            ax.legend(fontsize=7 if entries <= 12 else 3.5, ncols=1 if entries <= 12 else 2)
    return figure


def _of_training(axes: Any, history: list[dict[str, Any]]) -> None:
    """Losses, lambda and validation figures by epoch, on three axes."""
    epochs = [line for line in history if "val_loss" in line]
    steps = [line for line in history if "ce" in line]
    axes[0].set_title("cross-entropy")
    axes[1].set_title("attention loss and lambda")
    axes[2].set_title("validation")
    for ax in axes:
        ax.set_xlabel("epoch")
    drawn: dict[str, Any] = {"lw": 0.8, "ms": 3, "marker": "o" if len(steps) == 1 else ""}  # of one point is no line
    axes[0].plot([line["position"] for line in steps], [line["ce"] for line in steps], label="train", **drawn)
    axes[0].plot([line["epoch"] + 1 for line in epochs], [line["val_loss"] for line in epochs], "o-", ms=3, label="val")
    attended = [line for line in steps if line.get("attention") is not None]
    if attended:
        axes[1].plot(
            [line["position"] for line in attended],
            [line["attention"] for line in attended],
            label="attention, train",
            **drawn,
        )
        axes[1].plot([line["position"] for line in steps], [line["lambda"] for line in steps], label="lambda", **drawn)
    else:
        axes[1].text(0.5, 0.5, "none: plain cross-entropy", ha="center", va="center", transform=axes[1].transAxes)
    for name in ("val_accuracy", "val_auc", "val_energy"):
        known = [line for line in epochs if line.get(name) is not None]
        if known:
            axes[2].plot(
                [line["epoch"] + 1 for line in known], [line[name] for line in known], "o-", ms=3, label=name[4:]
            )


def svg(figure: Figure) -> bytes:
    """A figure as an SVG whose letters are letters; as a PNG where that would be much larger."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(), matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "cxr-focus"}):
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue() if len(buffer.getvalue()) <= LARGEST else png(figure)


def png(figure: Figure, dpi: int = 110) -> bytes:
    """A figure as the bytes of a PNG."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Names in letters that the font has not are boxes in pictures, and whole in the page
        warnings.filterwarnings("ignore", message="Glyph")
        figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()
