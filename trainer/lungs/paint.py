"""Disease, devices and other machines painted over radiographs whose lungs are known.

A lung segmenter that has only seen air-filled lungs leaves out the very part that this package needs: where fluid is,
no lung is found. Here opacities are painted over lungs while the mask stays whole, gas is painted where there is no
lung, and tubes, text, collimators and tone curves make the image look like one of another hospital.

Legend: image float [S,S] in [0,1]; mask bool [S,S], both lungs; alpha float [S,S] in [0,1], how much of a pixel is
painted. Everything is drawn before rotation and scaling, with the chest upright. Random numbers are a function of
(seed, epoch, position of the sample).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import kornia
import numpy as np
import torch
from torch.nn import functional as F

from trainer.sections import Painting

# How often each is drawn
NEGATIVES = {
    "turned": 0.2,
    "part": 0.2,
    "below": 0.1,
    "side": 0.25,
    "limb": 0.15,
    "blank": 0.1,
}


@dataclass
class Side:
    """One lung. ``depth`` 0 at its apex to 1 at its lowest row; ``across`` 0 at the midline to 1 at its outermost
    column; ``sign`` -1 on the image's left.
    """

    mask: torch.Tensor
    depth: torch.Tensor
    across: torch.Tensor
    sign: int


def sides(mask: torch.Tensor) -> list[Side]:
    """Left and right of a lung mask bool [S,S], cut at its emptiest column in the middle; one or none where there is no
    more.
    """
    size = len(mask)
    columns = mask.sum(0)
    filled = torch.nonzero(columns)[:, 0]
    if not len(filled):
        return []
    x0, x1 = int(filled[0]), int(filled[-1]) + 1
    width = x1 - x0
    inner = columns[x0 + int(0.3 * width) : x0 + max(int(0.7 * width), int(0.3 * width) + 1)]
    middle = x0 + int(0.3 * width) + float(torch.nonzero(inner == inner.min()).float().mean()) + 0.5
    y, x = _grid(size, mask.device)
    found = []
    for sign in (-1, 1):
        away = sign * (x * size - middle)
        part = mask & (away > 0)
        if int(part.sum()) < 0.005 * size * size:
            continue
        rows = torch.nonzero(part.any(1))[:, 0]
        top, bottom = int(rows[0]), int(rows[-1]) + 1
        reach = float(torch.where(part, away, 0.0).max())
        found.append(Side(part, (y * size - top) / (bottom - top), away / reach, sign))
    return found


def opacity(
    image: torch.Tensor,
    mask: torch.Tensor,
    side: Side,
    rng: np.random.Generator,
    *,
    kind: str,
    strength: float,
    level: float = 0.5,
) -> torch.Tensor:
    """An image with one lung (``haze``: all) made opaque; the mask stays what it is.

    Args:
        kind: ``effusion``: fluid from the base up to ``level`` whose surface climbs to the chest wall; ``whiteout``:
            the whole lung; ``consolidation``: patches; ``haze``: the whole chest, denser below.
        strength: 0 to 1, how much of the lung's own brightness goes.
        level: share of the lung's height that the fluid reaches at the midline.
    """
    size = len(image)
    if kind == "consolidation":
        alpha = torch.zeros_like(image)
        inside = torch.nonzero(side.mask)
        reach = float(side.mask.any(1).sum()) / size
        y, x = _grid(size, image.device)
        for _ in range(rng.integers(1, 4)):
            cy, cx = ((inside[int(rng.integers(len(inside)))] + 0.5) / size).tolist()
            ry, rx = rng.uniform(0.08, 0.4, 2) * reach
            blob = ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 + 0.5 * _smooth(rng, size, 7, image.device)
            alpha = torch.maximum(alpha, torch.sigmoid((1 - blob) * rng.uniform(2, 8)))
        support = _soft(side.mask, size, 0.015)
    elif kind == "haze":
        y, _ = _grid(size, image.device)
        alpha = (0.4 + 0.6 * y + 0.2 * _smooth(rng, size, 4, image.device)).clamp(0, 1)
        support = _soft(mask, size, 0.03)
    else:
        # Fluid and chest wall run into each other, so it is painted a little beyond the lung's edge, the diaphragm
        # included.
        support = _soft(side.mask, size, rng.uniform(0.02, 0.05))
        if kind == "whiteout":
            alpha = torch.ones_like(image)
        else:
            rise = rng.uniform(0.08, 0.25)
            surface = 1 - level + 0.06 - rise * side.across.clamp(0, 1) ** 2.2
            alpha = torch.sigmoid((side.depth - surface) / rng.uniform(0.008, 0.05))
    alpha = alpha * support * strength
    around = _soft(mask, size, 0.06) * (1 - _soft(mask, size, 0.01))
    tissue = _mean(image, around)
    spread = _mean((image - tissue) ** 2, around).sqrt()
    fill = tissue + rng.uniform(-0.3, 0.7) * spread + 0.04 * _smooth(rng, size, int(rng.integers(3, 9)), image.device)
    detail = (image - _blur(image, size / 40)) * rng.uniform(0, 0.6)  # ribs shine through
    return (image * (1 - alpha) + alpha * (torch.maximum(fill, image * 0.9) + detail)).clamp(0, 1)


def gas(image: torch.Tensor, mask: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Air where there is no lung, as dark as lung."""
    size = len(image)
    y, x = _grid(size, image.device)
    lung, tissue = _mean(image, mask.float()), _mean(image, (~mask).float())
    dark = min(lung, 0.8 * tissue) * rng.uniform(0.6, 1.1)
    alpha = torch.zeros_like(image)
    for side in sides(mask):
        rows = torch.nonzero(side.mask.any(1))[:, 0]
        height = len(rows) / size
        if rng.random() < 0.5:  # a crescent under the diaphragm
            below = size - 1 - side.mask.flip(0).int().argmax(0)  # lowest lung pixel of each column
            below = torch.where(side.mask.any(0), below, -size).float() / size
            below = _smooth_row(below)
            gap, thick = rng.uniform(0.012, 0.03), rng.uniform(0.01, 0.08)
            crescent = ((y - below - gap) > 0) & (
                (y - below - gap) < thick * (1 - (2 * side.across - 1).abs() ** rng.uniform(1.5, 4))
            )
            alpha = torch.maximum(alpha, crescent.float() * rng.uniform(0.5, 1))
        if rng.random() < 0.6:  # stomach, bowel
            for _ in range(rng.integers(1, 5)):
                cx = float(x[0][side.mask.any(0)].mean()) + rng.normal(0, 0.06)
                cy = float(rows[-1]) / size + rng.uniform(0.0, 0.2)
                ry, rx = rng.uniform(0.02, 0.3 * height), rng.uniform(0.03, 0.12)
                bubble = ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 + 0.25 * _smooth(rng, size, 8, image.device)
                if rng.random() < 0.4:  # a level of fluid
                    bubble = bubble + (y > cy + ry * rng.uniform(-0.3, 0.6)) * 2
                alpha = torch.maximum(alpha, torch.sigmoid((1 - bubble) * rng.uniform(4, 12)) * rng.uniform(0.5, 1))
    alpha = _blur(alpha, size * rng.uniform(0.002, 0.008)) * (1 - _soft(mask, size, 0.008))
    return (image * (1 - alpha) + alpha * dark).clamp(0, 1)


