"""Where an archive's lesions are marked: boxes, run lengths, polygons."""

import os
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shards.errors import InputError
from shards.pixels import image_size
from shards.sources.cells import cell_of, read_table
from shards.sources.item import LesionShare, Outline
from shards.sources.listing import Listed, find_tables
from shards.sources.recipe import Recipe
from shards.sources.tables import share_of


def boxes_of(
    recipe: Recipe, root: Path, images: Sequence[Listed], skipped: dict[str, int], notes: list[str], skip_bad: bool
) -> dict[Path, list[LesionShare]]:
    """Lesion boxes in shares of their image, from its own rows or from a table of boxes."""
    b = recipe.boxes
    if not b:
        return {}
    found: dict[Path, list[LesionShare]] = defaultdict(list)
    pairs = [(image.path, row, "") for image in images for row in image.rows]
    if "files" in b:
        of_name = {os.path.splitext(os.path.basename(image.name))[0]: image.path for image in images}
        of_name |= {os.path.basename(image.name): image.path for image in images}
        pairs = []
        files = [b["files"]] if isinstance(b["files"], str) else b["files"]
        if not (tables := find_tables(root, files)):
            notes.append(f"there is no {' or '.join(files)}: no lesion boxes")
        for path in tables:
            for row in read_table(path, "table")[1]:
                name = os.path.basename(cell_of(row, b["image_column"], path.name))
                where = of_name.get(name) or of_name.get(os.path.splitext(name)[0])
                if where is None:
                    skipped["boxes of images that are left out or in no table"] += 1
                else:
                    pairs.append((where, row, f"{path.relative_to(root)}, "))
    sizes: dict[Path, tuple[int, int]] = {}
    for path, row, table in pairs:
        flag = f"{table}row {row.line}"
        cells = [cell_of(row, name, flag) for name in b["columns"]]
        if not any(cells):
            continue
        name = b.get("finding") or cell_of(row, b["finding_column"], flag)
        try:
            x0, y0, x1, y1 = map(float, cells)
        except ValueError as error:
            raise InputError(f"{flag}: columns {', '.join(b['columns'])} hold no four numbers ({error})") from error
        if b.get("kind") == "sides":
            x1, y1 = x0 + x1, y0 + y1
        try:
            sizes[path] = sizes.get(path) or tuple(b.get("size", ())) or image_size(path)
        except InputError:
            if skip_bad:  # the image itself is left out, and counted, when it is packed
                continue
            raise
        width, height = sizes[path]
        inside = (max(0.0, x0), max(0.0, y0), min(float(width), x1), min(float(height), y1))
        if inside != (x0, y0, x1, y1) and max(inside[0] - x0, inside[1] - y0, x1 - inside[2], y1 - inside[3]) <= 1:
            x0, y0, x1, y1 = inside  # rounded beyond the edge
        found[path].append((recipe.named(name), share_of((x0, y0, x1, y1), (width, height), flag, path.name)))
    return found


def outlines_of(recipe: Recipe, image: Listed) -> tuple[Outline, ...]:
    """Lesion masks: runs or polygons of the image's rows."""
    if recipe.kind == "runs":
        r: Mapping[str, Any] = recipe.findings["runs"]
        none = {str(one) for one in r.get("none", ())}
        runs = tuple(text for row in image.rows if (text := row[r["column"]]) and text not in none)
        height, width = r["size"]
        return (Outline(r["finding"], runs=runs, size=(height, width)),) if runs else ()
    drawn: dict[str, list[tuple[tuple[float, float], ...]]] = defaultdict(list)
    for row in image.rows:
        if polygon := getattr(row, "polygon", ()):
            width, height = image_size(image.path)
            for x, y in polygon:
                if not (-1 <= x <= width + 1 and -1 <= y <= height + 1):
                    where = f"{recipe.title}, {os.path.basename(image.name)}"
                    raise InputError(f"{where}: a polygon has the point {x:g} {y:g}, outside of {width}x{height}")
            name = recipe.named(row[recipe.findings["rows"]["column"]])
            drawn[name].append(tuple((x / width, y / height) for x, y in polygon))
    return tuple(Outline(name, polygons=tuple(polygons)) for name, polygons in drawn.items())
