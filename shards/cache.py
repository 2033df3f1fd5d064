"""The local cache of shards at a URL (fsspec: s3, gcs, http, file), which the processes of a machine share.

Files are named by their checksum, fetched once under a lock, checked, and the least recently used ones make room.
`CXR_FOCUS_CACHE` names the folder, `CXR_FOCUS_CACHE_GB` bounds it.
"""

import errno
import fcntl
import os
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shards.errors import InputError
from shards.files import SHA256, file_sha256

ATTEMPTS = 6  # with pauses of about 0.5, 1, 2, 4 and 8 seconds

FIRST_PAUSE = 0.5

DEFAULT_GB = 100.0


INDEX_BYTES = 2**26  # of an index.json: that of ten million samples has a sixth of it

LEFTOVER = 3600.0  # seconds after which a download counts as abandoned

EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gcs", "gcs": "gcs", "http": "http", "https": "http"}


class Cache:
    """A bounded folder of files named by their SHA-256, shared by processes."""

    def __init__(self, root: Path, limit: int) -> None:
        self.root, self.limit = root, limit

    @staticmethod
    def default() -> "Cache":
        """As the environment says: CXR_FOCUS_CACHE (default: in the user's cache folder), CXR_FOCUS_CACHE_GB (default:
        100).
        """
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        root = Path(os.environ.get("CXR_FOCUS_CACHE") or os.path.join(base, "cxr-focus"))
        text = os.environ.get("CXR_FOCUS_CACHE_GB", str(DEFAULT_GB))
        try:
            limit = float(text)
            if not limit > 0:
                raise ValueError
        except ValueError as error:
            raise InputError(f"CXR_FOCUS_CACHE_GB={text}: expected a number of gigabytes above 0") from error
        return Cache(root, int(limit * 1e9))

    def fetch(self, url: str, size: int, sha256: str) -> Path:
        """The local file with the content of ``url``, whole and checked."""
        path = self.root / sha256
        if size > self.limit:
            raise InputError(
                f"{url}: {size / 1e9:.1f} GB do not fit into the cache of {self.limit / 1e9:.1f} GB; raise "
                "CXR_FOCUS_CACHE_GB"
            )
        if self._has(path, size):
            return path
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with self._locked(f"{sha256[:2]}.lock"):  # a process that waits here finds the file of the one before
                if not self._has(path, size):
                    with self._room(size):
                        _retry(url, lambda: self._download(url, size, sha256))
        except OSError as error:
            raise InputError(
                f"{url}: cannot be kept in the cache {self.root} ({error.strerror or error}); free space, or set "
                "CXR_FOCUS_CACHE and CXR_FOCUS_CACHE_GB"
            ) from error
        return path

    def _has(self, path: Path, size: int) -> bool:
        try:
            there = path.stat().st_size == size
            if there:
                os.utime(path)  # recently used
            return there
        except OSError:
            return False

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with (self.root / name).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @contextmanager
    def _room(self, size: int) -> Iterator[None]:
        """Hold ``size`` bytes of the cache: what was used longest ago goes, and downloads of others are waited for."""
        hold = self.root / f"{os.getpid()}-{threading.get_ident()}.hold"
        while not self._made_room(size, hold):
            time.sleep(0.02)
        try:
            yield
        finally:
            hold.unlink(missing_ok=True)

    def _made_room(self, size: int, hold: Path) -> bool:
        with self._locked("room.lock"):
            files, used = [], 0
            with os.scandir(self.root) as listing:
                entries = list(listing)
            for entry in entries:
                try:
                    stat = entry.stat()
                except OSError:  # another process has just removed or renamed it
                    if entry.name.endswith(".hold"):
                        return False  # what it held may be a file now that this listing lacks: look again
                    continue
                held = entry.name.endswith((".hold", ".part"))
                if held and (
                    time.time() - stat.st_mtime > LEFTOVER or (entry.name.endswith(".hold") and _gone(entry.name))
                ):
                    os.unlink(entry.path)  # of a process that was killed
                elif entry.name.endswith(".hold"):  # what becomes of a .part is held
                    used += stat.st_size
                # Whatever else lies here is not ours
                elif SHA256.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    used += stat.st_size
                    files.append((stat.st_mtime, stat.st_size, entry.path))
            for _, bytes_, path in sorted(files):
                if used + size <= self.limit:
                    break
                os.unlink(path)  # who has it open goes on reading it
                used -= bytes_
            if used + size > self.limit:
                return False
            with hold.open("wb") as file:
                file.truncate(size)  # sparse: it counts, but takes nothing
            return True

    def _download(self, url: str, size: int, sha256: str) -> None:
        descriptor, partial = tempfile.mkstemp(suffix=".part", dir=self.root)
        os.close(descriptor)
        try:
            _get(url, partial, size)
            got = os.stat(partial).st_size
            if got != size:
                raise _BrokenError(f"has {got} bytes, its index says {size}")
            if file_sha256(Path(partial)) != sha256:
                raise _BrokenError("its checksum is not the one of its index")
            os.replace(partial, self.root / sha256)
        finally:
            if os.path.exists(partial):
                os.unlink(partial)


