"""python -m shards {phantom,nih,folder,csv,dicom,archive,masks,index,verify}: make shards, and check them."""

import argparse
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from shards.command import parser
from shards.errors import InputError, command_line, listed, read_json, run
from shards.names import same_as
from shards.sample import FINDINGS, NO_FINDING


def main(argv: list[str] | None = None) -> None:
    """Parse and run one command."""
    whole, commands = parser()
    arguments = command_line(whole, commands, argv)
    COMMANDS[arguments.command](arguments)


def _phantom(a: argparse.Namespace) -> None:
    from shards.phantom import SEVERAL, Phantoms, SeveralPhantoms

    if a.several is not None:
        if a.shortcut_kind != "marker":
            raise InputError(f"--shortcut-kind {a.shortcut_kind}: with --several the shortcut is a mark in the corner")
        names = SEVERAL if a.findings == ",".join(FINDINGS) else _names(a.findings)
        shares: dict[str, Any] = {"share": a.several, "unknown": a.unknown, "uncertain": a.uncertain}
        shares["lesion_masks"] = a.lesion_masks
        of_mark = {"shortcut": a.shortcut, "shortcut_test": a.shortcut_test}
        _pack(a, SeveralPhantoms(a.count, a.seed, size=a.size, findings=names, **shares, **of_mark), "phantom")
        return
    if a.unknown or a.uncertain:
        raise InputError("--unknown and --uncertain are of --several: one finding an image is always known")
    shortcut: dict[str, Any] = {"shortcut": a.shortcut, "shortcut_test": a.shortcut_test, "kind": a.shortcut_kind}
    shortcut["lesion_masks"] = a.lesion_masks
    _pack(a, Phantoms(a.count, a.seed, size=a.size, findings=_names(a.findings), **shortcut), "phantom")


def _nih(a: argparse.Namespace) -> None:
    from shards.sources.nih import nih

    source = nih(
        a.images,
        a.metadata,
        a.task,
        how=a.split,
        seed=a.seed,
        shares=_shares(a),
        balanced=a.balanced,
        lists=a.lists,
        boxes=a.boxes,
        skip_missing=a.on_bad == "skip",
    )
    _pack(a, source, "nih")


def _folder(a: argparse.Namespace) -> None:
    from shards.sources.folders import class_folders

    _pack(a, class_folders(a.path, a.seed, _shares(a)), a.path.resolve().name)


def _columns(a: argparse.Namespace) -> Any:
    from shards.sources.labels import Columns

    if not a.separator:
        raise InputError("--separator: must not be empty; leave it out where a cell holds one finding")
    keep = getattr(a, "keep_column", "")
    return Columns(
        a.path_column,
        _names(a.finding_column),
        a.split_column,
        getattr(a, "patient_column", ""),
        a.separator,
        _names(keep) if keep else (),
    )


def _csv(a: argparse.Namespace) -> None:
    from shards.sources.tables import table

    declared = _names(a.findings) if a.findings else None
    images = a.images or a.csv.parent
    source = table(
        a.csv,
        images,
        _columns(a),
        declared=declared,
        boxes=a.boxes,
        lesions=a.lesions,
        devices=_names(a.devices) if a.devices else (),
        seed=a.seed,
        shares=_shares(a),
        skip_missing=a.on_bad == "skip",
        unlisted=a.unlisted,
    )
    if not a.patient_column:
        print("no --patient-column: every image counts as a patient of its own, so one patient may be in two splits")
    _pack(a, source, a.csv.resolve().stem.removesuffix(".csv"))


def _dicom(a: argparse.Namespace) -> None:
    from shards.sources.dicom import dicom

    try:
        salt = a.salt_file.read_bytes().strip()
    except OSError as error:
        raise InputError(
            f"--salt-file {a.salt_file}: cannot be read ({error.strerror}); make one: head -c 32 /dev/urandom | base64 "
            f"> {a.salt_file}"
        ) from error
    if len(salt) < 16:
        raise InputError(
            f"--salt-file {a.salt_file}: {len(salt)} bytes are too few to keep IDs from being guessed; at least 16"
        )
    declared = _names(a.findings) if a.findings else None
    source = dicom(
        a.path,
        salt,
        labels=a.csv,
        columns=_columns(a),
        declared=declared,
        seed=a.seed,
        shares=_shares(a),
        skip_bad=a.on_bad == "skip",
        unlisted=a.unlisted,
    )
    _pack(a, source, a.path.resolve().name)


