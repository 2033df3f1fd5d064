"""Weights of other programs: read without executing anything, and fitted to a timm network.

What a file is called in and how it is cut is told apart by what fits: names behind any prefix, in the words of
transformers' DINOv2, or as timm's own filter of the architecture makes them (position embeddings and relative position
tables are resampled to the grid at hand, old names become new ones).
"""

import argparse
import contextlib
import itertools
import json
import logging
import pickle
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from shards.errors import InputError, listed
from shards.names import known_as

Tensors = dict[str, torch.Tensor]

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


class Fitted(NamedTuple):
    """state: tensors of the network's own names and shapes; seen: of the file, as far as they were recognised;
    resampled: names of those that had another shape in the file.
    """

    state: Tensors
    seen: Tensors
    resampled: list[str]


class Trained(NamedTuple):
    """What a model of this trainer was trained for: ``one`` finding an image or ``any`` number, and their names in the
    order of its head.
    """

    kind: str
    findings: tuple[str, ...]


def trained_for(path: Path) -> Trained | None:
    """Of a run folder, or the model of one; None: the file is another's."""
    path = path / "model.safetensors" if path.is_dir() else path
    try:
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
        names = json.loads(said["findings"])
        return Trained(said.get("labels", "one"), tuple(map(str, names)))
    except (SafetensorError, OSError, KeyError, ValueError, TypeError):
        return None


def _head_of(own: Tensors, seen: Tensors, known: Trained, now: Trained, path: Path) -> tuple[Tensors, str]:
    """The network's head ``own`` with the rows of a run's, ``seen``, that are of the same findings; what they are, in
    words.
    """
    if known.kind != now.kind:
        return own, f"its head was trained with --labels.kind {known.kind} and begins anew"
    rows: dict[int, int] = {}
    for k, name in enumerate(now.findings):
        if (old := known_as(name, known.findings, f"--pretrained {path}")) is not None:
            rows[k] = known.findings.index(old)
    head = {name: tensor.clone() for name, tensor in own.items()}
    for name, tensor in head.items():
        if name in seen and seen[name].shape[1:] == tensor.shape[1:]:
            for k, row in rows.items():
                tensor[k] = seen[name][row]
    taken, begun = ([name for k, name in enumerate(now.findings) if (k in rows) == there] for there in (True, False))
    said = [f"its head's rows of {listed(taken)} are taken"] if taken else []
    return head, " and ".join([*said, *([f"those of {listed(begun)} begin anew"] if begun else [])])


