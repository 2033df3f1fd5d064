"""Where shards are: a folder, or an fsspec URL (s3, gcs, http,
file) whose shards are fetched whole into a local cache.
"""

import os
from pathlib import Path
from typing import Any

from shards.cache import Cache, read
from shards.errors import InputError
from shards.index import parse_index


def open_store(root: str | Path) -> "Folder | Remote":
    """The store behind a path or URL."""
    text = str(root)
    return Remote(text, Cache.default()) if "://" in text else Folder(Path(text))


class Folder:
    """Shards of a local folder."""

    remote = False

    def __init__(self, root: Path) -> None:
        self.root, self.name = root, str(root)
        self.remedy = f"pack it again (tars from elsewhere: `python -m shards index {root}`)"
        self._read: tuple[tuple[int, int], dict[str, Any]] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_read": None}  # a loader's process reads it itself

    def index(self) -> dict[str, Any]:
        """The content of ``index.json``, not to be changed; of ten million samples it takes a second to read, so it is
        kept as long as the file stays as it is.
        """
        path = self.there()
        state = path.stat()
        version = (state.st_mtime_ns, state.st_size)
        if self._read is None or self._read[0] != version:
            self._read = version, parse_index(path.read_bytes(), str(path), self.remedy)
        return self._read[1]

    def there(self) -> Path:
        """Of ``index.json``; InputError: it is not there."""
        path = self.root / "index.json"
        if not self.root.is_dir():
            begun = self.root.with_name(self.root.name + ".partial")
            if begun.is_dir():
                raise InputError(
                    f"--shards {self.root}: packing has not finished ({begun}); run the same packing command again, it "
                    "goes on from there"
                )
            raise InputError(
                f"--shards {self.root}: no such folder; make one with `python -m shards "
                f"phantom|nih|folder|csv|dicom|archive|masks --out {self.root}`"
            )
        if not path.is_file():
            raise InputError(
                f"{self.root}: has no index.json; if it holds tars from elsewhere, run `python -m shards index "
                f"{self.root}`"
            )
        return path

    def table(self, name: str, entry: dict[str, Any]) -> Path:
        """Local path of a table of the index; InputError: it is not there."""
        path = self.root / name
        if not path.is_file():
            raise InputError(f"{path}: is in the index but not on disk; copy it again, or {self.remedy}")
        return path

    def check(self, shards: list[dict[str, Any]]) -> None:
        """InputError for a shard that is not there, or has another size than the index says."""
        for shard in shards:
            path = os.path.join(self.name, shard["name"])
            try:
                size = os.stat(path).st_size
            except OSError as error:
                raise InputError(f"{path}: is in the index but not on disk; copy it again, or {self.remedy}") from error
            if size != shard["bytes"]:
                raise InputError(
                    f"{path}: has {size} bytes, its index says {shard['bytes']}; copy it again, or {self.remedy}"
                )

    def shard(self, shard: dict[str, Any]) -> Path:
        """Local path of a shard."""
        return self.root / shard["name"]


class Remote:
    """Shards at a URL."""

    remote = True

    def __init__(self, url: str, cache: "Cache") -> None:
        self.name, self.cache = url.rstrip("/"), cache
        self.remedy = "upload the whole folder again, as it was packed"

    def index(self) -> dict[str, Any]:
        """The content of ``index.json``, fetched anew."""
        url = f"{self.name}/index.json"
        return parse_index(read(url), url, self.remedy)

    def there(self) -> None:
        """Nothing is asked of a server before its index is read."""

    def table(self, name: str, entry: dict[str, Any]) -> Path:
        """Local path of a table of the index."""
        if not entry:
            raise InputError(f"{self.name}/index.json: has no table {name}; {self.remedy}")
        return self.cache.fetch(f"{self.name}/{name}", entry["bytes"], entry["sha256"])

    def check(self, shards: list[dict[str, Any]]) -> None:
        """A shard is checked when it is fetched."""

    def room_ahead(self) -> int:
        """Bytes that may be fetched before they are needed."""
        return self.cache.limit // 2

    def shard(self, shard: dict[str, Any]) -> Path:
        """Local path of a shard; fetched if need be."""
        return self.cache.fetch(f"{self.name}/{shard['name']}", shard["bytes"], shard["sha256"])
