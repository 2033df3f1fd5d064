"""ChestX-Det's lists of lesions: JSON of images, each with names, boxes and, in the second release, polygons."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shards.errors import InputError, read_json
from shards.sources.cells import Row

COLUMNS = ("x0", "y0", "x1", "y1")


class Lesion(Row):
    """A lesion of an image, or that it has none: file_name, sym, x0, y0, x1, y1; ``polygon``: points in pixels."""

    polygon: Sequence[tuple[float, float]] = ()


def read_chestxdet(path: Path) -> list[Row]:
    """A row a lesion, one of an image without any. InputError: not such a list."""
    content = read_json(path, f"table {path}")
    rows: list[Row] = []
    try:
        for number, entry in enumerate(content, 1):
            names, boxes = entry["syms"], entry["boxes"]
            polygons = entry.get("polygons") or [[]] * len(names)
            for name, box, polygon in zip(names, boxes, polygons, strict=True):
                row = _row(entry, number, str(name), [str(float(v)) for v in box])
                row.polygon = [(float(x), float(y)) for x, y in polygon]
                if 0 < len(row.polygon) < 3:
                    raise ValueError(f"{entry['file_name']}: a polygon of {len(row.polygon)} points")
                rows.append(row)
            if not names:
                rows.append(_row(entry, number, "", [""] * 4))
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        raise InputError(f"table {path}: is no list of ChestX-Det ({error}); use the archive's own JSON") from error
    return rows


def _row(entry: dict[str, Any], number: int, name: str, box: Sequence[str]) -> Lesion:
    row = Lesion({"file_name": str(entry["file_name"]), "sym": name} | dict(zip(COLUMNS, box, strict=True)))
    row.line = number
    return row
