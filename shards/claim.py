"""A working folder that one process, or several that share it, hold."""

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shards.errors import InputError
from shards.merge import NOTES


@contextmanager
def claimed(work: Path, *, shared: bool) -> Iterator[None]:
    """The working folder, locked; removed when it is left without a finished shard. Only parts share it."""
    try:
        work.mkdir(parents=True, exist_ok=True)
        lock = os.open(work / ".lock", os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise InputError(
            f"--out {work.with_suffix('')}: cannot be written ({error.strerror or error}); choose a folder that can"
        ) from error
    try:
        if not _lock(lock, fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
            raise InputError(f"{work}: another process is packing there; wait for it, or choose another --out")
        yield
    finally:
        if work.is_dir() and not any(work.glob(f"{NOTES}/*.json")) and _lock(lock, fcntl.LOCK_EX):
            shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


def _lock(descriptor: int, how: int) -> bool:
    """Whether the lock was to be had at once."""
    try:
        fcntl.flock(descriptor, how | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass  # a file system without locks
    return True
