"""Lesion masks of a file of their own: polygons, run lengths, images of them.

Four layouts are told apart by what they hold:

    {"a.png": [{"finding": "Mass", "points": [[x, y], ...]}, ...]}               JSON by image
    {"a.png": [{"finding": "Mass", "size": [H, W], "counts": "..."}, ...]}       with COCO's run lengths
    {"images": [...], "annotations": [...], "categories": [...]}                 COCO
    path,finding,mask                                                            CSV: an image file of each mask, or
    path,finding,rle                                                             SIIM's relative runs over the image

Points are shares of the image's sides where none of the file is above 1, else pixels of the image's file.
"""

import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from shards.errors import InputError, listed, read_json
from shards.pixels import image_size
from shards.rle import Runs
from shards.sources.cells import column, read_table
from shards.sources.finder import Finder
from shards.sources.item import Outline

RLE = ("rle", "EncodedPixels")
NONE = ("", "-1")  # of a cell of runs: there is no lesion
OUTSIDE = 1  # pixels that a point may lie beyond the image's edge


class Drawn(NamedTuple):
    """A lesion as its file has it: image and finding as they are called there; one of polygons, runs, relative, file;
    where: of it, for messages.
    """

    image: str
    finding: str
    where: str
    polygons: tuple[tuple[tuple[float, float], ...], ...] = ()
    runs: Runs | None = None
    relative: str = ""
    file: str = ""


def read_outlines(
    path: Path,
    images: Path,
    known: Mapping[Path, Sequence[str]],
    path_column: str,
    skipped: dict[str, int],
    notes: list[str],
) -> dict[Path, list[Outline]]:
    """The outlines of each image, of findings that it shows.

    Args:
        known: the images that are packed, and what each of them shows.
        path_column: of a CSV.
        skipped: what is left out is counted here: lesions of other images, and of findings that an image does not show.

    Raises:
        InputError: none of the layouts, a polygon with fewer than three points or outside its image, runs that are
            none, no lesion that can be used.
    """
    flag = f"--lesions {path}"
    lesions = list(
        _from_table(path, path_column) if path.suffix.lower() in (".csv", ".gz", ".tsv") else _from_json(path)
    )
    shares = all(v <= 1 for lesion in lesions for polygon in lesion.polygons for point in polygon for v in point)
    if any(lesion.polygons for lesion in lesions):
        notes.append(
            f"{flag}: points are read as {'shares of the image sides' if shares else 'pixels of the image files'}"
        )
    finder, found = Finder(images), dict[Path, list[Outline]]()
    named: dict[str, list[Path]] = defaultdict(list)
    for image in known:
        named[image.name].append(image)
    sizes: dict[Path, tuple[int, int]] = {}
    for lesion in lesions:
        image, alike = finder.find(lesion.image), named[os.path.basename(lesion.image)]
        image = alike[0] if image not in known and len(alike) == 1 else image
        if image not in known:
            skipped["lesions of images that are not in the table"] += 1
        elif lesion.finding not in known[image]:
            skipped["lesions of findings that their image is not labelled with"] += 1
        else:
            if lesion.polygons or lesion.relative:
                sizes[image] = sizes.get(image) or image_size(image)
            found.setdefault(image, []).append(_outline(lesion, path.parent, sizes.get(image, (1, 1)), shares))
    if not found:
        why = (
            listed(f"{count} {what}" for what, count in skipped.items() if what.startswith("lesions")) or "it has none"
        )
        raise InputError(
            f"{flag}: none of its {len(lesions)} lesions can be used ({why}); expected images and findings as in the "
            "table"
        )
    return found


def _outline(lesion: Drawn, folder: Path, size: tuple[int, int], shares: bool) -> Outline:
    """As it is drawn later; ``size``: width and height of the image's file."""
    width, height = (1, 1) if shares else size
    slack = OUTSIDE if not shares else 1e-3
    for polygon in lesion.polygons:
        if len(polygon) < 3:
            raise InputError(f"{lesion.where}: a polygon of {len(polygon)} points; expected three or more")
        for x, y in polygon:
            if not (-slack <= x <= width + slack and -slack <= y <= height + slack):
                raise InputError(f"{lesion.where}: the point {x:g} {y:g} is outside of its image, {width}x{height}")
    return Outline(
        lesion.finding,
        tuple(tuple((x / width, y / height) for x, y in polygon) for polygon in lesion.polygons),
        (lesion.relative,) if lesion.relative else (),
        (size[1], size[0]) if lesion.relative else (0, 0),
        (lesion.runs,) if lesion.runs else (),
        (str(folder / lesion.file),) if lesion.file else (),
    )


def _from_table(path: Path, path_column: str) -> Iterator[Drawn]:
    flag = f"--lesions {path}"
    names, rows = read_table(path, "--lesions")
    image, finding = column(names, flag, path_column), column(names, flag, "finding")
    kind = column(names, flag, "mask", *RLE)
    for row in rows:
        where = f"{flag}, row {row.line}"
        if kind != "mask":
            if row[kind] not in NONE:
                yield Drawn(row[image], row[finding], where, relative=row[kind])
        elif row[kind]:
            if os.path.isabs(row[kind]) or ".." in Path(row[kind]).parts:
                raise InputError(f"{where}: the mask {row[kind]!r} leaves the folder of the table; name one below it")
            yield Drawn(row[image], row[finding], where, file=row[kind])


def _from_json(path: Path) -> Iterator[Drawn]:
    flag = f"--lesions {path}"
    if not path.is_file():
        raise InputError(f"{flag}: no such file")
    content = read_json(path, flag)
    try:
        if not isinstance(content, dict):
            raise ValueError("it is a list")
        if {"images", "annotations", "categories"} <= content.keys():
            yield from _from_coco(content, flag)
            return
        for image, lesions in content.items():
            for lesion in lesions:
                where = f"{flag}, {image}"
                if "counts" in lesion:
                    yield Drawn(image, str(lesion["finding"]), where, runs=_runs(lesion, where))
                else:
                    yield Drawn(image, str(lesion["finding"]), where, (_points(lesion["points"]),))
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{flag}: {type(error).__name__} {error}: expected lesions by image, "
            '{"a.png": [{"finding": "Mass", "points": [[x, y], ...]}]}, or COCO\'s images, annotations and categories'
        ) from error


def _from_coco(content: Mapping[str, Any], flag: str) -> Iterator[Drawn]:
    images = {image["id"]: image for image in content["images"]}
    kinds = {kind["id"]: str(kind["name"]) for kind in content["categories"]}
    for number, lesion in enumerate(content["annotations"]):
        image, finding = images[lesion["image_id"]], kinds[lesion["category_id"]]
        where, drawn, name = f"{flag}, annotation {number}", lesion["segmentation"], str(image["file_name"])
        if isinstance(drawn, dict):
            yield Drawn(name, finding, where, runs=_runs(drawn, f"{where} ({name}, {finding})"))
        elif drawn:
            polygons = tuple(_points(list(zip(one[::2], one[1::2], strict=True))) for one in drawn)
            yield Drawn(name, finding, where, polygons)


def _runs(drawn: Mapping[str, Any], where: str) -> Runs:
    try:
        return Runs.of(drawn["size"], drawn["counts"])
    except ValueError as error:
        raise InputError(f"{where}: {error}; COCO's runs are by column and cover the whole mask") from error


def _points(points: Any) -> tuple[tuple[float, float], ...]:
    return tuple((float(x), float(y)) for x, y in points)
