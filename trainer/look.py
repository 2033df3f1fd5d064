"""The way of an image, written once: raw -> resized -> lungs -> expected region -> logits and CAM. Training, evaluation, panels and predict go it.

Legend: raw uint8 [B,1,H,W], as stored; images float [B,1,S,S] in [0,1]; boxes int64 [B,4]; region bool [B,S,S]; cam float [B,S,S] in [0,1].
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from trainer.augment import resize
from trainer.classifier import FocusClassifier, normalize_cam
from trainer.launching import Accelerator
from trainer.lungs import LungBoxes
from trainer.regions import finding_regions
from trainer.rules import Rule


@dataclass
class Located:
    """A batch on the device with its lungs. boxes None: nobody looked; found bool [B] on the CPU: whether there are lungs, else the box is the whole image."""

    images: torch.Tensor
    boxes: torch.Tensor | None
    found: list[bool]


@dataclass
class Seen(Located):
    """What a model makes of a batch: region is empty without boxes and for findings without a rule; raw_cam [B,h,w] as the model gives it."""

    region: torch.Tensor
    logits: torch.Tensor
    cam: torch.Tensor | None
    raw_cam: torch.Tensor | None


def locate(accelerator: Accelerator, raw: torch.Tensor, index: torch.Tensor, lungs: LungBoxes | None, size: int) -> Located:
    """Resize a batch that is on the device, and find its lungs, once an image; ``index`` int64 [B] on the CPU: positions in ``lungs``."""
    with accelerator.autocast():
        boxes = lungs(raw, index) if lungs is not None else None
    return Located(resize(raw, size), boxes, lungs.found(index) if lungs is not None else [False] * len(raw))


@torch.no_grad()
def look(
    accelerator: Accelerator,
    model: FocusClassifier,
    raw: torch.Tensor,
    index: torch.Tensor,
    classes: torch.Tensor | None,
    names: Sequence[str] | None,
    lungs: LungBoxes | None,
    rules: Mapping[str, Rule],
    size: int,
    *,
    cam: bool = True,
    change: Callable[[Located], torch.Tensor] | None = None,
) -> Seen:
    """Run the model over a batch, in the launcher's precision.

    Args:
        raw: on the device; index: see `locate`.
        classes: int64 [B], whose CAM is taken; None: the predicted ones.
        names: the findings whose regions are expected; None: nothing is.
        lungs: None: nothing is known of a region.
        cam: take CAMs, where the model has a map.
        change: what becomes of the images before the model sees them.
    """
    located = locate(accelerator, raw, index, lungs, size)
    images = located.images if change is None else change(located)
    with accelerator.autocast():
        logits, found = model(images, classes, cam=cam and model.has_map)
    if located.boxes is not None and names is not None:
        region = finding_regions(located.boxes, names, size, rules)
    else:
        region = torch.zeros(len(raw), size, size, dtype=torch.bool, device=raw.device)
    return Seen(images, located.boxes, located.found, region, logits, None if found is None else normalize_cam(found, size), found)
