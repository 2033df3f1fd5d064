"""Files that are whole or not there, power cuts and full disks included."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from shards.errors import InputError


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to, which gets the name ``path`` when the block ends; nothing is left where it does not.

    InputError: it cannot be written, such as to a full disk; what was at ``path`` before is still there.
    """
    partial = path.with_name(f".{path.name[:200]}.{os.getpid()}.partial")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)  # or after a power cut the content may be there and its name not
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); free space, or choose another place; finished "
            "work is kept"
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)


def write(path: Path, data: str | bytes) -> None:
    """Write a file that is whole or not there."""
    with whole(path) as partial:
        partial.write_bytes(data.encode(errors="backslashreplace") if isinstance(data, str) else data)


def append(path: Path, line: str) -> None:
    """Add a line to a file. InputError: it cannot be written."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise InputError(
            f"{path}: cannot be written ({error.strerror or error}); free space; finished work is kept"
        ) from error


def sync(path: Path) -> None:
    """Have the system write a file, or a folder's names, to the disk. OSError: a file cannot be; some file systems do
    not sync folders.
    """
    with suppress(OSError) if path.is_dir() else nullcontext():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