def _archive(a: argparse.Namespace) -> None:
    from shards.names import lists
    from shards.sources.archive import archive
    from shards.sources.recipe import read_recipe

    recipe = read_recipe(a.name)
    source = archive(
        recipe,
        a.root,
        views=a.views,
        task=(lists().get(a.task) or _names(a.task)) if a.task else (),
        agree=a.agree,
        seed=a.seed,
        shares=_shares(a),
        skip_missing=a.on_bad == "skip",
    )
    _pack(a, source, recipe.name)


def _masks(a: argparse.Namespace) -> None:
    from shards.sources.folders import image_masks

    if not 0 < a.val_share < 1:
        raise InputError(f"--val-share {a.val_share}: a share lies between 0 and 1")
    _pack(a, image_masks(a.images, a.masks, a.val_share, a.test_share), a.source or a.images.resolve().parent.name)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise InputError(f"{text!r}: expected different names, separated by commas")
    return names


def _shares(a: argparse.Namespace) -> list[float]:
    try:
        shares = [float(share) for share in a.ratios.split(",")]
    except ValueError:
        shares = []
    if len(shares) != 3 or not all(0 <= share <= 1 for share in shares) or abs(sum(shares) - 1) > 1e-6:
        raise InputError(
            f"--ratios {a.ratios}: expected three shares of train, val and test that add up to 1, such as 0.6,0.2,0.2 "
            "or 0,0,1"
        )
    return shares


def _pack(a: argparse.Namespace, source: Any, dataset: str) -> None:
    from shards.pack import pack

    for flag in ("per_shard", "workers"):
        if getattr(a, flag) is not None and getattr(a, flag) < 1:
            raise InputError(f"--{flag.replace('_', '-')} {getattr(a, flag)}: at least 1")
    if not 16 <= a.size <= 4096:
        raise InputError(f"--size {a.size}: expected 16 to 4096 pixels")
    if "://" in str(a.out).replace(":/", "://"):
        raise InputError(
            f"--out {str(a.out).replace(':/', '://')}: shards are packed into a folder; upload it afterwards, "
            "index.json last"
        )
    bits = getattr(a, "bits", None)
    if bits is not None and not 9 <= bits <= 16:
        raise InputError(f"--bits {bits}: expected 9 to 16")
    source.size, source.aspect, source.bits = a.size, getattr(a, "aspect", "stretch"), bits
    index = pack(
        source,
        a.out,
        dataset=dataset,
        form=a.format,
        per_shard=a.per_shard,
        workers=a.workers,
        on_bad=getattr(a, "on_bad", "stop"),
        part=_part(a.part),
    )
    if index is None:
        print(
            f"part {a.part} is made in {a.out}.partial; when all are, `python -m shards index --merge {a.out}` makes "
            f"{a.out}"
        )
    else:
        _made(index, a.out)
    for why, count in source.skipped.items():  # at the end, where they are seen
        print(f"left out {count}: {why}")
    for note in source.notes:
        print(
            note if note.startswith("warning") else f"note: {note}",
            file=sys.stderr if note.startswith("warning") else sys.stdout,
        )
    if getattr(a, "boxes", None):
        boxed = [len(item.boxes) for item in source.items if item.boxes]
        print(f"{sum(boxed)} lesion boxes are on {len(boxed)} of the images")
    if getattr(a, "lesions", None):
        drawn = [len(item.outlines) for item in source.items if item.outlines]
        print(f"{sum(drawn)} lesion masks are on {len(drawn)} of the images")


def _part(text: str) -> tuple[int, int] | None:
    if not text:
        return None
    i, _, n = text.partition("/")
    if not (i.isdecimal() and n.isdecimal() and 1 <= int(i) <= int(n)):
        raise InputError(f"--part {text}: expected I/N with I from 1 to N, such as 3/16")
    return int(i), int(n)


