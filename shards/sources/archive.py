"""An archive as downloaded, read by its recipe (`shards.sources.recipe`)."""

import gzip
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from shards import deal
from shards.errors import InputError, listed, nearest
from shards.names import known_as
from shards.sample import NO_FINDING, SPLITS, SUPPORT_DEVICES, Labels, clean_key
from shards.sources.cells import cell_of
from shards.sources.item import Item, Source, mixed, present, refuse_torn, separated
from shards.sources.labels import NOBODY, contradicts
from shards.sources.listing import Listed, find_tables, images_of, kept_of
from shards.sources.marked import boxes_of, outlines_of
from shards.sources.recipe import Recipe
from shards.sources.said import agreed, readings
from shards.sources.tables import alike_patients


def archive(
    recipe: Recipe,
    root: Path,
    *,
    views: str = "frontal",
    task: Sequence[str] = (),
    agree: str = "majority",
    seed: int = 0,
    shares: Sequence[float] = deal.SHARES,
    skip_missing: bool = False,
) -> Source:
    """All images that a recipe finds below ``root``, with what the archive says of each.

    Args:
        views: ``frontal`` leaves out what is none by its table, and counts it.
        task: findings that are stored; without: all that the archive asks for.
        agree: of several readers of an image, ``any``, ``majority`` or ``all`` of whom must see a finding.
        seed, shares: of who goes where, as far as the archive does not say it.
        skip_missing: leave out images that are not there, and count them.

    Raises:
        InputError: no table, a column that is not there, images that are missing, a cell that says nothing of the kind,
            a patient in two splits.
    """
    if not root.is_dir():
        raise InputError(f"--root {root}: no such folder; name the folder of {recipe.title} as it was downloaded")
    skipped: dict[str, int] = defaultdict(int)
    notes: list[str] = []
    if recipe.overlap:
        notes.append(
            f"images of {recipe.title} are also in {listed(recipe.overlap)}: train on one and test on the other, and "
            "the "
            "figures say nothing"
        )
    images = images_of(recipe, root, views, skipped, notes)
    here = present([image.path for image in images], f"--root {root}", skipped, skip_missing)
    images = [image for image, there in zip(images, here, strict=True) if there]
    asked = _label(recipe, images, agree, task, skipped, f"--root {root}")
    images = [image for image in images if image.labels is not _NOTHING]
    if not images:
        raise InputError(f"--root {root}: no image is left ({listed(f'{n} {why}' for why, n in skipped.items())})")
    patients = _patients(recipe, images, notes)
    parts = _parts(recipe, root, images, patients, seed, shares, notes)
    boxes = boxes_of(recipe, root, images, skipped, notes, skip_missing)
    items = []
    for image, part, who in zip(images, parts, patients, strict=True):
        own = [box for box in boxes.get(image.path, ()) if box[0] in image.labels.present]
        skipped["boxes of findings that their image is not labelled with"] += len(boxes.get(image.path, ())) - len(own)
        said = {"source": image.name, "archive": recipe.name} | kept_of(recipe, image.rows[0])
        if recipe.patient is not None:
            said["patient"] = who
        items.append(
            Item(
                part,
                clean_key(os.path.splitext(image.path.relative_to(root).as_posix())[0]),
                image.labels.present,
                str(image.path),
                boxes=tuple(own),
                extra=tuple(sorted(said.items())),
                absent=image.labels.absent,
                uncertain=image.labels.uncertain,
                outlines=outlines_of(recipe, image),
            )
        )
    refuse_torn(items, f"--root {root}")
    names = [image.name for image in images]
    left_out = {why: n for why, n in skipped.items() if n}
    classes = tuple(name for name in asked if any(name in item.findings for item in items))
    source = Source(mixed(separated(items, names)), left_out, classes, notes=notes)
    return replace(source, asked=asked, unlisted=recipe.unlisted)


_NOTHING = Labels(("nothing that can be used",))


# -- labels ---------------------------------------------------------------------------------------------------------


