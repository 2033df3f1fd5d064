"""The images that an archive's tables list, by its recipe."""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shards.errors import InputError, listed
from shards.files import walk
from shards.sample import Labels, split_of_folder
from shards.sources.cells import Row, cell_of, read_table
from shards.sources.chestxdet import read_chestxdet
from shards.sources.finder import Finder
from shards.sources.nih import years
from shards.sources.recipe import Recipe, Table


@dataclass
class Listed:
    """An image of an archive: its file, its rows, and what they say."""

    path: Path
    name: str
    split: str
    rows: list[Row] = field(default_factory=list)
    labels: Labels = field(default_factory=Labels)


def find_tables(root: Path, files: Sequence[str]) -> list[Path]:
    """The first of the patterns that there is below the root or a folder of it, with ``.gz`` or without."""
    for pattern in files:
        if os.path.isabs(pattern) or ".." in Path(pattern).parts:
            raise InputError(f"table {pattern}: must lie below --root")
        for shape in (pattern, f"{pattern}.gz", f"*/{pattern}", f"*/{pattern}.gz"):
            if found := sorted(path for path in root.glob(shape) if path.is_file()):
                return found
    return []


def images_of(recipe: Recipe, root: Path, views: str, skipped: dict[str, int], notes: list[str]) -> list[Listed]:
    """The images that the tables list, in their order, each with its rows."""
    joined = [(join, _by_key(root, recipe, join.files, join.by, join.optional)) for join in recipe.joins]
    met: dict[int, set[tuple[str, ...]]] = defaultdict(set)
    finder, images = finder_of(recipe, root), dict[str, Listed]()
    for table, path, row in _rows(recipe, root):
        flag = f"{path.relative_to(root)}, row {row.line}"
        lacks = False
        for k, (join, others) in enumerate(joined):
            key = tuple(cell_of(row, name, flag) for name in join.by)
            met[k].add(key)
            if key in others:
                row.update({name: value for name, value in others[key].items() if name not in row})
            elif not join.optional:
                skipped[f"not in {listed(join.files)}"] += 1
                lacks = True
        if lacks:
            continue
        name = _filled(table.image or recipe.image, row, flag)
        if os.path.isabs(name) or "\0" in name or ".." in Path(name.replace("\\", "/")).parts:
            raise InputError(f"{flag}: the image {name!r} does not lie below --root; correct the row")
        if os.path.basename(name) in recipe.bad:
            skipped["known to be broken"] += 1
            continue
        if name not in images:
            if views == "frontal" and recipe.view is not None and (why := _other_view(recipe, row)):
                skipped[why] += 1
                continue
            images[name] = Listed(finder(name), name, table.split or _split_name(recipe, row, flag))
        elif images[name].split != (table.split or _split_name(recipe, row, flag)) or (
            recipe.patient is not None and recipe.patient.of(images[name].rows[0]) != recipe.patient.of(row)
        ):
            raise InputError(f"{flag}: says another split or patient of {name} than a row before; correct one")
        images[name].rows.append(row)
    for k, (join, others) in enumerate(joined):
        if alone := len(others.keys() - met[k]):
            notes.append(f"{alone} rows of {listed(join.files)} are of no image of {recipe.tables[0].files[0]}")
    same: dict[Path, str] = {}
    for image in images.values():
        if image.path in same:
            raise InputError(
                f"--root {root}: {same[image.path]} and {image.name} are one file, {image.path}; correct the table"
            )
        same[image.path] = image.name
    return list(images.values())


def _rows(recipe: Recipe, root: Path) -> Iterator[tuple[Table, Path, Row]]:
    """Every row of every table."""
    found = False
    for table in recipe.tables:
        paths = find_tables(root, table.files)
        if not paths and not table.optional:
            raise InputError(
                f"--root {root}: has no {' or '.join(table.files)}, in it or in a folder of it; is that {recipe.title} "
                "as "
                "it was downloaded?"
            )
        for path in paths:
            found = True
            if table.format == "chestxdet":
                rows: Sequence[Row] = read_chestxdet(path)
            else:
                rows = read_table(path, "table")[1]
            for row in rows:
                yield table, path, row
    if not found:
        raise InputError(f"--root {root}: has none of the tables of {recipe.title}")