def collapse(image: torch.Tensor, side: Side, rng: np.random.Generator) -> torch.Tensor:
    """A pneumothorax: the upper and outer part of a lung dark and without vessels behind a thin line."""
    size = len(image)
    edge = (
        side.depth * rng.uniform(0.6, 2)
        + (1 - side.across.clamp(0, 1)) * rng.uniform(0.8, 2)
        + 0.05 * _smooth(rng, size, 5, image.device)
    )
    limit = rng.uniform(0.3, 1.0)
    alpha = torch.sigmoid((limit - edge) / 0.02) * _soft(side.mask, size, 0.0) * rng.uniform(0.5, 1)
    dark = _blur(image, size / 30) * rng.uniform(0.4, 0.9)
    line = torch.exp(-(((edge - limit) / 0.02) ** 2)) * side.mask * rng.uniform(0, 0.25)
    return (image * (1 - alpha) + alpha * dark + line).clamp(0, 1)


def devices(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Tubes, leads, metal and letters anywhere on the image."""
    size = len(image)
    y, x = _grid(size, image.device)
    bright = float(image.max())
    for _ in range(rng.integers(1, 5)):
        # A curve through a few points as short segments; a tube has two walls.
        knots = (
            rng.uniform(-0.1, 1.1, (4, 2))
            if rng.random() < 0.5
            else np.cumsum(rng.normal(0, 0.15, (4, 2)), 0) + rng.uniform(0.2, 0.8, 2)
        )
        t = np.linspace(0, 1, 9)[:, None]
        curve = (
            (1 - t) ** 3 * knots[0] + 3 * t * (1 - t) ** 2 * knots[1] + 3 * t**2 * (1 - t) * knots[2] + t**3 * knots[3]
        )
        distance = _distance(y, x, curve)
        width, wall = rng.uniform(0.0015, 0.006), rng.uniform(0.004, 0.012) if rng.random() < 0.3 else 0.0
        alpha = torch.exp(-(((distance - wall) / width) ** 2)) * rng.uniform(0.2, 0.9)
        image = image + alpha * (bright - image)
    if rng.random() < 0.3:  # a case of metal, a plate, an arm
        cy, cx = rng.uniform(0.05, 0.95, 2)
        ry, rx = rng.uniform(0.02, 0.09, 2)
        case = torch.sigmoid((1 - ((y - cy) / ry).abs() ** 4 - ((x - cx) / rx).abs() ** 4) * 10) * rng.uniform(0.4, 1)
        image = image + case * (bright - image)
    for _ in range(rng.integers(0, 4)):
        height, count = rng.uniform(0.015, 0.07), int(rng.integers(1, 7))
        glyphs = torch.from_numpy((rng.random((1, 1, 7, 6 * count)) < 0.5).astype(np.float32)).to(image.device)
        glyphs[..., ::6] = 0
        rows, columns = max(7, round(height * size)), min(size - 2, max(6, round(height * size * 0.7 * count)))
        text = F.interpolate(glyphs, (rows, columns))[0, 0]
        border = rng.random() < 0.7  # letters stand at the rim more often than on the chest
        top = (
            int(rng.choice([rng.uniform(0, 0.12), rng.uniform(0.85, 1)]) * (size - rows))
            if border
            else int(rng.integers(size - rows))
        )
        left = int(rng.integers(size - columns))
        image = image.clone()
        image[top : top + rows, left : left + columns] = torch.where(
            text > 0, bright, image[top : top + rows, left : left + columns]
        )
    return image.clamp(0, 1)


def tone(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Another machine: a monotone curve of brightness, uneven exposure, local contrast or blur."""
    size = len(image)
    if rng.random() < 0.7:
        steps = rng.exponential(1, 6) + 0.25
        knots = torch.tensor(
            np.concatenate([[0], np.cumsum(steps) / steps.sum()]), dtype=image.dtype, device=image.device
        )
        place = image * 6
        low = place.floor().clamp(0, 5).long()
        image = knots[low] + (knots[low + 1] - knots[low]) * (place - low)
    if rng.random() < 0.5:
        image = image * (1 + rng.uniform(0, 0.35) * _smooth(rng, size, 3, image.device))
    which = rng.random()
    if which < 0.3:
        image = _blur(image, size * rng.uniform(0.002, 0.01))
    elif which < 0.6:
        local = _blur(image, size * rng.uniform(0.02, 0.15))
        image = local * rng.uniform(0.3, 1) + (image - local) * rng.uniform(1, 2.5) + rng.uniform(0, 0.2)
    return image.clamp(0, 1)


def frame(image: torch.Tensor, mask: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """A border around the lungs: what the collimator cut off, black (or, seldom, white)."""
    size = len(image)
    rows, columns = torch.nonzero(mask.any(1))[:, 0], torch.nonzero(mask.any(0))[:, 0]
    if not len(rows):
        return image
    room = [int(rows[0]), size - 1 - int(rows[-1]), int(columns[0]), size - 1 - int(columns[-1])]
    top, bottom, left, right = (int(min(r, 0.15 * size) * rng.uniform(0, 1)) * (rng.random() < 0.6) for r in room)
    value = 1.0 if rng.random() < 0.15 else rng.uniform(0, 0.08)
    framed = torch.full_like(image, value)
    framed[top : size - bottom, left : size - right] = image[top : size - bottom, left : size - right]
    return framed


def negative(image: torch.Tensor, mask: torch.Tensor, rng: np.random.Generator, kind: str = "") -> torch.Tensor:
    """Made of a chest or of nothing: an image on which no pair of lungs is to be found. ``kind``: one of `NEGATIVES`;
    empty: drawn.
    """
    size, device = len(image), image.device
    lungs = sides(mask)
    kind = kind or str(rng.choice(list(NEGATIVES), p=list(NEGATIVES.values())))
    if kind == "turned":
        return torch.rot90(image, int(rng.integers(1, 4)))
    if kind == "below" and lungs:
        bottom = int(torch.nonzero(mask.any(1))[-1, 0]) + 1
        if size - bottom >= 0.12 * size:
            return F.interpolate(image[None, None, bottom:], (size, size), mode="bilinear")[0, 0]
    if kind == "side" and len(lungs) == 2:
        # Both lungs over each other in the middle, as seen from the side, with the spine behind and the heart in front
        # of them.
        centers = [float(torch.nonzero(lung.mask.any(0)).float().mean()) for lung in lungs]
        moved = [torch.roll(image, round(size / 2 - center + rng.normal(0, 0.02 * size)), 1) for center in centers]
        share = rng.uniform(0.3, 0.7)
        overlaid = share * moved[0] + (1 - share) * moved[1]
        overlaid = torch.minimum(overlaid, torch.minimum(*moved) + rng.uniform(0.05, 0.4))
        y, x = _grid(size, device)
        behind = rng.choice([-1, 1]) * rng.uniform(0.12, 0.25)
        spine = torch.exp(-(((x - 0.5 - behind - 0.04 * torch.sin(5 * y)) / rng.uniform(0.03, 0.06)) ** 4)) * (
            0.85 + 0.15 * torch.sin(rng.uniform(50, 90) * y)
        )
        heart = torch.sigmoid(
            (1 - ((x - 0.5 + behind * 0.7) / 0.12) ** 2 - ((y - rng.uniform(0.5, 0.65)) / 0.14) ** 2) * 4
        )
        tissue = float(image[~mask].mean()) * rng.uniform(1, 1.4)
        alpha = torch.maximum(spine * rng.uniform(0.3, 0.9), heart * rng.uniform(0.2, 0.8))
        return (overlaid * (1 - alpha) + tissue * alpha).clamp(0, 1)
    if kind == "limb":
        # Flesh with bones in it: capsules of two widths around the same lines, on a dark ground.
        y, x = _grid(size, device)
        drawn = torch.full_like(image, rng.uniform(0, 0.15))
        root = rng.uniform(0.3, 0.7, 2)
        for _ in range(rng.integers(1, 7)):
            end = root + rng.normal(0, 0.35, 2)
            line = np.linspace(root + rng.normal(0, 0.08, 2), end, 3)
            distance, width = _distance(y, x, line), rng.uniform(0.03, 0.14)
            flesh, bone = torch.sigmoid((width - distance) / 0.008), torch.sigmoid((0.45 * width - distance) / 0.006)
            drawn = torch.maximum(drawn, torch.maximum(flesh * rng.uniform(0.3, 0.55), bone * rng.uniform(0.5, 0.95)))
        return (drawn + 0.05 * _smooth(rng, size, 9, device)).clamp(0, 1)
    if kind == "blank":
        ground = torch.full_like(image, rng.uniform(0, 1))
        for cells in rng.integers(2, 40, rng.integers(0, 4)):
            ground = ground + rng.uniform(0, 0.4) * _smooth(rng, size, int(cells), device)
        grain = torch.from_numpy(rng.normal(0, rng.uniform(0, 0.3), (size, size)).astype(np.float32)).to(device)
        return (ground + grain * (rng.random() < 0.5)).clamp(0, 1)
    side = int(rng.uniform(0.2, 0.42) * size)  # a part, much enlarged
    top, left = (int(rng.integers(size - side)) for _ in range(2))
    return F.interpolate(image[None, None, top : top + side, left : left + side], (size, size), mode="bilinear")[0, 0]


def paint(
    images: torch.Tensor,
    masks: torch.Tensor,
    seed: int,
    epoch: int,
    index: Sequence[int] | torch.Tensor,
    painting: Painting,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Paint on images float [B,1,S,S] in [0,1] with lung masks bool [B,S,S]; only ``warp`` moves the masks."""
    done = []
    masks = masks.clone()
    for b, i in enumerate(index):
        rng = np.random.default_rng([seed, epoch, int(i), 1])
        image, mask = images[b, 0], masks[b]
        lungs = sides(mask)
        wanted = {
            name: rng.random() < getattr(painting, name)
            for name in ("opacity", "gas", "collapse", "devices", "tone", "warp", "frame", "negative")
        }
        if wanted["collapse"] and lungs:
            image = collapse(image, lungs[int(rng.integers(len(lungs)))], rng)
        if wanted["opacity"] and lungs:
            for _ in range(1 + (rng.random() < 0.35)):
                kind = str(rng.choice(["effusion", "whiteout", "consolidation", "haze"], p=[0.5, 0.15, 0.25, 0.1]))
                strength = 1 - rng.uniform(0, 0.85) ** (1.5 if kind in ("effusion", "whiteout") else 0.8)
                hit = lungs if rng.random() < 0.3 else [lungs[int(rng.integers(len(lungs)))]]
                for side in hit:
                    image = opacity(image, mask, side, rng, kind=kind, strength=strength, level=rng.uniform(0.05, 0.9))
        if wanted["gas"] and lungs:
            image = gas(image, mask, rng)
        if wanted["negative"]:
            image, lungs = negative(image, mask, rng), []
            masks[b] = mask = torch.zeros_like(mask)
        if wanted["devices"]:
            image = devices(image, rng)
        if wanted["tone"]:
            image = tone(image, rng)
        if wanted["frame"]:
            image = frame(image, mask, rng)
        if wanted["warp"]:
            image, masks[b] = bend(image, mask, rng)
        done.append(image)
    return torch.stack(done)[:, None], masks


def bend(image: torch.Tensor, mask: torch.Tensor, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Another build: a smooth displacement of up to 3% of the image and sides stretched by up to 20%, image and mask
    alike.
    """
    size = len(image)
    y, x = _grid(size, image.device)
    amount = rng.uniform(0, 0.03)
    zoom = 1 + rng.uniform(-0.2, 0.2, 2)
    at = torch.stack(
        [
            (2 * x - 1) * zoom[0] + amount * 2 * _smooth(rng, size, 4, image.device),
            (2 * y - 1) * zoom[1] + amount * 2 * _smooth(rng, size, 4, image.device),
        ],
        -1,
    )
    both = torch.stack([image, mask.float()])[:, None]
    moved = F.grid_sample(both, at.expand(2, -1, -1, -1).to(both.dtype), mode="bilinear", align_corners=False)
    return moved[0, 0], moved[1, 0] >= 0.5


# -- parts ------------------------------------------------------------------------------------------------------


def _grid(size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """y and x of pixel centres in shares of the image: [S,S] each."""
    at = (torch.arange(size, device=device) + 0.5) / size
    y, x = torch.meshgrid(at, at, indexing="ij")
    return y, x


def _smooth(rng: np.random.Generator, size: int, cells: int, device: torch.device) -> torch.Tensor:
    """Smooth noise, about -1 to 1, with ``cells`` cells over the image: [S,S]."""
    coarse = torch.from_numpy(rng.uniform(-1, 1, (1, 1, cells, cells)).astype(np.float32)).to(device)
    fine = F.interpolate(coarse, (-(-size // 4), -(-size // 4)), mode="bicubic", align_corners=True)
    return F.interpolate(fine, (size, size), mode="bilinear", align_corners=True)[0, 0]


def _smooth_row(row: torch.Tensor) -> torch.Tensor:
    return F.avg_pool1d(row[None, None], 7, 1, 3, count_include_pad=False)[0, 0]


def _blur(image: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur [S,S]; wide ones on a coarser grid, where they look the same."""
    size = len(image)
    coarse = 1 if sigma < 4 else 2 ** int(np.log2(sigma / 2))
    small = image[None, None]
    if coarse > 1:
        small = F.avg_pool2d(small, coarse, ceil_mode=True)
    s = max(sigma / coarse, 0.1)
    taps = 2 * int(np.ceil(2.5 * s)) + 1
    small = kornia.filters.gaussian_blur2d(small, (taps, taps), (s, s), border_type="replicate")
    return F.interpolate(small, (size, size), mode="bilinear")[0, 0] if coarse > 1 else small[0, 0]


def _soft(mask: torch.Tensor, size: int, grow: float) -> torch.Tensor:
    """A mask grown by a share of the image and with a soft edge: float [S,S]."""
    pixels = round(grow * size / 4)
    grown = F.avg_pool2d(mask.float()[None, None], 4 if pixels else 1, ceil_mode=True)  # a soft edge needs no fine grid
    if pixels:
        grown = F.max_pool2d(grown, (2 * pixels + 1, 1), 1, (pixels, 0))
        grown = F.max_pool2d(grown, (1, 2 * pixels + 1), 1, (0, pixels))
        return F.interpolate(
            _blur(grown[0, 0], max(pixels / 2, size / 600))[None, None], (size, size), mode="bilinear"
        )[0, 0]
    return _blur(grown[0, 0], size / 150)


def _mean(image: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return (image * weight).sum() / weight.sum().clamp(min=1)


def _distance(y: torch.Tensor, x: torch.Tensor, curve: np.ndarray) -> torch.Tensor:
    """Distance of every pixel to a chain of segments [N,2] (y, x): [S,S]."""
    points = torch.from_numpy(curve.astype(np.float32)).to(y.device)
    a, b = points[:-1, :, None, None], points[1:, :, None, None]
    along = b - a
    at = torch.stack([y, x])[None] - a
    t = ((at * along).sum(1) / (along**2).sum(1).clamp(min=1e-9)).clamp(0, 1)
    return ((at - t[:, None] * along) ** 2).sum(1).amin(0).sqrt()
