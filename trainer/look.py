"""The way of an image: raw -> resized -> lungs -> expected region -> logits and CAM.

Evaluation, panels and predict go it with `look`. Training goes it with `locate`, and augments and swaps surroundings in
between (`Trainer.prepare`).

Legend: raw uint8 [B,1,H,W], as stored; images float [B,1,S,S] in [0,1]; boxes int64 [B,4]; lungs bool [B,S,S]; cam
float [B,S,S] in [0,1].
"""

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass

import torch

from trainer.augment import lung_masks, resize
from trainer.cam import normalize_cam
from trainer.classifier import FocusClassifier
from trainer.launching import Accelerator
from trainer.lungs import LungFinder
from trainer.regions import Expected, Regions, has_region


@dataclass
class Located:
    """A batch on the device with its lungs. boxes, outlines None: nobody looked; found bool [B] on the CPU: false where
    the whole image is the box.
    """

    images: torch.Tensor
    boxes: torch.Tensor | None
    outlines: torch.Tensor | None
    found: torch.Tensor

    @property
    def lungs(self) -> torch.Tensor | None:
        """Their masks, lung_masks anew each time."""
        if self.boxes is None or self.outlines is None:
            return None
        return lung_masks(self.outlines, self.boxes, (self.images.shape[-2], self.images.shape[-1]))


@dataclass
class Seen(Located):
    """What a model makes of a batch: expected is None without boxes; raw_cam [B,h,w] is as the model gives it."""

    expected: Expected | None
    logits: torch.Tensor
    cam: torch.Tensor | None
    raw_cam: torch.Tensor | None

    @property
    def region(self) -> torch.Tensor:
        """Where the finding is expected: bool [B,S,S], empty where nothing is expected."""
        return (
            self.expected.region if self.expected is not None else torch.zeros_like(self.images[:, 0], dtype=torch.bool)
        )


def locate(
    accelerator: Accelerator, raw: torch.Tensor, index: torch.Tensor, finder: LungFinder | None, size: int
) -> Located:
    """Resize a batch that is on the device, and find its lungs, once an image; ``index`` int64 [B] on the CPU:
    positions in the finder's split.
    """
    if finder is None:
        return Located(resize(raw, size), None, None, torch.zeros(len(raw), dtype=torch.bool))
    with accelerator.autocast():
        boxes, outlines, found = finder(raw, index)
    return Located(resize(raw, size), boxes, outlines, found)


@torch.no_grad()
def look(
    accelerator: Accelerator,
    model: FocusClassifier,
    raw: torch.Tensor,
    index: torch.Tensor,
    classes: torch.Tensor | None,
    finder: LungFinder | None,
    regions: Regions,
    expect: torch.Tensor | None,
    *,
    cam: bool = True,
    change: Callable[[Located], torch.Tensor] | None = None,
) -> Seen:
    """Run the model over a batch, in the launcher's precision.

    Args:
        raw: on the device; index: see `locate`.
        classes: int64 [B], whose CAM is taken, or M of each image [B,M]: then cam is [B,M,S,S]; None: the predicted
            ones.
        finder: None: nothing is known of a region.
        regions: where findings are expected.
        expect: int64 [B], the finding of ``regions`` that is expected; None: that whose CAM is taken, of one an image.
        cam: take CAMs, where the model has a map.
        change: what becomes of the images before the model sees them.
    """
    located = locate(accelerator, raw, index, finder, regions.size)
    images = located.images if change is None else change(located)
    with accelerator.autocast():
        logits, raw_cam = model(images, classes, cam=cam and model.has_map)
    expected = None
    if located.boxes is not None:
        expect = expect if expect is not None else classes if classes is not None else logits.argmax(1)
        expected = regions(expect, located.boxes, located.lungs if regions.uses_lungs else None)
    seen_cam = None
    if raw_cam is not None:
        side = (regions.size, regions.size)
        seen_cam = normalize_cam(raw_cam.flatten(0, -3), regions.size).reshape(*raw_cam.shape[:-2], *side)
    return Seen(images, located.boxes, located.outlines, located.found, expected, logits, seen_cam, raw_cam)


def regions_of(seen: Seen, findings: Sequence[str], rules: Container[str], regions: Regions) -> dict[str, torch.Tensor]:
    """Where each of the findings that have a rule is expected in a batch: bool [B,S,S] on the device, nowhere in an
    image without lungs; nothing where nobody looked for lungs.
    """
    if seen.boxes is None:
        return {}
    found = seen.found.to(seen.boxes.device)[:, None, None]
    of = {name: torch.full((len(found),), k) for k, name in enumerate(findings) if name in rules}
    return {name: regions(numbers, seen.boxes, seen.lungs).region & found for name, numbers in of.items()}


def energies_of(
    cam: torch.Tensor | None, places: Mapping[str, torch.Tensor], findings: Sequence[str]
) -> dict[str, list[float | None]]:
    """By finding the share of its CAM, of cam [B,K,S,S], in its place, bool [B,S,S]; nothing without CAMs."""
    return {n: energy_in(cam[:, findings.index(n)], at) for n, at in places.items()} if cam is not None else {}


def energy_in(cam: torch.Tensor, region: torch.Tensor) -> list[float | None]:
    """The shares of CAMs [B,S,S] in regions bool [B,S,S]; None where there is neither."""
    total, inside = cam.sum((1, 2)), (cam * region).sum((1, 2))
    known = (total > 0) & has_region(region)
    shares = (inside / total.clamp(min=1e-12)).tolist()
    return [round(share, 6) if there else None for share, there in zip(shares, known.tolist(), strict=True)]
