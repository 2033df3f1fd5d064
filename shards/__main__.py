"""python -m shards {phantom,folder,masks,index,verify}: make shards, and check them."""

import argparse
from pathlib import Path
from typing import Any

from shards.errors import InputError, nearest, run
from shards.sample import FINDINGS


class _Parser(argparse.ArgumentParser):
    """One-line errors with the nearest names, no abbreviations."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **options)

    def error(self, message: str) -> None:  # type: ignore[override]
        raise InputError(f"{self.prog}: {message}; see {self.prog} --help")


def main(argv: list[str] | None = None) -> None:
    """Parse and run one command."""
    parser = _Parser(prog="python -m shards", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    phantom = commands.add_parser("phantom", help="synthetic radiographs with known lungs and lesions")
    phantom.add_argument("--count", type=int, required=True, help="images of all splits together (60/20/20)")
    phantom.add_argument("--seed", type=int, default=0, help="the same seed gives the same bytes")
    phantom.add_argument("--size", type=int, default=256, help="pixels of a side")
    phantom.add_argument("--findings", default=",".join(FINDINGS), help="which findings, separated by commas")
    phantom.add_argument("--shortcut", type=float, help="plant a corner marker; its correlation with the finding in train and val, -1..1")
    phantom.add_argument("--shortcut-test", type=float, default=0.0, help="the marker's correlation in test, with --shortcut")

    folder = commands.add_parser("folder", help="class folders: train|val|test/<class>/*.png")
    folder.add_argument("--path", type=Path, required=True, help="folder with train, val and test")
    folder.add_argument("--size", type=int, default=512, help="pixels of a side as stored; images are stretched to it, as published")

    masks = commands.add_parser("masks", help="images and lung masks, to train a lung segmenter")
    masks.add_argument("--images", type=Path, required=True, help="folder of radiographs")
    masks.add_argument("--masks", type=Path, required=True, help="folder of masks with the same names (or NAME_mask)")
    masks.add_argument("--val-share", type=float, default=0.2, help="share of the pairs kept for validation")
    masks.add_argument("--size", type=int, default=512, help="pixels of a side as stored")

    for command in (phantom, folder, masks):
        command.add_argument("--out", type=Path, required=True, help="folder to make; must not hold anything")
        command.add_argument("--format", choices=("jpg", "png"), default="jpg", help="how images are stored")
        command.add_argument("--per-shard", type=int, default=256, help="samples in a tar")

    index = commands.add_parser("index", help="index WebDataset tars: DIR/{train,val,test}/*.tar or DIR/train-*.tar")
    index.add_argument("dir", type=Path, metavar="DIR")
    index.add_argument("--findings", help="names of the classes, for tars with a number in a .cls member")

    verify = commands.add_parser("verify", help="checksums, index against tars, every image decodes; exit code 0 if all is well")
    verify.add_argument("dir", type=Path, metavar="DIR")

    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [flag for p in (commands.choices[arguments.command],) for flag in p._option_string_actions]
        raise InputError(f"unknown argument {unknown[0]!r}; {nearest(unknown[0].partition('=')[0], flags)}")
    globals()[f"_{arguments.command}"](arguments)


def _phantom(a: argparse.Namespace) -> None:
    from shards.phantom import phantoms

    names = [name.strip() for name in a.findings.split(",")]
    samples = phantoms(a.count, a.seed, size=a.size, findings=names, shortcut=a.shortcut, shortcut_test=a.shortcut_test)
    _pack(a, samples, "phantom", a.count)


def _folder(a: argparse.Namespace) -> None:
    from shards.sources import ClassFolders

    source = ClassFolders.scan(a.path, _size(a))
    for why, count in source.skipped.items():
        print(f"skipped {count}: {why}")
    _pack(a, source.samples(), a.path.resolve().name, source.files)


def _masks(a: argparse.Namespace) -> None:
    from shards.sources import ImageMasks

    if not 0 < a.val_share < 1:
        raise InputError(f"--val-share {a.val_share}: a share lies between 0 and 1")
    source = ImageMasks.scan(a.images, a.masks, _size(a), a.val_share)
    _pack(a, source.samples(), a.images.resolve().parent.name, source.files)


def _size(a: argparse.Namespace) -> int:
    if not 16 <= a.size <= 4096:
        raise InputError(f"--size {a.size}: expected 16 to 4096 pixels")
    return int(a.size)


def _pack(a: argparse.Namespace, samples, dataset: str, total: int) -> None:  # type: ignore[no-untyped-def]
    from shards.pack import pack

    if a.per_shard < 1:
        raise InputError(f"--per-shard {a.per_shard}: at least 1")
    index = pack(samples, a.out, dataset=dataset, total=total, form=a.format, per_shard=a.per_shard)
    _table(index)
    print(f"wrote {a.out}")


def _index(a: argparse.Namespace) -> None:
    from shards.pack import build_index

    if not a.dir.is_dir():
        raise InputError(f"{a.dir}: no such folder")
    classes = [name.strip() for name in a.findings.split(",")] if a.findings else None
    _table(build_index(a.dir, dataset=a.dir.resolve().name, classes=classes))


def _table(index: dict) -> None:  # type: ignore[type-arg]
    names = index["findings"]
    width = max([7, *map(len, names)])
    print(f"{'':{width}}" + "".join(f"{split:>9}" for split in index["splits"]))
    for name in names:
        print(f"{name:{width}}" + "".join(f"{entry['findings'][name]:>9}" for entry in index["splits"].values()))
    print(f"{'images':{width}}" + "".join(f"{entry['samples']:>9}" for entry in index["splits"].values()))


def _verify(a: argparse.Namespace) -> None:
    from shards.pack import file_sha256
    from shards.stream import Split, read_index

    index = read_index(a.dir)
    problems = []
    for name, entry in index["splits"].items():
        split = Split(a.dir, name)
        for path, shard in zip(split.paths, entry["shards"], strict=True):
            if file_sha256(path) != shard["sha256"]:
                problems.append(f"{path}: changed since it was indexed; copy it again, or run `python -m shards index {a.dir}`")
        for position in range(len(split)):
            try:
                image, mask = split.image(position), split.mask(position)
                split.meta(position)
                if mask is not None and mask.shape != image.shape:
                    problems.append(f"{split.name(position)}: the mask's size is not the image's")
            except InputError as error:
                problems.append(str(error))
    for problem in problems[:20]:
        print(problem)
    _table(index)
    if problems:
        raise InputError(f"{a.dir}: {len(problems)} problems, the first {min(len(problems), 20)} above")
    print(f"{a.dir}: all is well")


if __name__ == "__main__":
    run(main)