def _gone(hold: str) -> bool:
    """Whether the process that a hold is named after has ended."""
    pid = hold.partition("-")[0]
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, OverflowError):
        pass  # another user's, or no number
    return False


class _BrokenError(Exception):
    """What came is not what the index describes."""


def _retry(url: str, fetch: Any) -> Any:
    """Call ``fetch`` until it succeeds, with growing pauses; InputError that names ``url`` in the end."""
    for attempt in range(ATTEMPTS):
        try:
            return fetch()
        except InputError:
            raise
        except FileNotFoundError as error:
            raise InputError(f"{url}: is not there; check the URL, or upload the whole folder again") from error
        except PermissionError as error:
            raise InputError(f"{url}: access is refused ({error}); check your credentials") from error
        except Exception as error:  # fsspec passes on the exceptions of each of its libraries
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):  # the cache's own disk
                raise
            if getattr(error, "status", 0) in (401, 403):
                raise InputError(f"{url}: access is refused ({error}); check your credentials") from error
            if attempt == ATTEMPTS - 1:
                what = str(error) or type(error).__name__
                broken = isinstance(error, _BrokenError)
                advice = (
                    "it changed since it was packed, or stays broken; upload it again"
                    if broken
                    else "check the network and the server"
                )
                raise InputError(
                    f"{url}: could not be read in {ATTEMPTS} attempts ({what.splitlines()[0]}); {advice}"
                ) from error
            time.sleep(FIRST_PAUSE * 2**attempt * random.uniform(0.7, 1.3))
    raise AssertionError


def read(url: str) -> bytes:
    """A small file, such as an index, fetched anew.
    InputError: it cannot be read, or is larger than an index may be.
    """

    def fetch() -> bytes:
        with tempfile.TemporaryDirectory(prefix="cxr-focus-index-") as folder:
            _get(url, os.path.join(folder, "index.json"), INDEX_BYTES)
            return Path(folder, "index.json").read_bytes()

    return _retry(url, fetch)  # type: ignore[no-any-return]


def _get(url: str, local: str, limit: int) -> None:
    """Fetch a file of at most ``limit`` bytes; `_BrokenError` (of an index InputError) as soon as there is more."""
    system, path = _file_system(url)
    from fsspec.callbacks import Callback

    more = f"has more than the {limit} bytes that"

    class Bounded(Callback):
        def set_size(self, size: int | None) -> None:
            self.refuse(size or 0)

        def relative_update(self, inc: int = 1) -> None:
            self.value += inc
            self.refuse(self.value)

        def absolute_update(self, value: int) -> None:
            self.refuse(value)

        def refuse(self, size: int) -> None:
            if size > limit:
                raise (
                    InputError(f"{url}: {more} an index may have")
                    if limit == INDEX_BYTES
                    else _BrokenError(f"{more} its index says")
                )

    if url.startswith("file://"):  # copied in one go, without a word to the callback
        Bounded().refuse(system.size(path))
    system.get_file(path, local, callback=Bounded())


_forked_safely = False


def _file_system(url: str) -> tuple[Any, str]:
    """The fsspec file system of a URL and the path in it. Asked for anew each time: its connections do not survive a
    fork.
    """
    scheme = url.partition("://")[0]
    if scheme not in EXTRAS and scheme != "file":
        raise InputError(f"{url}: shards are read from s3, gcs, http, https and file URLs, and from folders")
    global _forked_safely
    try:
        import fsspec
        import fsspec.asyn

        if not _forked_safely:
            # Loader workers are forks. They must not wait for an event loop whose thread stayed behind: fsspec's own
            # remedy.
            os.register_at_fork(after_in_child=fsspec.asyn.reset_lock)
            _forked_safely = True
        return fsspec.core.url_to_fs(url)  # type: ignore[no-any-return]
    except ImportError as error:
        raise InputError(
            f"{url}: needs another package: pip install '.[{EXTRAS.get(scheme, 'http')}]' in the checkout"
        ) from error
