"""How an archive is laid out, as a file of shards/archives says it: which tables, where an image lies, what a cell
means.

    extends: a ready-made recipe, whose settings these replace
    title: what it is                    known_from: where the layout is known from
    tables: the tables that list images, a line each (or several lines an image), in their order:
      - {files: train.csv, split: train, optional: false, image: ..., format: csv}
    joins: tables whose columns are added: - {files: ..., by: [columns], optional: false}
    image: path below the root, with columns in braces: p{subject_id:2} is p and its first two signs; **/ at any depth
    patient, study, view, split: a column, or {column: ..., find: a regular expression whose first group it is}
    frontal: values of the view that are frontal
    lists: {train: file, test: file}: files that name the images of a split, a line each
    val_share: share of the train patients who become val where the archive has none
    keep: {age: column, ...}: what else stays in a sample
    findings: one of
      cells: columns of 1, 0, -1 and nothing, a list or {column: finding}; optional: columns that may be missing
      names: {column: ..., separator: '|', quoted: true, healthy: [...], nothing: [...], leave_out: [...]}
      rows: {column: ..., healthy: [...]}: a finding a line
      runs: {column: ..., finding: ..., none: ['-1'], size: [height, width]}: run lengths of lesions, as of SIIM
    healthy: {column: ..., values: [...]}: who is healthy by another column
    reader: the column of who read a line: findings are then agreed on
    among: findings that the archive asks for (without it: all that occur)
    rename: {its name: ours}
    unlisted: absent | unknown
    boxes: {columns: [x0, y0, x1, y1] or [x, y, w, h] as they are called, kind: corners | sides, finding: a name,
            finding_column: ..., size: [width, height] where they are not pixels of the file, files: a table of boxes,
            image_column: its images, with suffix or without}
    bad: names of image files that are known to be broken
    overlap: archives of the same images
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from shards.errors import InputError, nearest, read_yaml
from shards.index import UNLISTED
from shards.names import same_as
from shards.sample import NO_FINDING, SPLITS

READY = Path(__file__).parents[1] / "archives"
FORMATS = ("csv", "chestxdet")
KINDS = ("cells", "names", "rows", "runs")


@dataclass(frozen=True)
class Table:
    """A table of images; ``split``: of all of them, where it is one."""

    files: tuple[str, ...]
    split: str = ""
    optional: bool = False
    image: str = ""
    format: str = "csv"


@dataclass(frozen=True)
class Join:
    """A table whose columns are added to the rows that agree in ``by``."""

    files: tuple[str, ...]
    by: tuple[str, ...]
    optional: bool = False


@dataclass(frozen=True)
class Part:
    """What a cell holds, or the first group of a regular expression in it."""

    column: str
    find: str = ""

    def of(self, row: Mapping[str, str]) -> str:
        """Of a row; empty where there is nothing of the kind."""
        value = row.get(self.column, "")
        if not self.find:
            return value
        match = re.search(self.find, value)
        return match[1] if match else ""


@dataclass(frozen=True)
class Recipe:
    """See the module."""

    name: str
    title: str
    tables: tuple[Table, ...]
    image: str
    findings: Mapping[str, Any]
    unlisted: str
    known_from: str = ""
    joins: tuple[Join, ...] = ()
    patient: Part | None = None
    study: Part | None = None
    view: Part | None = None
    split: Part | None = None
    frontal: tuple[str, ...] = ()
    lists: Mapping[str, str] = field(default_factory=dict)
    val_share: float = 0.0
    keep: Mapping[str, str] = field(default_factory=dict)
    healthy: Mapping[str, Any] = field(default_factory=dict)
    reader: str = ""
    among: tuple[str, ...] = ()
    rename: Mapping[str, str] = field(default_factory=dict)
    boxes: Mapping[str, Any] = field(default_factory=dict)
    bad: tuple[str, ...] = ()
    overlap: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """How findings are told."""
        return next(kind for kind in KINDS if kind in self.findings)

    def named(self, name: str) -> str:
        """What a finding of the archive is called here: without commas, as in Hernia, Hiatal."""
        if same_as(name) == same_as(NO_FINDING):
            return NO_FINDING
        columns = self.findings.get("cells")
        name = columns.get(name, name) if isinstance(columns, dict) else name
        return self.rename.get(name, name).replace(",", "")  # which separates the findings of a --task


# Of the sections of a recipe: settings that there must be, and their types; others that there may be.
_TEXT, _LIST, _EITHER, _MAP = (str,), (list,), (str, list), (dict,)
_SECTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "cells": ({}, {}),
    "names": (
        {"column": _TEXT},
        {"separator": _TEXT, "quoted": (bool,), "healthy": _LIST, "nothing": _LIST, "leave_out": _LIST},
    ),
    "rows": ({"column": _TEXT}, {"healthy": _LIST}),
    "runs": ({"column": _TEXT, "finding": _TEXT, "size": _LIST}, {"none": _LIST}),
    "healthy": ({"column": _TEXT, "values": _LIST}, {}),
    "boxes": (
        {"columns": _LIST},
        {
            "kind": _TEXT,
            "finding": _TEXT,
            "finding_column": _TEXT,
            "size": _LIST,
            "files": _EITHER,
            "image_column": _TEXT,
        },
    ),
}
_TYPES: dict[str, Any] = {
    **dict.fromkeys(("title", "known_from", "image", "unlisted", "reader"), _TEXT),
    **dict.fromkeys(("tables", "joins", "frontal", "among", "bad", "overlap"), _LIST),
    **dict.fromkeys(("lists", "keep", "rename", "findings", "healthy", "boxes"), _MAP),
    **dict.fromkeys(("patient", "study", "view", "split"), (str, dict)),
    "val_share": (float, int),
}


def _check(content: dict[str, Any], where: str) -> None:
    """InputError for a setting of another type, or one within a section that nobody reads or that is missing."""
    for key, value in content.items():
        if not isinstance(value, _TYPES[key]):
            raise InputError(f"{where}: {key}: {value}: expected {_in_words(_TYPES[key])}")
    findings = content["findings"]
    kind = next(kind for kind in KINDS if kind in findings)
    for key in findings:
        if key not in (kind, "optional"):
            raise InputError(f"{where}: findings: unknown setting {key}; {nearest(str(key), (*KINDS, 'optional'))}")
    if kind == "cells":
        if not isinstance(findings[kind], list | dict) or not findings[kind]:
            raise InputError(f"{where}: findings: cells: expected columns, as a list or {{column: finding}}")
    else:
        _section(findings[kind], kind, f"{where}: findings: {kind}")
    for name in ("healthy", "boxes"):
        if name in content:
            _section(content[name], name, f"{where}: {name}")
    boxes = content.get("boxes", {})
    if boxes and (len(boxes["columns"]) != 4 or boxes.get("kind", "corners") not in ("corners", "sides")):
        raise InputError(f"{where}: boxes: expected four columns, and kind corners or sides")
    if boxes and not {"finding", "finding_column"} & boxes.keys():
        raise InputError(f"{where}: boxes: says nothing of finding or finding_column")
    if not 0 <= content.get("val_share", 0) < 1:
        raise InputError(f"{where}: val_share: {content['val_share']}: expected a share from 0 to below 1")


def _section(section: Any, name: str, where: str) -> None:
    needed, allowed = _SECTIONS[name]
    if not isinstance(section, dict):
        raise InputError(f"{where}: {section}: expected settings under it: {', '.join((*needed, *allowed))}")
    for key, value in section.items():
        if key not in (*needed, *allowed):
            raise InputError(f"{where}: unknown setting {key}; {nearest(str(key), (*needed, *allowed))}")
        kinds = {**needed, **allowed}[key]
        if not isinstance(value, kinds):
            raise InputError(f"{where}: {key}: {value}: expected {_in_words(kinds)}")
    for key in needed:
        if key not in section:
            raise InputError(f"{where}: says nothing of {key}")


def _in_words(kinds: Any) -> str:
    words = {str: "a text", list: "a list", dict: "settings under it", bool: "true or false", float: "a number"}
    return " or ".join(words[kind] for kind in kinds if kind in words)


def names() -> list[str]:
    """The ready-made recipes."""
    return sorted(path.stem for path in READY.glob("*.yaml"))


def read_recipe(name: str) -> Recipe:
    """A ready-made recipe by its name, or a file.

    InputError: there is none, or it does not say what it must, or it says what nobody reads.
    """
    path = READY / f"{name}.yaml"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        raise InputError(f"archive {name}: no such file, and no ready-made archive; {nearest(name, names())}")
    return _recipe(_content(path), path.stem, f"archive {name}")


def _content(path: Path) -> dict[str, Any]:
    content = read_yaml(path, "archive")
    if not isinstance(content, dict):
        raise InputError(f"archive {path}: expected `name: value` lines, see shards/sources/recipe.py")
    base = content.pop("extends", None)
    return content if base is None else _content(READY / f"{Path(str(base)).name}.yaml") | content


def _recipe(content: dict[str, Any], name: str, where: str) -> Recipe:
    known = [item.name for item in fields(Recipe) if item.name != "name"]
    for key in content:
        if key not in known:
            raise InputError(f"{where}: unknown setting {key}; {nearest(str(key), known)}")
    for key in ("title", "tables", "image", "findings", "unlisted"):
        if content.get(key) in (None, "", [], {}):
            raise InputError(f"{where}: says nothing of {key}; see shards/sources/recipe.py")
    if content["unlisted"] not in UNLISTED:
        raise InputError(f"{where}: unlisted: {content['unlisted']}: expected {' or '.join(UNLISTED)}")
    findings = content["findings"]
    if not isinstance(findings, dict) or len([kind for kind in KINDS if kind in findings]) != 1:
        raise InputError(f"{where}: findings: expected one of {', '.join(KINDS)}")
    _check(content, where)
    try:
        made = content | {
            "tables": tuple(_one(Table, entry) for entry in content["tables"]),
            "joins": tuple(_one(Join, entry) for entry in content.get("joins", ())),
        }
        for key in ("patient", "study", "view", "split"):
            if key in content:
                value = content[key]
                made[key] = Part(str(value)) if isinstance(value, str) else Part(**value)
                if made[key].find and not re.compile(made[key].find).groups:
                    raise InputError(f"{where}: {key}: find: {made[key].find}: has no group (...) that is taken")
        for key in ("frontal", "among", "bad", "overlap"):
            made[key] = tuple(str(one) for one in content.get(key, ()))
        recipe = Recipe(name=name, **made)
    except (TypeError, re.error) as error:
        raise InputError(f"{where}: {str(error).partition('.__init__() ')[2] or error}") from error
    for table in recipe.tables:
        if table.format not in FORMATS or table.split not in ("", *SPLITS):
            raise InputError(f"{where}: tables: expected format {' or '.join(FORMATS)} and split {', '.join(SPLITS)}")
    return recipe


def _one(kind: Any, entry: Any) -> Any:
    """A table or a join; ``files`` and ``by`` may be one name."""
    if not isinstance(entry, dict):
        raise TypeError(f"{entry}: expected {{files: ...}}")
    return kind(**{k: (v,) if k in ("files", "by") and isinstance(v, str) else _fixed(v) for k, v in entry.items()})


def _fixed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
