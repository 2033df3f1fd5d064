"""python -m shards {phantom,nih,folder,csv,dicom,masks,index,verify}: make shards, and check them."""

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from shards.deal import SHARES
from shards.errors import CommandParser, InputError, command_line, listed, run
from shards.pixels import ASPECTS, FORMATS
from shards.sample import FINDINGS, NO_FINDING, spelling


def parser() -> tuple[CommandParser, dict[str, CommandParser]]:
    """The command line, and each command's own."""
    main = CommandParser(prog="python -m shards", description=__doc__)
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=CommandParser)

    phantom = commands.add_parser("phantom", help="synthetic radiographs with known lungs and lesions")
    phantom.add_argument("--count", type=int, required=True, help="images of all splits together (60/20/20)")
    phantom.add_argument("--findings", default=",".join(FINDINGS), help="which findings, separated by commas")
    phantom.add_argument(
        "--shortcut", type=float, help="plant a shortcut; its correlation with the finding in train and val, -1..1"
    )
    phantom.add_argument("--shortcut-test", type=float, default=0.0, help="its correlation in test, with --shortcut")
    phantom.add_argument(
        "--shortcut-kind",
        choices=("marker", "tube"),
        default="marker",
        help="a mark in the corner, or a tube inside a lung",
    )

    nih = commands.add_parser("nih", help="NIH ChestX-ray14 as downloaded")
    nih.add_argument(
        "--images", type=Path, required=True, help="folder with the images at any depth (images_001/images/*.png ...)"
    )
    nih.add_argument(
        "--metadata", type=Path, required=True, help="Data_Entry_2017_v2020.csv or the older one (.gz too)"
    )
    nih.add_argument(
        "--task",
        required=True,
        help="ne, np, nep, nc, or findings separated by commas; an image belongs to a finding that is its one label",
    )
    nih.add_argument(
        "--split",
        choices=("published", "official", "random"),
        default="published",
        help="published: the positives of Wu et al. 2026; official: test_list.txt; random: patients dealt by --seed "
        "and --ratios",
    )
    nih.add_argument(
        "--lists",
        type=Path,
        help="folder of train_val_list.txt and test_list.txt, for --split official (without it: that of --metadata)",
    )
    nih.add_argument("--boxes", type=Path, help="BBox_List_2017.csv: lesion boxes, scaled to the stored images")
    nih.add_argument(
        "--balanced",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="as many images of every class in each split",
    )

    folder = commands.add_parser("folder", help="class folders: train|val|test/<class>/*.png, or <class>/*.png")
    folder.add_argument(
        "--path",
        type=Path,
        required=True,
        help="folder with train, val and test, or with the classes, whose images are then dealt",
    )

    table = commands.add_parser("csv", help="a table that names images, findings and, if known, splits and patients")
    table.add_argument("--csv", type=Path, required=True, help="the table, with a header (.gz too)")
    table.add_argument(
        "--images", type=Path, help="folder that the paths in the table start from (without it: the table's own)"
    )
    table.add_argument("--patient-column", default="", help="column of the patient: nobody is put into two splits")
    boxes = (
        "a table of lesion boxes: the same path column, finding, and x0, y0, x1, y1 or x, y, w, h in pixels of "
        "the file (without it: such columns of --csv)"
    )
    table.add_argument("--boxes", type=Path, help=boxes)

    dicom = commands.add_parser("dicom", help="DICOM radiographs at any depth (extra: dicom)")
    dicom.add_argument(
        "--path",
        type=Path,
        required=True,
        help="folder; findings are its <class>/ or train|val|test/<class>/ folders, or come from --csv",
    )
    dicom.add_argument(
        "--salt-file",
        type=Path,
        required=True,
        help="a secret of your own to hash patient IDs with; the same salt gives the same hashes",
    )
    dicom.add_argument("--csv", type=Path, help="a table with the path below --path and the finding of each file")

    for command in (table, dicom):
        command.add_argument("--path-column", default="path", help="column with the image file")
        command.add_argument(
            "--finding-column",
            default="finding",
            help="column with the finding(s), or several columns of 0 and 1, separated by commas",
        )
        command.add_argument("--separator", default="|", help="what separates several findings in one cell")
        command.add_argument(
            "--split-column",
            default="",
            help="column with train, val or test (without it: patients are dealt by --seed and --ratios)",
        )
        command.add_argument(
            "--findings", help="the findings that may occur, separated by commas (without it: all that occur)"
        )

    masks = commands.add_parser("masks", help="images and lung masks, to train a lung segmenter")
    masks.add_argument("--images", type=Path, required=True, help="folder of radiographs")
    masks.add_argument(
        "--masks",
        type=Path,
        required=True,
        action="append",
        help="folder of masks with the same names (or NAME_mask); twice: one for each lung",
    )
    masks.add_argument("--val-share", type=float, default=0.2, help="share of the pairs kept for validation")
    masks.add_argument(
        "--test-share", type=float, default=0.0, help="share of the pairs kept for the figures of the report"
    )
    masks.add_argument(
        "--source", help="name of the hospital or data set in reports (without it: the folder that holds --images)"
    )

    for command in (phantom, nih, folder, table, dicom):
        command.add_argument("--seed", type=_seed, default=0, help="the same seed gives the same shards")
    for command in (nih, folder, table, dicom):
        command.add_argument(
            "--ratios",
            default=",".join(map(str, SHARES)),
            help="shares of train, val and test where patients are dealt",
        )
    for command in (phantom, nih, folder, table, dicom, masks):
        command.add_argument("--out", type=Path, required=True, help="folder to make; must not hold anything")
        command.add_argument(
            "--size", type=int, default=256 if command is phantom else 512, help="pixels of a side as stored"
        )
        command.add_argument("--format", choices=FORMATS, default="jpg", help="how images are stored (webp: lossless)")
        command.add_argument("--per-shard", type=int, default=256, help="samples in a tar")
        command.add_argument("--workers", type=int, help="processes (without it: one for each core)")
        command.add_argument(
            "--part", default="", metavar="I/N", help="make every N-th shard from the I-th on; then `index --merge OUT`"
        )
        if command is not phantom:
            command.add_argument(
                "--aspect",
                choices=ASPECTS,
                default="stretch",
                help="stretch: to a square, as published; pad: aspect kept, black beside it",
            )
            command.add_argument(
                "--bits",
                type=int,
                help="depth of images of more than 8 bits, 9 to 16 (without it: told from the values of the whole set)",
            )
            command.add_argument(
                "--on-bad",
                choices=("stop", "skip"),
                default="stop",
                help="at an image that is missing or cannot be decoded",
            )

    index = commands.add_parser("index", help="index WebDataset tars: DIR/{train,val,test}/*.tar or DIR/train-*.tar")
    index.add_argument("dir", type=Path, metavar="DIR")
    index.add_argument("--findings", help="names of the classes, for tars with a number in a .cls member")
    index.add_argument(
        "--merge", action="store_true", help="put together the parts that were made with --out DIR --part I/N"
    )

    verify = commands.add_parser(
        "verify",
        help="checksums, members, every image decodes, no patient and no image in two splits; exit code 0: all is well",
    )
    verify.add_argument("dir", metavar="DIR", help="folder or URL")
    verify.add_argument("--workers", type=int, help="processes (without it: one for each core)")
    return main, commands.choices


