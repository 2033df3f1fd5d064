"""python -m trainer.export RUN --out DIR: a finished run for others, as an ONNX graph, weights and a card."""

if __name__ == "__main__":  # what is wrong with the flags is said before torch is imported, which takes seconds
    from pathlib import Path as _Path

    from shards.errors import run as _run
    from trainer.command import parse as _parse
    from trainer.command import positionals as _positionals
    from trainer.command import run_at as _run_at
    from trainer.options import ExportConfig as _Config

    def _check() -> None:
        flags, folders = _positionals(None)
        _parse(_Config, flags, prog="trainer.export")
        for folder in folders:
            _run_at(_Path(folder), "")

    _run(_check)

from pathlib import Path

from shards.errors import InputError, run
from trainer.command import parse, positionals
from trainer.export.write import export
from trainer.launching import set_threads
from trainer.options import ExportConfig


def main(argv: list[str] | None = None) -> None:
    """Write the export, and say how near it is to the run."""
    flags, folders = positionals(argv)
    options = parse(ExportConfig, flags, prog="trainer.export")
    if len(folders) != 1:
        raise InputError(f"{len(folders)} runs named: python -m trainer.export RUN --out DIR")
    set_threads()
    for line in export(Path(folders[0]), Path(options.out)):
        print(line)


if __name__ == "__main__":
    run(main)