def _by_key(
    root: Path, recipe: Recipe, files: Sequence[str], by: Sequence[str], optional: bool
) -> dict[tuple[str, ...], Row]:
    """The rows of a table by what they are joined on."""
    paths = find_tables(root, files)
    if not paths and not optional:
        raise InputError(f"--root {root}: has no {' or '.join(files)}, which {recipe.title} comes with")
    rows: dict[tuple[str, ...], Row] = {}
    for path in paths:
        for row in read_table(path, "table")[1]:
            flag = f"{path.relative_to(root)}, row {row.line}"
            key = tuple(cell_of(row, name, flag) for name in by)
            other = rows.setdefault(key, row)
            if dict(other) != dict(row):
                raise InputError(f"{flag}: says another thing of {', '.join(key)} than row {other.line}; correct one")
    return rows


def _filled(template: str, row: Row, flag: str) -> str:
    """A path with the cells of a row in place of ``{column}`` and ``{column:2}``."""

    def cell(match: re.Match[str]) -> str:
        value = cell_of(row, match[1], flag)
        return value[: int(match[2])] if match[2] else value

    return re.sub(r"\{([^{}:]+)(?::(\d+))?\}", cell, template)


def finder_of(recipe: Recipe, root: Path) -> Callable[[str], Path]:
    """What gives the file of a name: below the root, or without the name's first folder, which may be the archive's
    own; ``**/``: wherever it lies.
    """
    finder, anywhere = Finder(root), defaultdict[str, list[Path]](list)
    if any(template.startswith("**/") for template in (recipe.image, *(table.image for table in recipe.tables))):
        for path in walk(root):
            for key in {path.name, path.stem}:
                anywhere[key].append(path)

    def find(name: str) -> Path:
        if name.startswith("**/"):
            base = name.removeprefix("**/")
            found = anywhere.get(base) or anywhere.get(os.path.splitext(base)[0]) or [root / base]
            if len(found) > 1:
                raise InputError(
                    f"--root {root}: {base} is there {len(found)} times: {listed(found, 2)}; name a folder that holds "
                    "it "
                    "once, or remove the others"
                )
            return found[0]
        inner = name.partition("/")[2] or name
        for one in (name, inner, os.path.splitext(name)[0], os.path.splitext(inner)[0]):
            if (path := finder.find(one)).is_file():
                return path
        return root / (name if (root / name.partition("/")[0]).exists() else inner)

    return find


def _other_view(recipe: Recipe, row: Row) -> str:
    """Why a row is no frontal view; empty: it is one."""
    assert recipe.view is not None
    cell_of(row, recipe.view.column, recipe.title)
    view = recipe.view.of(row)
    if view.lower() in (name.lower() for name in recipe.frontal):
        return ""
    return f"no frontal view ({view})" if view else "of an unknown view"


def _split_name(recipe: Recipe, row: Row, flag: str) -> str:
    if recipe.split is None:
        return ""
    value = recipe.split.of(row)
    if not (name := split_of_folder(value)):
        raise InputError(f"{flag}: unknown split {value!r}; expected train, val or test")
    return name


def kept_of(recipe: Recipe, row: Row) -> dict[str, Any]:
    """What else of a row stays in the sample."""
    parts = {name: row.get(column, "") for name, column in recipe.keep.items()}
    for name, part in (("study", recipe.study), ("view", recipe.view)):
        if part is not None:
            parts[name] = part.of(row)
    if "birth" in parts:  # a year, beside the date of the study
        born, year = parts.pop("birth"), parts.get("date", "")[:4]
        if re.fullmatch(r"\d{4}(\.0)?", born) and re.fullmatch(r"\d{4}", year):
            parts["age"] = str(int(year) - int(born[:4]))
    parts["sex"] = parts.get("sex") or parts.pop("sex_", "")
    kept: dict[str, Any] = {name: value for name, value in parts.items() if value and name != "sex_"}
    if "age" in kept and (age := years(kept["age"])) is not None:
        kept["age"] = age
    return kept
