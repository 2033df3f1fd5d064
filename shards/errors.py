"""Errors for people: one line that says what is wrong, where, and what to do about it."""

import difflib
import os
import sys
import time
from collections.abc import Callable, Iterable

ALONE = 3.0  # seconds after which a process says what the first one has not said


class InputError(ValueError):
    """The user's input cannot be used. The message is the whole explanation: what, where, what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown ``name``: the known names closest to it, or all of them if none is close."""
    known = sorted(set(known))
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    if not known:
        return "none is known"
    shown = ", ".join(known[:12])
    return f"known are: {shown}{', ...' if len(known) > 12 else ''}"


def listed(items: Iterable[object], most: int = 5) -> str:
    """``a, b, c, d, e and 7 more``."""
    names = [str(item) for item in items]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def run(main: Callable[[], None]) -> None:
    """Run an entry point; turn what a user can mend into one line and exit code 2, an interrupt into exit code 130."""
    rank = int(os.environ.get("RANK", "0"))
    where = f"[process {rank}] " if rank else ""
    try:
        main()
    except InputError as error:
        if rank:
            time.sleep(ALONE)  # the first process most likely says the same; the launcher then ends this one
        print(f"{where}error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except (PermissionError, FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
        if error.filename is None:
            raise
        print(f"{where}error: {error.filename}: {error.strerror}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"{where}interrupted", file=sys.stderr, flush=True)
        sys.exit(130)
    except BrokenPipeError:  # `... | head` closed the pipe: nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
