"""One sampled transform for an image and what belongs to it (box, outline, mask), on the device. Hides Kornia.

Legend: images float [B,1,H,W] in [0,1]; boxes int64 [B,4] x0 y0 x1 y1, ends exclusive, pixels of these images; outlines float [B,h,w]: grids over
the boxes.

Random numbers are a function of (seed, epoch, position of the sample), so an image is transformed alike whichever
process, batch or loader worker it comes through.
"""

from collections.abc import Sequence
from typing import NamedTuple

import kornia
import numpy as np
import torch
from torch.nn import functional as F

from trainer.config import Strength

DRAWS = 13  # random numbers that one image uses
SWAPS = slice(11, 13)  # of these, for the context swap: whether, and with whom


class Augmented(NamedTuple):
    """What comes out, each like what went in."""

    images: torch.Tensor
    boxes: torch.Tensor | None
    masks: torch.Tensor | None
    lungs: torch.Tensor | None


def resize(images: torch.Tensor, size: int) -> torch.Tensor:
    """uint8 [B,1,H,W] -> float [B,1,size,size] in [0,1], bilinear with antialiasing."""
    images = images.float() / 255
    if images.shape[-2:] == (size, size):
        return images
    return F.interpolate(images, (size, size), mode="bilinear", antialias=True)


def draw(seed: int, epoch: int, index: Sequence[int] | torch.Tensor) -> torch.Tensor:
    """Random numbers for each sample: float32 [B, DRAWS] in [0, 1)."""
    rows = [np.random.default_rng([seed, epoch, int(i)]).random(DRAWS, np.float32) for i in index]
    return torch.from_numpy(np.stack(rows))


def augment(
    images: torch.Tensor,
    draws: torch.Tensor,
    strength: Strength,
    *,
    boxes: torch.Tensor | None = None,
    masks: torch.Tensor | None = None,
    outlines: torch.Tensor | None = None,
) -> Augmented:
    """Transform images float [B,1,H,W], boxes int64 [B,4], masks bool [B,H,W] and the outlines in the boxes by the same sampled maps.

    A box becomes the rectangle around its transformed corners, cut at the image; an outline becomes a mask bool [B,H,W] of what it says is
    lung, drawn once, at its final place. What comes in from outside is black.
    """
    d = draws.to(images.device)
    signed = 2 * d - 1
    height, width = images.shape[-2:]
    centre = torch.tensor([(width - 1) / 2, (height - 1) / 2], device=images.device).expand(len(images), 2)
    shift = signed[:, :2] * strength.shift * torch.tensor([width, height], device=images.device)
    zoom = (1 + strength.scale * signed[:, 2:3]).expand(-1, 2)
    matrix = kornia.geometry.transform.get_affine_matrix2d(shift, centre, zoom, strength.rotate * signed[:, 3])
    mirror = torch.eye(3, device=images.device).repeat(len(images), 1, 1)
    flipped = d[:, 4] < strength.flip
    mirror[flipped, 0, 0], mirror[flipped, 0, 2] = -1.0, width - 1.0
    matrix = matrix @ mirror

    moves = bool(strength.shift or strength.scale or strength.rotate or strength.flip)
    lungs = lung_masks(outlines, boxes, (height, width), matrix if moves else None) if outlines is not None and boxes is not None else None
    if moves:
        size = (height, width)
        warp = kornia.geometry.transform.warp_affine
        images = warp(images, matrix[:, :2], size, align_corners=True)
        if masks is not None:
            masks = warp(masks[:, None].float(), matrix[:, :2], size, align_corners=True)[:, 0] >= 0.5
        if boxes is not None:
            boxes = _move_boxes(boxes, matrix, width, height)
    return Augmented(_expose(images, d, signed, strength), boxes, masks, lungs)


def lung_masks(outlines: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int], matrix: torch.Tensor | None = None) -> torch.Tensor:
    """Grids over boxes as masks of images of size (height, width): where the share of lung, between the cells bilinear, is a half or more.

    Args:
        matrix: [B,3,3] that then moves the image, in its pixels.
    """
    extent = boxes[:, 2:] - boxes[:, :2]
    step = torch.stack([extent[:, 0] / outlines.shape[2], extent[:, 1] / outlines.shape[1]], 1)  # of a cell, in pixels
    first = boxes[:, :2] + step / 2 - 0.5  # its middle, of the first one
    if matrix is None:  # rows and columns apart, which is much less than a pixel at a time
        across, down = (_tent(first[:, k, None], step[:, k, None], outlines.shape[2 - k], size[1 - k]) for k in (0, 1))
        with torch.autocast(boxes.device.type, enabled=False):
            return down @ outlines @ across.transpose(1, 2) >= 0.5
    at = torch.zeros(len(boxes), 3, 3, device=boxes.device)
    at[:, 0, 0], at[:, 1, 1], at[:, 2, 2] = step[:, 0], step[:, 1], 1.0
    at[:, :2, 2] = first
    return kornia.geometry.transform.warp_affine(outlines[:, None], (matrix @ at)[:, :2], size, align_corners=True)[:, 0] >= 0.5


def _tent(first: torch.Tensor, step: torch.Tensor, cells: int, pixels: int) -> torch.Tensor:
    """How much of each cell a pixel has by linear interpolation, nothing beyond the outer cells: float [B,pixels,cells]; first, step [B,1] in pixels."""
    place = (torch.arange(pixels, device=first.device) - first) / step
    return (1 - (place[:, :, None] - torch.arange(cells, device=first.device)).abs()).clamp(min=0)


def _move_boxes(boxes: torch.Tensor, matrix: torch.Tensor, width: int, height: int) -> torch.Tensor:
    edges = boxes.float() - 0.5  # pixel i covers i - 0.5 .. i + 0.5 in the coordinates of the matrix
    x0, y0, x1, y1 = edges.unbind(1)
    corners = torch.stack([x0, y0, x1, y0, x1, y1, x0, y1], 1).view(-1, 4, 2)
    moved = kornia.geometry.linalg.transform_points(matrix, corners) + 0.5
    low, high = moved.amin(1).round(), moved.amax(1).round()
    limit = torch.tensor([width, height], device=boxes.device)
    low = torch.minimum(low.clamp(min=0), limit - 1.0)
    high = torch.maximum(torch.minimum(high, limit.float()), low + 1)
    return torch.cat([low, high], 1).long()


def _expose(images: torch.Tensor, d: torch.Tensor, signed: torch.Tensor, strength: Strength) -> torch.Tensor:
    def per_image(values: torch.Tensor) -> torch.Tensor:
        return values[:, None, None, None]

    if strength.contrast or strength.brightness:
        mean = images.mean((1, 2, 3), keepdim=True)
        images = (images - mean) * per_image(1 + strength.contrast * signed[:, 5]) + mean
        images = (images + per_image(strength.brightness * signed[:, 6])).clamp(0, 1)
    if strength.gamma:
        images = images.clamp(1e-6, 1) ** per_image((1 + strength.gamma) ** signed[:, 7])
    if strength.noise:
        # Each image is seeded by its own draw, so its noise does not depend on who else is in the batch.
        generator = torch.Generator(images.device)
        seeds = (d[:, 9].double() * 2**53).long().tolist()
        noise = [torch.randn(images.shape[1:], generator=generator.manual_seed(s), device=images.device) for s in seeds]
        images = (images + torch.stack(noise) * per_image(strength.noise * d[:, 8])).clamp(0, 1)
    if strength.invert:
        images = torch.where(per_image(d[:, 10] < strength.invert), 1 - images, images)
    return images
