"""DICOM files at any depth, with findings from their folders or a table."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from shards import deal
from shards.errors import InputError
from shards.files import walk
from shards.sample import SPLITS, Labels, split_of_folder
from shards.sources.folders import folder_finding
from shards.sources.item import Item, Source, mixed, refuse_missing_class, refuse_torn
from shards.sources.labels import Columns
from shards.sources.tables import ANONYMOUS, Tabled, _own_boxes, alike_patients, read_listed


def dicom(
    root: Path,
    salt: bytes,
    *,
    labels: Path | None = None,
    columns: Columns | None = None,
    declared: Sequence[str] | None = None,
    seed: int = 0,
    shares: Sequence[float] = deal.SHARES,
    skip_bad: bool = False,
    unlisted: str = "",
) -> Source:
    """DICOM files at any depth. Of the patient only a salted hash of the ID is stored, and the file's name and UID as
    one.

    Findings come from ``labels`` (a CSV whose path column names files below ``root``) or from the folders:
    ``train|val|test/<class>/...`` or ``<class>/...``, which is split by patient. ``unlisted``: see `tables.table`.
    """
    from shards.dicom import MISNAMED, UNREADABLE, Header, pseudonym, read_header

    if not root.is_dir():
        raise InputError(f"--path {root}: no such folder")
    skipped: dict[str, int] = defaultdict(int)
    notes: list[str] = []
    listed_images: dict[Path, Tabled] = {}
    cells = False  # a column for each finding
    if labels is not None:
        rows, cells = read_listed(labels, root, columns or Columns(), declared, skipped, notes, skip_bad)
        listed_images = {image.path: image for image in rows}
    paths = list(listed_images) if labels is not None else list(walk(root))
    headers: dict[Path, Header] = {}
    same: dict[str, list[Path]] = defaultdict(list)
    for path in paths:
        header = read_header(path)
        if isinstance(header, str):
            if not skip_bad and (labels is not None or header.startswith((UNREADABLE, MISNAMED))):
                remedy = (
                    "rename it"
                    if header.startswith(MISNAMED)
                    else "correct --csv"
                    if labels is not None
                    else "replace or remove it"
                )
                raise InputError(f"{path}: {header}; {remedy}, or leave it out with --on-bad skip")
            skipped[header.partition(":")[0]] += 1
        elif any(
            path.stat().st_size == other.stat().st_size and path.read_bytes() == other.read_bytes()
            for other in same[header.uid]
        ):
            skipped["a copy of another file"] += 1
        else:
            same[header.uid].append(path)
            headers[path] = header
    if not headers:
        raise InputError(
            f"--path {root}: no DICOM image in it "
            f"({', '.join(f'{n} {why}' for why, n in skipped.items()) or 'it is empty'})"
        )
    of_folder = _folder_labels(root, headers) if labels is None else {}
    nobody = _no_patients(headers.values(), notes)
    lesions = _own_boxes(
        [image for path, image in listed_images.items() if path in headers],
        f"--csv {labels}",
        lambda path: headers[path].size,
        skip_bad,
    )
    items, patients = [], []
    for path, header in headers.items():
        said, part = of_folder[path] if labels is None else (listed_images[path].labels, listed_images[path].split)
        patient = header.patient.strip()
        who = pseudonym((header.study or header.uid) if patient in nobody else patient, salt)
        extra = (("patient", who), *((("view", header.view),) if header.view else ()))
        number = 1 + same[header.uid].index(path)
        key = pseudonym(header.uid, salt) + (f"-{number}" if number > 1 else "")
        boxes = tuple(lesions.get(path, ()))
        items.append(
            Item(
                part,
                key,
                said.present,
                str(path),
                boxes=boxes,
                extra=extra,
                absent=said.absent,
                uncertain=said.uncertain,
            )
        )
        patients.append(who)
    if not all(item.split for item in items):
        if len(items) > 1 and len(set(patients)) == 1:
            notes.append(f"warning: all {len(items)} images have one patient ID and one study, so all are in one split")
        part_of = deal.by_findings([item.findings for item in items], np.array(patients), seed, shares)
        items = [replace(item, split=SPLITS[p]) for item, p in zip(items, part_of, strict=True)]
    names = tuple(declared or dict.fromkeys(name for item in items for name in item.findings))
    refuse_torn(items, f"--path {root}")
    if declared or not cells:
        refuse_missing_class(items, declared, f"--path {root}")
    asked = tuple(dict.fromkeys((*((columns or Columns()).finding if cells else ()), *names)))
    either = unlisted or ("unknown" if cells else "absent")
    return Source(mixed(items), dict(skipped), names, notes=notes, asked=asked, unlisted=either)


def _folder_labels(root: Path, paths: Iterable[Path]) -> dict[Path, tuple[Labels, str]]:
    """Finding and split of each file by its folders: ``<split>/<class>/...`` for all of them, or ``<class>/...`` for
    all of them.
    """
    found: dict[Path, tuple[Labels, str]] = {}
    first: dict[bool, str] = {}
    for path in paths:
        folders = path.relative_to(root).parts[:-1]
        part = split_of_folder(folders[0]) if folders else ""
        if len(folders) < (2 if part else 1):
            raise InputError(
                f"{path}: has no class; put files into <class>/ or train|val|test/<class>/ folders, or name a table "
                "with --csv"
            )
        first.setdefault(bool(part), folders[0])
        found[path] = Labels((folder_finding(folders[1] if part else folders[0]),)), part
    if len(first) > 1:
        raise InputError(
            f"--path {root}: the folder {first[True]} is a split, {first[False]} is none, so it is not said where its "
            "images belong; "
            "put all class folders into train, val and test, or none"
        )
    return found


def _no_patients(headers: Iterable[Any], notes: list[str]) -> set[str]:
    """Patient IDs that name nobody, for which the study stands:
    empty, a placeholder, or one ID on most of the studies.
    """
    studies: dict[str, set[str]] = defaultdict(set)
    images: Counter[str] = Counter()
    for header in headers:
        studies[header.patient.strip()].add(header.study or header.uid)
        images[header.patient.strip()] += 1
    count = len(set().union(*studies.values()))
    nobody = {
        who
        for who, of in studies.items()
        if len(of) > 1 and (ANONYMOUS.fullmatch(who) or (len(of) > count / 2 and len(of) >= 10))
    }
    if len(studies) == 1 and count > 1:
        nobody |= set(studies)
    if empty := images[""]:
        notes.append(f"warning: {empty} images have no patient ID: the images of one study count as one patient")
    for who in sorted(nobody - {""}):
        notes.append(
            f"warning: {images[who]} images have the patient ID {who!r}, which names nobody: the images of one study "
            "count as one patient"
        )
    notes += alike_patients(set(studies) - nobody)
    return nobody | {""}
