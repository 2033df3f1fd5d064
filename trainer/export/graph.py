"""A run as one graph of tensors: from the packed square to probabilities, maps, lungs and regions, for ONNX.

A CAM is a gradient, which no exporter takes: the classifier is traced with the gradient inside, so that what is
exported is the head's backward written out.

Legend: squares uint8 [B,side,side]; S pixels of a side of the network's input; B images, K findings.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch._decomp import core_aten_decompositions
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from trainer.augment import lung_masks
from trainer.cam import normalize_cam
from trainer.classifier import FocusClassifier
from trainer.predictor import Predictor

# What the graph gives, in order; without lungs, or without a map, fewer
OUTPUTS = ("logits", "probability", "calibrated", "cam", "found", "lung_box", "lungs", "region")


class Graph(nn.Module):
    """A run's best model, as `torch.onnx.export` takes it.

    forward: squares uint8 [B,side,side] -> those of `OUTPUTS` that there are: logits, probability, calibrated float32
    [B,K] (calibrated: NaN where val could not tell); cam float32 [B,K,S,S] in [0,1]; found bool [B]; lung_box int64
    [B,4] x0 y0 x1 y1 in pixels of the network's input, ends exclusive; lungs bool [B,S,S]; region bool [B,R,S,S] of the
    findings ``regions``.
    """

    def __init__(self, cxr: Predictor) -> None:
        super().__init__()
        self.cxr, self.has_map = cxr, cxr.model.has_map
        self.segmenter = cxr.segmenter
        self.regions = [name for name in cxr.findings if name in cxr.rules] if cxr.segmenter is not None else []
        self.names = [name for name in OUTPUTS if self._gives(name)]
        self.shrink = nn.ParameterDict()
        for size in {cxr.size, *([self.segmenter.settings["size"]] if self.segmenter is not None else [])}:
            self.shrink[str(size)] = nn.Parameter(shrinking(cxr.side, size), requires_grad=False)
        self.classifier = traced(cxr.model, cxr.size)

    def _gives(self, name: str) -> bool:
        if name == "cam":
            return self.has_map
        if name == "region":
            return bool(self.regions)
        return self.segmenter is not None or name not in ("found", "lung_box", "lungs")

    def _shrunk(self, images: torch.Tensor, size: int) -> torch.Tensor:
        """`trainer.augment.resize`, as products of matrices."""
        if size == self.cxr.side:
            return images
        of = self.shrink[str(size)]
        return of @ images @ of.T

    def forward(self, squares: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See the class."""
        task, size = self.cxr.task, self.cxr.size
        images = squares[:, None].float() / 255
        seen = self.classifier(self._shrunk(images, size))
        logits = seen[0]
        of: dict[str, torch.Tensor] = {"logits": logits, "probability": task.probabilities(logits).float()}
        of["calibrated"] = task.calibrated(logits, self.cxr.calibration).float()
        if self.has_map:
            of["cam"] = seen[1]
        if self.segmenter is not None:
            boxes, outlines, found = self.segmenter.find(self._shrunk(images, self.segmenter.settings["size"]), size)
            lungs = lung_masks(outlines, boxes, (size, size))
            of |= {"found": found, "lung_box": boxes, "lungs": lungs}
            if self.regions:
                count, shape = len(self.regions), (images.shape[0], len(self.regions), size, size)
                numbers = torch.tensor([self.cxr.findings.index(name) for name in self.regions])
                every = lungs[:, None].expand(shape).reshape(-1, size, size)
                boxed = boxes[:, None].expand(-1, count, -1).reshape(-1, 4)
                region = self.cxr.regions(numbers.expand(images.shape[0], -1).reshape(-1), boxed, every).region
                of["region"] = region.view(shape) & found[:, None, None, None]
        return tuple(of[name] for name in self.names)


def shrinking(before: int, after: int) -> torch.Tensor:
    """The matrix float [after,before] of bilinear resampling with antialiasing, of one side."""
    rows = torch.eye(before)[None, None]
    return F.interpolate(rows, (after, before), mode="bilinear", antialias=True)[0, 0]


def traced(model: FocusClassifier, size: int) -> GraphModule:
    """A module: images float [B,1,S,S] -> logits [B,K], and where the model has a map the CAMs of all findings as
    `normalize_cam` gives them, [B,K,S,S]; for any B. The model is left as it is.
    """
    count = model.net.num_classes

    def seen(images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if not model.has_map:
            return (model(images).logits,)
        every = torch.arange(count).expand(images.shape[0], -1)
        logits, raw = model(images, every, cam=True, differentiable=False)
        assert raw is not None
        cam = normalize_cam(raw.flatten(0, 1), size)
        return logits, cam.view(images.shape[0], count, size, size)

    table: dict[Any, Callable[..., Any]] = dict(core_aten_decompositions())
    table[torch.ops.aten.convolution_backward.default] = convolution_backward
    with _contiguous(model), _PlainPooling():
        # Three: no number that occurs in a network's shape, nor one that a graph would be specialised for
        example = torch.rand(3, 1, size, size)
        return make_fx(seen, table, "symbolic", _allow_non_fake_inputs=True)(example)


@contextlib.contextmanager
def _contiguous(model: FocusClassifier) -> Iterator[None]:
    """Within the block the model's tensors are laid out plainly: the backward of others has no ONNX operator."""
    before = model.layout
    model.layout = torch.contiguous_format
    model.to(memory_format=torch.contiguous_format)
    try:
        yield
    finally:
        model.layout = before
        model.to(memory_format=before)


class _PlainPooling(TorchFunctionMode):
    """Pooling to one place as a mean; torch's own writes strides for tensors that lie channel by channel."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is F.adaptive_avg_pool2d and args[1] in (1, (1, 1), [1, 1]):
            return args[0].mean((-2, -1), keepdim=True)
        return func(*args, **(kwargs or {}))


def convolution_backward(
    gradient: torch.Tensor,
    images: torch.Tensor,
    weight: torch.Tensor,
    bias_sizes: Any,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    transposed: bool,
    output_padding: list[int],
    groups: int,
    mask: list[bool],
) -> tuple[torch.Tensor | None, None, None]:
    """The gradient with respect to the images alone, as a transposed convolution."""
    if transposed or mask[1] or mask[2]:
        raise NotImplementedError("only a convolution's gradient with respect to its input is exported")
    if not mask[0]:
        return None, None, None
    missing = []
    for k in (0, 1):
        reached = (gradient.shape[2 + k] - 1) * stride[k] - 2 * padding[k] + dilation[k] * (weight.shape[2 + k] - 1) + 1
        missing.append(images.shape[2 + k] - reached)
    return F.conv_transpose2d(gradient, weight, None, stride, padding, missing, groups, dilation), None, None
