"""Making a timm backbone, with weights from the hub, from a file of any training program, or with none."""

import contextlib
import difflib
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import timm
import torch
from timm.models.vgg import ConvMlp
from torch import nn
from torch.nn import functional as F

from shards.errors import InputError, read_json
from trainer.weights import Trained, load_into

PUBLISHED = {"pvt": "pvt_v2_b2_li", "vgg": "vgg16", "resnet": "resnet50"}

HUB_SECONDS = 5.0

LOCAL, HUB = "local-dir:", ("hf-hub:", "hf_hub:")


class Covering(nn.Conv2d):
    """A convolution that is a matrix product where its kernel covers all of its input, as in VGG's head of 120 million
    weights: the same numbers, and what a CAM differentiates twice there takes a third of the time.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B,C,h,w] -> [B,D,1,1], or what a convolution gives where the input is larger."""
        if self.kernel_size != (x.shape[2], x.shape[3]):
            return super().forward(x)
        rows, weight = (t.permute(0, 2, 3, 1).flatten(1) for t in (x, self.weight))  # views where channels come last
        return F.linear(rows, weight, self.bias)[:, :, None, None]


def create(
    name: str,
    classes: int,
    size: int,
    pretrained: str,
    stride: int = 0,
    arguments: Mapping[str, Any] | None = None,
    now: Trained | None = None,
) -> tuple[nn.Module, str]:
    """The network, and what was loaded into it of a file, in words.

    Args:
        name: pvt, vgg, resnet, a timm model, hf-hub:USER/NAME, or local-dir:FOLDER with timm's config.json.
        classes: outputs of its head.
        size: pixels of a side of the input, for backbones with a fixed one.
        pretrained: ``true`` (weights from timm's hub, or of the local folder), ``false``, or a file: safetensors or a
            state dict.
        stride: pixels of the input a position of the last feature map, where timm has it; 0: the model's own.
        arguments: of timm's model.
        now: see `trainer.weights.load_into`.

    Raises:
        InputError: no such model, it has no such stride, it cannot be built at that size or with those arguments, its
            weights are not to be had or do not fit.
    """
    name = PUBLISHED.get(name, name)
    options: dict[str, Any] = {"num_classes": classes}
    said: dict[str, Any] = {}  # of a local folder: what its pixels are normalised by
    if name.startswith(LOCAL):
        folder = Path(name.removeprefix(LOCAL))
        name, options, said = _local(folder, options)
        pretrained = str(_weights_in(folder)) if pretrained.lower() == "true" else pretrained
    bare = name.partition(".")[0]
    if not name.startswith(HUB):
        if bare not in timm.list_models():
            known = [*PUBLISHED, *timm.list_models()]
            close = difflib.get_close_matches(name, known, n=4, cutoff=0.4) or list(PUBLISHED)
            raise InputError(
                f"--backbone {name}: unknown; did you mean {', '.join(close)}? Any timm model will do: "
                "timm.list_models()"
            )
        cfg = timm.get_pretrained_cfg(bare)
        if cfg is not None and cfg.fixed_input_size:
            options["img_size"] = size
    if stride:
        options["output_stride"] = stride
    options |= arguments or {}
    from_hub = pretrained.lower() == "true"
    try:
        with _hub() if from_hub or name.startswith(HUB) else contextlib.nullcontext(), contextlib.redirect_stderr(None):
            net: nn.Module = timm.create_model(name, pretrained=from_hub, **options)
    except Exception as error:  # every backend of the hub raises its own kinds
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if name.startswith(HUB):
            raise InputError(
                f"--backbone {name}: is not to be had from the hub ({type(error).__name__}: no network, or the hub has "
                "none). Download it and name its folder: --backbone local-dir:FOLDER"
            ) from error
        if stride and "output_stride" in str(error):
            raise InputError(
                f"--attention.stride {stride}: {name} has no other stride than its own ({why}); leave it out, or take "
                "a finer --attention.layer"
            ) from error
        for key in arguments or ():
            if f"'{key}'" in str(error):
                raise InputError(f"--backbone_args {key}: {name} has no such argument ({why})") from error
        if from_hub:
            raise InputError(
                f"--backbone {name}: no ImageNet weights to be had ({type(error).__name__}: no network, or the hub has "
                "none). "
                "Give them as a file, --pretrained FILE (safetensors or a state dict), or train from scratch with "
                "--pretrained false"
            ) from error
        raise InputError(f"--backbone {name}: timm cannot build it at --size {size} ({why})") from error
    for head in (module for module in net.modules() if isinstance(module, ConvMlp)):
        for conv in (head.fc1, head.fc2):
            conv.__class__ = Covering
    net.pretrained_cfg = {**net.pretrained_cfg, **said}  # type: ignore[dict-item, assignment]
    if from_hub or pretrained.lower() == "false":
        return net, ""
    architecture = str(net.pretrained_cfg.get("architecture") or bare)  # type: ignore[union-attr, operator]
    return net, load_into(net, architecture, tuple(head_names(net)), Path(pretrained), now)


def _local(folder: Path, options: dict[str, Any]) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """timm's name, the arguments and the normalisation of a folder as `timm.models.save_for_hf` writes it."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"--backbone {LOCAL}{folder}: has no config.json; name a folder as timm's hub models have it")
    content = read_json(path)
    arguments, cfg = (
        (content.get(key) or {} for key in ("model_args", "pretrained_cfg")) if isinstance(content, dict) else ({}, {})
    )
    if not isinstance(content, dict) or not isinstance(content.get("architecture"), str):
        raise InputError(f"{path}: names no architecture of timm; is it a model of another library?")
    numbers = {k: tuple(cfg[k]) for k in ("mean", "std") if isinstance(cfg, dict) and isinstance(cfg.get(k), list)}
    return content["architecture"], {**arguments, **options}, numbers


def _weights_in(folder: Path) -> Path:
    """The file of weights of a folder."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return folder / name
    raise InputError(
        f"--backbone {LOCAL}{folder}: has no model.safetensors; give weights with --pretrained FILE, or false"
    )


@contextlib.contextmanager
def _hub() -> Iterator[None]:
    """Ask the hub once, shortly, whether it is there; without it, only its cache is read, instead of a minute of
    retries.
    """
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


def head_names(net: nn.Module) -> list[str]:
    """Prefixes of the tensors of a network's head."""
    config: dict[str, Any] = net.pretrained_cfg  # type: ignore[assignment]
    names = config.get("classifier", "")
    return [f"{name}." for name in ([names] if isinstance(names, str) else names) if name]
