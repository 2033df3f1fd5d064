"""What the rows of an image say of findings, and what its readers agree on."""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from shards.sample import NO_FINDING, SUPPORT_DEVICES, Labels
from shards.sources.cells import Row, cell_of
from shards.sources.labels import NOBODY, cell_number
from shards.sources.recipe import Recipe


def readings(recipe: Recipe, rows: Sequence[Row], flag: str) -> list[Labels] | None:
    """What each reader of an image says; without readers there is one. None: nothing that can be used."""
    by_reader: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_reader[row.get(recipe.reader, "")].append(row)
    found = []
    for own in by_reader.values():
        said = [_row(recipe, row, flag) for row in own]
        if None in said:
            return None
        parts = [labels for labels in said if labels is not None]
        found.append(
            Labels(*(tuple(dict.fromkeys(n for one in part for n in one)) for part in zip(*parts, strict=True)))
        )
    return found


def _row(recipe: Recipe, row: Row, flag: str) -> Labels | None:
    """What a row says."""
    kind, settings = recipe.kind, recipe.findings[recipe.kind]
    where = f"{flag}, {row.table}, row {row.line}"
    if kind == "cells":
        said = _cells(recipe, settings, row, where)
    elif kind == "names":
        names = _names(settings, row, where)
        if names is None:
            return None
        said = Labels(tuple(dict.fromkeys(recipe.named(name) for name in names)))
    elif kind == "rows":
        name = cell_of(row, settings["column"], where)
        healthy = name.lower() in (one.lower() for one in settings.get("healthy", ()))
        said = Labels((NO_FINDING if healthy else recipe.named(name),) if name else ())
    else:
        text = cell_of(row, settings["column"], where)
        there = bool(text) and text not in {str(one) for one in settings.get("none", ())}
        said = Labels((settings["finding"],)) if there else Labels((), (settings["finding"],))
    if recipe.healthy:
        value = cell_of(row, recipe.healthy["column"], where)
        if value.lower() in (str(one).lower() for one in recipe.healthy["values"]):
            said = said._replace(present=(NO_FINDING, *said.present))
    return said


def _cells(recipe: Recipe, settings: Any, row: Row, where: str) -> Labels:
    columns: Mapping[str, str] = settings if isinstance(settings, dict) else {name: name for name in settings}
    states = {}
    for column, name in columns.items():
        if column not in row and column in recipe.findings.get("optional", ()):
            continue
        states[recipe.named(name)] = cell_number(cell_of(row, column, where), where, column)
    return Labels(*(tuple(name for name, state in states.items() if state == value) for value in (1.0, 0.0, -1.0)))


def _names(settings: Mapping[str, Any], row: Row, where: str) -> list[str] | None:
    """Names in a cell; None: the image is to be left out."""
    text = cell_of(row, settings["column"], where)
    if settings.get("quoted"):  # as Python writes a list: ['a', "b"]
        names = [(one or other).strip() for one, other in re.findall(r"'([^']*)'|\"([^\"]*)\"", text)]
    else:
        names = [name.strip() for name in text.split(settings.get("separator", "|"))]
    names = [name for name in names if name]
    lower = [name.lower() for name in names]
    nothing, healthy, leave_out = (
        [str(one).lower() for one in settings.get(what, ())] for what in ("nothing", "healthy", "leave_out")
    )
    if not names or any(name in leave_out or name in NOBODY for name in lower):
        return None
    kept = [name for name, low in zip(names, lower, strict=True) if low not in nothing]
    if not kept:
        return None
    return [NO_FINDING if name.lower() in healthy else name for name in kept]


def agreed(read: Sequence[Labels], agree: str, lists_all: bool) -> Labels:
    """What ``any``, the ``majority`` or ``all`` of an image's readers see. Uncertain is what enough of them
    see or hold for possible, absent the rest; so is No Finding where it is not agreed on, or a finding is.

    Args:
        lists_all: the absent are not listed.
    """
    if len(read) == 1:
        return read[0]
    least = {"any": 1, "majority": len(read) // 2 + 1, "all": len(read)}[agree]
    names = dict.fromkeys(name for one in read for part in one for name in part)
    votes = {name: sum(name in one.present for one in read) for name in names}
    perhaps = {name: n + sum(name in one.uncertain for one in read) for name, n in votes.items()}
    present = [name for name, n in votes.items() if n >= least]
    if any(name not in (NO_FINDING, SUPPORT_DEVICES) for name in present):
        present = [name for name in present if name != NO_FINDING]
    uncertain = [
        name for name in names if name not in present and perhaps[name] >= least and perhaps[name] > votes[name]
    ]
    absent = [name for name in names if name not in (*present, *uncertain)]
    if lists_all:  # the rest is not listed, but that the image is not healthy
        absent = [name for name in absent if name == NO_FINDING]
    if NO_FINDING not in (*present, *absent):
        absent.append(NO_FINDING)
    return Labels(tuple(present), tuple(absent), tuple(uncertain))
