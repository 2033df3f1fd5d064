"""What must be the same on all processes, and what must be there, before the first step: told, not found out later."""

import importlib.metadata
import math
import os
import platform
import shutil
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

import trainer
from shards.batch import SHM_REMEDY, decoded_by
from shards.dataset import Split
from shards.errors import InputError, listed
from shards.jpeg import gray_jpeg_shape
from shards.loader import PREFETCH
from trainer.command import flat
from trainer.config import Config

SHM = Path("/dev/shm")
APART = 60.0  # seconds that clocks may differ: a file system's times, a token's validity
# Packages whose version the figures of a run may depend on
PACKAGES = ("torch", "torchvision", "accelerate", "timm", "kornia", "numpy")


def together(accelerator: Accelerator, config: Config, splits: Mapping[str, Split]) -> list[str]:
    """Compare the processes; what is worth a note.

    InputError on every process: their settings, training images or packages are not the same, which ones.
    """
    if accelerator.num_processes == 1:
        return []
    own = {f"--{name}": repr(value) for name, value in flat(asdict(config)).items()}
    own |= {f"the {name} images": split.fingerprint for name, split in splits.items()}
    own |= {name: importlib.metadata.version(name) for name in PACKAGES}
    own |= {"cxr-focus": trainer.__version__, "Python": platform.python_version()}
    own |= {"processes": str(accelerator.num_processes), "precision": accelerator.mixed_precision}
    own |= {"device": accelerator.device.type}
    told = gather_object([(f"process {accelerator.process_index} on {socket.gethostname()}", time.time(), own)])
    return compared(told)


def compared(told: list[tuple[str, float, dict[str, str]]]) -> list[str]:
    """See `together`; of each process who it is, its clock, what it has."""
    (first, clock, wanted), *others = told
    problems = []
    for who, _, has in others:
        for name in dict.fromkeys([*wanted, *has]):
            if wanted.get(name) != has.get(name):
                problems.append(f"{name} is {has.get(name)} in {who}, {wanted.get(name)} in {first}")
    if problems:
        raise InputError(
            f"the processes are not alike: {listed(problems[:6])}; start all with one command, from one environment"
        )
    who, far = max(((who, at - clock) for who, at, _ in others), key=lambda pair: abs(pair[1]), default=("", 0.0))
    if abs(far) > APART:
        return [f"note: the clock of {who} is {far:+.0f} s from that of {first}; set them by NTP"]
    return []


def room(out: Path, model: torch.nn.Module, config: Config) -> None:
    """InputError: the disk of the run folder has no room for the model and its checkpoints."""
    weights = sum(tensor.numel() * tensor.element_size() for tensor in model.state_dict().values())
    # Of a checkpoint: weights, two moments of Adam, the running mean; one more is written before the oldest goes
    need = weights * (3 + bool(config.optim.ema)) * (config.keep + 1) + 2 * weights
    there = [file.stat().st_size for file in (out / "checkpoints").glob("*.pt")] if out.is_dir() else []
    free = shutil.disk_usage(next(folder for folder in (out, *out.resolve().parents) if folder.is_dir())).free
    if free + sum(there) < need:
        raise InputError(
            f"--out {out}: the run needs some {need / 1e6:.0f} MB there (the model, and --keep {config.keep} "
            f"checkpoints), and {free / 1e6:.0f} MB are free; free space, or choose another disk"
        )


def shared_memory(config: Config, image: tuple[int, ...], processes: int) -> None:
    """InputError: batches on their way from the loader's processes do not fit into /dev/shm.

    Args:
        image: height and width of a stored image; processes: of this machine.
    """
    if not config.workers or not SHM.is_dir():
        return
    need = config.batch * math.prod(image) * config.workers * PREFETCH * processes
    status = os.statvfs(SHM)
    free = status.f_bavail * status.f_frsize
    if need > free:
        raise InputError(
            f"--batch {config.batch} x --workers {config.workers}: batches on their way need {need / 1e6:.0f} MB of "
            f"/dev/shm for {processes} processes, and {free / 1e6:.0f} MB are free; {SHM_REMEDY}"
        )


def decoder(split: Split, device: torch.device) -> list[str]:
    """What is worth a note of ``--decode device``. InputError: the first image is not decoded there."""
    first = split.image_bytes(0)
    if not any(gray_jpeg_shape(first)):
        return [
            f"note: {split.name(0)} is no gray JPEG of 8 bits; batches with such an image are decoded by the loader"
        ]
    decoded_by(device, split, [0], [torch.frombuffer(bytearray(first), dtype=torch.uint8)])
    return [] if device.type == "cuda" else ["note: there is no GPU that could decode; the training process does"]


def on_this_machine() -> int:
    """How many processes of the run this machine has."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1") or 1)


def all_of(accelerator: Accelerator, action: Any) -> None:
    """Do something on every process. InputError of any of them, on all."""
    problem = None
    try:
        action()
    except InputError as error:
        problem = str(error)
    found = gather_object([problem]) if accelerator.num_processes > 1 else [problem]
    if said := next((one for one in found if one), None):
        raise InputError(said)
