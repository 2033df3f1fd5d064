"""The tables of a report, and what is said of how a model came about."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from trainer.calibration import TEMPERATURE
from trainer.content import Content, Figures, Found, Measured, OfLesions
from trainer.groups import RATES, gaps
from trainer.multilabel import AT_POINT
from trainer.report.template import as_words, small
from trainer.report.words import KINDS, LESION_WORDS, LOCALIZATION_WORDS, NO_INTERVAL, chosen_by, without_map

NOTHING = "\u2013"
Cell = str | Markup
Rows = tuple[list[str], list[list[Cell]]]  # a table: its head and its rows


def figure(pair: tuple[float, list[float]] | None) -> Cell:
    """``0.838``, in small print ``0.761 to 0.906``."""
    if pair is None or pair[0] is None or math.isnan(pair[0]):
        return NOTHING
    (value, (low, high)) = pair
    return (
        small(f"{value:.3f}", f"{low:.3f} to {high:.3f}") if low is not None and not math.isnan(low) else f"{value:.3f}"
    )


def _localization(found: Found, head: str) -> Rows:
    """All figures of one kind of localization."""
    names = [name for name in LOCALIZATION_WORDS if name in found]
    words = [LOCALIZATION_WORDS[name] + (f" ({found['iou_threshold']:g})" if name == "iou" else "") for name in names]
    return [head, *words], [["", *(figure((found[name], found[f"{name}_95"])) for name in names)]]


def data(content: Content) -> Rows | None:
    """What each split has; None for reports from before that was written down."""
    of = content.get("data")
    if not of:
        return None
    rows: list[list[Cell]] = [["images", *(str(each["images"]) for each in of.values())]]
    rows.append(["patients", *(str(each["patients"] or "unknown") for each in of.values())])
    for name in content["findings"]:
        cells: list[Cell] = []
        for each in of.values():
            present, absent = each["findings"][name]
            share = f"{100 * present / (present + absent):.1f}%" if present + absent else "unknown"
            cells.append(small(str(present), share))
        rows.append([name, *cells])
    return ["what there is", *of], rows


def training(content: Content) -> str:
    """How the model came about, in a line."""
    t, c = content["training"], content["config"]
    lost = ", ".join(f"{len(keys)} in {split}" for split, keys in content["lungs_not_found"].items() if keys)
    parts = [f"{c['backbone']}, {c['size']} px"]
    if not t.get("map", True):
        parts.append("no feature map, so nothing is said of where it looks")
    if "epochs" in t:
        precision = {"no": "float32"}.get(t["precision"], t["precision"])
        parts.append(
            f"last of {t['epochs']} epochs"
            if t["best"] == "last"
            else f"best of {t['epochs']} epochs by {t['best']} on val: epoch {t['best_epoch']}"
        )
        parts.append(f"{t['minutes']:.1f} minutes on {t['processes']} x {t['device']}, {precision}")
        parts += [
            f"{change['what']} {change['from']} up to step {change['step']}, then {change['to']}"
            for change in t.get("changes", ())
        ]
    parts.append(
        (f"no lungs found, whole image used: {lost}" if lost else "lungs were found in all images")
        if content["lungs_not_found"]
        else "without a lung segmenter"
    )
    replaced = ", ".join(f"{n} in {split}" for split, n in content.get("regions_replaced", {}).items() if n)
    if replaced:
        parts.append(
            "the outline of the lungs left nothing of the region, or was unknown, and its part of the lung box stands "
            f"in: {replaced}"
        )
    return "; ".join(parts) + f". {content.get('written', '')}"


def tables(content: Content, split: Measured) -> list[Rows]:
    """Of each finding, of localization; of one finding an image also of the confusion and the operating point."""
    figures = content[split]
    several = "per_finding" in figures
    every = [_of_cells(figures) if several else _by_finding(content["findings"], figures)]
    every += _looks(content["findings"], figures)
    if figures.get("calibration"):
        every.append(_calibration(content, split))
    for kind, what in KINDS.items():
        if found := figures["localization"].get(kind, {}).get("all"):
            head = (
                f"{what}, {found['images']} {'pairs of image and finding' if several else 'images'}{without_map(found)}"
            )
            every.append(_localization(found, head))
    if found_lesions := figures.get("lesions"):
        every += _lesions(found_lesions, content["findings"])
    every += asked_for(figures)
    if not several:
        confusion: list[list[Cell]] = [
            [name, *map(str, line)] for name, line in zip(content["findings"], figures["confusion"], strict=True)
        ]
        every.append((["is \\ predicted", *content["findings"]], confusion))
    if "binary" in figures:
        names = {"sensitivity": "sensitivity", "specificity": "specificity", "ppv": "PPV", "npv": "NPV"}
        names["youden"] = "Youden's index"
        points: list[tuple[str, Mapping[str, Any]]] = [
            ("predicted class, 0.5", {**figures["per_class"][1], **figures["binary"]})
        ]
        if at := figures.get("at_threshold"):
            how = {"youden": "the best Youden's index", "f1": "the best F1"}.get(way := chosen_by(content), way)
            points.append((f"{at['threshold']:.3f}, {how} on val", at))
        rows: list[list[Cell]] = [[what, *(_with_interval(of, n) for n in names)] for what, of in points]
        every.append(([f"{content['findings'][1]} from a probability of", *names.values()], rows))
    return every


def asked_for(figures: Figures) -> list[Rows]:
    """What an evaluation was asked for beside: figures of studies or patients, at a prevalence, by a column."""
    every = [_of_units(pooled)] if (pooled := figures.get("per")) else []
    every += [_at_prevalence(common)] if (common := figures.get("at_prevalence")) else []
    return every + [_by_column(column, groups) for column, groups in figures.get("by", {}).items()]


def as_text(rows: Rows) -> str:
    """A table for a console: what stands in small print is in brackets."""
    head, lines = rows
    cells = [head, *([as_words(cell) for cell in line] for line in lines)]
    wide = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(w) if not k else cell.rjust(w) for k, (cell, w) in enumerate(zip(line, wide, strict=True)))
        for line in cells
    )


def _calibration(content: Content, split: Measured) -> Rows:
    """How far probabilities are right, of each finding, before and after what val corrects."""
    fitted = content.get("calibration") or {}
    heat = fitted.get(TEMPERATURE)
    how = f"temperature {heat[0]:.2f}, from val" if heat else "Platt's scaling, from val"
    head = ["calibration", "ECE, 15 bins", f"with {how}", "Brier score", f"with {how}"]
    rows: list[list[Cell]] = [
        [name, *(_number(of.get(figure)) for figure in ("ece", "ece_calibrated", "brier", "brier_calibrated"))]
        for name, of in content[split]["calibration"].items()
    ]
    return head, rows


def _lesions(of: dict[str, OfLesions], findings: Sequence[str]) -> list[Rows]:
    """Maps against known lesions as papers print it, each figure beside its floor: of all pairs, then by finding."""
    every = of["all"]
    kinds = {
        "model": "model",
        "constant": "mean lesion of val, whatever the image",
        "region": "expected region, drawn as a map",
        "random": "random weights",
        "true_positives": "model, where it says so",
    }
    shown = [kind for kind in kinds if every.get(kind)]
    rows: list[list[Cell]] = []
    for name, words in LESION_WORDS.items():
        cells = [_of_lesion(every[kind], name) for kind in shown]  # type: ignore[literal-required]
        if any(cell != NOTHING for cell in cells):
            rows.append([words, *cells])
    head = [
        f"lesions, at the size that images are stored at, {every['images']} pairs",
        *(kinds[kind] for kind in shown),
    ]
    tables: list[Rows] = [(head, rows)]
    names = [name for name in findings if name in of]
    if len(names) > 1:
        figures = ("pointing", "hit", "energy", "miou", "t_iou 0.1", "t_iou 0.3", "t_iou 0.5")
        whose = {"model": "", "constant": "; mean lesion", "region": "; expected region"}
        lines: list[list[Cell]] = [
            [f"{name}{words}", str(of[name]["images"]), *(_of_lesion(found, n) for n in figures)]
            for name in names
            for kind, words in whose.items()
            if (found := of[name][kind])  # type: ignore[literal-required]
        ]
        tables.append((["lesions of", "pairs", *(LESION_WORDS[name] for name in figures)], lines))
    return tables


def _by_column(column: str, groups: dict[str, dict[str, Any]]) -> Rows:
    """A row for each finding and value of a column of the samples."""
    head = [f"by {column}", "images", "with it", "AUC against all without it", "AUC against those of the same value"]
    head += ["AUPRC", "sensitivity", "false positives", "ECE", "energy in lesion", "pointing at lesion"]
    rows: list[list[Cell]] = []
    for value, group in groups.items():
        for name, of in group["per_finding"].items():
            cells: list[Cell] = [f"{name}, {value}", str(group["images"]), str(of["present"])]
            cells += [figure((of[n], of[f"{n}_95"] or NO_INTERVAL)) for n in ("auc", "auc_within")]
            cells.append(_number(of.get("auprc")))
            cells += [figure((of[rate], of[f"{rate}_95"] or NO_INTERVAL)) if rate in of else NOTHING for rate in RATES]
            cells.append(_number(of.get("ece")))
            lesion = of.get("lesion")
            cells += [figure((lesion[f], lesion[f"{f}_95"])) if lesion else NOTHING for f in ("energy", "pointing")]
            rows.append(cells)
    for name, of in gaps(groups).items():
        words = f"{name}, best less worst ({of['best']}, {of['worst']})"
        rows.append([words, "", "", "", _number(of["gap"]), *[""] * (len(head) - 5)])
    kept = [i for i in range(len(head)) if any(row[i] not in (NOTHING, "") for row in rows)]
    return [head[i] for i in kept], [[row[i] for i in kept] for row in rows]


def _of_units(of: Mapping[str, Any]) -> Rows:
    """Of studies or patients instead of images."""
    alone = f", {of['without']} of them on their own as their {of['unit']} is unknown" if of["without"] else ""
    over = "patients" if of.get("resampled") == "patients" else f"its values of {of['unit']}"
    what = f"by {of['unit']}: {of['pooling']} of {of['pooled']} images, {of['images']} in all{alone}"
    head = [f"{what}; intervals over {over}"]
    head += ["present", "absent", "AUC", "AUPRC", "threshold", "sensitivity", "specificity", "PPV", "NPV"]
    rows: list[list[Cell]] = []
    for name, row in of["per_finding"].items():
        cells: list[Cell] = [name, str(row["positive"]), str(row["negative"])]
        cells += [_with_interval(row, n) for n in ("auc", "auprc")] + [_number(row["threshold"])]
        rows.append(cells + [_with_interval(row, n) for n in AT_POINT[:4]])
    return head, rows


def _at_prevalence(of: Mapping[str, Mapping[str, float]]) -> Rows:
    """What a yes and a no are worth where findings are as common as the user says."""
    head = ["where it is as common as", "prevalence", "PPV", "NPV"]
    return head, [
        [name, f"{row['prevalence']:g}", _number(row["ppv"]), _number(row["npv"])] for name, row in of.items()
    ]


def _of_lesion(found: Found | None, name: str) -> Cell:
    """A figure of `trainer.papers.figures`; ``t_iou 0.1``: one of several steps."""
    kind, _, step = name.partition(" ")
    if not found or kind not in found:
        return NOTHING
    return _number(found[kind][step]) if step else figure((found[kind], found.get(f"{kind}_95", NO_INTERVAL)))


def _of_cells(figures: Figures) -> Rows:
    """A row a finding, over the images where it is known; then their mean, and all of them together."""
    head = ["finding", "present", "absent", "unknown", "AUC", "AUPRC", "threshold", *map(_upper, AT_POINT)]
    rows: list[list[Cell]] = []
    for name, row in figures["per_finding"].items():
        cells: list[Cell] = [name, *(str(row[n]) for n in ("positive", "negative", "unknown"))]  # type: ignore[literal-required]
        cells += [_with_interval(dict(row), n) for n in ("auc", "auprc")]
        cells.append(_number(row["threshold"]))
        rows.append(cells + [_with_interval(dict(row), n) for n in AT_POINT])
    macro, micro = figures["macro"], figures["micro"]
    mean: list[Cell] = [f"mean of {figures['defined']} of {len(rows)}", "", "", ""]
    mean += [_with_interval(dict(figures), n) for n in ("auc", "auprc")] + [""]
    together: list[Cell] = ["all cells together", "", "", "", _number(micro["auc"]), _number(micro["auprc"]), ""]
    fewer = {n: figures["macro_findings"][n] for n in AT_POINT if figures["macro_findings"][n] < figures["defined"]}
    mean += [small(f"{macro[n]:.3f}", f"of {fewer[n]}") if fewer.get(n) else _number(macro[n]) for n in AT_POINT]
    together += [_number(micro.get(n)) for n in AT_POINT]
    return head, [*rows, mean, together]


def _looks(findings: Sequence[str], figures: Figures) -> list[Rows]:
    """How much of the maps of each finding lies where it is expected, and in its lesions; none of what is not known."""
    places = {"expected": "region", "lesion": "lesion"}
    head = ["its maps", *(f"{what} {where}" for where in places.values() for what in ("energy in", "pointing at"))]
    rows: list[list[Cell]] = []
    for name in findings:
        cells: list[Cell] = [name]
        for kind in places:
            found = figures["localization"].get(kind, {}).get(name)
            cells += [figure((found[f], found[f"{f}_95"])) if found else NOTHING for f in ("energy", "pointing")]
        if any(cell != NOTHING for cell in cells[1:]):
            rows.append(cells)
    kept = [i for i in range(len(head)) if any(row[i] != NOTHING for row in rows)]
    return [([head[i] for i in kept], [[row[i] for i in kept] for row in rows])] if rows else []


def _with_interval(row: Mapping[str, Any], name: str) -> Cell:
    return figure((row[name], row.get(f"{name}_95", NO_INTERVAL))) if row.get(name) is not None else NOTHING


def _upper(name: str) -> str:
    return name if len(name) > 3 else name.upper()


def _number(value: float | None) -> Cell:
    return NOTHING if value is None or math.isnan(value) else f"{value:.3f}"


def _by_finding(findings: Sequence[str], figures: Figures) -> Rows:
    """A row a class, against the rest; reports from before some figures were measured have none."""
    head = ["finding against the rest, at the predicted class", "images", "AUC", "AUPRC", *map(_upper, AT_POINT)]
    rows: list[list[Cell]] = []
    for name, row in zip(findings, figures["per_class"], strict=True):
        known = {"sensitivity": row["recall"], "ppv": row["precision"]} | dict(row)
        cells = [_with_interval(known, n) for n in ("auc", "auprc", *AT_POINT)]
        rows.append([name, str(row["support"]), *cells])
    return head, rows
