"""What all pictures have in common: the colours of outlines, and names that are names, with two dollars, too."""

import matplotlib
import numpy as np

LUNGS = "#00e5ff"
REGION = "#7CFC00"
LESION = "#ff4040"
OPACITY = 0.65  # of a map where it is largest

matplotlib.rcParams["text.parse_math"] = False  # or a name with two dollars would be a formula


def short(name: str) -> str:
    """A name for a picture, where a long one would leave no room for the rest."""
    return name if len(name) <= 28 else f"{name[:27]}\u2026"


def overlay(
    pixels: np.ndarray, cam: np.ndarray, *, lungs: np.ndarray | None = None, region: np.ndarray | None = None
) -> np.ndarray:
    """An image with a map over it and the outlines of lungs and region, at its own size: uint8 [H,W,3].

    Args:
        pixels: uint8 [H,W]; cam: float32 [H,W] in [0,1]; lungs, region: bool [H,W].
    """
    heat = np.float32(255) * matplotlib.colormaps["inferno"](np.arange(256))[:, :3].astype(np.float32)
    alpha = OPACITY * cam[..., None]
    drawn = pixels[..., None] * (1 - alpha) + alpha * heat[(cam * 255).astype(np.uint8)]
    drawn = drawn.round().astype(np.uint8)
    width = 1 + max(pixels.shape) // 500
    for mask, colour in ((lungs, LUNGS), (region, REGION)):
        if mask is not None:
            drawn[edge(mask, width)] = rgb(colour)
    return drawn


def rgb(colour: str) -> list[int]:
    """``#00e5ff`` as three numbers of 0 to 255."""
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]


def edge(mask: np.ndarray, width: int) -> np.ndarray:
    """The pixels of a mask, bool [H,W], that lie no more than ``width`` from its outside; beyond the image is none."""
    inner = mask.copy()
    inner[width:] &= mask[:-width]
    inner[:-width] &= mask[width:]
    inner[:, width:] &= mask[:, :-width]
    inner[:, :-width] &= mask[:, width:]
    return mask & ~inner
