"""Tables that name images, findings and, if known, splits, patients and lesion boxes."""

import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shards import deal
from shards.errors import InputError, listed, nearest
from shards.pixels import image_size
from shards.sample import NO_FINDING, SPLITS, Labels, clean_key, split_of_folder
from shards.sources.cells import Row, column, read_table
from shards.sources.drawn import read_outlines
from shards.sources.finder import Finder
from shards.sources.item import Item, LesionShare, Source, mixed, present, refuse_missing_class, refuse_torn, separated
from shards.sources.labels import NOBODY, Columns, contradicts, indicators, labelled

NIH_BOX_NAMES = {"Infiltrate": "Infiltration"}  # the archive's list of boxes has a spelling of its own


ANONYMOUS = re.compile(
    r"(anon\w*|unknown|unnamed|removed|redacted|de-?identified|patient|no ?name|test|x+|0+|none|null|nan?|n/a)",
    re.IGNORECASE,
)

# Names of the four columns of a lesion box, in pixels of the file: corners, or a corner and the sides.
CORNERS = (
    ("x0", "y0", "x1", "y1"),
    ("x_min", "y_min", "x_max", "y_max"),
    ("xmin", "ymin", "xmax", "ymax"),
    ("x1", "y1", "x2", "y2"),
)

SIDES = (("x", "y", "w", "h"), ("x", "y", "width", "height"))


# Entries of a sample's JSON that have a meaning
OWN = ("findings", "absent", "uncertain", "boxes", "lesion_masks", "source", "patient")


@dataclass
class Tabled:
    """An image of a table. ``boxes``: of its own rows, each with the row, its finding and x0 y0 x1 y1 in pixels of the
    file; ``kept``: other columns of its first row.
    """

    path: Path
    labels: Labels
    split: str
    patient: str
    boxes: list[tuple[Row, str, tuple[float, float, float, float]]]
    kept: tuple[tuple[str, str], ...] = ()


def read_listed(
    path: Path,
    images: Path,
    columns: Columns,
    declared: Sequence[str] | None,
    skipped: dict[str, int],
    notes: list[str],
    skip: bool,
    *,
    own_boxes: bool = True,
) -> tuple[list[Tabled], bool]:
    """The images that a table lists, in its order, and whether it has a column of 1, 0, -1 and nothing for each
    finding. Several rows of an image, one for each box or finding, are put together.

    InputError: a column that is not there, images outside the folder or missing, a row that is there twice, rows of an
    image that disagree.
    """
    flag = f"--csv {path}"
    names, rows = read_table(path, "--csv")
    for name in (columns.path, *columns.finding, *filter(None, (columns.split, columns.patient)), *columns.keep):
        column(names, flag, name)
    if own := [name for name in columns.keep if name in OWN]:
        raise InputError(f"--keep-column {own[0]}: is an entry that every sample has; rename the column")
    if "split" in names and not columns.split:
        skipped["column 'split', for --split-column was not given: patients are dealt anew"] += 1
    corners = box_columns(names)
    finder, found = Finder(images), dict[Path, Tabled]()
    rows_of: dict[Path, list[Row]] = defaultdict(list)
    torn: set[Path] = set()
    for row, labels in labelled(rows, names, columns, declared, flag, skipped, notes, skip):
        image = finder.find(row[columns.path])
        part = _split_name(row[columns.split], f"{flag}, image {row[columns.path]}") if columns.split else ""
        who = row[columns.patient] if columns.patient else ""
        box = box_of(row, corners, flag) if corners and own_boxes else None
        findings = labels.present
        boxes = [(row, findings[0], box)] if box and len(findings) == 1 and findings[0] != NO_FINDING else []
        kept = tuple((name, row[name]) for name in columns.keep)
        other = found.setdefault(image, Tabled(image, Labels(), part, who, [], kept))
        rows_of[image].append(row)
        both = Labels(*(tuple(dict.fromkeys(pair)) for pair in map(lambda a, b: (*a, *b), other.labels, labels)))
        if corners:  # a row for each box: what one row shows, others need not
            both = Labels(both.present, *(tuple(n for n in names if n not in both.present) for names in both[1:]))
        if (other.split, other.patient) != (part, who) or contradicts(both):
            same = (other.split, other.patient) == (part, who)
            twice = [n for n in both.present if n in (*both.absent, *both.uncertain)]
            what = "different splits or patients" if not same else listed(both.present)
            what = f"different things of {listed(twice)}" if same and twice else what
            if skip:
                torn.add(image)
                continue
            raise InputError(
                f"{flag}, rows {rows_of[image][0].line} and {row.line}: say {what} of one image, {row[columns.path]}; "
                "correct one"
            )
        other.labels = both
        other.boxes += boxes
    if torn:
        skipped["rows of one image that disagree"] += len(torn)
        found = {image: of for image, of in found.items() if image not in torn}
    outside = [str(image) for image in found if not image.is_relative_to(images)]
    if outside:
        raise InputError(
            f"{flag}: {len(outside)} images are not below --images {images}: {listed(outside)}; name the folder that "
            "holds them all"
        )
    # A row for each box is usual; rows without boxes, or that say the same, are a mistake.
    twice = [
        str(image)
        for image, of in rows_of.items()
        if len(of) > 1 and (not corners or len({tuple(row.values()) for row in of}) < len(of))
    ]
    if twice:
        raise InputError(
            f"{flag}: {len(twice)} images are listed more than once: {listed(twice)}; keep one row of each, with all "
            "its findings"
        )
    here = present(found, flag, skipped, skip)
    listed_ = [image for image, there in zip(found.values(), here, strict=True) if there]
    if corners and own_boxes and (count := sum(len(image.boxes) for image in listed_)):
        notes.append(f"lesion boxes are taken from the table's own columns {', '.join(corners)}: {count}")
    return listed_, indicators(rows, columns)


