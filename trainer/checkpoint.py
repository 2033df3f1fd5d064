"""The run folder on disk: claiming it, atomic checkpoints, resuming everything."""

import fcntl
import json
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from shards.errors import InputError, listed


def write_atomic(path: Path, text: str) -> None:
    """Write a text file that is whole or not there."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    partial.replace(path)


def readable(path: Path) -> None:
    """Give a file the usual rights: safetensors writes it for its owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def claim(accelerator: Accelerator, out: Path, files: dict[str, str], *, resumable: bool = True) -> None:
    """Make the run folder with these files, config.yaml last; InputError on every process if it already holds something."""
    taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    accelerator.wait_for_everyone()  # all have looked before anybody writes
    if taken:
        what = "another run" if (out / "config.yaml").is_file() else "other files"
        remedy = "choose another folder, remove it, or go on with that run by --resume" if resumable else "choose another folder, or remove it"
        raise InputError(f"--out {out}: already holds {what}; {remedy}")
    if accelerator.is_main_process:
        try:
            out.mkdir(parents=True, exist_ok=True)
            for name, text in files.items():
                write_atomic(out / name, text)
        except OSError as error:
            raise InputError(f"--out {out}: cannot be written ({error.strerror})") from error
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


def save(path: Path, state: dict[str, Any]) -> None:
    """Write tensors, numbers, strings, lists and dicts; the file is whole or not there."""
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        torch.save(state, file)
        os.fsync(file.fileno())  # or after a power cut the name may be there and its content not
    partial.replace(path)


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote, without executing anything in it."""
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged or hostile file
        raise InputError(f"{path}: is not a checkpoint of this trainer ({type(error).__name__}); remove it or restore it") from error
    return state


def refuse_other(out: Path, was: dict[str, Any], own: dict[str, Any], words: dict[str, str]) -> None:
    """InputError where a run to be resumed was made with other settings; ``words``: what to call those that are no flag."""
    other = [name for name, value in own.items() if was.get(name) != value]
    if other:
        told = [words.get(name) or (f"--{name} {was[name]}" if was.get(name) is not None else f"no --{name}") for name in other]
        raise InputError(f"--resume {out}: the run was made with {listed(told)}; leave that as it was, or start a new run")


def _number(line: str, by: str) -> int | None:
    """The number of a line; None of one that a crash cut short."""
    try:
        return int(json.loads(line)[by])
    except (ValueError, KeyError, TypeError):
        return None


def rewind(path: Path, last: int, by: str = "step") -> None:
    """Drop the lines of a metrics.jsonl that come after step (or ``by``) ``last``: a resumed run writes them again."""
    if path.is_file():
        lines = [line for line in path.read_text().splitlines() if (number := _number(line, by)) is not None and number <= last]
        write_atomic(path, "".join(line + "\n" for line in lines))
