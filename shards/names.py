"""Which names are one finding, and ready-made lists of findings: what names.yaml says."""

import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from shards.errors import InputError, read_yaml
from shards.sample import TASKS, spelling


@cache
def _data() -> dict[str, Any]:
    content: dict[str, Any] = read_yaml(Path(__file__).with_name("names.yaml"), "names of findings")
    return content


@cache
def _groups() -> dict[str, str]:
    """The spelling of each name -> that of the first of its line."""
    return {spelling(name): spelling(line[0]) for line in _data()["same"] for name in line}


def same_as(name: str) -> str:
    """What all names of one finding have in common."""
    return _groups().get(spelling(name), spelling(name))


def lists() -> dict[str, tuple[str, ...]]:
    """The ready-made lists of findings, the published tasks first."""
    return TASKS | {name: tuple(findings) for name, findings in _data()["lists"].items()}


def known_as(name: str, names: Iterable[str], where: str) -> str | None:
    """Which of ``names`` is the finding ``name``: itself, or the one that is the same; None: none is.

    InputError: two of them are.
    """
    found = [other for other in dict.fromkeys(names) if same_as(other) == same_as(name)]
    if len(found) > 1:
        raise InputError(
            f"{where}: {' and '.join(map(repr, found))} are one finding under two names; give it one and pack again"
        )
    return found[0] if found else None


def exact_or_known_as(name: str, names: Iterable[str], where: str) -> str | None:
    """As `known_as`, but where the very name is among ``names`` it is that, whatever else is."""
    names = tuple(names)
    return name if name in names else known_as(name, names, where)


NUMBER = r"\d+(\.\d+)?"


def policy(text: str, allowed: str, flag: str) -> dict[str, str]:
    """A setting for all findings, or by finding: ``ones``, or ``Edema: ones, Atelectasis: ones, zeros``, where the one
    without a name is of all others. Returns name -> value, "" for all others.

    Args:
        allowed: a regular expression of values.

    Raises:
        InputError: a value that is none, a finding twice.
    """
    parsed: dict[str, str] = {}
    for part in filter(None, (part.strip() for part in text.strip().strip("{}").split(","))):
        name, _, value = (piece.strip() for piece in part.rpartition(":"))
        if name in parsed or not re.fullmatch(allowed, value):
            what = f"{name or 'a value for all'} is given twice" if name in parsed else f"{value!r} is no value"
            words = allowed.replace(NUMBER, "a number").split("|")
            raise InputError(
                f"{flag} {text}: {what}; expected {', '.join(words)}, for all or by finding, such as "
                f"'Edema: {words[0] if words[0] != 'a number' else '3'}'"
            )
        parsed[name] = value
    if not parsed:
        raise InputError(f"{flag}: is empty; leave it out, or say {', '.join(allowed.split('|')[:3])}")
    return parsed
