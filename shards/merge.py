"""Finished shards -> their index, then the name that they were packed for.

Shards are made in ``DIR.partial/shards``, a note on each in ``DIR.partial/notes``.
"""

import os
import shutil
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from shards.atomic import sync
from shards.errors import InputError, listed, read_json
from shards.index import Indexed, write_index
from shards.tars import index_tar

SHARDS, NOTES = "shards", "notes"  # in the working folder


def work_folder(out: Path) -> Path:
    """Where the shards of ``out`` are made."""
    out = Path(os.path.abspath(out))
    return out.with_name(out.name + ".partial")


def note_of(work: Path, name: str) -> Path:
    """The note of the shard ``train/000000.tar``."""
    return work / NOTES / f"{name.replace('/', '-')}.json"


def refuse_existing(out: Path) -> None:
    """InputError unless ``out`` is missing or an empty folder that can be replaced: shards are never overwritten or
    mixed.
    """
    if out.is_symlink():
        raise InputError(f"--out {out}: is a link; name the folder itself")
    if out.is_dir() and (os.path.ismount(out) or out.resolve() == Path.cwd()):
        what = "a mounted volume" if os.path.ismount(out) else "the working folder"
        raise InputError(
            f"--out {out}: is {what}, which cannot be replaced in one step; name a folder inside it, such as "
            f"{out / 'shards'}"
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"--out {out}: already holds something; choose another folder or remove this one first")


def merge(out: Path) -> dict[str, Any]:
    """Finished shards in ``out.partial`` -> their index, then the name ``out``.
    InputError: which shards are missing.
    """
    work = work_folder(out)
    refuse_existing(out)
    try:
        plan = read_json(work / "plan.json")
        names: list[str] = plan["shards"]
    except (OSError, InputError, KeyError) as error:
        raise InputError(
            f"{work}: holds no packed parts; make them with `python -m shards ... --out {out} --part 1/N`"
        ) from error
    missing = [name for name in names if not note_of(work, name).is_file()]
    if missing:
        raise InputError(
            f"{work}: {len(missing)} of {len(names)} shards are not made yet: {listed(missing)}; run the parts that "
            "make them"
        )
    shards: dict[str, list[dict[str, Any]]] = defaultdict(list)
    parts: dict[str, list[Indexed]] = defaultdict(list)
    skipped: list[dict[str, str]] = []
    splits_of: dict[str, set[str]] = defaultdict(set)  # of each image
    remarks: Counter[str] = Counter()
    for name in names:
        split, note = name.partition("/")[0], read_json(note_of(work, name))
        skipped += note["skipped"]
        remarks.update(note.get("remarks", {}))
        if not note["rows"]:
            continue
        tar = work / SHARDS / name
        if not tar.is_file() or tar.stat().st_size != note["bytes"]:
            raise InputError(f"{tar}: is not the shard that was made; copy it again or run its part again")
        shards[split].append(
            {"name": name, "bytes": note["bytes"], "sha256": note["sha256"], "samples": len(note["rows"])}
        )
        # A part of an earlier version has no boxes and ids in its note: its shard does.
        parts[split].append(Indexed.of(note) if {"ids", "labels", "masks"} <= note.keys() else index_tar(tar)[0])
        for content in note["contents"]:
            splits_of[content].add(split)
    if not shards:
        raise InputError(f"{work}: every sample was skipped: {listed(s['key'] + ': ' + s['why'] for s in skipped)}")
    shared = sum(len(splits) > 1 for splits in splits_of.values())
    more = {
        "asked": plan.get("asked", []),
        "unlisted": plan.get("unlisted", "absent"),
        "stored": plan["stored"],
        "left_out": plan["left_out"],
        "skipped": skipped,
        "remarks": remarks,
        "in_two_splits": shared,
    }
    folder = work / SHARDS
    wanted = {shard["name"] for of_split in shards.values() for shard in of_split}
    for path in folder.glob("*/*"):  # of an earlier plan, or of a process that was killed
        if path.relative_to(folder).as_posix() not in wanted:
            path.unlink()
    index = write_index(folder, plan["dataset"], plan["classes"], shards, parts, more)
    if out.exists():
        out.rmdir()  # refuse_existing made sure that it is empty
    folder.rename(out)
    sync(work.parent)
    shutil.rmtree(work, ignore_errors=True)
    return index
