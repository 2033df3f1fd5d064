"""NIH ChestX-ray14 as downloaded."""

import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shards import deal
from shards.errors import InputError, listed, nearest
from shards.files import walk
from shards.sample import EFFUSION, NO_FINDING, PNEUMOTHORAX, SPLITS, TASKS
from shards.sources.cells import column, read_cells, read_table
from shards.sources.item import Item, LesionShare, Source, present
from shards.sources.tables import NIH_BOX_NAMES

NIH_FINDINGS = (
    NO_FINDING, "Atelectasis", "Cardiomegaly", "Consolidation", "Edema", EFFUSION, "Emphysema", "Fibrosis", "Hernia",
    "Infiltration", "Mass", "Nodule", "Pleural_Thickening", "Pneumonia", PNEUMOTHORAX,
)  # fmt: skip

NIH_PIXELS = 1024.0  # lesion boxes of the archive are pixels of its 1024 x 1024 images


def nih_task(task: str) -> tuple[str, ...]:
    """Classes of ``--task``: a published task or names of the archive's findings; No Finding comes first unless it is
    named.
    """
    names = TASKS.get(task) or tuple(name.strip() for name in task.split(","))
    for name in names:
        if name not in NIH_FINDINGS:
            known = [t for t, classes in TASKS.items() if set(classes) <= set(NIH_FINDINGS)]
            more = f" ({name} is not a label of NIH ChestX-ray14)" if task in TASKS else ""
            raise InputError(f"--task {task}: unknown{more}; {nearest(name, (*NIH_FINDINGS, *known))}")
    if len(set(names)) < len(names):
        raise InputError(f"--task {task}: names a finding twice")
    return names if NO_FINDING in names else (NO_FINDING, *names)


def nih(
    images: Path,
    metadata: Path,
    task: str,
    *,
    how: str = "published",
    seed: int = 0,
    shares: Sequence[float] = deal.SHARES,
    balanced: bool = True,
    lists: Path | None = None,
    boxes: Path | None = None,
    skip_missing: bool = False,
) -> Source:
    """NIH ChestX-ray14 as downloaded: ``Data_Entry_2017(_v2020).csv`` and images at any depth.

    An image belongs to a finding when that is its one label. ``how``: ``published`` (Wu et al., DMKD 2026),
    ``official`` (train_val_list.txt and test_list.txt in ``lists``) or ``random`` (patients dealt by ``seed`` and
    ``shares``).
    """
    flag, classes = f"--metadata {metadata}", nih_task(task)
    names, rows = read_table(metadata, "--metadata")
    image = column(names, flag, "Image Index")
    labels, patient = column(names, flag, "Finding Labels"), column(names, flag, "Patient ID")
    age, sex, view = (
        column(names, flag, "Patient Age"),
        column(names, flag, "Patient Sex", "Patient Gender"),
        column(names, flag, "View Position"),
    )
    if not images.is_dir():
        raise InputError(f"--images {images}: no such folder")
    where: dict[str, str] = {}
    for path in walk(images):
        if path.suffix.lower() in (".png", ".jpg", ".jpeg"):
            other = where.setdefault(path.stem, str(path))
            if other != str(path):
                raise InputError(
                    f"--images {images}: {path.name} is there twice, in {os.path.dirname(other)} and in {path.parent}; "
                    "remove one"
                )
    if not where:
        raise InputError(
            f"--images {images}: no .png or .jpg at any depth; expected the archive's folders, such as "
            "images_001/images"
        )

    stems = [row[image].rpartition(".")[0] for row in rows]
    findings = [tuple(row[labels].split("|")) for row in rows]
    unknown = sorted({name for found in findings for name in found} - set(NIH_FINDINGS))
    if unknown:
        raise InputError(
            f"{flag}: labels that the archive does not have: {listed(unknown)}; {nearest(unknown[0], NIH_FINDINGS)}"
        )
    who = np.array([row[patient].strip() for row in rows])
    cases = deal.Cases(
        [row[image] for row in rows], findings, who, np.array([not skip_missing or stem in where for stem in stems])
    )
    if how == "published":
        parts = deal.published(cases, classes, seed, balanced=balanced)
    elif how == "official":
        parts = deal.official(
            cases, classes, seed, _official_test(lists or metadata.parent, cases.names), balanced=balanced
        )
    else:
        parts = deal.at_random(cases, classes, seed, shares, balanced=balanced)
    skipped: dict[str, int] = defaultdict(int)
    label = cases.labels(classes)
    wanted = [i for p in parts for i in p]
    there = np.array([stem in where for stem in stems])
    message = listed(
        (f"{name} {((label == k) & there).sum()} of {(label == k).sum()}" for k, name in enumerate(classes)),
        len(classes),
    )
    if not skip_missing:
        present(
            [Path(where.get(stems[i], images / rows[i][image])) for i in wanted],
            flag,
            skipped,
            False,
            f" (there are {message})",
        )
    elif not cases.here.any():
        raise InputError(f"--images {images}: none of the {len(rows)} images of {metadata.name} is there")
    else:
        skipped["listed but missing"] = int((~cases.here).sum())
    what = f"--task {task} --split {how} of {int(there.sum())} images that are there ({message})"
    deal.check(parts, label, who, classes, what, shares=shares if how == "random" else deal.SHARES)
    of_task = int((label[cases.here] >= 0).sum())
    skipped |= {
        "several findings, or none of the task's": int(cases.here.sum()) - of_task,
        "not drawn": of_task - len(wanted),
    }
    lesions = _nih_boxes(boxes) if boxes else {}
    items = []
    for name, part in zip(SPLITS, parts, strict=True):
        for i in part:
            row = rows[i]
            extra = (
                ("age", years(row[age])),
                ("patient", row[patient]),
                ("sex", row[sex]),
                ("source", row[image]),
                ("view", row[view]),
            )
            items.append(
                Item(
                    name,
                    stems[i],
                    (findings[i][0],),
                    where[stems[i]],
                    boxes=tuple(lesions.get(stems[i], ())),
                    extra=extra,
                )
            )
    return Source(items, {why: count for why, count in skipped.items() if count}, classes)


