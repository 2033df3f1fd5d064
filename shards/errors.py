"""Errors for people: one line that says what is wrong, where, and what to do about it."""

import argparse
import difflib
import errno
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

ALONE = 3.0  # seconds after which a process says what the first one has not said


class InputError(ValueError):
    """The user's input cannot be used. The message is the whole explanation: what, where, what to do."""


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about an unknown ``name``:
    the known names closest to it, or all of them if none is close.
    """
    known = sorted(set(known))
    part, ends = name.lstrip("-"), {flag: flag.lstrip("-").rpartition(".")[2] for flag in known if flag[:2] == "--"}
    same = [flag for flag, end in ends.items() if part.startswith(end) or end.startswith(part)]
    if name[:2] == "--" and part and "." not in part and same:  # --lr: --optim.lr; --lambda: --balance.lam
        return f"did you mean {' or '.join(sorted(same, key=lambda flag: (ends[flag] != part, flag))[:3])}?"
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return f"did you mean {' or '.join(close)}?"
    if not known:
        return "none is known"
    shown = ", ".join(known[:24])
    return f"known are: {shown}{', ...' if len(known) > 24 else ''}"


def first_line(error: Exception) -> str:
    """What an error says first, or what kind it is."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def listed(items: Iterable[object], most: int = 5) -> str:
    """``a, b, c, d, e and 7 more``."""
    names = [str(item) for item in items]
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _twice(node: Any, seen: set[int]) -> Any:
    """The first name that is given twice in a mapping, as its node: the last one would win, unsaid."""
    if id(node) in seen or not isinstance(node, yaml.CollectionNode):
        return None
    seen.add(id(node))
    names: set[str] = set()
    for item in node.value:
        if isinstance(node, yaml.MappingNode):
            key, item = item
            if isinstance(key, yaml.ScalarNode) and key.value in names:
                return key
            names.add(str(key.value))
        if (found := _twice(item, seen)) is not None:
            return found
    return None


def read_yaml(path: Path, flag: str) -> Any:
    """Plain values of a YAML file; no tag builds an object. InputError: it cannot be read, is not YAML, gives a name
    twice.
    """
    try:
        text = path.read_text()
        twice = _twice(yaml.compose(text, yaml.SafeLoader), set())
        if twice is None:
            return yaml.safe_load(text)
    except OSError as error:
        raise InputError(f"{flag} {path}: cannot be read ({error.strerror})") from error
    except RecursionError as error:
        raise InputError(f"{flag} {path}: is nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{flag} {path}: is not YAML ({' '.join(str(error).split())})") from error
    raise InputError(f"{flag} {path}, line {twice.start_mark.line + 1}: {twice.value!r} is given twice; remove one")


def read_json(source: Path | bytes, where: str = "") -> Any:
    """Plain values of a JSON file, or of its bytes. InputError: it is not JSON, or nested too deeply. OSError: it
    cannot be read.
    """
    text = source.read_bytes() if isinstance(source, Path) else source
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        why = str(error) if isinstance(error, ValueError) else "nested too deeply"
        raise InputError(f"{where or str(source)}: is not JSON ({why}); it is damaged, restore it") from error


def finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: they become null."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


class CommandParser(argparse.ArgumentParser):
    """One-line errors with the nearest names, no abbreviations."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **{"formatter_class": argparse.ArgumentDefaultsHelpFormatter, **options})

    def error(self, message: str) -> None:  # type: ignore[override]
        """As argparse's, which would print the usage and exit."""
        raise InputError(f"{self.prog}: {message}; see {self.prog} --help")


def command_line(
    whole: CommandParser, commands: Mapping[str, CommandParser], argv: list[str] | None
) -> argparse.Namespace:
    """Parse a command and its flags; InputError names what is nearest to an unknown flag."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and argv[0] in commands:
        flags = list(commands[argv[0]]._option_string_actions)
        for token in argv[1:]:  # before argparse complains that what is misspelt is missing
            if token.startswith("--") and token.partition("=")[0] not in flags:
                raise InputError(f"unknown flag {token!r}; {nearest(token.partition('=')[0], flags)}")
    return whole.parse_args(argv)


FULL = (errno.ENOSPC, errno.EDQUOT)


def run(main: Callable[[], None]) -> None:
    """Run an entry point; turn what a user can mend into one line and exit code 2, an interrupt into exit code 130."""
    rank = int(os.environ.get("RANK", "0"))
    where = f"[process {rank}] " if rank else ""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # a file's name may not be text

    def tell(message: str) -> None:
        print(f"{where}error: {message}", file=sys.stderr, flush=True)
        sys.exit(2)

    try:
        main()
    except InputError as error:
        if rank:
            time.sleep(ALONE)  # the first process most likely says the same; the launcher then ends this one
        tell(str(error))
    except KeyboardInterrupt as interrupt:  # one that was asked for by a scheduler has a code of its own
        print(f"{where}interrupted", file=sys.stderr, flush=True)
        sys.exit(getattr(interrupt, "code", 130))
    except BrokenPipeError:  # `... | head` closed the pipe: nothing is wrong
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except OSError as error:
        if error.errno in FULL:
            tell(
                f"{error.filename or 'a file'}: cannot be written ({error.strerror}); free space and run it again, "
                "finished work is kept"
            )
        if error.filename is None or error.errno is None:
            raise
        tell(f"{error.filename}: {error.strerror}")
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        tell(WORKER_LOST)  # torch tells it from a signal handler, wherever the process is


WORKER_LOST = (
    "a loader process was killed, most likely for want of memory or of space in /dev/shm; use fewer "
    "--workers or a smaller --batch"
)
