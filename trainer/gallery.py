"""The images that a report shows one by one: which, and what is drawn over each.

Maps, outlines and regions are pictures of their own, so that a page can switch them: small ones, which a browser draws
larger.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import matplotlib
import numpy as np
import torch
from PIL import Image

from shards.pixels import encode_image
from shards.sample import NO_FINDING
from shards.targets import ABSENT, PRESENT
from trainer.cam import normalize_cam
from trainer.classifier import evaluating
from trainer.drawing import LESION, LUNGS, REGION, edge, rgb
from trainer.groups import limits_of
from trainer.look import energies_of, look, regions_of
from trainer.measure import Evaluator
from trainer.metrics import LOCALIZATION
from trainer.outcome import Outcome
from trainer.regions.lesions import LesionRegions
from trainer.task import Point

MOST = 200  # images
BUDGET = 10 * 2**20  # bytes of pictures; written as text they are a third more
WRONG = 0.6  # at most so many of them are those that the model gets wrong
# Pixels of a side of an image, of the outlines and of the maps over it: of these enough to be smooth on paper, too
SIDE, LINES, HEAT = 384, 192, 56
OF_ALL = 4  # findings: with more than these an image has the maps of those alone that are there or named
BATCH = 16
TIE = 1e-12


@dataclass(frozen=True)
class Shown:
    """An image of the gallery.

    Attributes:
        present, unknown, predicted: names of findings; of one finding an image the class is present.
        wrong: those that the model gets wrong; missed ones are present, false ones are not.
        probability: of each finding; limits: their thresholds; dead: findings whose map is zero everywhere.
        sure: how far the worst of its findings is on the wrong side of its threshold, below 0 if all are right.
        judged: whether any of its findings is known and has a threshold.
        energy: of each finding with a map the share of it in the expected region; None where there is none.
        image: JPEG; cams, regions, lesions: PNGs to be laid over it, by finding; lungs: one; box: x0 y0 x1 y1 of the
            lungs in shares of its sides.
    """

    key: str
    present: list[str]
    unknown: list[str]
    predicted: list[str]
    wrong: list[str]
    probability: dict[str, float]
    sure: float
    energy: dict[str, float | None]
    judged: bool
    image: bytes
    lungs: bytes | None = None
    box: tuple[float, ...] | None = None
    limits: dict[str, float | None] = field(default_factory=dict)
    dead: list[str] = field(default_factory=list)
    cams: dict[str, bytes] = field(default_factory=dict)
    regions: dict[str, bytes] = field(default_factory=dict)
    lesions: dict[str, bytes] = field(default_factory=dict)

    @property
    def lead(self) -> str:
        """The finding whose map is shown first: what the image has, or what it is taken for; nothing, without maps."""
        names = [name for name in (*self.present, *self.predicted) if name != NO_FINDING]
        return next((name for name in (*names, *self.cams) if name in self.cams), "")

    @property
    def listed(self) -> list[str]:
        """The findings whose figures stand below it: all where there are few, else those that are there or named, and
        the most probable one.
        """
        names = list(self.probability)
        if len(names) <= OF_ALL:
            return names
        first = max(names, key=lambda name: self.probability[name])
        return [name for name in names if name in self.present or name in self.predicted or name == first]

    @property
    def weight(self) -> int:
        """Bytes of its pictures."""
        of = [self.image, self.lungs or b"", *self.cams.values(), *self.regions.values(), *self.lesions.values()]
        return sum(map(len, of))

    @property
    def attended(self) -> float | None:
        """The mean energy of the findings that are there; None where none has a region."""
        known = [e for name in self.present if (e := self.energy.get(name)) is not None]
        return sum(known) / len(known) if known else None


def gallery(evaluator: Evaluator, name: str, outcome: Outcome, point: Point) -> list[Shown]:
    """Up to 200 images of a split, as far as their pictures are not too large for a page: `interesting` ones."""
    chosen, shown, weight = interesting(outcome, point), list[Shown](), 0
    batch, far = min(BATCH, evaluator.batch), margins(outcome, point)
    for begin in range(0, len(chosen), batch):
        for one in _shown(evaluator, name, outcome, point, far, chosen[begin : begin + batch]):
            weight += one.weight
            if weight > BUDGET:
                return shown
            shown.append(one)
    return shown


def margins(outcome: Outcome, point: Point) -> np.ndarray:
    """How far each cell is on the wrong side of its threshold, below 0 where it is right: float [N,K]; NaN where it is
    unknown or has no threshold. Of one finding an image: of the class that it has, behind the one that is predicted.
    """
    task, target = outcome.task, outcome.target.numpy()
    probability = task.probabilities(outcome.logits).numpy()
    if not task.several:
        own = np.where(target == PRESENT, probability, -np.inf).max(1)
        other = np.where(target == PRESENT, -np.inf, probability).max(1)
        right = task.predicted(outcome.logits).numpy() == target.argmax(1)
        far = np.where(right, np.minimum(other - own, -TIE), np.maximum(other - own, TIE))
        return np.where(target == PRESENT, far[:, None], np.nan)
    limits = limits_of(task.findings, point)
    limit = np.array([np.nan if (at := limits.get(name)) is None else at for name in task.findings])
    far = np.where(target == PRESENT, limit - probability, probability - limit + TIE)  # at its threshold it is named
    return np.where(target >= ABSENT, far, np.nan)


def interesting(outcome: Outcome, point: Point, most: int = MOST) -> list[int]:
    """Positions of images: those that the model gets wrong, the surest first, up to 60 of 100; then, of those that it
    gets right, those whose maps are least in their regions, and as many others, evenly from all.
    """
    far = margins(outcome, point)
    known = ~np.isnan(far).all(1)
    worst = np.where(known, np.nanmax(np.where(np.isnan(far), -np.inf, far), axis=1), -np.inf)
    count = len(worst)
    wrong = [int(i) for i in np.argsort(-worst, kind="stable") if worst[i] > 0]
    if count <= most:
        right = [i for i in range(count) if worst[i] <= 0]
        return [*wrong, *right]
    taken = wrong[: int(WRONG * most)]
    energy = np.full(count, np.nan)
    of_pair = outcome.expected[:, LOCALIZATION.index("energy")].numpy()
    there = ~np.isnan(of_pair)
    np.fmin.at(energy, outcome.pairs.image.numpy()[there], of_pair[there])
    low = [int(i) for i in np.argsort(energy, kind="stable") if worst[i] <= 0 and not np.isnan(energy[i])]
    left = most - len(taken)
    taken += low[: left // 2]
    others = sorted(set(np.flatnonzero(worst <= 0).tolist()) - set(taken))
    left = min(most - len(taken), len(others))
    return [*taken, *(others[int(k)] for k in np.linspace(0, len(others) - 1, left).round())]


def _shown(
    evaluator: Evaluator, name: str, outcome: Outcome, point: Point, margin: np.ndarray, positions: Sequence[int]
) -> list[Shown]:
    split, task, device = evaluator.splits[name], outcome.task, evaluator.accelerator.device
    index, findings = torch.tensor(positions), task.findings
    every = torch.arange(len(findings), device=device).expand(len(index), -1)
    stored = [split.image(p) for p in positions]
    raw = torch.from_numpy(np.stack(stored))[:, None].to(device)
    places, lungs = evaluator.regions(split), evaluator.lungs.get(name)
    lesions = LesionRegions(split, exact=True)
    with evaluating(evaluator.model):
        seen = look(evaluator.accelerator, evaluator.model, raw, index, every, lungs, places, index * 0)
    far = margin[positions]
    named = task.named(outcome.logits[index], point)
    probability = task.probabilities(outcome.logits[index]).tolist()
    regions = regions_of(seen, findings, evaluator.rules, places)
    energies = energies_of(seen.cam, regions, findings)
    maps = None
    if seen.raw_cam is not None:
        maps = normalize_cam(seen.raw_cam.flatten(0, 1), HEAT).reshape(len(index), -1, HEAT, HEAT).cpu().numpy()
    limits = limits_of(findings, point)
    result = []
    for b, position in enumerate(positions):
        states, found = outcome.target[position].tolist(), bool(seen.found[b])
        present = [n for n, state in zip(findings, states, strict=True) if state == PRESENT]
        mapped = [n for n in findings if len(findings) <= OF_ALL or n in present or n in named[b]]
        result.append(
            Shown(
                key=split.key(position),
                present=present,
                unknown=[n for n, state in zip(findings, states, strict=True) if state < ABSENT],
                predicted=named[b],
                wrong=[n for n, by in zip(findings, far[b], strict=True) if by > 0],
                probability=dict(zip(findings, probability[b], strict=True)),
                sure=float(np.nanmax(far[b])) if not np.isnan(far[b]).all() else 0.0,
                energy={n: energies[n][b] for n in mapped if n in energies},
                judged=not bool(np.isnan(far[b]).all()),
                image=_jpeg(stored[b]),
                limits=limits if task.several else {},
                dead=[n for n in mapped if maps is not None and not maps[b, findings.index(n)].any()],
                lungs=_outline(seen.lungs[b], LUNGS) if seen.lungs is not None and found else None,
                box=tuple((seen.boxes[b] / evaluator.size).tolist()) if seen.boxes is not None and found else None,
                cams={n: _heat(maps[b, findings.index(n)]) for n in mapped} if maps is not None else {},
                regions={n: _outline(regions[n][b], REGION) for n in mapped if found and n in regions},
                lesions=_lesions(lesions, position, {n: findings.index(n) for n in present}, raw.shape[-2:]),
            )
        )
    return result


def _lesions(
    drawn: LesionRegions, position: int, findings: Mapping[str, int], stored: tuple[int, ...]
) -> dict[str, bytes]:
    """The outlines of the known lesions of an image, by finding."""
    outlines = {}
    for name, k in findings.items():
        mask = drawn.regions(torch.tensor([position]), torch.tensor([k]), (stored[0], stored[1]), LINES)[0]
        if mask.any():
            outlines[name] = _outline(mask, LESION)
    return outlines


def _jpeg(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.LANCZOS).save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def _heat(cam: np.ndarray) -> bytes:
    """A map [h,w] in [0,1] as colours that cover the more the larger it is."""
    colours = matplotlib.colormaps["inferno"](cam)
    colours[..., 3] = cam
    return encode_image((colours * 255).round().astype(np.uint8), "png")


def _outline(mask: torch.Tensor, colour: str) -> bytes:
    """The edge of a mask bool [S,S]."""
    small = np.asarray(Image.fromarray(mask.cpu().numpy()).resize((LINES, LINES), Image.Resampling.NEAREST))
    lines = np.zeros((LINES, LINES, 4), np.uint8)
    lines[edge(small, 1)] = [*rgb(colour), 255]
    return encode_image(lines, "png")
