"""Files of a folder: which of them are data, and what identifies their content."""

import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

SHA256 = re.compile("[0-9a-f]{64}")  # in hex, as in an index and as a name in the cache


def hidden(name: str) -> bool:
    """Whether a file or folder is no data: `.ipynb_checkpoints`, `._x.png`, and what macOS and file servers put beside
    it.
    """
    return name.startswith(".") or name in ("__MACOSX", "@eaDir", "$RECYCLE.BIN")


def walk(root: Path) -> Iterator[Path]:
    """Files at any depth, sorted, links to folders followed (each folder once), hidden files and folders left out."""
    seen: set[str] = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not hidden(name))
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        paths = (Path(folder, file) for file in sorted(files) if not hidden(file))
        yield from (path for path in paths if path.is_file())  # a pipe would wait for ever


def file_sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
