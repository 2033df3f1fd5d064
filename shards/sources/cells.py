"""A table as text: CSV in any of the encodings and separators that people have, gzip or not."""

import csv
import gzip
import io
import re
import sys
import zlib
from pathlib import Path

from shards.errors import InputError, nearest

TABLE_BYTES = 2**31  # of a table, unpacked


class Row(dict[str, str]):
    """A row of a table, by column; ``line``: its last line in the file ``table``."""

    line, table = 0, ""


def _text(data: bytes, where: str) -> str:
    """A table's text: UTF-8, UTF-16 with its mark, or what Excel writes in Western Europe, Windows-1252,
    which is told.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = data.decode("cp1252")
        print(f"note: {where} is not UTF-8; it is read as Windows-1252", file=sys.stderr)
        return text


def read_cells(path: Path, flag: str) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Header and rows, each with its last line in the file, of a CSV (``.gz`` too). Commas, semicolons or tabs; blank
    rows are left out.

    InputError: missing, empty, not text.
    """
    if not path.is_file():
        raise InputError(f"{flag} {path}: no such file")
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            data = file.read(TABLE_BYTES + 1)
        if len(data) > TABLE_BYTES:
            raise csv.Error(f"more than {TABLE_BYTES} bytes")
        text = _text(data, f"{flag} {path}")
        first = re.match(r"[^\r\n]*", text)[0]  # type: ignore[index]
        said = re.fullmatch(r'"?sep=(.)"?', first)  # Excel's own line
        skip = 1 if said else 0
        head = re.split(r"\r\n|\r|\n", text, maxsplit=skip + 1)[skip] if text else ""
        separator = said[1] if said else max(",;\t", key=lambda one: len(next(csv.reader([head], delimiter=one), [])))
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
        rows = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)][skip:]
    except (OSError, EOFError, UnicodeDecodeError, csv.Error, zlib.error) as error:
        raise InputError(f"{flag} {path}: cannot be read as a CSV ({error}); save it as a CSV in UTF-8") from error
    if len(rows) < 2:
        raise InputError(f"{flag} {path}: has no rows")
    return [name.strip() for name in rows[0][1]], rows[1:]


def read_table(path: Path, flag: str) -> tuple[list[str], list[Row]]:
    """Columns and rows, by column, of a CSV; errors as `read_cells`, and for a row shorter than the header."""
    columns, found = read_cells(path, flag)
    while columns and not columns[-1]:
        columns.pop()
    rows = []
    for line, cells in found:
        if len(cells) < len(columns):
            raise InputError(
                f"{flag} {path}: row {line} has {len(cells)} cells, the header {len(columns)}; correct the row"
            )
        rows.append(Row(zip(columns, (cell.strip() for cell in cells), strict=False)))
        rows[-1].line, rows[-1].table = line, path.name
    return columns, rows


def column(columns: list[str], flag: str, *names: str) -> str:
    """The first of ``names`` that is a column; InputError says which columns there are."""
    for name in names:
        if columns.count(name) > 1:
            raise InputError(f"{flag}: has {columns.count(name)} columns {name!r}; rename one")
        if name in columns:
            return name
    close = nearest(names[0], [c for c in columns if c])
    hint = f"; {close}" if close.startswith("did you mean") else ""
    raise InputError(f"{flag}: has no column {names[0]!r}; its columns are {', '.join(c for c in columns if c)}{hint}")


def cell_of(row: Row, name: str, where: str) -> str:
    """A cell; InputError: there is no such column."""
    if name not in row:
        raise InputError(f"{where}: has no column {name!r}; {nearest(name, row)}")
    return row[name]
