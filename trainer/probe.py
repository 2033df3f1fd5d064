"""What a model's figures are tested against: images without the region, or without all but it, and a network that knows
nothing.

Legend: images float [B,1,S,S] in [0,1]; region bool [B,S,S].
"""

from collections.abc import Collection, Sequence

import torch

from shards.sample import NO_FINDING
from trainer.classifier import FocusClassifier
from trainer.context import blend, kept_mask

SIGMA = 1 / 14  # of the blur, in shares of the side: 16 pixels at 224, wider than ribs and vessels
SEAM = 0.02  # width of the transition, in shares of the side


def blurred(images: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """Images, Gaussian-blurred where bool [B,S,S] says so, with a soft seam outside of that place."""
    size = images.shape[-1]
    at = torch.arange(size, device=images.device, dtype=torch.float32)
    taps = torch.exp(-0.5 * ((at[:, None] - at) / (SIGMA * size)) ** 2)
    taps = taps / taps.sum(1, keepdim=True)  # renormalised at the border
    with torch.autocast(images.device.type, enabled=False):
        smooth = taps @ images.float() @ taps.T
    soft = torch.where(where.flatten(1).any(1)[:, None, None], kept_mask(where, SEAM), 0.0)
    return blend(smooth, soft, images)


def probed(present: torch.Tensor, index: torch.Tensor, findings: Sequence[str], rules: Collection[str]) -> torch.Tensor:
    """Whose regions are blurred in each image: its own findings'; where it has none, that of one of the task's in turn,
    so that blur is no sign of disease.

    Args:
        present: bool [B,K], which of ``findings`` each image shows; index int64 [B]: its position, all on the CPU.
        rules: the findings that have a region.

    Returns:
        bool [B,K].
    """
    known = [k for k, name in enumerate(findings) if name in rules and name != NO_FINDING]
    whose = present & torch.tensor([name in rules for name in findings])
    if known:
        lacking = torch.nonzero(~whose.any(1)).flatten()
        whose[lacking, torch.tensor(known)[index[lacking] % len(known)]] = True
    return whose


def random_twin(model: FocusClassifier, seed: int) -> FocusClassifier:
    """The same network with the random weights that a training of ``seed`` could have started from, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        return model.untrained().eval()
