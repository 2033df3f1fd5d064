"""timm backbone -> Prediction(logits, cam) in one forward. Hides layers, layouts and the double backward.

Legend: images float [B,1,S,S] in [0,1]; logits [B,K]; cam float [B,h,w], not negative, at least float32.

Grad-CAM (Selvaraju et al. 2017, eq. 1 and 2): the gradient of one class's logit with respect to a feature map A,
averaged over positions, weighs A's channels; ReLU of the weighted sum. It is taken inside the forward, where the
network runs in the launcher's precision, so it costs the gradient of the head alone and can itself be differentiated.
"""

import contextlib
import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from shards.errors import InputError, first_line
from trainer.backbone import create, head_names
from trainer.cam import fused, grad_cam, layer_cam, normalize_cam
from trainer.layers import INPUT, INSIDE, default_layer, evaluating, halves, is_square, split_names, to_maps, top_layers
from trainer.losses import at_least_float32
from trainer.weights import Trained

__all__ = ["FocusClassifier", "Prediction", "evaluating", "normalize_cam"]


class Prediction(NamedTuple):
    """logits [B,K]; cam [B,h,w] before normalisation (of M classes an image [B,M,h,w]), or None where none was asked
    for.
    """

    logits: torch.Tensor
    cam: torch.Tensor | None


