"""Where lesions lie, as the tables of an index say it: boxes, and masks in a few bytes.

Legend: M lesions of a split, in the order of its samples, of findings that are present and of the task; position int64
[M]; finding int64 [M], its number in the task.
"""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from shards.coarse import CUTS, CoarseMask, coarse
from shards.index import MASK


class Lesions(NamedTuple):
    """Boxes: xyxy float64 [M,4], pixels of the stored image, ends exclusive."""

    position: np.ndarray
    finding: np.ndarray
    xyxy: np.ndarray


class LesionMasks(NamedTuple):
    """Masks: rows [M] of `shards.index.MASK`, whose xyxy are pixels of the stored image."""

    position: np.ndarray
    finding: np.ndarray
    rows: np.ndarray


def coarse_of(row: Any) -> CoarseMask:
    """Of a row of `MASK`."""
    x0, y0, x1, y1 = row["xyxy"].tolist()
    return CoarseMask((x0, y0, x1, y1), int(row["cut"]), row["cells"])


def from_samples(metas: Iterable[dict[str, Any]], kind: str, dtype: np.dtype) -> tuple[np.ndarray, list[str]]:
    """A table of ``boxes`` or ``masks`` from the samples' JSON, its rows counting these, and the names of findings that
    it numbers.
    """
    numbers: dict[str, int] = {}
    lines: list[tuple] = []
    for position, meta in enumerate(metas):
        for lesion in meta["boxes" if kind == "boxes" else "lesion_masks"]:
            number = numbers.setdefault(lesion.finding, len(numbers))
            if kind == "boxes":
                lines.append((position, number, lesion.xyxy))
            elif (small := coarse(lesion.runs.mask())) is not None:
                lines.append((position, number, *small))
    return np.array(lines, dtype), list(numbers)


def wrong_with(table: np.ndarray, findings: int, samples: int) -> str:
    """What makes a table of lesions impossible in an index of so many findings and samples; empty: nothing."""
    row = table["row"]
    if not len(row):
        return ""
    if table["finding"].max() >= findings or int(row.max()) >= samples or not (row[1:] >= row[:-1]).all():
        return "names samples or findings that index.json does not have"
    if not np.isfinite(table["xyxy"]).all():
        return "has a box of no numbers"
    if table.dtype == MASK:
        empty = (table["xyxy"][:, :2] >= table["xyxy"][:, 2:]).any() or not table["cut"].all()
        return "has a mask that is none" if empty or table["cut"].max() >= CUTS else ""
    return ""
