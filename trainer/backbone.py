"""Making a timm backbone, and its weights: from the hub, from a file of any training program, or none."""

import argparse
import contextlib
import difflib
import pickle
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import numpy as np
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from shards.errors import InputError, listed

PUBLISHED = {"pvt": "pvt_v2_b2_li", "vgg": "vgg16", "resnet": "resnet50"}

HUB_SECONDS = 5.0


def create(name: str, classes: int, size: int, pretrained: str, stride: int = 0) -> tuple[nn.Module, str]:
    """The network, and what was loaded into it of a file, in words.

    Args:
        name: pvt, vgg, resnet, or a timm model.
        classes: outputs of its head.
        size: pixels of a side of the input, for backbones with a fixed one.
        pretrained: ``true`` (ImageNet weights from timm's hub), ``false``, or a file: safetensors or a state dict.
        stride: pixels of the input a position of the last feature map, where timm has it; 0: the model's own.

    Raises:
        InputError: no such model, it has no such stride, it cannot be built at that size, its weights are not to be had
            or do not fit.
    """
    name = PUBLISHED.get(name, name)
    bare, _, _ = name.partition(".")
    if bare not in timm.list_models():
        known = [*PUBLISHED, *timm.list_models()]
        close = difflib.get_close_matches(name, known, n=4, cutoff=0.4) or list(PUBLISHED)
        raise InputError(
            f"--backbone {name}: unknown; did you mean {', '.join(close)}? Any timm model will do: timm.list_models()"
        )
    options: dict[str, Any] = {"num_classes": classes}
    cfg = timm.get_pretrained_cfg(bare)
    if cfg is not None and cfg.fixed_input_size:
        options["img_size"] = size
    if stride:
        options["output_stride"] = stride
    try:
        if pretrained.lower() != "true":
            net = timm.create_model(name, pretrained=False, **options)
            return (net, "") if pretrained.lower() == "false" else (net, _load_file(net, Path(pretrained)))
        with _hub(), contextlib.redirect_stderr(None):
            return timm.create_model(name, pretrained=True, **options), ""
    except InputError:
        raise
    except Exception as error:  # every backend of the hub raises its own kinds
        if pretrained.lower() == "true":
            raise InputError(
                f"--backbone {name}: no ImageNet weights to be had ({type(error).__name__}: no network, or the hub has "
                "none). "
                "Give them as a file, --pretrained FILE (safetensors or a state dict), or train from scratch with "
                "--pretrained false"
            ) from error
        why = (str(error).splitlines() or [type(error).__name__])[0]
        if stride and "output_stride" in str(error):
            raise InputError(
                f"--attention.stride {stride}: {name} has no other stride than its own ({why}); leave it out, or take "
                "a finer --attention.layer"
            ) from error
        raise InputError(f"--backbone {name}: timm cannot build it at --size {size} ({why})") from error


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


# What training programs put weights under.
WRAPPERS = (
    "state_dict",
    "state_dict_ema",
    "model_state_dict",
    "model_ema",
    "ema",
    "model",
    "net",
    "network",
    "teacher",
    "student",
    "backbone",
    "encoder",
    "module",
    "weights",
)


def _load_file(net: nn.Module, path: Path) -> str:
    """Backbone weights from a file or a run folder; the head is left out where its number of classes differs. Returns
    what was loaded, in words.
    """
    if path.is_dir():
        if not (path / "model.safetensors").is_file():
            raise InputError(
                f"--pretrained {path}: is a folder without model.safetensors; name a finished run of this trainer, or "
                "a file of weights"
            )
        path = path / "model.safetensors"
    if not path.is_file():
        raise InputError(
            f"--pretrained {path}: no such file; expected true, false, a file of weights (safetensors or a state "
            "dict), or a run folder"
        )
    own = net.state_dict()
    found = _read_weights(path)
    # The prefix that training wrappers put before the names: the one that most tensors fit behind.
    prefixes = dict.fromkeys(
        ["", *(name[: at + 1] for name in found for at, letter in enumerate(name) if letter == ".")]
    )
    state: dict[str, torch.Tensor] = {}
    fits: dict[str, torch.Tensor] = {}
    for prefix in prefixes:
        behind = {
            name[len(prefix) :]: _three_channels(tensor, own.get(name[len(prefix) :]))
            for name, tensor in found.items()
            if name.startswith(prefix)
        }
        fitting = {name: tensor for name, tensor in behind.items() if name in own and own[name].shape == tensor.shape}
        if len(fitting) > len(fits) or not state:
            state, fits = behind, fitting
    head = {name for name in own if name.startswith(tuple(head_names(net)))}
    missing = [
        name for name in own if name not in fits and name not in head and not name.endswith("num_batches_tracked")
    ]
    if missing:
        name = missing[0]
        got = tuple(state[name].shape) if name in state else "nothing"
        raise InputError(
            f"--pretrained {path}: {len(missing)} of {len(own)} tensors are missing or of another shape "
            f"({listed(missing, 3)}); "
            f"{name}: expected {tuple(own[name].shape)}, got {got}. The file has {listed(found, 3)}. Is it a file for "
            "this --backbone?"
        )
    net.load_state_dict(fits, strict=False)
    left = [name for name in own if name not in fits and name in head]
    return f"--pretrained {path}: {len(fits)} of {len(own)} tensors are taken" + (
        f"; {listed(left)} begin anew" if left else ""
    )