class FocusClassifier(nn.Module):
    """A timm backbone that predicts and says where it looked.

    Args:
        backbone: pvt, vgg, resnet, or a timm model.
        classes: K.
        size: pixels of a side of the input, for backbones with a fixed one.
        pretrained: ``true`` (ImageNet weights from timm's hub), ``false``, or a file: safetensors or a state dict.
        layer: module whose output is A; several, separated by commas: their normalised maps together; ``input``: the
            energy of the input's gradient in place of a CAM (Ross et al., "Right for the right reasons", IJCAI 2017);
            empty: the last feature map that the prediction depends on.
        kind: ``gradcam``, or ``layercam``: see `trainer.cam.layer_cam`; its gradient counts as a constant, so that
            nothing is differentiated twice, which between the layers of a network is slow.
        fuse: of several layers, ``mean`` or ``product``.
        stride: pixels of the input a position of the last feature map, 8 or 16; 0: as the backbone has it (32).
        arguments: of timm's model.
        normal: mean and standard deviation of pixels; None: the backbone's own.
        now: what it is for: then of weights of a run of this trainer the head's rows are taken by finding.
        needs_map: without, a backbone that has no feature map is taken, too: `has_map` tells.

    Raises:
        InputError: unknown backbone (with the nearest), weights that cannot be had or do not fit, a layer that does not
            exist (with the model's layers), no feature map.
    """

    net: Any  # a timm model: forward_features, forward_head, pretrained_cfg
    mean: torch.Tensor
    std: torch.Tensor

    def __init__(
        self,
        backbone: str,
        classes: int,
        *,
        size: int = 224,
        pretrained: str = "true",
        layer: str = "",
        kind: str = "gradcam",
        fuse: str = "mean",
        stride: int = 0,
        arguments: Mapping[str, Any] | None = None,
        normal: tuple[float, float] | None = None,
        needs_map: bool = True,
        now: Trained | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.size = backbone, size
        self.options: dict[str, Any] = {"layer": layer, "kind": kind, "fuse": fuse, "stride": stride}
        self.options |= {"arguments": dict(arguments or {}), "normal": normal}
        self.kind, self.fuse = kind, fuse
        self.net, self.loaded = create(backbone, classes, size, pretrained, stride, arguments, now)
        self.layers = split_names(layer or default_layer(self.net))
        known = [name for name, _ in self.net.named_modules()]
        for name in self.layers:
            if name == INPUT and len(self.layers) > 1:
                raise InputError(
                    f"--attention.layer {layer}: {INPUT} is the gradient at the image and stands alone; leave the "
                    "others out, or it"
                )
            if name not in known and name != INPUT:
                close = difflib.get_close_matches(name, known, n=3)
                hint = f"; did you mean {' or '.join(close)}?" if close else "."
                raise InputError(
                    f"--attention.layer {name}: {backbone} has no such module{hint} It has "
                    f"{', '.join(top_layers(self.net))} and what is in them"
                )
        self.halves: tuple[Callable[..., Any], Callable[..., Any]] | None = None  # with `compile_body`: to the map, on
        self.map_side = 0  # positions of a side of the map
        self.keeps = False
        self.kept: list[
            torch.Tensor
        ] = []  # with ``keeps``: the last forward's feature maps, where the gradients of both losses meet
        config: dict[str, Any] = self.net.pretrained_cfg  # type: ignore[assignment]
        mean, std = ([value] * 3 for value in normal) if normal else (config["mean"], config["std"])
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.layout = torch.channels_last  # of tensors in memory
        self.to(memory_format=self.layout)
        with self._explained(f"at --size {size}"), torch.no_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            trial = torch.rand(1, 1, size, size)
            logits = self.eval()(trial).logits  # a wrong size shows here, not in the first step
            if not isinstance(logits, torch.Tensor) or logits.shape != (1, classes):
                raise InputError(
                    f"--backbone {backbone}: gives no logits of {classes} classes, so it is no classifier of this "
                    "kind; choose another"
                )
            with self._awake():
                self.has_map = self._find_map(trial, layer, needs_map)
        self.train()

    def compile_body(self) -> None:
        """From now on the network up to its map runs compiled; not head and CAM, where a gradient is differentiated.
        Weights keep their names.

        InputError: the map lies in the midst of the network; this machine cannot compile.
        """
        parts = halves(self.net, self.layers)
        if parts is None:
            raise InputError(
                f"--compile: the network is compiled up to its map, and {self.backbone}'s is taken in its midst, at "
                f"{','.join(self.layers)}; leave --attention.layer out, or --compile"
            )
        self.halves = torch.compile(parts[0]), parts[1]

    def untrained(self) -> "FocusClassifier":
        """The same network with random weights."""
        return FocusClassifier(self.backbone, self.net.num_classes, size=self.size, pretrained="false", **self.options)

    @contextlib.contextmanager
    def _awake(self) -> Iterator[None]:
        """Some heads begin with zeros, from which no gradient comes: meanwhile with random numbers in their place."""
        asleep = [
            p
            for name, p in self.net.named_parameters()
            if name.startswith(tuple(head_names(self.net))) and p.ndim > 1 and not p.any()
        ]
        for parameter in asleep:
            torch.nn.init.normal_(parameter)
        try:
            yield
        finally:
            for parameter in asleep:
                torch.nn.init.zeros_(parameter)

    def _find_map(self, trial: torch.Tensor, layer: str, needed: bool) -> bool:
        """Whether the layers give a map; without a named one, look for a layer that does."""
        try:
            cam = self(trial, cam=True).cam
            assert cam is not None
            if cam.shape[1] != cam.shape[2]:
                raise InputError(
                    f"--attention.layer {layer or ','.join(self.layers)}: its map has {cam.shape[1]} x {cam.shape[2]} "
                    "positions, and of a square image it must be square; choose another layer"
                )
            self.map_side = cam.shape[1]
            if layer or self._depends(trial):
                return True
            fallback = True  # a map, if one that says nothing yet
        except (InputError, RuntimeError, AttributeError, TypeError, IndexError, ValueError) as error:
            if layer and needed:
                raise error if isinstance(error, InputError) else RuntimeError(str(error)) from error
            fallback = False
        if layer:
            return False
        before = self.layers
        for name in self._candidates(trial):
            self.layers = [name]
            with contextlib.suppress(InputError, RuntimeError):
                cam = self(trial, cam=True).cam
                if cam is not None and cam.shape[1] == cam.shape[2] and self._depends(trial):
                    self.map_side = cam.shape[1]
                    return True
        self.layers = before
        if not fallback and needed:
            raise InputError(
                f"--backbone {self.backbone}: gives no feature map that a CAM could be taken from; name a layer that "
                "has one with --attention.layer, "
                "choose another backbone, or train by cross-entropy alone, which needs none: --balance.lam 1 "
                "--swap.probability 0"
            )
        return fallback

    def _depends(self, trial: torch.Tensor) -> bool:
        """Whether the prediction depends on the map: not on a class token alone, for one."""
        kept = self.keeps, self.kept
        self.keeps, self.kept = True, []
        try:
            with torch.enable_grad():
                logits, _ = self._logits_and_cam(((trial - self.mean) / self.std), None, True)
                gradients = torch.autograd.grad(logits.sum(), self.kept, allow_unused=True)
            return all(g is not None and bool(to_maps(g, self.net).any()) for g in gradients)
        finally:
            self.keeps, self.kept = kept

    def _candidates(self, trial: torch.Tensor) -> list[str]:
        """Modules whose output may be a map, the last that is run first, so that a block comes before what is in it."""
        run: list[str] = []

        def note(name: str) -> Callable[..., None]:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                if isinstance(output, torch.Tensor) and (output.ndim == 3 or (output.ndim == 4 and is_square(output))):
                    run.append(name)

            return hook

        handles = [module.register_forward_hook(note(name)) for name, module in self.net.named_modules() if name]
        try:
            self.net((trial - self.mean) / self.std)
        finally:
            for handle in handles:
                handle.remove()
        # What runs several times is a part that others share
        once = [name for name in reversed(run) if run.count(name) == 1]
        return [name for name in once if not INSIDE.search(name)] or once

    def try_step(self, size: int, images: int, *, cam: bool, mode: str = "train") -> None:
        """One forward and backward in training, as many images as the smallest batch has; nothing of the model is
        changed.

        InputError: what the backbone cannot do, in one line.
        """
        before = {name: buffer.clone() for name, buffer in self.named_buffers()}
        device = self.mean.device
        try:
            with (
                self._explained(f"in training with {images} image{'s' if images > 1 else ''}"),
                torch.random.fork_rng(devices=[]),
            ):
                torch.manual_seed(0)
                logits, found = self.train()(
                    torch.rand(images, 1, size, size, device=device),
                    torch.zeros(images, dtype=torch.int64, device=device),
                    cam=cam,
                    mode=mode,
                )
                (logits.float().square().mean() + (0 if found is None else found.mean())).backward()
        except InputError as error:
            if images == 1 and "more than 1 value per channel" in str(error):
                raise InputError(
                    f"--backbone {self.backbone}: normalises over the images of a batch, and the smallest one of an "
                    "epoch has a single image; "
                    "choose another --batch or number of processes"
                ) from error
            raise
        finally:
            with torch.no_grad():
                for name, buffer in self.named_buffers():
                    buffer.copy_(before[name])
            self.zero_grad(set_to_none=True)
            self.kept = []

    @contextlib.contextmanager
    def _explained(self, where: str) -> Iterator[None]:
        """Whatever a backbone raises where it is tried, as one line."""
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # timm's models raise many kinds
            why = first_line(error)
            raise InputError(f"--backbone {self.backbone} does not work {where}: {why}") from error

    def forward(
        self,
        images: torch.Tensor,
        classes: torch.Tensor | None = None,
        *,
        cam: bool = False,
        mode: str = "train",
        differentiable: bool = True,
    ) -> Prediction:
        """Logits, and with ``cam`` the Grad-CAM of ``classes`` (int64 [B], or M of each image [B,M]; None: the
        predicted ones).

        Args:
            images: float [B,1,S,S] in [0,1].
            mode: ``train``: the CAM of this very forward; ``eval``: of a second forward in eval mode, as published.
            differentiable: whether the CAM carries a gradient. Under no_grad it never does, and only the head keeps a
                graph.
        """
        x = ((images - self.mean) / self.std).contiguous(memory_format=self.layout)
        if not cam:
            return Prediction(self._run(x, lambda features: features) if self.halves else self.net(x), None)
        differentiable = differentiable and torch.is_grad_enabled()
        if mode == "eval" and self.training:
            logits = self(images).logits
            with evaluating(self.net), contextlib.nullcontext() if differentiable else torch.no_grad():
                _, raw = self._logits_and_cam(x, logits.argmax(1) if classes is None else classes, differentiable)
            return Prediction(logits, raw)
        return Prediction(*self._logits_and_cam(x, classes, differentiable))

    def _logits_and_cam(
        self, x: torch.Tensor, classes: torch.Tensor | None, differentiable: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One forward. The network runs up to the feature map A as it would anyway; A is kept; what follows A, the
        head, has a graph in any case, so that the score has a gradient at A. In evaluation nothing before A has one.
        """
        kept: list[torch.Tensor] = []  # A, of each layer
        had_graph = torch.is_grad_enabled()
        behind = contextlib.ExitStack()  # what holds from A to the logits

        def start_graph_here(features: torch.Tensor) -> torch.Tensor:
            """Called by the network's own forward, with A on its way to the head."""
            if not isinstance(features, torch.Tensor):
                raise InputError(
                    f"--backbone {self.backbone}: gives several outputs where its feature map is looked for; name a "
                    "layer with --attention.layer"
                )
            if not kept:  # fused attention has no second derivative
                behind.enter_context(sdpa_kernel(SDPBackend.MATH))
            if not had_graph and not kept:  # A becomes a leaf; `set_grad_enabled` below takes this back
                torch.set_grad_enabled(True)
                features = features.detach().requires_grad_()
            kept.append(features)
            return features.clone()  # an in-place ReLU may follow (VGG) and must not change what is kept

        with torch.set_grad_enabled(had_graph), behind:
            logits = self._run(x, start_graph_here)
            if len(kept) < max(1, len(self.layers)):
                raise InputError(
                    f"--attention.layer {','.join(self.layers)}: is not run in the forward, so there is nothing to "
                    "see; choose another layer"
                )
            if classes is None:
                classes = logits.argmax(1)
            several = classes.ndim == 2
            # Of each class the gradients at A: the head runs backward once for each.
            gradients = [
                torch.autograd.grad(
                    logits.gather(1, column[:, None]).sum(),
                    kept,
                    create_graph=differentiable and self.kind == "gradcam",
                    retain_graph=True,
                    allow_unused=True,
                )
                for column in (classes.unbind(1) if several else [classes])
            ]
            if any(gradient is None for of_class in gradients for gradient in of_class):
                raise InputError(
                    f"--backbone {self.backbone}: its prediction does not depend on "
                    f"{','.join(self.layers) or 'its features'}; choose another layer"
                )
        self.kept = kept if self.keeps and differentiable else []
        maps = [self._map(kept, of_class, differentiable) for of_class in gradients]
        return (logits if had_graph else logits.detach()), torch.stack(maps, 1) if several else maps[0]

    def _map(
        self, kept: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor], differentiable: bool
    ) -> torch.Tensor:
        """The map of a class, of feature maps and the gradients there: [B,h,w]."""
        maps = []
        for features, gradient in zip(kept, gradients, strict=True):
            if self.layers == [INPUT]:
                energy = at_least_float32(gradient).square().sum(1)
                # Tiny numbers, which are no sign of a dead map
                maps.append(energy / energy.detach().amax((1, 2), keepdim=True).clamp(min=1e-30))
                continue
            features = features if differentiable else features.detach()
            take = grad_cam if self.kind == "gradcam" else layer_cam
            maps.append(take(to_maps(features, self.net), to_maps(gradient, self.net)))
        return maps[0] if len(maps) == 1 else fused(maps, self.fuse)

    def _run(self, x: torch.Tensor, at_map: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Logits; ``at_map`` is given each feature map on its way, and gives what the network goes on with."""
        if self.halves is not None:
            body, head = self.halves
            return head(at_map(body(x)))
        if not self.layers:
            return self.net.forward_head(at_map(self.net.forward_features(x)))
        if self.layers == [INPUT]:
            return self.net(at_map(x.requires_grad_()))
        modules = [self.net.get_submodule(name) for name in self.layers]
        handles = [module.register_forward_hook(lambda _module, _inputs, output: at_map(output)) for module in modules]
        try:
            return self.net(x)
        finally:
            for handle in handles:
                handle.remove()