def _made(index: dict[str, Any], out: Path) -> None:
    _table(index)
    _odd_names(index)
    skipped = index.get("skipped", [])
    if "train" in index["splits"] and "val" not in index["splits"]:
        print("there is no val split: training needs train and val")
    elif "test" not in index["splits"]:
        print("there is no test split: figures will be of val, which chooses the best epoch, too")
    if skipped:
        first = listed((f"{s['key']}: {s['why']}" for s in skipped), 3)
        print(f"skipped {len(skipped)} that could not be used, listed in {out / 'index.json'}; the first: {first}")
    for remark, count in index.get("remarks", {}).items():
        print(f"warning: {count} of {sum(entry['samples'] for entry in index['splits'].values())} samples: {remark}")
    for name in index["findings"]:
        empty = [split for split, entry in index["splits"].items() if not entry["findings"][name]]
        if empty:
            if name == NO_FINDING and index["unlisted"] != "absent":
                continue
            stops = (
                "a training whose task names it will be refused"
                if index["unlisted"] == "absent"
                else ("it cannot be learnt or measured there")
            )
            print(f"warning: {listed(empty)} has no image of {name}: {stops}")
    if index.get("in_two_splits"):
        print(
            f"warning: {index['in_two_splits']} images are in more than one split: `python -m shards verify {out}` "
            "names them"
        )
    print(f"wrote {out}")


def _odd_names(index: dict[str, Any]) -> None:
    """Findings that may be one under two names, and sets without healthy images."""
    counts = {name: sum(entry["findings"][name] for entry in index["splits"].values()) for name in index["findings"]}
    alike: dict[str, list[str]] = defaultdict(list)
    for name in counts:
        alike[same_as(name)].append(name)
    for names in alike.values():
        if len(names) > 1:
            spellings = " and ".join(f"{name!r} ({counts[name]})" for name in names)
            print(
                f"note: {spellings} are findings of their own, as they are spelt; if they are one, give them one name "
                "and pack again (--labels.kind any refuses them)"
            )
    lists_all = index["unlisted"] == "absent"
    if lists_all and index["findings"] and NO_FINDING not in (*index["findings"], *index["asked"]):
        print(
            f"note: no image is called {NO_FINDING!r}, as healthy ones must be; is that what "
            f"{listed(index['findings'])} means?"
        )


def _index(a: argparse.Namespace) -> None:
    from shards.merge import merge
    from shards.tars import build_index

    if a.merge:
        _made(merge(a.dir), a.dir)
        return
    if not a.dir.is_dir():
        raise InputError(f"{a.dir}: no such folder; index works on a folder of this machine")
    old = _old_index(a.dir)
    dataset = old.get("dataset", a.dir.resolve().name)
    classes = _names(a.findings) if a.findings else old.get("classes")
    said = {"asked": old.get("asked", []), "unlisted": a.unlisted or old.get("unlisted", "absent")}
    index = build_index(a.dir, dataset=dataset, classes=classes, stored=old.get("stored"), **said)
    _table(index)
    _odd_names(index)


def _old_index(folder: Path) -> dict[str, Any]:
    """What an index that is written anew keeps of the old one; nothing where there is none that can be read."""
    path = folder / "index.json"
    try:
        old = read_json(path) if path.is_file() else {}
    except InputError:
        return {}
    kinds = {"dataset": str, "classes": list, "stored": dict, "asked": list, "unlisted": str}
    if not isinstance(old, dict):
        return {}
    return {name: old[name] for name, kind in kinds.items() if isinstance(old.get(name), kind)}


def _table(index: dict[str, Any]) -> None:
    names = index["findings"]
    width = max([7, *map(len, names)])
    print(f"{'':{width}}" + "".join(f"{split:>9}" for split in index["splits"]))
    for name in names:
        print(f"{name:{width}}" + "".join(f"{entry['findings'][name]:>9}" for entry in index["splits"].values()))
    print(f"{'images':{width}}" + "".join(f"{entry['samples']:>9}" for entry in index["splits"].values()))


def _verify(a: argparse.Namespace) -> None:
    from shards.verify import verify

    if "://" not in a.dir and not os.path.isdir(a.dir):
        raise InputError(f"{a.dir}: no such folder; name a folder of packed shards")
    index, problems = verify(a.dir, a.workers)
    for problem in problems[:20]:
        print(problem)
    _table(index)
    if problems:
        more = f", the first {min(len(problems), 20)} above" if len(problems) > 20 else ", above"
        raise InputError(f"{a.dir}: {len(problems)} problem{'s' if len(problems) > 1 else ''}{more}")
    print(f"{a.dir}: all is well")


COMMANDS = {
    "phantom": _phantom,
    "nih": _nih,
    "folder": _folder,
    "csv": _csv,
    "dicom": _dicom,
    "archive": _archive,
    "masks": _masks,
    "index": _index,
    "verify": _verify,
}

if __name__ == "__main__":
    run(main)
