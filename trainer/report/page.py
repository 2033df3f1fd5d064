"""report.html: one file that needs nothing beside it."""

import base64
import html
import json
import math
from typing import Any

from trainer.report.words import CAUTION, KINDS, LOCALIZATION_WORDS, MEANING, SUMMARY, notes, shown_split, summary, without_map

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1280px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em 1em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}small{color:#777;white-space:nowrap}
dl{display:grid;grid-template-columns:minmax(7em,12em) 1fr;gap:.3em 1em}dt{font-weight:600}dd{margin:0}
img{max-width:100%}pre{background:#f6f6f6;padding:1em;overflow:auto;font-size:12px}"""


def page(title: str, runs: dict[str, dict[str, Any]], pictures: dict[str, dict[str, bytes]], text: str = "") -> str:
    """One HTML file that needs nothing beside it."""
    first = next(iter(runs.values()))
    split, esc = shown_split(first), html.escape
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><title>{esc(title)}</title><style>{STYLE}</style><h1>{esc(title)}</h1>"]
    parts.append(f"<p>{esc(', '.join(first['findings']))} on {esc(first['dataset'])}; {first[split]['images']} images of the {split} split.</p>")
    parts += [f"<p><b>Note: {esc(note)}.</b></p>" for note in notes(runs)]
    values = [summary(content) for content in runs.values()]
    rows = [[name, *(_figure(row[i]) for row in values)] for i, name in enumerate(SUMMARY) if any(row[i] for row in values)]
    parts.append(html_table(["with 95% intervals", *map(esc, runs)], rows))
    shown = {row[0] for row in rows}
    meanings = "".join(f"<dt>{name}</dt><dd>{meaning}</dd>" for name, meaning in MEANING.items() if name in shown)
    if meanings:
        parts.append(f"<dl>{meanings}</dl><p>{CAUTION}</p>")
    for name, content in runs.items():
        parts.append(f"<h2>{esc(name)}</h2><p>{esc(_training(content))}</p>")
        parts.append(_by_finding(content, split if split in content else shown_split(content)))
        for kind, data in pictures[name].items():
            heading = {"panel": "Where the model looks", "curves": "Curves", "no_lungs": "No lungs found: the whole image stands in for the box"}[kind]
            parts.append(f"<h3>{heading}</h3><img alt='{kind}' src='data:image/png;base64,{base64.b64encode(data).decode()}'>")
        settings = json.dumps({"training": content["training"], "config": content["config"]}, indent=1)
        parts.append(f"<details><summary>Settings</summary><pre>{esc(settings)}</pre></details>")
    if text:
        parts.append(f"<h2>Text report</h2><pre>{esc(text)}</pre>")
    return "\n".join(parts)


def html_table(head: list[str], rows: list[list[str]]) -> str:
    """A table of HTML cells."""
    lines = ["".join(f"<th>{cell}</th>" for cell in head), *("".join(f"<td>{cell}</td>" for cell in row) for row in rows)]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _figure(pair: tuple[float, list[float]] | None) -> str:
    """``0.838 <small>0.761 to 0.906</small>``."""
    if pair is None or pair[0] is None or math.isnan(pair[0]):
        return "&ndash;"
    (value, (low, high)) = pair
    return f"{value:.3f}" + (f" <small>{low:.3f} to {high:.3f}</small>" if low is not None and not math.isnan(low) else "")


def _localization(found: dict[str, Any], head: str) -> str:
    """All figures of one kind of localization."""
    names = [name for name in LOCALIZATION_WORDS if name in found]
    words = [LOCALIZATION_WORDS[name] + (f" ({found['iou_threshold']:g})" if name == "iou" else "") for name in names]
    return html_table([head, *words], [["", *(_figure((found[name], found[f"{name}_95"])) for name in names)]])


def _training(content: dict[str, Any]) -> str:
    """How the model came about, in a line."""
    t, c = content["training"], content["config"]
    lost = ", ".join(f"{len(keys)} in {split}" for split, keys in content["lungs_not_found"].items() if keys)
    told = [f"{c['backbone']}, {c['size']} px"]
    if not t.get("map", True):
        told.append("no feature map, so nothing is said of where it looks")
    if "epochs" in t:
        told.append(f"last of {t['epochs']} epochs" if t["best"] == "last" else f"best of {t['epochs']} epochs by {t['best']} on val: epoch {t['best_epoch']}")
        told.append(f"{t['minutes']:.1f} minutes on {t['processes']} x {t['device']}, {t['precision']}")
        told += [f"{change['what']} {change['from']} up to step {change['step']}, then {change['to']}" for change in t.get("changes", ())]
    told.append(f"no lungs found, whole image used: {lost or 'nowhere'}" if content["lungs_not_found"] else "without a lung segmenter")
    replaced = ", ".join(f"{n} in {split}" for split, n in content.get("regions_replaced", {}).items() if n)
    if replaced:
        told.append(f"the outline of the lungs left nothing of the region, or was unknown, and its part of the lung box stands in: {replaced}")
    return "; ".join(told) + f". {content.get('written', '')}"


def _by_finding(content: dict[str, Any], split: str) -> str:
    """Tables of each finding, and of the operating point of a binary task."""
    figures = content[split]
    place = figures["localization"]
    head = [
        "finding, at the predicted class",
        "images",
        "sensitivity",
        "precision",
        "F1",
        "energy in region",
        "pointing hit",
        "energy in lesion",
        "pointing at lesion",
    ]
    rows = []
    for name, row in zip(content["findings"], figures["per_class"], strict=True):
        cells = [html.escape(name), str(row["support"]), f"{row['recall']:.3f}", f"{row['precision']:.3f}", f"{row['f1']:.3f}"]
        for kind in ("expected", "lesion"):
            found = place[kind].get(name)
            cells += [_figure((found[f], found[f"{f}_95"])) if found else "&ndash;" for f in ("energy", "pointing")]
        rows.append(cells)
    keep = [i for i in range(len(head)) if i < 5 or any(row[i] != "&ndash;" for row in rows)]
    parts = [html_table([head[i] for i in keep], [[row[i] for i in keep] for row in rows])]
    parts += [
        _localization(place[kind]["all"], f"{what}, {place[kind]['all']['images']} images{without_map(place[kind]['all'])}")
        for kind, what in KINDS.items()
        if place.get(kind, {}).get("all")
    ]
    confusion = [[html.escape(name), *map(str, line)] for name, line in zip(content["findings"], figures["confusion"], strict=True)]
    parts.append(html_table(["is \\ predicted", *map(html.escape, content["findings"])], confusion))
    if "binary" in figures:
        names = {"sensitivity": "sensitivity", "specificity": "specificity", "ppv": "PPV", "youden": "Youden's index"}
        points = [("predicted class, 0.5", figures["binary"])]
        if at := figures.get("at_threshold"):
            points.append((f"{at['threshold']:.3f}, the best Youden's index on val", at))
        rows = [[what, *("&ndash;" if of[n] is None else f"{of[n]:.3f}" for n in names)] for what, of in points]
        parts.append(html_table([f"{html.escape(content['findings'][1])} from a probability of", *names.values()], rows))
    return "".join(parts)