def load_into(net: nn.Module, architecture: str, head: tuple[str, ...], path: Path, now: Trained | None = None) -> str:
    """Backbone weights from a file or a run folder; the head is left out where its number of classes differs. Returns
    what was loaded, in words.

    Args:
        architecture: timm's name of the network; head: prefixes of its head's tensors.
        now: what the network is for: of a run of this trainer the head's rows are then taken by finding.
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
    found = read_weights(path)
    fits, seen, resampled = fit(net, architecture, head, found)
    in_head = {name for name in own if name.startswith(head)} if head else set()
    of_head = ""
    if now is not None and (known := trained_for(path)) is not None and in_head:
        rows, of_head = _head_of({name: own[name] for name in in_head}, seen, known, now, path)
        fits = {name: tensor for name, tensor in fits.items() if name not in in_head}
    missing = [
        name for name in own if name not in fits and name not in in_head and not name.endswith("num_batches_tracked")
    ]
    if missing:
        name = missing[0]
        got = tuple(seen[name].shape) if name in seen else "nothing"
        raise InputError(
            f"--pretrained {path}: {len(missing)} of {len(own)} tensors are missing or of another shape "
            f"({listed(missing, 3)}); "
            f"{name}: expected {tuple(own[name].shape)}, got {got}. The file has {listed(found, 3)}. Is it a file for "
            "this --backbone?"
        )
    net.load_state_dict(fits | (rows if of_head else {}), strict=False)
    said = [f"--pretrained {path}: {len(fits)} of {len(own)} tensors are taken"]
    if resampled:
        said.append(f"{listed(resampled, 3)} resampled to this size")
    if of_head:
        said.append(of_head)
    elif begun := [name for name in own if name not in fits and name in in_head]:
        said.append(f"{listed(begun)} begin anew")
    if unused := [name for name in seen if name not in own and not _of_no_use(name, head)]:
        said.append(f"left out of the file: {listed(unused, 3)}")
    return "; ".join(said)


def fit(net: nn.Module, architecture: str, head: tuple[str, ...], found: Tensors) -> Fitted:
    """The reading of a file's tensors that fits most of the network's."""
    own = net.state_dict()
    # The prefix that training wrappers put before the names: the one that most names fit behind.
    prefixes = dict.fromkeys(
        ["", *(name[: at + 1] for name in found for at, letter in enumerate(name) if letter == ".")]
    )
    readings: list[Tensors] = []
    for words in (dict, _from_transformers):
        behind = [
            words({name[len(prefix) :]: tensor for name, tensor in found.items() if name.startswith(prefix)})
            for prefix in prefixes
        ]
        readings.append(max(behind, key=lambda state: len(state.keys() & own.keys())))
    readings = [{name: _three_channels(t, own.get(name)) for name, t in state.items()} for state in readings]
    # A filter may take a file without a head for one of old names; so it is asked with the network's own head, too.
    lacking = {name: t for name, t in own.items() if head and name.startswith(head) and name not in readings[0]}
    for reading, more in itertools.product(list(readings), ({}, lacking)):
        if (state := _filtered(net, architecture, reading | more)) is not None:
            readings.append({name: tensor for name, tensor in state.items() if name not in more})
    best = max(readings, key=lambda state: sum(n in own and own[n].shape == t.shape for n, t in state.items()))
    fits = {name: tensor for name, tensor in best.items() if name in own and own[name].shape == tensor.shape}
    raw = {name: tensor.shape for reading in readings[:2] for name, tensor in reading.items()}
    return Fitted(fits, best, [name for name, t in fits.items() if name in raw and raw[name] != t.shape])


def _filtered(net: nn.Module, architecture: str, state: Tensors) -> Tensors | None:
    """What timm's own filter of the architecture makes of a file; None where it has none, or cannot read this one."""
    function = timm.model_entrypoint(architecture.partition(".")[0])
    take = getattr(sys.modules[function.__module__], "checkpoint_filter_fn", None)
    if take is None:
        return None
    with contextlib.suppress(Exception), _quiet(), torch.no_grad():  # it is made for files that it knows
        made = take(dict(state), net)
        return {name: tensor for name, tensor in made.items() if isinstance(tensor, torch.Tensor)}
    return None


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Filters log what they resample, print, and warn."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with contextlib.redirect_stdout(None), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# transformers' DINOv2 (RAD-DINO, XrayDINOv2) in timm's words; queries, keys and values are put together below
TRANSFORMERS = (
    (r"^embeddings\.cls_token$", "cls_token"),
    (r"^embeddings\.register_tokens$", "reg_token"),
    (r"^embeddings\.position_embeddings$", "pos_embed"),
    (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
    (r"^encoder\.layer\.", "blocks."),
    (r"^layernorm\.", "norm."),
    (r"\.attention\.output\.dense\.", ".attn.proj."),
    (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
    (r"\.mlp\.weights_in\.", ".mlp.fc1."),
    (r"\.mlp\.weights_out\.", ".mlp.fc2."),
)
PARTS = ("query", "key", "value")


def _from_transformers(state: Mapping[str, torch.Tensor]) -> Tensors:
    """Names of transformers' DINOv2 as timm's; others stay."""
    if "embeddings.cls_token" not in state:
        return dict(state)
    made: Tensors = {}
    for name, tensor in state.items():
        part = re.fullmatch(r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(weight|bias)", name)
        if part and part[2] == "query":
            three = [state.get(name.replace(".query.", f".{other}.")) for other in PARTS]
            if all(t is not None for t in three):
                made[f"blocks.{part[1]}.attn.qkv.{part[3]}"] = torch.cat([t for t in three if t is not None])
        elif not part:
            for pattern, words in TRANSFORMERS:
                name = re.sub(pattern, words, name)
            made[name] = tensor
    return made


def _of_no_use(name: str, head: tuple[str, ...]) -> bool:
    """Whether nobody misses a tensor of a file: of its head, or a table that is computed anew."""
    computed = ("num_batches_tracked", "relative_position_index", "attn_mask", "relative_coords_table")
    return name.startswith(head or ("\0",)) or name.endswith(computed) or "rope" in name


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


def read_weights(path: Path) -> dict[str, torch.Tensor]:
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