def main(argv: list[str] | None = None) -> None:
    """Parse and run one command."""
    whole, commands = parser()
    arguments = command_line(whole, commands, argv)
    globals()[f"_{arguments.command}"](arguments)


def _phantom(a: argparse.Namespace) -> None:
    from shards.phantom import Phantoms

    shortcut = {"shortcut": a.shortcut, "shortcut_test": a.shortcut_test, "kind": a.shortcut_kind}
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
    return Columns(
        a.path_column, _names(a.finding_column), a.split_column, getattr(a, "patient_column", ""), a.separator
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
        seed=a.seed,
        shares=_shares(a),
        skip_missing=a.on_bad == "skip",
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
    )
    _pack(a, source, a.path.resolve().name)


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


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise InputError(f"--seed {text}: expected a whole number, 0 or larger")
    return int(text)


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
    if skipped:
        first = listed((f"{s['key']}: {s['why']}" for s in skipped), 3)
        print(f"skipped {len(skipped)} that could not be used, listed in {out / 'index.json'}; the first: {first}")
    for remark, count in index.get("remarks", {}).items():
        print(f"warning: {count} of {sum(entry['samples'] for entry in index['splits'].values())} samples: {remark}")
    for name in index["findings"]:
        empty = [split for split, entry in index["splits"].items() if not entry["findings"][name]]
        if empty:
            print(f"warning: {listed(empty)} has no image of {name}: training on it will stop")
    if index.get("in_two_splits"):
        print(
            f"warning: {index['in_two_splits']} images are in more than one split: `python -m shards verify {out}` "
            "names them"
        )
    print(f"wrote {out}")


def _odd_names(index: dict[str, Any]) -> None:
    """Findings whose names differ by case or by what stands for a blank, and sets without healthy images."""
    counts = {name: sum(entry["findings"][name] for entry in index["splits"].values()) for name in index["findings"]}
    alike: dict[str, list[str]] = defaultdict(list)
    for name in counts:
        alike[spelling(name)].append(name)
    for names in alike.values():
        if len(names) > 1:
            told = " and ".join(f"{name!r} ({counts[name]})" for name in names)
            print(
                f"note: {told} are findings of their own, as they are spelt; if they are one, give them one name and "
                "pack again"
            )
    if index["findings"] and NO_FINDING not in index["findings"]:
        print(
            f"note: no image is called {NO_FINDING!r}, as healthy ones must be; is that what "
            f"{listed(index['findings'])} means?"
        )


def _index(a: argparse.Namespace) -> None:
    from shards.index import build_index
    from shards.merge import merge

    if a.merge:
        _made(merge(a.dir), a.dir)
        return
    if not a.dir.is_dir():
        raise InputError(f"{a.dir}: no such folder; index works on a folder of this machine")
    index = build_index(a.dir, dataset=a.dir.resolve().name, classes=_names(a.findings) if a.findings else None)
    _table(index)
    _odd_names(index)


def _table(index: dict[str, Any]) -> None:
    names = index["findings"]
    width = max([7, *map(len, names)])
    print(f"{'':{width}}" + "".join(f"{split:>9}" for split in index["splits"]))
    for name in names:
        print(f"{name:{width}}" + "".join(f"{entry['findings'][name]:>9}" for entry in index["splits"].values()))
    print(f"{'images':{width}}" + "".join(f"{entry['samples']:>9}" for entry in index["splits"].values()))


def _verify(a: argparse.Namespace) -> None:
    from shards.verify import verify

    index, problems = verify(a.dir, a.workers)
    for problem in problems[:20]:
        print(problem)
    _table(index)
    if problems:
        more = f", the first {min(len(problems), 20)} above" if len(problems) > 20 else ", above"
        raise InputError(f"{a.dir}: {len(problems)} problem{'s' if len(problems) > 1 else ''}{more}")
    print(f"{a.dir}: all is well")


if __name__ == "__main__":
    run(main)
