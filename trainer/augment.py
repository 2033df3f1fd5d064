"""One sampled transform for an image and what belongs to it (box, outline, mask), on the device. Hides Kornia.

Legend: images float [B,1,H,W] in [0,1]; boxes int64 [B,4] x0 y0 x1 y1, ends exclusive, pixels of these images; outlines
float [B,h,w]: grids over the boxes.

Random numbers are a function of (seed, epoch, position of the sample), so an image is transformed alike whichever
process, batch or loader worker it comes through.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import kornia
import numpy as np
import torch
from torch.nn import functional as F

from shards.coarse import GRID, LEVELS
from trainer.sections import Strength
from trainer.upload import upload

DRAWS = 17  # random numbers that one image uses
SWAPS = slice(11, 13)  # of these, for the context swap: whether, and with whom
PAIR, LABELS = 13, 14  # which of its findings is attended to; what uncertain ones become
LENDS = slice(15, 17)  # for another image's devices: whether, and whose
# SplitMix64's, as signed numbers
GOLDEN, *MIX = (x - 2**64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


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


def draw(
    seed: int, epoch: int, index: Sequence[int] | torch.Tensor, times: Sequence[int] | torch.Tensor | None = None
) -> torch.Tensor:
    """Random numbers for each sample: float32 [B, DRAWS] in [0, 1).

    Args:
        times: how often it came before in the epoch, which gives it others each time.
    """
    samples = torch.as_tensor(index).tolist()
    again = [0] * len(samples) if times is None else torch.as_tensor(times).tolist()
    keys = [[seed, epoch, i, *([k] if k else [])] for i, k in zip(samples, again, strict=True)]
    rows = [np.random.default_rng(key).random(DRAWS, np.float32) for key in keys]
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
    """Transform images float [B,1,H,W], boxes int64 [B,4], masks bool [B,H,W] or [B,M,H,W] and the outlines in the
    boxes by the same sampled maps.

    A box becomes the rectangle around its transformed corners, cut at the image; an outline becomes a mask bool [B,H,W]
    of what it says is lung, drawn once, at its final place. What comes in from outside is black.
    """
    height, width = images.shape[-2:]
    d = upload(draws, images.device)
    signed = 2 * d - 1
    moves = bool(strength.shift or strength.scale or strength.rotate or strength.flip)
    matrix = _matrix(d, signed, strength, height, width) if moves else None
    lungs = lung_masks(outlines, boxes, (height, width), matrix) if outlines is not None and boxes is not None else None
    if matrix is not None:
        size = (height, width)
        warp = kornia.geometry.transform.warp_affine
        images = warp(images, matrix[:, :2], size, align_corners=True)
        if masks is not None:
            moved = warp(masks.view(len(masks), -1, *size).float(), matrix[:, :2], size, align_corners=True)
            masks = moved.view(masks.shape) >= 0.5
        if boxes is not None:
            boxes = _move_boxes(boxes, matrix, width, height)
    return Augmented(_expose(images, d, signed, strength), boxes, masks, lungs)


def _matrix(d: torch.Tensor, signed: torch.Tensor, strength: Strength, height: int, width: int) -> torch.Tensor:
    """The map of each image [B,3,3], in pixels: a flip, then zoom and turn about the middle, then a shift."""
    centre = torch.stack([torch.full_like(d[:, 0], (side - 1) / 2) for side in (width, height)], 1)
    shift = torch.stack([signed[:, k] * strength.shift * side for k, side in enumerate((width, height))], 1)
    zoom = (1 + strength.scale * signed[:, 2:3]).expand(-1, 2)
    matrix = kornia.geometry.transform.get_affine_matrix2d(shift, centre, zoom, strength.rotate * signed[:, 3])
    flipped = d[:, 4] < strength.flip
    mirror = torch.eye(3, device=d.device).repeat(len(d), 1, 1)
    mirror[:, 0, 0], mirror[:, 0, 2] = torch.where(flipped, -1.0, 1.0), torch.where(flipped, width - 1.0, 0.0)
    return matrix @ mirror


def unpacked(packed: torch.Tensor) -> torch.Tensor:
    """Grids as `shards.coarse.packed` has them, uint8 [B,132] -> float [B,22,24] in {0, 1/3, 2/3, 1}."""
    levels = torch.stack([packed >> shift & LEVELS - 1 for shift in (0, 2, 4, 6)], 2)
    return levels.view(-1, *GRID).float() / (LEVELS - 1)


def lung_masks(
    outlines: torch.Tensor, boxes: torch.Tensor, size: tuple[int, int], matrix: torch.Tensor | None = None
) -> torch.Tensor:
    """`drawn_grids` of lungs, a half of a full cell or more."""
    return drawn_grids(outlines, boxes, size, 0.5, matrix)


def drawn_grids(
    outlines: torch.Tensor,
    boxes: torch.Tensor,
    size: tuple[int, int],
    cut: float | torch.Tensor,
    matrix: torch.Tensor | None = None,
) -> torch.Tensor:
    """Grids float [B,22,24] over boxes [B,4] as masks of images of size (height, width): where they are ``cut`` or
    more, a number or float [B], between the cells bilinear.

    Args:
        matrix: [B,3,3] that then moves the image, in its pixels.
    """
    if isinstance(cut, torch.Tensor):
        cut = cut[:, None, None]
    extent = boxes[:, 2:] - boxes[:, :2]
    step = torch.stack([extent[:, 0] / outlines.shape[2], extent[:, 1] / outlines.shape[1]], 1)  # of a cell, in pixels
    first = boxes[:, :2] + step / 2 - 0.5  # its middle, of the first one
    if matrix is None:  # rows and columns apart, which is much less than a pixel at a time
        across, down = (_tent(first[:, k, None], step[:, k, None], outlines.shape[2 - k], size[1 - k]) for k in (0, 1))
        with torch.autocast(boxes.device.type, enabled=False):
            return down @ outlines @ across.transpose(1, 2) >= cut
    at = torch.zeros(len(boxes), 3, 3, device=boxes.device)
    at[:, 0, 0], at[:, 1, 1], at[:, 2, 2] = step[:, 0], step[:, 1], 1.0
    at[:, :2, 2] = first
    return (
        kornia.geometry.transform.warp_affine(outlines[:, None], (matrix @ at)[:, :2], size, align_corners=True)[:, 0]
        >= cut
    )


def _tent(first: torch.Tensor, step: torch.Tensor, cells: int, pixels: int) -> torch.Tensor:
    """How much of each cell a pixel has by linear interpolation, nothing beyond the outer cells: float
    [B,pixels,cells]; first, step [B,1] in pixels.
    """
    place = (torch.arange(pixels, device=first.device) - first) / step
    return (1 - (place[:, :, None] - torch.arange(cells, device=first.device)).abs()).clamp(min=0)


def _move_boxes(boxes: torch.Tensor, matrix: torch.Tensor, width: int, height: int) -> torch.Tensor:
    edges = boxes.float() - 0.5  # pixel i covers i - 0.5 .. i + 0.5 in the coordinates of the matrix
    x0, y0, x1, y1 = edges.unbind(1)
    corners = torch.stack([x0, y0, x1, y0, x1, y1, x0, y1], 1).view(-1, 4, 2)
    moved = kornia.geometry.linalg.transform_points(matrix, corners) + 0.5
    low, high = moved.amin(1).round(), moved.amax(1).round()
    low = torch.stack([low[:, 0].clamp(0, width - 1.0), low[:, 1].clamp(0, height - 1.0)], 1)
    high = torch.maximum(torch.stack([high[:, 0].clamp(max=width), high[:, 1].clamp(max=height)], 1), low + 1)
    return torch.cat([low, high], 1).long()


def _expose(images: torch.Tensor, d: torch.Tensor, signed: torch.Tensor, strength: Strength) -> torch.Tensor:
    height, width = images.shape[-2:]

    def per_image(values: torch.Tensor) -> torch.Tensor:
        return values[:, None, None, None]

    if strength.contrast or strength.brightness:
        mean = images.mean((1, 2, 3), keepdim=True)
        images = (images - mean) * per_image(1 + strength.contrast * signed[:, 5]) + mean
        images = (images + per_image(strength.brightness * signed[:, 6])).clamp(0, 1)
    if strength.gamma:
        images = images.clamp(1e-6, 1) ** per_image((1 + strength.gamma) ** signed[:, 7])
    if strength.noise:
        seeds = (
            d[:, 9].double() * 2**53
        ).long()  # its own draw: an image's noise does not depend on who else is in the batch
        images = (images + _normal(seeds, height, width) * per_image(strength.noise * d[:, 8])).clamp(0, 1)
    if strength.invert:
        images = torch.where(per_image(d[:, 10] < strength.invert), 1 - images, images)
    return images


def _normal(seeds: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Standard normal numbers float [B,1,height,width] of seeds int64 [B], whatever the device: a hash of (seed,
    pixel), and Box and Muller's transform of it.

    The hash is the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014); a generator for each image would be a
    kernel for each.
    """
    x = _mixed(seeds, height * width)
    radius, angle = (((half & 2**32 - 1).double() + 0.5) / 2**32 for half in (x >> 32, x))
    normal = torch.sqrt(-2 * torch.log(radius)) * torch.cos(2 * math.pi * angle)
    return normal.float().view(len(seeds), 1, height, width)


def _mixed(seeds: torch.Tensor, count: int) -> torch.Tensor:
    """``count`` hashes of each seed: int64 [B] -> [B,count]."""
    x = seeds[:, None] + (1 + torch.arange(count, device=seeds.device)) * GOLDEN
    for shift, factor in ((30, MIX[0]), (27, MIX[1])):
        x = (x ^ (x >> shift & (1 << 64 - shift) - 1)) * factor
    return x ^ (x >> 31 & (1 << 33) - 1)


def hashed(chance: torch.Tensor, count: int) -> torch.Tensor:
    """Uniform numbers float32 [B,count] in [0,1) of one such number for each image, float [B], whatever the device."""
    seeds = (chance.double() * 2**53).long()
    return (_mixed(seeds, count) >> 11 & (1 << 24) - 1).float() / 2**24
