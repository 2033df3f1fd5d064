"""The image file that a row of a table names."""

import os
import unicodedata
from collections import defaultdict
from contextlib import suppress
from pathlib import Path

from shards.files import hidden
from shards.pixels import IMAGE_SUFFIXES


class Finder:
    """Files below a folder by the names that tables give them.

    A name that is not there as it stands is looked for with ``/`` for ``\\``, in another Unicode normal form or case,
    and without its suffix; what fits one file alone is that file.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.known: dict[str, dict[str, list[str]]] = {}  # of a folder: plain name or stem -> names

    def find(self, name: str) -> Path:
        """The file, or, where there is none, the path that the name stands for."""
        plain = self.root / name
        if os.path.isfile(plain) or "\0" in name:
            return plain
        parts = Path(name.replace("\\", "/")).parts
        if len(parts) > 1 and parts[0] == self.root.name and not os.path.isdir(self.root / parts[0]):
            parts = parts[1:]  # from the folder above the one that is named
        if not parts or os.path.isabs(name) or ".." in parts:
            return plain
        at = str(self.root)
        for part in parts:
            exact = os.path.join(at, part)
            names = (
                [] if os.path.lexists(exact) and (os.path.isdir(exact) or part is parts[-1]) else self._like(at, part)
            )
            at = os.path.join(at, names[0]) if len(names) == 1 else exact
        return Path(at) if os.path.isfile(at) else plain

    def _like(self, folder: str, name: str) -> list[str]:
        if folder not in self.known:
            self.known[folder] = defaultdict(list)
            with suppress(OSError):
                for entry in sorted(os.listdir(folder)):
                    if not hidden(entry):
                        stem, suffix = os.path.splitext(entry)
                        readable = suffix.lower() in (*IMAGE_SUFFIXES, ".dcm", ".dicom", "")
                        for key in {_plain(entry), *([_plain(stem)] if readable else [])}:
                            self.known[folder][key].append(entry)
        return self.known[folder].get(_plain(name), [])


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