def box_columns(names: Sequence[str]) -> tuple[str, str, str, str] | None:
    """The columns of a lesion box, corners before sides, whatever their case; None where there are none."""
    lower = {name.lower(): name for name in names}
    for four in (*CORNERS, *SIDES):
        if all(name in lower for name in four):
            a, b, c, d = (lower[name] for name in four)
            return a, b, c, d
    return None


def box_of(row: Row, corners: tuple[str, str, str, str], flag: str) -> tuple[float, float, float, float] | None:
    """The box of a row as corners in pixels; None where all four cells are empty."""
    cells = [row[name] for name in corners]
    if all(cell.lower() in NOBODY for cell in cells):
        return None
    try:
        # 20,5 as in half of Europe
        x0, y0, x1, y1 = (float(cell.replace(",", ".")) if cell.count(",") == 1 else float(cell) for cell in cells)
    except ValueError as error:
        raise InputError(
            f"{flag}, row {row.line}: columns {', '.join(corners)} hold no four numbers ({error})"
        ) from error
    if corners[2].lower() in ("w", "width"):
        x1, y1 = x0 + x1, y0 + y1
    return x0, y0, x1, y1


def share_of(
    box: tuple[float, float, float, float], size: tuple[int, int], row: str, name: str
) -> tuple[float, float, float, float]:
    """A box in pixels of a file of that width and height, as shares of its sides. InputError: outside, or less than a
    pixel.
    """
    (x0, y0, x1, y1), (width, height) = box, size
    row = f"{row}: {x0:g} {y0:g} {x1:g} {y1:g}"
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise InputError(
            f"{row} is no box inside {name}, which is {width} wide and {height} high: two corners, the upper left one "
            "first; correct the row"
        )
    if min(x1 - x0, y1 - y0) < 1:
        raise InputError(
            f"{row} is less than a pixel of {name} ({width}x{height}): boxes are in pixels of the file, not in shares "
            "of it"
        )
    return x0 / width, y0 / height, x1 / width, y1 / height


