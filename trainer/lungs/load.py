"""A segmenter from a file: ours, or the published U-Net's, whose pickle is read and not executed."""

import contextlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from shards.errors import InputError, listed, read_json
from trainer.lungs.segmenter import LungSegmenter
from trainer.lungs.unet import PUBLISHED_CHANNELS, PUBLISHED_SIZE, UNet

SHIPPED = Path(__file__).parent / "weights" / "lung_unet.safetensors"


def load_segmenter(path: str | Path | None = None) -> LungSegmenter:
    """A lung segmenter in eval mode, frozen: the one that ships with the package, or that of a file.

    Args:
        path: a file that `trainer.train_lungs` or ``python -m trainer.lungs convert`` wrote (or the run folder with
            it); a state dict of the published U-Net (.pt, .pth, .safetensors); or the published ``unet_model.pt``
            itself, whose pickle is read and not executed.

    Returns:
        A module: images float [B,1,H,W] in [0,1], any H and W -> masks bool [B,H,W].

    Raises:
        InputError: no such file, not a segmenter, tensors of other shapes (which), a pickle that asks for anything but
            layers.
    """
    path = SHIPPED if path is None else Path(path)
    if path.is_dir() and (path / "lung_unet.safetensors").is_file():
        path = path / "lung_unet.safetensors"
    if path.is_dir():
        raise InputError(
            f"--lungs.weights {path}: has no lung_unet.safetensors; name a run folder of trainer.train_lungs, or a file"
        )
    if not path.is_file():
        raise InputError(f"--lungs.weights {path}: no such file; without the flag the segmenter of the package is used")
    tensors, settings = _read(path)
    try:
        segmenter = LungSegmenter(settings.pop("channels"), settings.pop("size"), **settings)
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"--lungs.weights {path}: not a lung segmenter (its settings lack {error})") from error
    _check_tensors(segmenter.unet, tensors, path)
    segmenter.unet.load_state_dict(
        {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}
    )
    # Channel by channel its convolutions take two thirds of the time on a CPU
    segmenter.to(memory_format=torch.channels_last)
    return segmenter.eval().requires_grad_(False)


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and settings of a file of any of the known kinds."""
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"
    if zipped or path.suffix.lower() in (".pt", ".pth", ".bin"):
        tensors, settings = _read_pickle(path), {}
    else:
        try:
            with safe_open(path, "pt") as file:
                settings = read_json((file.metadata() or {}).get("lung_unet", "{}").encode(), f"--lungs.weights {path}")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        except (SafetensorError, OSError, ValueError) as error:
            raise InputError(f"--lungs.weights {path}: not a lung segmenter ({error})") from error
    if not settings:  # the published ones know nothing of ours: raw gray, every foreground pixel counts
        first = tensors.get("e1.conv.conv1.weight")
        if first is None:
            raise InputError(
                f"--lungs.weights {path}: not a lung segmenter: it has no settings of one, and no e1.conv.conv1.weight "
                "of the published U-Net"
            )
        levels = [f"{level}.conv.conv1.weight" for level in ("e1", "e2", "e3", "e4")] + ["b.conv1.weight"]
        channels = [
            len(tensors[name]) if name in tensors else usual
            for name, usual in zip(levels, PUBLISHED_CHANNELS, strict=True)
        ]
        inputs = first.shape[1] if first.ndim == 4 else 3
        settings = {
            "channels": channels,
            "size": PUBLISHED_SIZE,
            "inputs": inputs,
            "standardise": False,
            "clean_up": False,
        }
    return tensors, settings


def _read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """A state dict, or the state dict of a whole pickled module of the published U-Net, of which no code runs.

    Classes that the published file names stand for empty modules; torch's own reader refuses whatever is not allowed by
    name.
    """
    empty = [
        (type(name, (nn.Module,), {}), f"model.{name}")
        for name in ("build_unet", "encoder_block", "conv_block", "decoder_block")
    ]
    layers = [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.MaxPool2d, nn.ConvTranspose2d]
    try:
        with torch.serialization.safe_globals([*empty, *layers]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged or hostile file
        asked = []
        with contextlib.suppress(Exception):
            asked = [
                n
                for n in torch.serialization.get_unsafe_globals_in_checkpoint(path)
                if not n.startswith(("torch.nn.modules.", "model."))
            ]
        why = (
            f"its pickle asks for {listed(asked)}, which is not executed"
            if asked
            else f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
        )
        raise InputError(f"--lungs.weights {path}: not a lung segmenter ({why})") from error
    if isinstance(content, nn.Module):
        content = content.state_dict()
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise InputError(f"--lungs.weights {path}: holds no state dict of a lung segmenter")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def _check_tensors(unet: UNet, tensors: dict[str, torch.Tensor], path: Path) -> None:
    expected = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    wrong = [name for name in expected if name not in tensors or tuple(tensors[name].shape) != expected[name]]
    wrong += [name for name in tensors if name not in expected]
    if wrong:
        name = wrong[0]
        got = tuple(tensors[name].shape) if name in tensors else "nothing"
        raise InputError(
            f"--lungs.weights {path}: {len(wrong)} tensors do not fit ({listed(wrong)}); {name}: expected "
            f"{expected.get(name)}, got {got}"
        )
