"""The run folder on disk: claiming it, atomic checkpoints, resuming everything."""

import fcntl
import itertools
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save as safetensors_bytes

from shards.atomic import whole, write
from shards.errors import InputError, listed
from shards.files import file_sha256

MANIFEST = "manifest.json"
DAMAGED = "WARNING: {} is damaged: it was cut off, or changed since it was written; it is kept as {}"


def claim(accelerator: Accelerator, out: Path, files: dict[str, str], *, resumable: bool = True) -> None:
    """Make the run folder with these files, config.yaml last; InputError on every process if it already holds
    something.
    """
    taken = out.exists() and (not out.is_dir() or any(out.iterdir()))
    accelerator.wait_for_everyone()  # all have looked before anybody writes
    if taken:
        if not out.is_dir():
            raise InputError(f"--out {out}: is a file; name a folder")
        what = "another run" if (out / "config.yaml").is_file() else "other files"
        remedy = (
            "choose another folder, remove it, or go on with that run by --resume"
            if resumable and (out / "config.yaml").is_file()
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


def save(path: Path, state: dict[str, Any], *, keep: int = 1) -> None:
    """Write tensors, numbers, strings, lists and dicts; the file is whole or not there. Its checksum stands in the
    folder's manifest.json before it does; ``keep`` - 1 older ones stay beside it, last_1.pt beside
    last.pt and so on.
    """
    path.parent.mkdir(exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*.partial"):  # of a process that was killed: a run has one at a time
        left.unlink(missing_ok=True)
    with whole(path) as partial:
        try:
            with partial.open("wb") as file:
                torch.save(state, file)
        except RuntimeError as error:  # torch's word for whatever the file system refuses
            raise OSError(None, str(error).splitlines()[0]) from error
        known = _manifest(path.parent)
        if known is None:  # of an earlier version, or damaged
            known = [_entry(file, _name(file)) for file in sorted(path.parent.glob("*.pt"))]
        others = [one for one in known if one.get("name") != path.name]
        own = [one for one in known if one.get("name") == path.name]
        files = [_entry(partial, path.name), *own[: keep + 8], *others]
        write(path.parent / MANIFEST, json.dumps({"files": files}, indent=1))
        # From the oldest on: whenever this is cut off, the newest that are whole are there
        aged = [path.with_name(f"{path.stem}_{k}{path.suffix}" if k else path.name) for k in range(keep)]
        for newer, older in reversed(list(itertools.pairwise(aged))):
            if newer.is_file():
                newer.replace(older)
        for old in path.parent.glob(f"{path.stem}_*{path.suffix}"):
            if _age(old) >= keep:  # more were kept before
                old.unlink()


def _entry(file: Path, name: str) -> dict[str, Any]:
    return {"name": name, "sha256": file_sha256(file), "bytes": file.stat().st_size}


def _name(path: Path) -> str:
    """What a checkpoint was called when it was new."""
    return f"{path.stem.partition('_')[0]}{path.suffix}"


def _manifest(folder: Path) -> list[dict[str, Any]] | None:
    """Its entries, the newest of each name first; None: there is none, as in runs of earlier versions."""
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        return [one for one in content["files"] if isinstance(one, dict)]
    except (OSError, ValueError, RecursionError, TypeError, KeyError):
        return None


def sound(path: Path) -> bool:
    """Whether a file is there, and as it was written, as far as the manifest of its folder tells."""
    if not path.is_file():
        return False
    known = {one.get("sha256") for one in _manifest(path.parent) or [] if one.get("name") == _name(path)}
    return not known or file_sha256(path) in known


def newest(folder: Path) -> tuple[Path | None, list[Path]]:
    """The newest sound checkpoint of a run's folder of them, and newer ones that are damaged. InputError: all are."""
    found = [path for path in [folder / "last.pt", *sorted(folder.glob("last_*.pt"), key=_age)] if path.is_file()]
    damaged: list[Path] = []
    for path in found:
        if sound(path):
            return path, damaged
        damaged.append(path)
    if damaged:
        raise InputError(
            f"{listed(list(map(str, damaged)))}: damaged (no checksum of {folder / MANIFEST} is theirs); restore one, "
            "or remove them to start from the beginning"
        )
    return None, damaged


def there(folder: Path) -> bool:
    """Whether a run's folder of checkpoints has one."""
    return (folder / "last.pt").is_file() or any(folder.glob("last_*.pt"))


def _age(path: Path) -> int:
    number = path.stem.rpartition("_")[2]
    return int(number) if number.isdecimal() else sys.maxsize


def put_aside(path: Path) -> Path:
    """Give a damaged checkpoint another name, so that none takes its place among the sound ones."""
    return path.replace(path.with_name(f"{path.name}.damaged"))


def drop_older(folder: Path) -> None:
    """Of a finished run the last checkpoint is enough."""
    for path in folder.glob("last_*.pt"):
        path.unlink()


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