def table(
    path: Path,
    images: Path,
    columns: Columns,
    *,
    declared: Sequence[str] | None = None,
    boxes: Path | None = None,
    lesions: Path | None = None,
    devices: Sequence[str] = (),
    seed: int = 0,
    shares: Sequence[float] = deal.SHARES,
    skip_missing: bool = False,
    unlisted: str = "",
) -> Source:
    """Rows of a CSV that name images, findings and, where they are known, splits and patients; ``boxes``: a CSV of
    lesion boxes; ``lesions``: a file of lesion masks, see `shards.sources.drawn`; ``devices``: names in these two that
    are no findings.

    Without a split column patients are dealt to the splits by ``seed`` and ``shares``; without a patient column every
    image counts as a patient. ``unlisted``: what a finding is that a row does not list, absent or unknown; empty:
    unknown in a table with a column for each finding, absent in one that names those that are there. InputError: as
    `read_listed`, and a patient in two splits.
    """
    flag = f"--csv {path}"
    skipped: dict[str, int] = defaultdict(int)
    notes: list[str] = []
    taken, cells = read_listed(path, images, columns, declared, skipped, notes, skip_missing, own_boxes=boxes is None)
    patient = np.array([image.patient if columns.patient else str(i) for i, image in enumerate(taken)])
    if columns.patient:
        nobody = sum(who.lower() in NOBODY for who in patient)
        if nobody:
            raise InputError(
                f"{flag}: {nobody} rows have no patient in column {columns.patient!r}; fill it, or leave those rows "
                "out of the table"
            )
        if not columns.split and len(taken) > 1 and len(set(patient)) == 1:
            raise InputError(
                f"{flag}: column {columns.patient!r} holds {str(patient[0])!r} for all {len(taken)} images, so nobody "
                "can be split; "
                "name the column that tells patients apart (or the study), or leave --patient-column out"
            )
        notes += alike_patients(patient)
    if columns.split:
        parts = [image.split for image in taken]
    else:
        part = deal.by_findings([image.labels.present for image in taken], patient, seed, shares)
        parts = [SPLITS[p] for p in part]
    findings = tuple(declared or dict.fromkeys(name for image in taken for name in image.labels.present))
    boxed = (
        _table_boxes(boxes, images, taken, columns, (*findings, *devices), skipped, skip_missing)
        if boxes
        else _own_boxes(taken, flag, image_size, skip_missing)
    )
    shown = {image.path: (*image.labels.present, *devices) for image in taken}
    outlines = read_outlines(lesions, images, shown, columns.path, skipped, notes) if lesions else {}
    items, sources = [], []
    for image, p, who in zip(taken, parts, patient, strict=True):
        extra = [*image.kept, ("source", image.path.name)]
        if columns.patient:
            extra.append(("patient", str(who)))
        sources.append(str(image.path.relative_to(images)))
        theirs = boxed.get(image.path, ())
        kept = tuple(box for box in theirs if box[0] in shown[image.path])
        if other := len(theirs) - len(kept):
            skipped["boxes of findings that their image is not labelled with"] += other
        items.append(
            Item(
                p,
                clean_key(os.path.splitext(sources[-1])[0]),
                image.labels.present,
                str(image.path),
                boxes=kept,
                extra=tuple(extra),
                absent=image.labels.absent,
                uncertain=image.labels.uncertain,
                outlines=tuple(outlines.get(image.path, ())),
            )
        )
    refuse_torn(items, flag)
    if declared or not cells:  # what has a column of its own need not be everywhere
        refuse_missing_class(items, declared, flag)
    asked = tuple(dict.fromkeys((*(columns.finding if cells else ()), *findings)))
    return Source(
        mixed(separated(items, sources)),
        dict(skipped),
        findings,
        notes=notes,
        asked=asked,
        unlisted=unlisted or ("unknown" if cells else "absent"),
    )


