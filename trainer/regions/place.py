"""Where a finding is expected, given the lungs. Hides the geometry; the rules are data (`trainer.rules`).

Legend: boxes int64 [B,4] x0 y0 x1 y1, ends exclusive; lungs bool [B,S,S]; regions bool [B,S,S], or weights float
[B,S,S] in [0,1].
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from trainer.lungs.cleanup import ends
from trainer.rules import BOX, Rectangle, Rule, read_findings, rules_of
from trainer.upload import upload

PUBLISHED = rules_of(read_findings("published"))
INF = float("inf")
# By how much of both the lung on the image's left is seen larger where none is sick: the heart lies on the other
# (bench/LOG.md)
HEART = 0.07


class Expected(NamedTuple):
    """weight float [B,S,S] in [0,1], 0 where the finding is not expected; replaced bool [B]: the place was unknown or
    empty, the part of the box stands in; region bool [B,S,S]: where figures say that the finding is expected, on either
    side: a weight of a half or more, before the sides differ.
    """

    weight: torch.Tensor
    replaced: torch.Tensor
    region: torch.Tensor


class Regions:
    """The rules of some findings as tables on a device: made once, used at every step.

    Args:
        names: of the findings that a batch's numbers refer to. One without a rule, as No Finding, has an empty region.
        rules: by finding.
        size: S, pixels of a side.
    """

    def __init__(
        self, names: Sequence[str], rules: Mapping[str, Rule], size: int, device: torch.device | str = "cpu"
    ) -> None:
        own = [rules.get(name, Rule()) for name in names]
        self.size, self.device = size, torch.device(device)
        self.parts = _Rectangles([_part(rule) for rule in own], size, self.device)
        self.each = _EachLung(own, size, self.device) if any(rule.each for rule in own) else None
        self.uses_lungs = any(rule.place for rule in own)
        # The different places of the findings, each with how many pixels wider than seen it is (a rim at least one),
        # and by finding its number.
        places = [(rule.place, max(round(rule.dilate * size), int(rule.place == "rim"))) for rule in own]
        self.places = [place for place in dict.fromkeys(places) if place[0]]
        self.place_of = torch.tensor(
            [self.places.index(place) if place[0] else -1 for place in places], device=self.device
        )
        self.has_place = torch.tensor([bool(rule.place) for rule in own], device=self.device)
        self.beyond = torch.tensor([rule.place == "outside" for rule in own], device=self.device)
        self.elsewhere = torch.tensor([rule.elsewhere for rule in own], device=self.device)
        self.sided = torch.tensor([rule.sided for rule in own], device=self.device)
        self.uses_sides = any(rule.sided for rule in own)
        self.box = _Rectangles([Rule(BOX)], size, self.device)

    def __call__(self, labels: torch.Tensor, boxes: torch.Tensor, lungs: torch.Tensor | None) -> Expected:
        """Where finding ``labels[b]`` is expected: labels int64 [B]; lungs bool [B,S,S], empty where there are none.

        ``lungs`` None: nobody knows them, and parts of the box stand in.
        """
        labels = upload(labels, self.device)
        parts = self.parts(labels, boxes)
        if not self.uses_lungs:
            return Expected(parts.float(), torch.zeros_like(labels, dtype=torch.bool), parts)
        has_place = self.has_place[labels]
        # Of a place inside the lung box its part of the box stands in, of one outside what its part has beyond the box.
        boxed = self.box(torch.zeros_like(labels), boxes)
        stand_in = (parts & (~has_place[:, None, None] | boxed ^ self.beyond[labels][:, None, None])).float()
        if lungs is None:
            return Expected(stand_in, has_place, stand_in > 0)
        side = left_side(lungs) if self.each is not None or self.uses_sides else None
        if self.each is not None and side is not None:
            parts = self.each(labels, lungs, side, parts)
        place = torch.zeros_like(parts)
        # Of all images: which ones have it, the host does not know
        for number, (name, reach) in enumerate(self.places):
            place |= _place(lungs, name, reach) & (self.place_of[labels] == number)[:, None, None]
        weight = place * torch.where(parts, 1.0, self.elsewhere[labels][:, None, None])
        gone = has_place & ~(lungs.flatten(1).any(1) & (weight > 0).flatten(1).any(1))
        taken = (has_place & ~gone)[:, None, None]
        region = torch.where(taken, weight, stand_in) >= 0.5
        if self.uses_sides and side is not None:
            weight = weight * smaller_side(lungs, side, self.sided[labels])
        return Expected(torch.where(taken, weight, stand_in), gone, region)


class _Rectangles:
    """Rules without a place as tables; called with labels [B] and boxes [B,4], gives bool [B,S,S]."""

    def __init__(self, rules: Sequence[Rule], size: int, device: torch.device) -> None:
        count = max([1, *(len(rule.rectangles) for rule in rules)])
        edges = torch.zeros(len(rules), count, 4, dtype=torch.float64)
        for k, rule in enumerate(rules):
            if rule.rectangles:
                edges[k, : len(rule.rectangles)] = torch.tensor(rule.rectangles, dtype=torch.float64)
        self.size = size
        self.edges = edges.to(device, torch.float32)  # exact for pixels, and MPS has no other
        self.outside = torch.tensor([rule.outside for rule in rules], device=device)

    def __call__(self, labels: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        origin, extent = (
            boxes[:, :2].repeat(1, 2)[:, None].float(),
            (boxes[:, 2:] - boxes[:, :2]).repeat(1, 2)[:, None].float(),
        )
        pixels = torch.round((origin + self.edges[labels] * extent).clamp(0, self.size))
        at = torch.arange(self.size, device=boxes.device)
        columns = (at >= pixels[..., 0, None]) & (at < pixels[..., 2, None])
        rows = (at >= pixels[..., 1, None]) & (at < pixels[..., 3, None])
        inside = (rows[..., :, None] & columns[..., None, :]).any(1)
        return inside ^ self.outside[labels][:, None, None]


class _EachLung:
    """Parts of each lung's own box: `Rule.each`. Called with labels [B], lungs bool [B,S,S], their `left_side` and the
    parts bool [B,S,S] of rules that have none, gives bool [B,S,S].
    """

    def __init__(self, rules: Sequence[Rule], size: int, device: torch.device) -> None:
        opened = [tuple(map(_open, rule.each)) for rule in rules]
        # The spine is on the right of the lung on the image's left
        mirrored = [tuple((1 - r[2], r[1], 1 - r[0], r[3]) for r in each) for each in opened]
        self.left, self.right = (
            _Rectangles([Rule(r, rule.outside) for r, rule in zip(each, rules, strict=True)], size, device)
            for each in (mirrored, opened)
        )
        self.has = torch.tensor([bool(rule.each) for rule in rules], device=device)

    def __call__(
        self, labels: torch.Tensor, lungs: torch.Tensor, left_columns: torch.Tensor, parts: torch.Tensor
    ) -> torch.Tensor:
        side = left_columns[:, None]
        left, right = self.left(labels, _box_of(lungs & side)), self.right(labels, _box_of(lungs & ~side))
        has = self.has[labels][:, None, None]
        return has & (side & left | ~side & right) | ~has & parts  # onnxruntime has no `where` of truth values


def _box_of(masks: torch.Tensor) -> torch.Tensor:
    """The box around each of masks bool [B,S,S]: int64 [B,4], zeros without any."""
    (x0, x1), (y0, y1) = ends(masks.any(1)), ends(masks.any(2))
    return torch.stack([x0, y0, x1, y1], 1)


def _part(rule: Rule) -> Rule:
    """The rectangles of a rule, or what they leave of its place: the whole box leaves all of it, and an edge on the
    box's edge cuts nothing inside it.
    """
    if not rule.place:
        return rule
    if rule.rectangles == BOX:
        return Rule(((-INF, -INF, INF, INF),), rule.outside)
    return Rule(rule.rectangles if rule.place == "outside" else tuple(map(_open, rule.rectangles)), rule.outside)


def _open(r: Rectangle) -> Rectangle:
    left, top, right, bottom = r
    return (
        -INF if left <= 0 else left,
        -INF if top <= 0 else top,
        INF if right >= 1 else right,
        INF if bottom >= 1 else bottom,
    )


def _place(lungs: torch.Tensor, name: str, reach: int) -> torch.Tensor:
    """One of `PLACES` of lungs bool [B,S,S], ``reach`` pixels wider than seen: bool [B,S,S]."""
    if name == "within":
        return wider(lungs, reach)
    if name == "outside":
        return ~wider(lungs | between(lungs), reach)
    if name == "rim":
        return wider(lungs, reach) & wider(~lungs, reach)
    return wider(between(lungs), reach)


def smaller_side(lungs: torch.Tensor, side: torch.Tensor, sided: torch.Tensor) -> torch.Tensor:
    """Weights of the two sides of lungs bool [B,S,S], whose `left_side` is ``side``, by `Rule.sided`, float [B]: float
    [B,1,S] in (0,1].
    """
    columns = lungs.sum(1).float()
    left, right = (columns * side).sum(1), (columns * ~side).sum(1)
    share = torch.sigmoid(sided * ((right - left) / (left + right).clamp(min=1) + HEART))
    of_column = torch.where(side, share[:, None], 1 - share[:, None])
    return (of_column / torch.maximum(share, 1 - share)[:, None])[:, None]


def left_side(lungs: torch.Tensor) -> torch.Tensor:
    """Which columns of lungs bool [B,S,S] are of the one on the image's left: bool [B,S].

    The lungs are parted at the emptiest column of the middle, as clean-up does.
    """
    columns = lungs.sum(1)
    at = torch.arange(lungs.shape[2], device=lungs.device)
    first, last = ends(columns > 0)
    middle = (at >= (first + 0.3 * (last - first))[:, None]) & (at < (first + 0.7 * (last - first))[:, None])
    return at < torch.where(middle, columns, lungs.shape[1] + 1).argmin(1, keepdim=True)


def between(lungs: torch.Tensor) -> torch.Tensor:
    """What has one lung to its left in its row and the other to its right, and is none: bool [B,S,S] -> bool [B,S,S].
    (The hollow of one lung's base is not between the two.)
    """
    side = left_side(lungs)
    one, other = (lungs & side[:, None]).float(), (lungs & ~side[:, None]).float()
    return ~lungs & (one.cumsum(2) > 0) & (other.flip(2).cumsum(2).flip(2) > 0)


def wider(masks: torch.Tensor, reach: int) -> torch.Tensor:
    """Masks bool [B,S,S], dilated by ``reach`` pixels to each side, corners included."""
    if reach == 0:
        return masks
    for dim in (1, 2):  # first down, then across; by running counts, whose cost does not grow with the reach
        count = masks.cumsum(dim, dtype=torch.float32)
        last = count.narrow(dim, -1, 1)
        count = torch.cat([torch.zeros_like(last)] * (reach + 1) + [count] + [last] * reach, dim)
        size = masks.shape[dim]
        masks = count.narrow(dim, 2 * reach + 1, size) > count.narrow(dim, 0, size)
    return masks


def finding_regions(
    boxes: torch.Tensor,
    findings: Sequence[str],
    size: int,
    rules: Mapping[str, Rule] = PUBLISHED,
    lungs: torch.Tensor | None = None,
) -> torch.Tensor:
    """The expected region of ``findings[b]``: boxes int64 [B,4] -> bool [B,size,size], true where its weight is a half
    or more.

    Empty for No Finding and for a finding without a rule. For Effusion as published, with y, h of the box: rows round(y
    + h/2) .. y+h.

    Args:
        rules: by finding; without it the three of Wu et al. (DMKD 2026).
        lungs: masks bool [B,size,size] for rules that follow the lungs' outline; without them, their part of the lung
            box stands in.
    """
    names = list(dict.fromkeys(findings))
    labels = torch.tensor([names.index(name) for name in findings], dtype=torch.int64)
    return Regions(names, rules, size, boxes.device)(labels, boxes, lungs).region


def has_region(region: torch.Tensor) -> torch.Tensor:
    """Which regions, bool or weights [B,S,S], say something about where to look: bool [B], false for nowhere and for
    everywhere (an image without lungs).
    """
    flat = region.flatten(1)
    return (flat > 0).any(1) & (flat < 1).any(1)
