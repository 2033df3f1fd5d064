"""The table of Wu et al. (DMKD 2026) of any runs: backbones and tasks by lambda, the published figures below ours."""

import csv
import functools
import io
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from shards.sample import TASKS
from trainer.content import Content, Figures
from trainer.report.words import shown_split

LAMBDAS = ("1", "0.75", "0.5", "0.25", "adaptive")
FIGURES = {"accuracy": "accuracy, recall", "precision": "precision", "f1": "F1", "auc": "AUC"}
BACKBONES = {"pvt": "PVT", "vgg": "VGG16", "resnet": "ResNet50"}
HEAD = ("task", "backbone", "figure", "whose", *(f"lambda {name}" for name in LAMBDAS))
Key = tuple[str, str, str]  # task, backbone, dataset
Row = list[str]


def table(runs: Mapping[str, Content]) -> tuple[list[Row], list[str]]:
    """The rows below `HEAD`, and what is said of runs that have no place in them. Of several runs of one cell their
    mean, and how many they are.
    """
    of: dict[Key, dict[str, list[Figures]]] = defaultdict(lambda: defaultdict(list))
    notes = []
    for name, content in runs.items():
        where, lam, task = shown_split(content), _lambda(content), _task(content)
        if not lam or not task or "per_class" not in content[where]:
            why = f"its lambda is not one of {', '.join(LAMBDAS)}" if task and not lam else "its findings are no task"
            notes.append(f"{name} is left out: {why} of that table")
            continue
        if where == "val":
            notes.append(f"{name} has no test split: its figures are of val")
        of[task, str(content["config"]["backbone"]), str(content["dataset"])][lam].append(content[where])
    rows: list[Row] = []
    order = [*TASKS]
    for task, backbone in sorted({key[:2] for key in of}, key=lambda pair: (order.index(pair[0]), pair[1])):
        for figure, words in FIGURES.items():
            start = [task, BACKBONES.get(backbone, backbone), words]
            for key, by_lambda in of.items():
                if key[:2] == (task, backbone):
                    rows.append(
                        [*start, f"here, {key[2]}", *(_cell(by_lambda.get(lam, []), figure) for lam in LAMBDAS)]
                    )
            for dataset, values in published().get((task, backbone, figure), {}).items():
                rows.append([*start, f"published, {dataset}", *values])
    return rows, notes


def _cell(figures: Sequence[Figures], name: str) -> str:
    values = [_value(one, name) for one in figures]
    defined = [value for value in values if value is not None]
    count = f" ({len(defined)})" if len(defined) > 1 else ""
    return f"{fmean(defined):.3f}{count}" if defined else "undefined" if values else ""


def _value(figures: Figures, name: str) -> float | None:
    """As published: means of the classes weighted by their images, of which recall is the accuracy. None: undefined,
    such as an AUC of images of one class.
    """
    if name in ("accuracy", "auc"):
        value = figures["accuracy"] if name == "accuracy" else figures["auc"]
        return None if value is None or math.isnan(value) else float(value)
    rows = [row for row in figures["per_class"] if row["support"]]
    each = [(row["precision" if name == "precision" else "f1"], row["support"]) for row in rows]
    if not each or any(value is None or math.isnan(value) for value, _ in each):
        return None
    return sum(value * support for value, support in each) / sum(support for _, support in each)


def _lambda(content: Content) -> str:
    balance = content["config"]["balance"]
    if balance["policy"] == "published":
        return "adaptive"
    lam = f"{balance['lam']:g}" if balance["lam"] is not None else ""
    return lam if balance["policy"] == "fixed" and lam in LAMBDAS else ""


def _task(content: Content) -> str:
    return next((name for name, findings in TASKS.items() if findings == tuple(content["findings"])), "")


@functools.cache
def published() -> dict[Key, dict[str, list[str]]]:
    """By task, backbone and figure, the figures of each dataset in the order of `LAMBDAS`."""
    text = Path(__file__).with_name("published.csv").read_text()
    found: dict[Key, dict[str, list[str]]] = defaultdict(dict)
    for row in csv.DictReader(line for line in text.splitlines() if not line.startswith("#")):
        found[row["task"], row["backbone"], row["figure"]][row["dataset"]] = [row[name] for name in LAMBDAS]
    return dict(found)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def comma_separated(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A CSV file."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([head, *rows])
    return buffer.getvalue()


def latex(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A tabular, in which every task and backbone begins with a line."""
    lines = [rf"\begin{{tabular}}{{llll{'r' * len(LAMBDAS)}}}", r"\hline", _of_latex(head)]
    before: Sequence[str] = ()
    for row in rows:
        if row[:2] != before:
            lines.append(r"\hline")
        lines.append(_of_latex(row))
        before = row[:2]
    return "\n".join([*lines, r"\hline", r"\end{tabular}"]) + "\n"


def _of_latex(row: Sequence[str]) -> str:
    cells = [cell.replace("\\", "").replace("{", "").replace("}", "") for cell in row]
    for sign in "&%$#_":
        cells = [cell.replace(sign, f"\\{sign}") for cell in cells]
    return " & ".join(cell.replace("~", "-").replace("^", "-") for cell in cells) + r" \\"


FORMS: dict[str, Callable[[Sequence[str], Sequence[Sequence[str]]], str]] = {
    ".md": markdown,
    ".csv": comma_separated,
    ".tex": latex,
}