def _three_channels(tensor: torch.Tensor, own: torch.Tensor | None) -> torch.Tensor:
    """Weights of a first layer for one channel, spread over three that hold the same image."""
    if (
        own is not None
        and tensor.ndim == 4
        and own.ndim == 4
        and tensor.shape[1] == 1
        and own.shape[1] == 3
        and tensor.shape[2:] == own.shape[2:]
    ):
        return tensor.expand(-1, 3, -1, -1) / 3
    return tensor


def _read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, by name, without executing anything in it."""
    with path.open("rb") as file:
        start = file.read(64)
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(
                f"--pretrained {path}: is no safetensors file ({str(error).splitlines()[0]}); is it whole?"
            ) from error
    if not start.startswith((b"PK\x03\x04", b"\x80")):
        raise InputError(
            f"--pretrained {path}: is no file of weights (it begins with {start[:20]!r}); expected safetensors or a "
            "state dict of torch.save"
        )
    scalar: Any = np.float64(0).__reduce__()[0]  # what rebuilds a number of numpy's
    numbers: list[Any] = [
        np.dtype,
        *(type(np.dtype(kind)) for kind in ("f8", "f4", "i8", "i4", "?")),
        (scalar, "numpy.core.multiarray.scalar"),
    ]
    try:
        # A checkpoint of timm's train.py holds its command line, others a number of numpy's: plain data, that execute
        # nothing.
        with torch.serialization.safe_globals([argparse.Namespace, scalar, *numbers]):
            state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        asked: list[str] = []
        with contextlib.suppress(Exception):
            asked = [
                name
                for name in torch.serialization.get_unsafe_globals_in_checkpoint(path)
                if name != "argparse.Namespace"
            ]
        if not asked:
            raise InputError(
                f"--pretrained {path}: is damaged, or no file of weights ({str(error).splitlines()[0][:120]})"
            ) from error
        raise InputError(
            f"--pretrained {path}: holds more than tensors ({listed(asked, 3)}) and was not executed; save its "
            "state_dict() alone"
        ) from error
    except Exception as error:  # torch raises many kinds for damaged files
        raise InputError(
            f"--pretrained {path}: not safetensors, nor a state dict that loads without executing code "
            f"({type(error).__name__})"
        ) from error
    for _ in range(8):  # of wrappers in wrappers; a dict may hold itself
        inner = (
            next((state[w] for w in WRAPPERS if isinstance(state.get(w), dict)), None)
            if isinstance(state, dict)
            else None
        )
        if inner is None:
            break
        state = inner
    tensors = (
        {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, torch.Tensor)}
        if isinstance(state, dict)
        else {}
    )
    if not tensors:
        what = f"a dict of {listed(state, 5)}" if isinstance(state, dict) else type(state).__name__
        raise InputError(f"--pretrained {path}: holds no state dict ({what}); save the model's state_dict()")
    return tensors


def head_names(net: nn.Module) -> list[str]:
    """Prefixes of the tensors of a network's head."""
    config: dict[str, Any] = net.pretrained_cfg  # type: ignore[assignment]
    names = config.get("classifier", "")
    return [f"{name}." for name in ([names] if isinstance(names, str) else names) if name]
