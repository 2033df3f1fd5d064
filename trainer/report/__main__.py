"""python -m trainer.report --out FILE.html RUN [RUN ...]: several finished runs side by side."""

if __name__ == "__main__":  # what is wrong with the flags is said before torch is imported, which takes seconds
    from pathlib import Path as _Path

    from shards.errors import run as _run
    from trainer.command import parse as _parse
    from trainer.command import positionals as _positionals
    from trainer.command import run_at as _run_at
    from trainer.options import ReportConfig as _Config

    def _check() -> None:
        flags, folders = _positionals(None)
        _parse(_Config, flags, prog="trainer.report")
        for folder in map(_Path, folders):
            if not (folder / "report.json").is_file():  # an evaluation beside a run has one, too
                _run_at(folder, "")

    _run(_check)


import os
from pathlib import Path
from typing import cast
from urllib.parse import quote

from shards import atomic
from shards.errors import InputError, read_json, run
from trainer.command import parse, positionals
from trainer.content import Content
from trainer.options import ReportConfig
from trainer.report import paper
from trainer.report.page import page
from trainer.report.versus import versus
from trainer.report.words import table


def main(argv: list[str] | None = None) -> None:
    """Print the table, write the page."""
    flags, folders = positionals(argv)
    options = parse(ReportConfig, flags, prog="trainer.report")
    if not folders:
        raise InputError("no runs named: python -m trainer.report --out FILE.html RUN [RUN ...]")
    runs: dict[str, Content] = {}
    pictures: dict[str, dict[str, bytes]] = {}
    for folder in map(Path, folders):
        if not (folder / "report.json").is_file():
            raise InputError(f"{folder}: has no report.json; is it the folder of a finished run of trainer.train?")
        content = read_json(folder / "report.json")
        if not isinstance(content, dict) or "findings" not in content:
            raise InputError(f"{folder}: is a run of trainer.train_lungs; runs of trainer.train are compared here")
        if folder.resolve().name in runs:
            raise InputError(
                f"{folder}: a second run of that name; the columns could not be told apart, rename one folder"
            )
        name = folder.resolve().name
        runs[name] = cast(Content, content)
        if options.table:
            continue
        pictures[name] = {}
        for kind in ("panel", "curves", "no_lungs"):
            files = [folder / f"{kind}.{suffix}" for suffix in ("svg", "png")]
            if (file := next((one for one in files if one.is_file()), None)) is not None:
                pictures[name][kind] = file.read_bytes()
    out = Path(options.out)
    if not options.table and out.suffix.lower() not in (".html", ".htm"):
        raise InputError(f"--out {out}: the page is HTML; name a file that ends in .html")
    if out.is_dir():
        raise InputError(f"--out {out}: is a folder; name the HTML file to write, such as {out / 'report.html'}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror})") from error
    if options.table:
        rows, said = paper.table(runs)
        atomic.write(out, paper.FORMS[out.suffix](paper.HEAD, rows))
        print(paper.markdown(paper.HEAD, rows), end="")
        for line in said:
            print(f"note: {line}")
        print(f"\ntable: {out.resolve()}")
        return
    of = {folder.resolve().name: folder for folder in map(Path, folders)}
    parts, lines = versus(of, runs, options.images)
    links = {
        name: quote(os.path.relpath(folder.resolve() / "report.html", out.resolve().parent))
        for name, folder in of.items()
        if (folder / "report.html").is_file()
    }
    atomic.write(out, page(options.title, runs, pictures, versus=parts, about=options.about, links=links))
    print(table(runs))
    for line in lines:
        print(line)
    print(f"\nreport: {out.resolve()}")


if __name__ == "__main__":
    run(main)