def _label(
    recipe: Recipe,
    images: Sequence[Listed],
    agree: str,
    task: Sequence[str],
    skipped: dict[str, int],
    flag: str,
) -> tuple[str, ...]:
    """Write down what the archive says of each image; returns what it was asked for.

    An image of which it says No Finding and a finding, or a thing and its contrary, is left out and counted.
    """
    reads = [readings(recipe, image.rows, flag) for image in images]
    seen = Counter(name for read in reads for one in read or () for name in one.present)
    every = dict.fromkeys(recipe.named(name) for name in recipe.among) or dict.fromkeys(sorted(seen))
    asked = [name for name in every if name != NO_FINDING]
    if task:
        wanted = {known_as(name, asked, flag): name for name in task if name != NO_FINDING}
        if None in wanted:
            raise InputError(
                f"--task: {recipe.title} does not say anything of {wanted[None]}; {nearest(wanted[None], asked)}"
            )
        asked = [name for name in asked if name in wanted]
    known = {*asked, NO_FINDING}
    for image, read in zip(images, reads, strict=True):
        if read is None:
            image.labels = _NOTHING
            skipped["of which the archive says nothing that can be used"] += 1
            continue
        said = agreed(read, agree, recipe.unlisted == "absent")
        if contradicts(said):
            image.labels = _NOTHING
            skipped[f"{NO_FINDING} and something else, or a thing and its contrary"] += 1
            continue
        if other := [name for name in said.present if name not in every and name != NO_FINDING]:
            skipped[f"findings that {recipe.name} does not list, such as {other[0]}"] += len(other)
        kept = Labels(*(tuple(sorted(set(names) & known, key=_order)) for names in said))
        hidden = set(said.present) - known - {SUPPORT_DEVICES}
        if hidden and NO_FINDING not in kept.absent:  # it shows what is not stored
            kept = kept._replace(absent=(NO_FINDING, *kept.absent))
        image.labels = kept
    return (NO_FINDING, *asked)


def _order(name: str) -> tuple[bool, bool, str]:
    return name != NO_FINDING, name == SUPPORT_DEVICES, name


# -- who goes where -------------------------------------------------------------------------------------------------


def _patients(recipe: Recipe, images: Sequence[Listed], notes: list[str]) -> list[str]:
    if recipe.patient is None:
        notes.append(f"{recipe.title} does not tell patients apart: every image counts as a patient of its own")
        return [str(i) for i in range(len(images))]
    for image in images:
        cell_of(image.rows[0], recipe.patient.column, recipe.title)
    who = [recipe.patient.of(image.rows[0]) for image in images]
    if nobody := sum(one.lower() in NOBODY for one in who):
        raise InputError(f"{recipe.title}: {nobody} images have no patient in column {recipe.patient.column!r}")
    notes += alike_patients(who)
    return who


def _parts(
    recipe: Recipe,
    root: Path,
    images: Sequence[Listed],
    patients: Sequence[str],
    seed: int,
    shares: Sequence[float],
    notes: list[str],
) -> list[str]:
    """The split of each image: the archive's own, else dealt by patient."""
    parts = [image.split for image in images]
    if recipe.lists:
        of_list = {name: set(_list_of(root, file)) for name, file in recipe.lists.items()}
        every = [name for names in of_list.values() for name in names]
        if len(set(every)) < len(every):
            twice = sorted({name for name in every if every.count(name) > 1}) if len(every) < 10**4 else []
            raise InputError(f"--root {root}: images are in two of the lists of splits: {listed(twice)}; correct one")
        base = [os.path.basename(image.name) for image in images]
        parts = [next((name for name in of_list if one in of_list[name]), "") for one in base]
        if rest := [one for one, part in zip(base, parts, strict=True) if not part]:
            raise InputError(f"--root {root}: {len(rest)} images are in none of the lists: {listed(rest)}")
    found, who = [image.labels.present for image in images], np.array(patients)
    if not all(parts):
        if any(parts):
            raise InputError(f"{recipe.title}: some images have a split and some have none")
        dealt = deal.by_findings(found, who, seed, shares)
        notes.append("the archive has no splits of its own: patients are dealt by --seed and --ratios")
        return [SPLITS[part] for part in dealt]
    if recipe.val_share and "val" not in parts:
        rows = np.flatnonzero(np.array(parts) == "train")
        of_train = [found[row] for row in rows.tolist()]
        dealt = deal.by_findings(of_train, who[rows], seed, (1 - recipe.val_share, recipe.val_share, 0))
        for row, part in zip(rows.tolist(), dealt.tolist(), strict=True):
            parts[row] = SPLITS[part]
        notes.append(f"{100 * recipe.val_share:g}% of the patients of train are val, which the archive has not")
    return parts


def _list_of(root: Path, file: str) -> list[str]:
    found = find_tables(root, [file])
    if not found:
        raise InputError(f"--root {root}: has no {file}, which says who is in which split")
    try:
        with gzip.open(found[0], "rt") if found[0].suffix == ".gz" else found[0].open() as source:
            return source.read().split()
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise InputError(f"{found[0]}: cannot be read as a list of names ({error})") from error
