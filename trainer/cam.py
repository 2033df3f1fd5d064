"""Class activation maps of features and of the gradients of a class's score there.

Legend: features, gradient float [B,C,h,w]; maps float [B,h,w], not negative, at least float32.
"""

import torch
from torch.nn import functional as F

from trainer.losses import TINY, at_least_float32


def _rectified(scores: torch.Tensor) -> torch.Tensor:
    """ReLU, whose gradient reaches scores [B,h,w] that are negative everywhere, too, in units of their mean size: a map
    that is zero everywhere could never come back (`trainer.losses.revival`).
    """
    cam = F.relu(scores)
    if not scores.requires_grad:
        return cam
    size = scores.detach().abs().mean((1, 2), keepdim=True)
    dead = (scores.detach().amax((1, 2), keepdim=True) <= 0) & (size > TINY)
    return cam + torch.where(dead, (scores - scores.detach()) / size.clamp(min=TINY), 0)


def grad_cam(features: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Selvaraju et al. 2017, eq. 1 and 2: the mean of a channel's gradient weighs it; ReLU of the weighted sum."""
    features, gradient = at_least_float32(features), at_least_float32(gradient)
    with torch.autocast(features.device.type, enabled=False):
        return _rectified((features * gradient.mean((2, 3), keepdim=True)).sum(1))


def layer_cam(features: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """LayerCAM (Jiang et al., TIP 2021, eq. 6 and 7): the positive gradient at every place weighs what is there, not
    its mean, so that maps of earlier and finer layers mean something.
    """
    features, gradient = at_least_float32(features), at_least_float32(gradient)
    with torch.autocast(features.device.type, enabled=False):
        return _rectified((features * F.relu(gradient)).sum(1))


def normalize_cam(cam: torch.Tensor, size: int) -> torch.Tensor:
    """To [0,1] as published: minus the minimum, divided by (1e-7 + maximum), then bilinear to size x size.

    Args:
        cam: raw, not negative, [B,h,w], any float type; computed in at least float32.

    Returns:
        [B,size,size]. A constant map becomes 0 everywhere; a map whose peak is below 1e-6 carries no gradient.
    """
    cam = at_least_float32(cam)
    cam = cam - cam.amin((1, 2), keepdim=True)
    peak = cam.amax((1, 2), keepdim=True)
    cam = cam / (1e-7 + peak)
    alive = peak > TINY
    cam = torch.where(alive, cam, cam.detach())
    return F.interpolate(cam[:, None], (size, size), mode="bilinear", align_corners=False)[:, 0]


def fused(maps: list[torch.Tensor], how: str) -> torch.Tensor:
    """Maps of several sizes as one, at the size of the largest: each normalised to [0,1], then their ``mean`` or
    ``product``, in which the coarser says where, and the finer how far.
    """
    side = max(m.shape[1] for m in maps)
    together = torch.stack([normalize_cam(m, side) for m in maps])
    return together.mean(0) if how == "mean" else together.prod(0)
