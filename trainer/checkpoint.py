"""The run folder on disk: claiming it, atomic checkpoints, resuming everything."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save as safetensors_bytes

from shards.atomic import whole, write
from shards.errors import InputError, listed


def claim(accelerator: Accelerator, out: Path, files: dict[str, str], *, resumable: bool = True) -> None:
    """Make the run folder with these files, config.yaml last; InputError on every process if it already holds
    something.
    """
    taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    accelerator.wait_for_everyone()  # all have looked before anybody writes
    if taken:
        what = "another run" if (out / "config.yaml").is_file() else "other files"
        remedy = (
            "choose another folder, remove it, or go on with that run by --resume"
            if resumable
            else "choose another folder, or remove it"
        )
        raise InputError(f"--out {out}: already holds {what}; {remedy}")
    if accelerator.is_main_process:
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--out {out}: cannot be written ({error.strerror})") from error
        for name, text in files.items():
            write(out / name, text)
    accelerator.wait_for_everyone()


def hold(out: Path) -> None:
    """Keep a run folder for this process until it ends. InputError: another process trains there."""
    lock = os.open(out / ".lock", os.O_RDWR | os.O_CREAT)  # stays open: closing would give the lock back
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        raise InputError(f"--out {out}: another process is training there; wait for it, or stop it") from error
    except OSError:
        pass  # a file system without locks


def not_finite(*modules: torch.nn.Module) -> list[str]:
    """Weights and statistics that are not finite: nothing of the kind is ever saved."""
    return [
        name
        for module in modules
        for name, tensor in module.state_dict().items()
        if tensor.is_floating_point() and not tensor.isfinite().all()
    ]


def save(path: Path, state: dict[str, Any]) -> None:
    """Write tensors, numbers, strings, lists and dicts; the file is whole or not there."""
    path.parent.mkdir(exist_ok=True)
    with whole(path) as partial:
        try:
            with partial.open("wb") as file:
                torch.save(state, file)
        except RuntimeError as error:  # torch's word for whatever the file system refuses
            raise OSError(None, str(error).splitlines()[0]) from error


def save_weights(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, whole or not there."""
    write(
        path,
        safetensors_bytes(
            {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata=metadata
        ),
    )


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote, without executing anything in it."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged or hostile file
        raise InputError(
            f"{path}: is not a checkpoint of this trainer ({type(error).__name__}); remove it or restore it"
        ) from error
    return state


def refuse_other(out: Path, was: dict[str, Any], own: dict[str, Any], words: dict[str, str]) -> None:
    """InputError where a run to be resumed was made with other settings; ``words``: what to call those that are no
    flag.
    """
    other = [name for name, value in own.items() if was.get(name) != value]
    if other:
        changed = [
            words.get(name) or (f"--{name} {was[name]}" if was.get(name) is not None else f"no --{name}")
            for name in other
        ]
        raise InputError(
            f"--resume {out}: the run was made with {listed(changed)}; leave that as it was, or start a new run"
        )


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl that are whole; none where there is no such file. A crash, or another program, may
    have left others.
    """
    found = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, dict):
            found.append(value)
    return found


def rewind(path: Path, last: int, by: str = "step") -> None:
    """Drop the lines of a metrics.jsonl that come after step (or ``by``) ``last``: a resumed run writes them again."""
    if path.is_file():
        kept = [line for line in read_lines(path) if isinstance(line.get(by), int) and line[by] <= last]
        write(path, "".join(json.dumps(line) + "\n" for line in kept))