def years(text: str) -> float | None:
    """``058Y`` (2017) or ``58`` (2020) in years; months, weeks and days as shares of one."""
    match = re.fullmatch(r"(\d+)([YMWD]?)", text.strip())
    if not match:
        return None
    years = int(match[1]) / {"": 1, "Y": 1, "M": 12, "W": 52.18, "D": 365.25}[match[2]]
    return round(years, 2)


def _official_test(folder: Path, names: list[str]) -> set[str]:
    found = []
    for file in ("train_val_list.txt", "test_list.txt"):
        try:
            found.append(set((folder / file).read_text().split()))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"--lists {folder}: needs {file} for --split official; it comes with the archive"
            ) from error
    rest = [name for name in names if name not in found[0] and name not in found[1]]
    both = sorted(found[0] & found[1])
    if rest or both:
        raise InputError(
            f"--lists {folder}: {len(rest)} images of the metadata are in neither list ({listed(rest)}), {len(both)} "
            "in both; use the archive's own lists"
        )
    return found[1]


def _nih_boxes(path: Path) -> dict[str, list[LesionShare]]:
    """Lesion boxes by image, in shares of its sides. The file's header spans the four numbers with one name."""
    names, rows = read_cells(path, "--boxes")
    image, at = (names.index(column(names, f"--boxes {path}", name)) for name in ("Image Index", "Finding Label"))
    boxes = defaultdict(list)
    for _, cells in rows:
        try:
            x, y, w, h = (float(value) / NIH_PIXELS for value in cells[at + 1 : at + 5])
        except (ValueError, IndexError) as error:
            raise InputError(
                f"--boxes {path}: {cells[0]} has no box of four numbers; use the archive's BBox_List_2017.csv"
            ) from error
        name = NIH_BOX_NAMES.get(cells[at], cells[at])
        boxes[cells[image].rpartition(".")[0]].append((name, (x, y, x + w, y + h)))
    return boxes