def alike_patients(patients: Iterable[str]) -> list[str]:
    """A warning for IDs that differ only by leading zeros, ``.0`` or case: one patient may be in two splits under two
    of them.
    """
    spellings: dict[str, set[str]] = defaultdict(set)
    for who in map(str, patients):
        spellings[re.sub(r"\.0+$", "", who.strip()).lstrip("0").casefold()].add(who)
    alike = [sorted(names) for names in spellings.values() if len(names) > 1]
    if not alike:
        return []
    examples = listed((" and ".join(map(repr, names)) for names in alike), 3)
    return [
        f"warning: {len(alike)} patients may stand under two IDs that differ only by zeros or case: {examples}; "
        "correct the table if they are one"
    ]


def _own_boxes(
    taken: Sequence[Tabled], flag: str, size: Callable[[Path], tuple[int, int]], skip: bool
) -> dict[Path, list[LesionShare]]:
    """The boxes of the table's own rows, by image."""
    found = {}
    for image in taken:
        if image.boxes:
            try:
                pixels = size(image.path)
            except InputError:
                if skip:  # the image itself is left out, and counted, when it is packed
                    continue
                raise
            found[image.path] = [
                (finding, share_of(box, pixels, f"{flag}, row {row.line}", image.path.name))
                for row, finding, box in image.boxes
            ]
    return found


def _table_boxes(
    path: Path,
    images: Path,
    known: Sequence[Tabled],
    columns: Columns,
    findings: Sequence[str],
    skipped: dict[str, int],
    skip_bad: bool,
) -> dict[Path, list[LesionShare]]:
    """Lesion boxes of the ``known`` images: columns of the image, of the finding, and four of the box in pixels of the
    file.
    """
    flag = f"--boxes {path}"
    names, rows = read_table(path, "--boxes")
    column(names, flag, columns.path)
    corners = box_columns(names)
    if corners is None:
        raise InputError(
            f"{flag}: has no column {next(n for n in (CORNERS if 'x0' in names else SIDES)[0] if n not in names)!r} of "
            f"a box; it has {listed(names, 30)}"
        )
    ill = [name for name in findings if name != NO_FINDING]
    sure = ill[0] if len(ill) == 1 and not {"finding", *columns.finding} & set(names) else ""
    of = "" if sure else column(names, flag, "finding", *columns.finding[:1])
    wanted, finder = {image.path for image in known}, Finder(images)
    boxes, sizes = defaultdict(list), dict[Path, tuple[int, int]]()
    for row in rows:
        image, finding = finder.find(row[columns.path]), sure or row[of]
        if image not in wanted:
            skipped["boxes of images that are not in the table"] += 1
            continue
        if finding not in findings:
            finding = NIH_BOX_NAMES.get(finding, finding)
        if finding not in findings:
            skipped[f"boxes of {finding!r}, which is no finding of the table{_close(finding, findings)}"] += 1
            continue
        box = box_of(row, corners, flag)
        if box is None:
            skipped["boxes without numbers"] += 1
            continue
        try:
            sizes[image] = sizes.get(image) or image_size(image)
        except InputError:
            if skip_bad:  # the image itself is left out, and counted, when it is packed
                continue
            raise
        boxes[image].append((finding, share_of(box, sizes[image], f"{flag}, row {row.line}", image.name)))
    if not boxes:
        why = (
            listed(f"{count} {what}" for what, count in skipped.items() if what.startswith("boxes"))
            or "no image with a box can be read"
        )
        raise InputError(
            f"{flag}: none of its {len(rows)} boxes can be used ({why}); expected paths in column {columns.path!r} and "
            "findings as in the table"
        )
    return boxes


def _close(name: str, known: Sequence[str]) -> str:
    close = nearest(name, known)
    return f" ({close})" if close.startswith("did you mean") else ""


def _split_name(value: str, where: str) -> str:
    name = split_of_folder(value)
    if not name:
        raise InputError(f"{where}: unknown split {value!r}; expected train, val or test")
    return name
