"""Which modules of a timm network have a map, and how what they give becomes one: [B,C,h,w]."""

import contextlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from shards.errors import InputError

INPUT = "input"

# Parts of blocks, whose outputs are no features of the network
INSIDE = re.compile(r"(attn|mlp|drop|crpe|cpe|act|qkv|proj|gate)", re.IGNORECASE)


def default_layer(net: nn.Module) -> str:
    """The published layer of a family, or empty for whatever ``forward_features`` gives."""
    if type(net).__name__ == "VGG":  # the last convolution, before its ReLU
        return [
            name
            for name, module in net.named_modules()
            if name.startswith("features.") and isinstance(module, nn.Conv2d)
        ][-1]
    blocks = getattr(net, "blocks", None)
    if (
        getattr(net, "global_pool", None) == "token"
        and isinstance(blocks, nn.Sequential)
        and hasattr(blocks[-1], "norm1")
    ):
        # The class token alone is read: patches act on it last through this block's attention.
        return f"blocks.{len(blocks) - 1}.norm1"
    return ""


def halves(net: Any, layers: Sequence[str]) -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """A network up to its map, and what follows the map; None where the map lies in its midst, other than VGG's."""
    if not layers:
        return net.forward_features, net.forward_head
    if type(net).__name__ == "VGG" and list(layers) == [default_layer(net)]:
        at = int(layers[0].rpartition(".")[2]) + 1
        rest = net.features[at:]
        return net.features[:at], lambda features: net.forward_head(rest(features))
    return None


def to_maps(x: torch.Tensor, net: nn.Module) -> torch.Tensor:
    """Features of any timm layout to [B,C,h,w]. Tokens [B,N,C] are a map where N, less a few that stand for the whole,
    is the grid's or a square.
    """
    if x.ndim == 3:
        declared = int(getattr(net, "num_prefix_tokens", 0))
        h, w = getattr(getattr(net, "patch_embed", None), "grid_size", None) or (0, 0)
        for prefix in dict.fromkeys((declared, 0, 1, 2)):
            count = x.shape[1] - prefix
            side = math.isqrt(max(count, 0))
            if count > 1 and h * w == count:
                return x[:, prefix:].transpose(1, 2).unflatten(2, (h, w))
            if count > 1 and side * side == count:
                return x[:, prefix:].transpose(1, 2).unflatten(2, (side, side))
    elif x.ndim == 4:
        last = getattr(net, "output_fmt", "NCHW") == "NHWC" or (
            x.shape[1] == x.shape[2] != x.shape[3] and x.shape[2] != 1
        )
        return x.permute(0, 3, 1, 2) if last else x
    raise InputError(
        f"--attention.layer: an output of shape {tuple(x.shape)} is not a feature map; choose another layer"
    )


def is_square(output: torch.Tensor) -> bool:
    """Whether [B,C,H,W] or [B,H,W,C] has H = W, as all maps of a square image have, and more than one position."""
    a, b, c = output.shape[1:]
    return (b == c and b > 1) or (a == b and a > 1)


def split_names(layers: str) -> list[str]:
    """``stages.2, stages.3`` -> its names."""
    return [name.strip() for name in layers.split(",") if name.strip()]


def top_layers(net: nn.Module) -> list[str]:
    """Two levels of modules, enough to choose from."""
    names = [name for name, _ in net.named_modules() if name and name.count(".") <= 1]
    return names if len(names) <= 40 else [name for name in names if "." not in name]


@contextlib.contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Eval mode, and afterwards each module in the mode it was in."""
    modes = [(module, module.training) for module in net.modules()]
    net.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
