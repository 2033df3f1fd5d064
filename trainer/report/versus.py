"""Runs side by side: what differs between them, as tables and as lines."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from shards.errors import InputError
from trainer.compare import Change, Comparison, Predictions, compare, read_predictions, seeds_of_one, together
from trainer.content import Content
from trainer.report.beside import Beside, Runs
from trainer.report.words import SUMMARY, shown_split, summary

SHOWN = 20  # images on which two runs are of another opinion
Rows = tuple[list[str], list[list[str]]]  # a table: its head and its rows


@dataclass(frozen=True)
class Versus:
    """A part of the page: its heading, sentences below it, tables, images that several runs see."""

    heading: str
    says: list[str]
    tables: list[Rows]
    images: list[Beside] = field(default_factory=list)


def versus(folders: Mapping[str, Path], runs: Mapping[str, Content], images: int = 0) -> tuple[list[Versus], list[str]]:
    """All parts about runs by name, of which the first is what the others are compared with, and lines of text. Where
    it has several seeds, runs of another configuration are compared with its run of the same seed.

    Args:
        images: how many of those where two are of another opinion are shown.
    """
    parts, lines, opened = list[Versus](), list[str](), Runs(dict(folders))
    seeds = seeds_of_one(dict(runs))
    for names in seeds:
        parts.append(_seeds(names, runs))
    first, *others = runs
    ours = {_seed(runs[name]): name for name in next((names for names in seeds if first in names), [first])}
    known = {
        name: of
        for name, content in runs.items()
        if (of := read_predictions(folders[name], shown_split(content), content)) is not None
    }
    if first not in known:
        return parts, lines
    changes = dict[str, Comparison]()
    for name in others:
        if name not in known:
            continue
        other = first if name in ours.values() else ours.get(_seed(runs[name]), first)
        other = other if other in known else first
        try:
            found = compare(known[other], known[name])
        except InputError:
            lines.append(f"{name} and {other} are of other images, findings or labels: they are not compared")
            continue
        changes[name] = found
        parts.append(_changes(other, name, found, _shown(opened, other, name, found, images)))
        lines.append(f"{name} less {other}: {_in_a_line(found)}")
    for names in seeds:
        pairs = {name: ours.get(_seed(runs[name])) for name in names if name in changes}
        pairs = {name: other for name, other in pairs.items() if other in known}
        if first not in names and len(pairs) > 1:
            heading = f"{', '.join(pairs)} less {', '.join(map(str, pairs.values()))}"
            parts.append(_over_seeds(heading, [changes[name] for name in pairs]))
    alike = [first, *changes]
    for names in seeds or [alike]:
        if len(members := [name for name in names if name in alike]) > 1:
            parts.append(_ensemble(members, known))
    return parts, lines


def _seed(content: Content) -> object:
    return content.get("config", {}).get("seed")


def _shown(opened: Runs, first: str, name: str, found: Comparison, images: int) -> list[Beside] | str:
    """What is shown, or why it cannot be."""
    wanted = [(key, finding) for key, finding, _, _ in found.disagreed[:images]]
    if not wanted:
        return []
    try:
        return opened.beside([first, name], wanted)
    except InputError as error:
        return f"Their images cannot be shown: {error}."


def _changes(first: str, name: str, found: Comparison, images: list[Beside] | str) -> Versus:
    says = [
        f"On the same images, paired; intervals of 95% resample {found.over}. p is DeLong's, which takes images as "
        "independent."
    ]
    if len(found.auc) > 1:
        says.append(
            "Holm's p is that of all findings together: below 0.05, a difference is more than many comparisons bring "
            "by chance."
        )
    head = ["AUROC", first, name, "difference", "p", *(["Holm's p"] if len(found.auc) > 1 else [])]
    rows = [
        [of, *_cells(change), _p(p), *([_p(q)] if len(found.auc) > 1 else [])]
        for of, (change, p, q) in found.auc.items()
    ]
    figures = [[of, *_cells(change)] for of, change in found.figures.items() if of != "AUROC" or len(found.auc) > 1]
    tables = [
        (head, rows),
        (
            ["mean, without No Finding" if len(found.auc) > 1 else "others", first, name, "difference"],
            figures,
        ),
    ]
    if found.disagreed:
        more = len(found.disagreed) - SHOWN
        says.append(
            f"They disagree {len(found.disagreed)} times, an image and a finding each"
            f"{f', of which the {SHOWN} farthest apart are listed' if more > 0 else ''}."
        )
        opinions = [[key, of, f"{p:.2f}", f"{q:.2f}"] for key, of, p, q in found.disagreed[:SHOWN]]
        tables.append((["image", "finding", first, name], opinions))
    else:
        says.append("No image is called otherwise by the two with probabilities more than 0.05 apart.")
    if isinstance(images, str):
        says.append(images)
        images = []
    return Versus(f"{name} less {first}", says, tables, images)


def _over_seeds(heading: str, changes: Sequence[Comparison]) -> Versus:
    """Differences between two configurations, seed by seed."""
    rows = []
    for figure in changes[0].figures:
        of = [found.figures[figure].change for found in changes if figure in found.figures]
        if len(of) == len(changes):
            spread = [f"{np.mean(of):+.3f}", f"{np.std(of, ddof=1):.3f}", f"{min(of):+.3f} to {max(of):+.3f}"]
            rows.append([figure, *spread])
    head = ["difference", "mean", "standard deviation", "from, to"]
    return Versus(heading, [f"Over {len(changes)} seeds, each pair of one seed."], [(head, rows)])


def _ensemble(names: Sequence[str], known: Mapping[str, Predictions]) -> Versus:
    first = names[0]
    found = compare(known[first], together([known[name] for name in names]))
    rows = [[of, *_cells(change)] for of, change in found.figures.items()]
    says = [
        f"What {' and '.join(names)} say together, the mean of their probabilities, with the mean of their thresholds."
    ]
    return Versus("Ensemble", says, [(["figure", first, "together", "difference"], rows)])


def _seeds(names: Sequence[str], runs: Mapping[str, Content]) -> Versus:
    """Runs that differ in their seed alone, as one."""
    values = [summary(runs[name]) for name in names]
    rows = []
    for i, figure in enumerate(SUMMARY):
        of = [pair[0] for row in values if (pair := row[i]) is not None and pair[0] is not None]
        if len(of) == len(names) and not any(map(math.isnan, of)):
            rows.append([figure, f"{np.mean(of):.3f}", f"{np.std(of, ddof=1):.3f}", f"{min(of):.3f} to {max(of):.3f}"])
    says = [f"{', '.join(names)} are one configuration with several seeds."]
    return Versus("Seeds", says, [(["figure", "mean", "standard deviation", "from, to"], rows)])


def _cells(change: Change) -> list[str]:
    return [f"{change.first:.3f}", f"{change.other:.3f}", _with_interval(change)]


def _with_interval(change: Change) -> str:
    low, high = change.interval
    return f"{change.change:+.3f} ({low:+.3f} to {high:+.3f})"


def _p(p: float) -> str:
    return "" if math.isnan(p) else "< 0.001" if p < 0.001 else f"{p:.3f}"


def _in_a_line(found: Comparison) -> str:
    parts = [f"{of} {_with_interval(change)}" for of, change in found.figures.items()]
    if len(found.auc) == 1:
        (_, p, _) = next(iter(found.auc.values()))
        parts.insert(1, f"DeLong's p {_p(p)}")
    else:
        clear = [name for name, (_, _, q) in found.auc.items() if q < 0.05]
        parts.insert(1, f"beyond chance by Holm's p at {', '.join(clear) or 'no finding'}")
    return "; ".join(parts)
