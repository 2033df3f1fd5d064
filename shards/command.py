"""The command line of `python -m shards`."""

import argparse
from pathlib import Path

from shards.deal import SHARES
from shards.errors import CommandParser, InputError
from shards.index import UNLISTED
from shards.pixels import ASPECTS, FORMATS
from shards.sample import FINDINGS
from shards.sources.recipe import names as archives


def parser() -> tuple[CommandParser, dict[str, CommandParser]]:
    """The command line, and each command's own."""
    main = CommandParser(prog="python -m shards", description="Make shards, and check them.")
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

    phantom.add_argument(
        "--several",
        type=float,
        metavar="P",
        help="any number of findings an image, each with probability P; six kinds, and the shortcut is of the first "
        "one",
    )
    phantom.add_argument(
        "--unknown", type=float, default=0.0, help="with --several: share of cells that no label tells"
    )
    phantom.add_argument("--uncertain", type=float, default=0.0, help="with --several: share that is called uncertain")

    phantom.add_argument(
        "--lesion-masks", action="store_true", help="keep the lesions' outlines, which are then truth in place of boxes"
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
    lesions = (
        "lesion masks: JSON of polygons or COCO run lengths by image, COCO's own JSON, or a CSV with the path column, "
        "finding, and mask (image files) or rle (SIIM's)"
    )
    table.add_argument("--lesions", type=Path, help=lesions)
    table.add_argument(
        "--devices", default="", help="names in --boxes and --lesions that are no findings, such as 'Chest Drain'"
    )
    table.add_argument(
        "--keep-column",
        default="",
        help="columns that stay in the samples, such as drain,view: what reports can be split by (evaluate --by)",
    )

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

        command.add_argument(
            "--unlisted",
            choices=UNLISTED,
            default="",
            help="what a finding is that a row does not list (without it: unknown where a cell of 0 and 1 is empty, "
            "absent where it is not among the names)",
        )

    archive = commands.add_parser(
        "archive", help=f"an archive as downloaded: {', '.join(archives())}, or your own YAML"
    )
    archive.add_argument("name", metavar="NAME", help="one of these, or a file such as those in shards/archives")
    archive.add_argument("--root", type=Path, required=True, help="its folder as downloaded")
    archive.add_argument(
        "--views", choices=("frontal", "all"), default="frontal", help="frontal: others are left out and counted"
    )
    archive.add_argument(
        "--task", default="", help="store these findings only: a ready-made list (chexpert5, nih14) or names"
    )
    archive.add_argument(
        "--agree",
        choices=("any", "majority", "all"),
        default="majority",
        help="of several readers of an image, who must see a finding",
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

    for command in (phantom, nih, folder, table, dicom, archive):
        command.add_argument("--seed", type=_seed, default=0, help="the same seed gives the same shards")
    for command in (nih, folder, table, dicom, archive):
        command.add_argument(
            "--ratios",
            default=",".join(map(str, SHARES)),
            help="shares of train, val and test where patients are dealt",
        )
    for command in (phantom, nih, folder, table, dicom, archive, masks):
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
        "--unlisted",
        choices=UNLISTED,
        default="",
        help="what a finding is that a sample does not list (without it: what the index said, else absent)",
    )
    index.add_argument(
        "--merge", action="store_true", help="put together the parts that were made with --out DIR --part I/N"
    )

    verify = commands.add_parser(
        "verify",
        help="checksums, members, every image decodes, no patient and no image in two splits; exit code 0: all is well",
    )
    verify.add_argument("dir", metavar="DIR", help="folder or URL")
    verify.add_argument("--workers", type=int, help="processes (without it: one for each core)")
    commands.metavar = "|".join(commands.choices)  # what is asked for where none is given
    return main, commands.choices


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise InputError(f"--seed {text}: expected a whole number, 0 or larger")
    return int(text)
