"""The labels of a table's rows: names in a cell, or a column of 1, 0, -1 and nothing for each finding."""

from collections.abc import Sequence
from dataclasses import dataclass

from shards.errors import InputError, listed, nearest
from shards.sample import NO_FINDING, SUPPORT_DEVICES, Labels, spelling
from shards.sources.cells import Row

NOBODY = ("", "na", "nan", "none", "null", "n/a", "-")  # what stands for nothing in a cell


@dataclass
class Columns:
    """Names of the columns of a table. ``finding``: one column with names, or several of 0 and 1 named after their
    finding; ``keep``: what else stays in the samples.
    """

    path: str = "path"
    finding: Sequence[str] = ("finding",)
    split: str = ""
    patient: str = ""
    separator: str = "|"
    keep: Sequence[str] = ()


def labelled(
    rows: Sequence[Row],
    names: Sequence[str],
    columns: Columns,
    declared: Sequence[str] | None,
    flag: str,
    skipped: dict[str, int],
    notes: list[str],
    skip: bool,
) -> list[tuple[Row, Labels]]:
    """The rows that can be used, each with its labels. InputError: a finding that is not among ``declared``, and what
    else a cell should not hold.
    """
    healthy = next((name for name in names if spelling(name) == spelling(NO_FINDING)), "")
    found: list[Labels | None]
    if not indicators(rows, columns):
        found = [_named(row, columns, flag, skipped, notes, skip) for row in rows]
    else:
        found = [_indicated(row, columns, healthy, flag, skipped, skip) for row in rows]
        if not healthy:
            found = _assumed(rows, names, columns, found, notes)
    taken = []
    for row, labels in zip(rows, found, strict=True):
        other = [name for name in (labels or Labels()).present if declared and name not in declared]
        if other and not skip:
            raise InputError(
                f"{flag}, row {row.line}: the finding {other[0]!r} was not declared; "
                f"{nearest(other[0], declared or ())}; "
                "correct the row, add it to --findings, or leave such rows out with --on-bad skip"
            )
        if other:
            skipped["a finding that was not declared"] += 1
        elif labels is not None:
            taken.append((row, labels))
    return taken


def _assumed(
    rows: Sequence[Row],
    names: Sequence[str],
    columns: Columns,
    found: Sequence[Labels | None],
    notes: list[str],
) -> list[Labels | None]:
    """The labels where no column No Finding says who is healthy: who has a 0 in every column that is named, and no 1 in
    another one.
    """
    others = [name for name in names if name not in columns.finding and _only_numbers(rows, name)]
    done: list[Labels | None] = []
    ill: list[Row] = []
    for row, labels in zip(rows, found, strict=True):
        if labels is not None and len(labels.absent) == len(columns.finding):
            if any(row[name] in ("1", "1.0") for name in others):
                ill.append(row)
                labels = labels._replace(absent=(NO_FINDING, *labels.absent))
            else:
                labels = labels._replace(present=(NO_FINDING,))
        done.append(labels)
    count = sum(labels is not None and labels.present == (NO_FINDING,) for labels in done)
    ones = {name: sum(row[name] in ("1", "1.0") for row in ill) for name in others}
    but = (
        f"; {len(ill)} others are not, for they have a 1 in another column: "
        f"{listed(f'{name} {n}' for name, n in ones.items() if n)}"
        if ill
        else ""
    )
    if count or ill:
        notes.append(
            f"the table has no column {NO_FINDING!r}: its {count} rows with a 0 for each of the findings named are "
            "taken "
            f"as healthy{but}"
        )
    return done


def _only_numbers(rows: Sequence[Row], name: str) -> bool:
    values = {row[name].lower() for row in rows}
    return {""} != values <= {"0", "1", "-1", "0.0", "1.0", "-1.0", "", "true", "false", "yes", "no"}


def indicators(rows: Sequence[Row], columns: Columns) -> bool:
    """Whether the columns hold 0 and 1, each named after its finding, and not names of findings."""
    return len(columns.finding) > 1 or _only_numbers(rows, columns.finding[0])


def _named(
    row: Row, columns: Columns, flag: str, skipped: dict[str, int], notes: list[str], skip: bool
) -> Labels | None:
    """Labels of a cell of names."""
    cell = columns.finding[0]
    found = tuple(dict.fromkeys(name.strip() for name in row[cell].split(columns.separator) if name.strip()))
    if not found or any(name.lower() in NOBODY for name in found):
        if skip:
            skipped[f"no finding in column {cell!r}"] += 1
            return None
        what = (
            f"no finding in column {cell!r}"
            if not found
            else f"column {cell!r} holds {row[cell]!r}, which is no finding"
        )
        raise InputError(
            f"{flag}, row {row.line}: {what}; write {NO_FINDING!r} where there is none, or leave such rows out with "
            "--on-bad skip"
        )
    for name in found:
        if name != NO_FINDING and spelling(name) == spelling(NO_FINDING):
            note = f"{name!r} is read as {NO_FINDING!r}"
            if note not in notes:
                notes.append(note)
    found = tuple(dict.fromkeys(NO_FINDING if spelling(name) == spelling(NO_FINDING) else name for name in found))
    if NO_FINDING in found and len(found) > 1:
        if skip:
            skipped[f"{NO_FINDING} and something else"] += 1
            return None
        raise InputError(
            f"{flag}, row {row.line}: says {NO_FINDING} and something else ({listed(found)}); correct the row"
        )
    return Labels(found)


def _indicated(
    row: Row, columns: Columns, healthy: str, flag: str, skipped: dict[str, int], skip: bool
) -> Labels | None:
    """Labels of columns of 1, 0, -1 (uncertain) and nothing; ``healthy``: the table's own column No Finding, which
    alone says that an image is.
    """
    where = f"{flag}, row {row.line}"
    own = dict.fromkeys((*columns.finding, *filter(None, [healthy])))
    cells = {NO_FINDING if name == healthy else name: cell_number(row[name], where, name) for name in own}
    said = Labels(*(tuple(name for name, cell in cells.items() if cell == state) for state in (1.0, 0.0, -1.0)))
    if NO_FINDING in said.present and (ill := set(said.present) - {NO_FINDING, SUPPORT_DEVICES}):
        if skip:
            skipped[f"{NO_FINDING} and something else"] += 1
            return None
        raise InputError(f"{where}: says {NO_FINDING} and something else ({listed(sorted(ill))}); correct the row")
    first = [NO_FINDING] if NO_FINDING in said.present else []
    return said._replace(present=(*first, *(name for name in said.present if name != NO_FINDING)))


def cell_number(value: str, where: str, name: str) -> float | None:
    """1, 0, -1, or None for nothing."""
    if not value:
        return None
    try:
        number = float(value)
    except ValueError:
        number = {"true": 1.0, "false": 0.0}.get(value.lower(), 9.0)  # as pandas writes what is no number
    if number not in (-1.0, 0.0, 1.0):
        raise InputError(f"{where}: column {name!r} holds {value!r}; expected 1, 0, -1 (uncertain) or nothing")
    return number


def contradicts(said: Labels) -> bool:
    """Whether a finding is said to be two things, or No Finding beside a finding that is no device."""
    every = [name for names in said for name in names]
    ill = set(said.present) - {NO_FINDING, SUPPORT_DEVICES}
    return len(set(every)) < len(every) or (NO_FINDING in said.present and bool(ill))
