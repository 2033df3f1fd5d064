"""timm backbone -> Prediction(logits, cam) in one forward. Hides layers, layouts and the double backward.

Legend: images float [B,1,S,S] in [0,1]; logits [B,K]; cam float [B,h,w], not negative, at least float32.

Grad-CAM (Selvaraju et al. 2017, eq. 1 and 2): the gradient of one class's logit with respect to a feature map A, averaged
over positions, weighs A's channels; ReLU of the weighted sum. It is taken inside the forward, where the network runs in
the launcher's precision, so it costs the gradient of the head alone and can itself be differentiated.
"""

import contextlib
import difflib
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import huggingface_hub.constants
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from shards.errors import InputError, listed
from trainer.losses import TINY, at_least_float32

PUBLISHED = {"pvt": "pvt_v2_b2_li", "vgg": "vgg16", "resnet": "resnet50"}
HUB_SECONDS = 5.0
INPUT = "input"


class Prediction(NamedTuple):
    """logits [B,K]; cam [B,h,w] before normalisation, or None where none was asked for."""

    logits: torch.Tensor
    cam: torch.Tensor | None


class FocusClassifier(nn.Module):
    """A timm backbone that predicts and says where it looked.

    Args:
        backbone: pvt, vgg, resnet, or a timm model.
        classes: K.
        size: pixels of a side of the input, for backbones with a fixed one.
        pretrained: ``true`` (ImageNet weights from timm's hub), ``false``, or a file: safetensors or a state dict.
        layer: module whose output is A; several, separated by commas: the mean of their normalised maps; ``input``: the energy of
            the input's gradient in place of a CAM (Ross et al., "Right for the right reasons", IJCAI 2017); empty: the last feature map.

    Raises:
        InputError: unknown backbone (with the nearest), weights that cannot be had or do not fit, a layer that does not exist
            (with the model's layers).
    """

    net: Any  # a timm model: forward_features, forward_head, pretrained_cfg
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, backbone: str, classes: int, *, size: int = 224, pretrained: str = "true", layer: str = "") -> None:
        super().__init__()
        self.net = _create(PUBLISHED.get(backbone, backbone), classes, size, pretrained)
        self.layers = [name.strip() for name in (layer or default_layer(self.net)).split(",") if name.strip()]
        known = [name for name, _ in self.net.named_modules()]
        for name in self.layers:
            if name == INPUT and len(self.layers) > 1:
                raise InputError(f"--attention.layer {layer}: {INPUT} is the gradient at the image and stands alone; leave the others out, or it")
            if name not in known and name != INPUT:
                close = difflib.get_close_matches(name, known, n=3)
                hint = f"; did you mean {' or '.join(close)}?" if close else "."
                raise InputError(f"--attention.layer {name}: {backbone} has no such module{hint} It has {', '.join(_layers(self.net))} and what is in them")
        self.keeps = False
        self.kept: list[torch.Tensor] = []  # with ``keeps``: the last forward's feature maps, where the gradients of both losses meet
        config: dict[str, Any] = self.net.pretrained_cfg  # type: ignore[assignment]
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1), persistent=False)
        self.to(memory_format=torch.channels_last)
        try:  # a wrong size or a layer without a map shows here, not in the first step
            with torch.no_grad():
                self.eval()(torch.zeros(1, 1, size, size), cam=True)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"--backbone {backbone} does not work at --size {size}: {str(error).splitlines()[0]}") from error
        self.train()

    def forward(
        self, images: torch.Tensor, classes: torch.Tensor | None = None, *, cam: bool = False, mode: str = "train", differentiable: bool = True
    ) -> Prediction:
        """Logits, and with ``cam`` the Grad-CAM of ``classes`` (int64 [B]; None: the predicted ones).

        Args:
            images: float [B,1,S,S] in [0,1].
            mode: ``train``: the CAM of this very forward; ``eval``: of a second forward in eval mode, as published.
            differentiable: whether the CAM carries a gradient. Under no_grad it never does, and only the head keeps a graph.
        """
        x = ((images - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        if not cam:
            return Prediction(self.net(x), None)
        differentiable = differentiable and torch.is_grad_enabled()
        if mode == "eval" and self.training:
            logits = self.net(x)
            with evaluating(self.net), contextlib.nullcontext() if differentiable else torch.no_grad():
                _, raw = self._logits_and_cam(x, logits.argmax(1) if classes is None else classes, differentiable)
            return Prediction(logits, raw)
        return Prediction(*self._logits_and_cam(x, classes, differentiable))

    def _logits_and_cam(self, x: torch.Tensor, classes: torch.Tensor | None, differentiable: bool) -> tuple[torch.Tensor, torch.Tensor]:
        kept: list[torch.Tensor] = []
        had_graph = torch.is_grad_enabled()

        def keep(features: torch.Tensor) -> torch.Tensor:
            if not had_graph and not kept:  # from here on a graph is needed, for what follows alone
                torch.set_grad_enabled(True)
                features = features.detach().requires_grad_()
            kept.append(features)
            return features.clone()  # an in-place ReLU may follow (VGG) and must not change what is kept

        # Fused attention has no second derivative; it matters only for layers before an attention block.
        with torch.set_grad_enabled(had_graph), sdpa_kernel(SDPBackend.MATH) if self.layers else contextlib.nullcontext():
            logits = self._run(x, keep)
            if len(kept) < max(1, len(self.layers)):
                raise InputError(f"--attention.layer {','.join(self.layers)}: is not run in the forward, so there is nothing to see; choose another layer")
            if classes is None:
                classes = logits.argmax(1)
            score = logits.gather(1, classes[:, None]).sum()
            gradients = torch.autograd.grad(score, kept, create_graph=differentiable, retain_graph=True)
        self.kept = kept if self.keeps and differentiable else []
        maps = []
        for features, gradient in zip(kept, gradients, strict=True):
            if self.layers == [INPUT]:
                energy = at_least_float32(gradient).square().sum(1)
                maps.append(energy / energy.detach().amax((1, 2), keepdim=True).clamp(min=1e-30))  # tiny numbers, which are no sign of a dead map
                continue
            features = features if differentiable else features.detach()
            maps.append(grad_cam(_to_maps(features, self.net), _to_maps(gradient, self.net)))
        return (logits if had_graph else logits.detach()), maps[0] if len(maps) == 1 else _mean_map(maps)

    def _run(self, x: torch.Tensor, keep: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        if not self.layers:
            return self.net.forward_head(keep(self.net.forward_features(x)))
        if self.layers == [INPUT]:
            return self.net(keep(x.requires_grad_()))
        modules = [self.net.get_submodule(name) for name in self.layers]
        handles = [module.register_forward_hook(lambda _module, _inputs, output: keep(output)) for module in modules]
        try:
            return self.net(x)
        finally:
            for handle in handles:
                handle.remove()


def grad_cam(features: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Selvaraju et al. 2017, eq. 1 and 2: features, gradient [B,C,h,w] -> [B,h,w], not negative, at least float32."""
    features, gradient = at_least_float32(features), at_least_float32(gradient)
    with torch.autocast(features.device.type, enabled=False):
        return F.relu((features * gradient.mean((2, 3), keepdim=True)).sum(1))


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


def _mean_map(maps: list[torch.Tensor]) -> torch.Tensor:
    """The mean of maps [B,h,w] of several sizes, each normalised to [0,1], at the size of the largest."""
    return torch.stack([normalize_cam(m, max(m.shape[1] for m in maps)) for m in maps]).mean(0)


def default_layer(net: nn.Module) -> str:
    """The published layer of a family, or empty for whatever ``forward_features`` gives."""
    if type(net).__name__ == "VGG":  # the last convolution, before its ReLU
        return [name for name, module in net.named_modules() if name.startswith("features.") and isinstance(module, nn.Conv2d)][-1]
    blocks = getattr(net, "blocks", None)
    if getattr(net, "global_pool", None) == "token" and isinstance(blocks, nn.Sequential) and hasattr(blocks[-1], "norm1"):
        # The class token alone is read: patches act on it last through this block's attention.
        return f"blocks.{len(blocks) - 1}.norm1"
    return ""


def _to_maps(x: torch.Tensor, net: nn.Module) -> torch.Tensor:
    """Features of any timm layout to [B,C,h,w]."""
    if x.ndim == 3:  # tokens
        prefix = int(getattr(net, "num_prefix_tokens", 0))
        h, w = getattr(getattr(net, "patch_embed", None), "grid_size", (0, 0))
        if h * w == x.shape[1] - prefix:
            return x[:, prefix:].transpose(1, 2).unflatten(2, (h, w))
    elif x.ndim == 4:
        return x.permute(0, 3, 1, 2) if getattr(net, "output_fmt", "NCHW") == "NHWC" else x
    raise InputError(f"--attention.layer: an output of shape {tuple(x.shape)} is not a feature map; choose another layer")


def _layers(net: nn.Module) -> list[str]:
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


def _create(name: str, classes: int, size: int, pretrained: str) -> nn.Module:
    bare, _, _ = name.partition(".")
    if bare not in timm.list_models():
        known = [*PUBLISHED, *timm.list_models()]
        close = difflib.get_close_matches(name, known, n=4, cutoff=0.4) or list(PUBLISHED)
        raise InputError(f"--backbone {name}: unknown; did you mean {', '.join(close)}? Any timm model will do: timm.list_models()")
    options: dict[str, Any] = {"num_classes": classes}
    cfg = timm.get_pretrained_cfg(bare)
    if cfg is not None and cfg.fixed_input_size:
        options["img_size"] = size
    try:
        if pretrained.lower() != "true":
            net = timm.create_model(name, pretrained=False, **options)
            return net if pretrained.lower() == "false" else _load_file(net, Path(pretrained))
        with _hub(), contextlib.redirect_stderr(None):
            return timm.create_model(name, pretrained=True, **options)
    except InputError:
        raise
    except Exception as error:  # every backend of the hub raises its own kinds
        if pretrained.lower() == "true":
            raise InputError(
                f"--backbone {name}: no ImageNet weights to be had ({type(error).__name__}: no network, or the hub has none). "
                "Give them as a file, --pretrained FILE (safetensors or a state dict), or train from scratch with --pretrained false"
            ) from error
        raise InputError(f"--backbone {name}: timm cannot build it at --size {size} ({str(error).splitlines()[0]})") from error


@contextlib.contextmanager
def _hub() -> Iterator[None]:
    """Ask the hub once, shortly, whether it is there; without it, only its cache is read, instead of a minute of retries."""
    constants = huggingface_hub.constants
    before = constants.HF_HUB_OFFLINE
    try:
        urllib.request.urlopen(urllib.request.Request(constants.ENDPOINT, method="HEAD"), timeout=HUB_SECONDS).close()
    except urllib.error.HTTPError:
        pass  # it answers
    except (OSError, ValueError):
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _load_file(net: nn.Module, path: Path) -> nn.Module:
    """Backbone weights from a file; the head is left out where its number of classes differs."""
    if not path.is_file():
        raise InputError(f"--pretrained {path}: no such file; expected true, false, or a file of weights (safetensors or a state dict)")
    try:
        if path.suffix == ".safetensors":
            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
            for wrapper in ("state_dict", "model"):
                state = state.get(wrapper, state) if isinstance(state.get(wrapper), dict) else state
        if not all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
            raise ValueError("not a state dict")
    except (SafetensorError, OSError, ValueError, AttributeError, RuntimeError, EOFError) as error:
        kind = type(error).__name__
        raise InputError(f"--pretrained {path}: not safetensors, nor a state dict that loads without executing code ({kind})") from error
    except Exception as error:  # pickle.UnpicklingError: weights_only refused something
        raise InputError(f"--pretrained {path}: holds more than tensors and was not executed; save its state_dict() alone") from error
    state = {name.removeprefix("module.").removeprefix("net."): tensor for name, tensor in state.items()}
    own = net.state_dict()
    head = {name for name in own if name.startswith(tuple(_head_names(net)))}
    fits = {name: tensor for name, tensor in state.items() if name in own and own[name].shape == tensor.shape}
    missing = [name for name in own if name not in fits and name not in head and not name.endswith("num_batches_tracked")]
    if missing:
        name = missing[0]
        got = tuple(state[name].shape) if name in state else "nothing"
        raise InputError(
            f"--pretrained {path}: {len(missing)} of {len(own)} tensors are missing or of another shape ({listed(missing, 3)}); "
            f"{name}: expected {tuple(own[name].shape)}, got {got}. Is it a file for this --backbone?"
        )
    net.load_state_dict(fits, strict=False)
    return net


def _head_names(net: nn.Module) -> list[str]:
    config: dict[str, Any] = net.pretrained_cfg  # type: ignore[assignment]
    names = config.get("classifier", "")
    return [f"{name}." for name in ([names] if isinstance(names, str) else names) if name]
