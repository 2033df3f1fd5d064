"""What a person gets: report.json, the published text report, curves and panel as PNG, report.html with all of it.

python -m trainer.report --out FILE.html RUN [RUN ...]: several finished runs side by side.
"""

if __name__ == "__main__":  # what is wrong with the flags is said before torch is imported, which takes seconds
    from shards.errors import run as _run
    from trainer.config import ReportConfig as _Config
    from trainer.config import parse as _parse
    from trainer.config import positionals as _positionals

    def _check() -> None:
        _parse(_Config, _positionals(None)[0], prog="trainer.report")

    _run(_check)

import base64
import hashlib
import html
import io
import json
import math
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.metrics import roc_curve

from shards import atomic
from shards.dataset import Split
from shards.errors import InputError, finite, read_json, run
from trainer.annotations import lesion_regions
from trainer.checkpoint import read_lines
from trainer.classifier import FocusClassifier
from trainer.config import Config, ReportConfig, parse, positionals
from trainer.launching import Accelerator
from trainer.look import look
from trainer.lungs import LungFinder
from trainer.metrics import LOCALIZATION, measured
from trainer.regions import Regions
from trainer.rules import Rule

if TYPE_CHECKING:
    from trainer.evaluate import Outcome

matplotlib.rcParams["text.parse_math"] = False  # a name with two dollars is no formula
TILES = 12
LONGEST = 200  # bytes of a file name that is made of others' names; file systems take 255
LUNGS, REGION, LESION = "#00e5ff", "#7CFC00", "#ff4040"


@dataclass
class Tile:
    """One image of a panel: image and cam float [S,S] in [0,1]; region, lesion and lungs bool [S,S]."""

    title: str
    image: np.ndarray
    cam: np.ndarray
    region: np.ndarray
    lesion: np.ndarray
    lungs: np.ndarray


def tiles(accelerator: Accelerator, model: FocusClassifier, split: Split, lungs: LungFinder | None, config: Config, rules: Mapping[str, Rule]) -> list[Tile]:
    """Up to 12 images of a split, the first ones of each class in turn, with the CAM of their label's class."""
    per_class = [np.flatnonzero(split.labels == k) for k in range(len(split.classes))]
    chosen = [c[i] for i in range(max(map(len, per_class))) for c in reversed(per_class) if i < len(c)][:TILES]
    index, device, size = torch.as_tensor(np.array(chosen)), accelerator.device, config.size
    raw = torch.from_numpy(np.stack([split.image(p) for p in chosen]))[:, None].to(device)
    labels = torch.as_tensor(split.labels[chosen].astype(np.int64)).to(device)
    names = [split.classes[k] for k in labels.tolist()]
    training = model.training
    seen = look(accelerator, model.eval(), raw, index, labels, lungs, Regions(split.classes, rules, size, device), labels)
    model.train(training)
    cams = seen.cam.cpu().numpy() if seen.cam is not None else np.zeros((len(raw), size, size), np.float32)
    probability = torch.softmax(seen.logits.float(), 1).cpu()
    regions, lesions = seen.region.cpu().numpy(), lesion_regions(split, index, raw.shape[-2:], size).numpy()
    outlines = seen.lungs
    outlined = outlines.cpu().numpy() if outlines is not None else np.zeros_like(regions)
    result = []
    for b, name in enumerate(names):
        guess = int(probability[b].argmax())
        title = f"{short(name)}\npredicted {short(split.classes[guess])} {probability[b, guess]:.2f}"
        title += "" if cams[b].any() else ", no map"
        result.append(Tile(title, seen.images[b, 0].float().cpu().numpy(), cams[b], regions[b], lesions[b], outlined[b]))
    return result


def panel(shown: list[Tile], columns: int = 4, cam_of: str = "the label's class") -> Figure:
    """Each image beside itself with its CAM; the outlines of lungs cyan, of the expected region green, of lesion boxes red, as far as there are any."""
    drawn = (("cyan: lungs", any(t.lungs.any() for t in shown)), ("green: expected region", any(t.region.any() for t in shown)))
    words = [word for word, there in (*drawn, ("red: lesion box", any(t.lesion.any() for t in shown))) if there]
    legend = "   ".join([*words, f"right half: Grad-CAM of {cam_of}"])
    columns = min(columns, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = Figure(figsize=(3.7 * columns, 2.35 * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax, tile in zip(axes.flat, shown, strict=False):
        draw(ax, tile)
    for ax in axes.flat:
        ax.axis("off")
    figure.supxlabel(legend, fontsize=9 if columns > 1 else 6)
    return figure


def whole(splits: dict[str, Split], lost: dict[str, list[int]]) -> Figure | None:
    """Up to 12 of the images without believable lungs, by split; None where there are none. ``lost``: their positions."""
    every = [(name, position) for name, positions in lost.items() for position in positions]
    if not every:
        return None
    chosen = [every[i] for i in np.unique(np.linspace(0, len(every) - 1, TILES).astype(int))]
    figure = Figure(figsize=(12, 2.3 * math.ceil(len(chosen) / 6)), layout="constrained")
    for k, (name, position) in enumerate(chosen):
        ax = figure.add_subplot(math.ceil(len(chosen) / 6), 6, k + 1)
        ax.imshow(splits[name].image(position), cmap="gray", vmin=0, vmax=255)
        ax.set_title(f"{name} {splits[name].key(position)}", fontsize=7)
        ax.axis("off")
    return figure


def draw(ax: Any, tile: Tile) -> None:
    """The tile's image and, to its right, the same with the CAM over it."""
    size = tile.image.shape[0]
    gray = np.repeat(tile.image[..., None], 3, 2)
    heat = matplotlib.colormaps["inferno"](tile.cam)[..., :3]
    alpha = 0.65 * tile.cam[..., None]
    ax.imshow(np.concatenate([gray, (1 - alpha) * gray + alpha * heat], 1), vmin=0, vmax=1)
    for shift in (0, size):
        for mask, colour in ((tile.lungs, LUNGS), (tile.region, REGION), (tile.lesion, LESION)):
            if mask.any():
                ax.contour(np.arange(size) + shift, np.arange(size), mask, levels=[0.5], colors=[colour], linewidths=0.9)
    ax.set_title(tile.title, fontsize=8)


def curves(history: list[dict[str, Any]], outcomes: dict[str, "Outcome"], findings: list[str]) -> Figure:
    """Losses, lambda and validation figures by epoch, and the ROC of each split; ``findings`` names the classes, class 0 first."""
    figure = Figure(figsize=(13, 3.2), layout="constrained")
    axes = figure.subplots(1, 4)
    epochs = [line for line in history if "val_loss" in line]
    steps = [line for line in history if "ce" in line]
    axes[0].set_title("cross-entropy")
    axes[1].set_title("attention loss and lambda")
    axes[2].set_title("validation")
    axes[3].set_title("ROC")
    axes[0].plot([line["position"] for line in steps], [line["ce"] for line in steps], lw=0.8, label="train")
    axes[0].plot([line["epoch"] + 1 for line in epochs], [line["val_loss"] for line in epochs], "o-", ms=3, label="val")
    attended = [line for line in steps if line.get("attention") is not None]
    if attended:
        axes[1].plot([line["position"] for line in attended], [line["attention"] for line in attended], lw=0.8, label="attention, train")
        axes[1].plot([line["position"] for line in steps], [line["lambda"] for line in steps], lw=0.8, label="lambda")
    else:
        axes[1].text(0.5, 0.5, "none: plain cross-entropy", ha="center", va="center", transform=axes[1].transAxes)
    for name in ("val_accuracy", "val_auc", "val_energy"):
        known = [line for line in epochs if line.get(name) is not None]
        if known:
            axes[2].plot([line["epoch"] + 1 for line in known], [line[name] for line in known], "o-", ms=3, label=name[4:])
    for split, outcome in outcomes.items():
        scores = torch.softmax(outcome.logits.double(), 1)
        for k in range(1, scores.shape[1]):
            if 0 < (outcome.labels == k).sum() < len(outcome.labels):
                fpr, tpr, _ = roc_curve((outcome.labels == k).numpy(), scores[:, k].numpy())
                axes[3].plot(fpr, tpr, lw=1, label=split if scores.shape[1] == 2 else f"{split}, {short(findings[k])}")
    for ax, label in zip(axes, ("epoch", "epoch", "epoch", "1 - specificity"), strict=True):
        ax.set_xlabel(label)
        ax.grid(alpha=0.3)
        if ax.get_legend_handles_labels()[0]:
            entries = len(ax.get_legend_handles_labels()[0])
            ax.legend(fontsize=7 if entries <= 12 else 3.5, ncols=1 if entries <= 12 else 2)
    return figure


def text_name(config: Config, dataset: str) -> str:
    """``<backbone>_<dataset>_<task>_la<lambda>_t<threshold>.txt`` as published; the published schedule is ``laa``."""
    lam = {"fixed": f"{config.balance.lam:g}", "published": "a"}.get(config.balance.policy, config.balance.policy)
    task = config.task.replace(",", "-").replace(" ", "").replace("/", "-")
    return file_name(f"{config.backbone}_{dataset}_{task}_la{lam}_t{config.attention.threshold:g}", ".txt")


def file_name(text: str, suffix: str = "") -> str:
    """A name of one file, whatever the names in it: no folder, no control or foreign sign, and not too long, with a checksum where it was cut."""
    plain = re.sub(r"[^\w .,+=@()-]", "-", text).lstrip(".") or "-"
    data = plain.encode()
    if len(data) + len(suffix) > LONGEST:
        plain = data[: LONGEST - len(suffix) - 9].decode(errors="ignore") + "-" + hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:8]
    return plain + suffix


def printable(text: str) -> str:
    """Text that can be drawn, printed and written: what is none, as of a file's name in another encoding, becomes an escape."""
    return text.encode(errors="backslashreplace").decode()


def short(name: str) -> str:
    """A name for a picture, where a long one would leave no room for the rest."""
    return name if len(name) <= 28 else f"{name[:27]}\u2026"


def rehearse(config: Config, dataset: str, findings: tuple[str, ...], out: Path) -> None:
    """What is drawn and written at the end, tried with these names at the start. InputError: it cannot be."""
    nothing = np.zeros((8, 8), np.float32)
    try:
        png(panel([Tile(short(name), nothing, nothing, *[nothing > 1] * 3) for name in findings][:TILES]))
        png(curves([], {}, list(findings)))
        if not (name := out / text_name(config, dataset)).exists():
            atomic.write(name, "")
            name.unlink()
    except Exception as error:
        raise InputError(f"--task {config.task}: a report with these names cannot be made ({error}); rename the findings in a file of --findings") from error


def text_report(content: dict[str, Any]) -> str:
    """The published text report, then what it lacks."""
    lines = [f"Execution Time: {content['training'].get('minutes', 0):.2f} minutes"]
    shown = [(split, content[split]) for split in ("val", "test") if split in content]
    for number, (split, figures) in enumerate(shown):
        if number or split == "test":
            lines += ["-" * 30, "Metrics of unseen test data:"]
        lines += [_classification_table(figures, content["findings"]), f"AUC Score: {figures['auc']:.4f}"]
        if "binary" in figures:
            b = figures["binary"]
            lines += [
                f"Best Threshold: {b['best_threshold']:.4f}",
                f"Specificity: {b['specificity']:.4f}",
                f"False Discovery Rate (FDR): {b['fdr']:.4f}",
                f"False Omission Rate (FOR): {b['for']:.4f}",
            ]
    for split, figures in shown:
        lines += ["-" * 30, f"Beyond the published report, {split}:"]
        if "binary" in figures:
            b = figures["binary"]
            lines.append(f"(Best Threshold above is chosen on {split} itself; the figures beside it, and these, are at the predicted class)")
            lines += [f"Sensitivity: {b['sensitivity']:.4f}", f"Positive Predictive Value (PPV): {b['ppv']:.4f}"]
            lines += [f"Youden's Index: {b['youden']:.4f}", f"Discriminant Power: {b['dp']:.4f}"]
            if at := figures.get("at_threshold"):
                told = (
                    f"{words} {at[name]:.4f}" for name, words in (("sensitivity", "sensitivity"), ("specificity", "specificity"), ("youden", "Youden's index"))
                )
                lines.append(f"At the threshold {at['threshold']:.4f}, chosen on val: {', '.join(told)}")
        for kind, what in KINDS.items():
            if kind not in figures["localization"]:
                continue
            found = figures["localization"][kind]["all"]
            if found is None:
                lines.append(f"Localization, {what}: no ground truth")
                continue
            lines.append(f"Localization, {what} ({found['images']} images{_without_map(found)}):")
            for name, words in LOCALIZATION_WORDS.items():
                if name in found:
                    at = f" at {found['iou_threshold']:g}" if name == "iou" else ""
                    low, high = found[f"{name}_95"]
                    lines.append(f"  {words}{at}: {found[name]:.4f} [{low:.4f}, {high:.4f}]")
        if figures.get("probe"):
            lines.append("Probes of the localization:")
            known = {words: found for words, found in probes(figures["probe"]).items() if found[0] is not None}
            lines += [f"  {words}: {value:.4f} [{low:.4f}, {high:.4f}]" for words, (value, (low, high)) in known.items()]
    for split, keys in content["lungs_not_found"].items():
        lines.append(f"No lungs found, whole image used ({split}): {len(keys)}")
    lines += [f"Expected regions replaced by their part of the lung box ({split}): {n}" for split, n in content.get("regions_replaced", {}).items()]
    return "\n".join(lines) + "\n"


def _without_map(found: dict[str, Any]) -> str:
    """How many CAMs are zero everywhere: they have no energy, and miss."""
    return f", {found['without_map']} of them without a map: no energy, pointing misses" if found.get("without_map") else ""


KINDS = {"expected": "expected region", "expected_box": "part of the lung box, as published or as the rule has it", "lesion": "lesion boxes"}
LOCALIZATION_WORDS = {
    "energy": "CAM energy inside",
    "lift": "CAM energy inside minus area",
    "pointing": "Pointing hit",
    "pointing_near": "Pointing hit with tolerance",
    "coverage": "Coverage at the threshold",
    "iou_otsu": "IoU at Otsu's threshold",
    "iou": "IoU, threshold from val",
}


def probes(probe: dict[str, Any]) -> dict[str, tuple[float, list[float]]]:
    """The figures of `evaluate.probe` in words, each with its 95% interval."""
    chance = probe["random"]
    figures = [(probe[name], probe[f"{name}_95"]) for name in ("drop_outside", "drop_inside")]
    figures += [(chance[name], chance[f"{name}_95"]) if chance else (None, [None, None]) for name in ("energy", "similarity")]
    return dict(zip(PROBES, figures, strict=True))


def _classification_table(figures: dict[str, Any], findings: list[str]) -> str:
    """Laid out as scikit-learn's classification_report with 3 digits, which the published code prints."""
    width = max(12, *map(len, findings))
    lines = [f"{'':>{width}} {'precision':>9} {'recall':>9} {'f1-score':>9} {'support':>9}", ""]
    rows = figures["per_class"]
    total = sum(row["support"] for row in rows)
    for name, row in zip(findings, rows, strict=True):
        lines.append(f"{name:>{width}} {row['precision']:>9.3f} {row['recall']:>9.3f} {row['f1']:>9.3f} {row['support']:>9}")
    lines += ["", f"{'accuracy':>{width}} {'':>9} {'':>9} {figures['accuracy']:>9.3f} {total:>9}"]
    macro = [figures["macro_precision"], figures["macro_recall"], figures["macro_f1"]]
    weighted = [sum(row[n] * row["support"] for row in rows) / total for n in ("precision", "recall", "f1")]
    for name, average in (("macro avg", macro), ("weighted avg", weighted)):
        lines.append(f"{name:>{width}} " + " ".join(f"{value:>9.3f}" for value in average) + f" {total:>9}")
    return "\n".join(lines) + "\n"


def write_run(
    out: Path,
    config: Config,
    content: dict[str, Any],
    outcomes: dict[str, "Outcome"],
    shown: list[Tile],
    splits: dict[str, Split],
    lost: Figure | None,
) -> None:
    """Write report.json, the text report, predictions, panel.png, curves.png, no_lungs.png and report.html into the run folder."""
    history = read_lines(out / "metrics.jsonl")
    pictures = {"panel": png(panel(shown)), "curves": png(curves(history, outcomes, content["findings"]))}
    if lost is not None:
        pictures["no_lungs"] = png(lost)
    for name, data in pictures.items():
        atomic.write(out / f"{name}.png", data)
    for name, outcome in outcomes.items():
        atomic.write(out / f"predictions_{name}.jsonl", _predictions(outcome, splits[name]))
    text = text_report(content)
    atomic.write(out / text_name(config, content["dataset"]), text)
    atomic.write(out / "report.html", _page(out.resolve().name, {out.resolve().name: content}, {out.resolve().name: pictures}, text))
    atomic.write(out / "report.json", json.dumps(finite(content), indent=1))


def _predictions(outcome: "Outcome", split: Split) -> str:
    """One JSON line an image: key, label, probabilities, localization."""
    probability = torch.softmax(outcome.logits.double(), 1)
    lines = []
    for i in range(len(split)):
        line: dict[str, Any] = {"key": split.key(i), "label": split.classes[split.labels[i]]}
        line["probability"] = {name: round(p, 6) for name, p in zip(split.classes, probability[i].tolist(), strict=True)}
        for kind, table in outcome.tables().items():
            if measured(table[i : i + 1]).any():  # an energy that is null: the CAM is zero everywhere
                line[kind] = {n: round(v, 6) for n, v in zip(LOCALIZATION, table[i].tolist(), strict=False)}  # the rest: IoU by threshold
        lines.append(json.dumps(finite(line)) + "\n")
    return "".join(lines)


PROBES = ("AUC lost, outside blurred", "AUC lost, region blurred", "energy, random weights", "likeness to random weights")
SUMMARY = ("accuracy", "AUC", "energy in region", "lift over area", "pointing hit", "energy in lesion", "pointing at lesion", *PROBES)
MEANING = {
    "energy in region": "share of the CAM's sum that lies in the region where the finding is expected (green; where its weight is a half or more), "
    "mean over the images of a finding",
    "lift over area": "that share minus the region's share of the image: 0 is no better than a map that is the same everywhere",
    "pointing hit": "share of those images whose CAM has its peak in the region",
    "energy in lesion": "as above, in the lesion boxes (red) of the image's own finding, on images that have some",
    "pointing at lesion": "as above",
    PROBES[0]: "fall of the AUC when everything but the expected region is blurred, paired by image: what the model gets from elsewhere on these "
    "images. Near 0 or below it does not mean that it reads the region: a mark that misleads on these images is no loss",
    PROBES[1]: "fall of the AUC when the expected region is blurred: what the model gets from there",
    PROBES[2]: "energy in region of the same network with random weights: what an untrained map gets for nothing",
    PROBES[3]: "mean rank correlation of the model's CAMs with those of the random network; near 1, the maps do not depend on what was learned",
}
CAUTION = (
    "A region is where a finding is expected, not where it is: a model can look there and be wrong, so read these figures beside AUC, "
    "and where there are lesion boxes, beside those of the lesions. Higher is better, but for the loss outside and the two rows of random weights. "
    "The CAM of a No Finding image is that of its own class and has no region: nothing is asked of it."
)


def shown_split(content: dict[str, Any]) -> str:
    """The split that the summary is of: test, or val where there is no test."""
    return "test" if "test" in content else "val"


def summary(content: dict[str, Any]) -> list[tuple[float, list[float]] | None]:
    """The figures of `SUMMARY`, each with its 95% interval; None where there is no ground truth."""
    figures = content[shown_split(content)]
    pairs: list[tuple[float, list[float]] | None] = [(figures[name], figures[f"{name}_95"]) for name in ("accuracy", "auc")]
    for kind, names in (("expected", ("energy", "lift", "pointing")), ("lesion", ("energy", "pointing"))):
        found = figures["localization"][kind]["all"]
        pairs += [(found[name], found[f"{name}_95"]) if found else None for name in names]
    probe = figures.get("probe")
    return pairs + (list(probes(probe).values()) if probe else [None] * len(PROBES))


def notes(runs: dict[str, dict[str, Any]]) -> list[str]:
    """What a reader of runs side by side must know."""
    told = [f"{name} has not finished: its best model so far" for name, content in runs.items() if content["training"].get("unfinished")]
    kinds = {json.dumps([c["findings"], c["dataset"], shown_split(c), c[shown_split(c)]["images"]]) for c in runs.values()}
    if len(kinds) > 1:
        told.append("these runs differ in their findings or images: their figures cannot be compared")
    if len({content.get("regions") for content in runs.values()}) > 1:
        told.append("these runs differ in their expected regions: figures of the region cannot be compared")
    return told


def table(runs: dict[str, dict[str, Any]]) -> str:
    """Runs side by side as text."""
    first = next(iter(runs.values()))
    head = f"{shown_split(first)}, {first[shown_split(first)]['images']} images"
    width = max(len(head), *(len(name) for name in SUMMARY))
    columns = [max(10, len(name)) for name in runs]
    lines = [f"{head:{width}}  " + "  ".join(f"{name:>{c}}" for name, c in zip(runs, columns, strict=True))]
    values = [summary(content) for content in runs.values()]
    for i, name in enumerate(SUMMARY):
        cells = ["-" if (pair := row[i]) is None or pair[0] is None or math.isnan(pair[0]) else f"{pair[0]:.3f}" for row in values]
        if set(cells) != {"-"}:
            lines.append(f"{name:{width}}  " + "  ".join(f"{cell:>{c}}" for cell, c in zip(cells, columns, strict=True)))
    return "\n".join([*lines, *(f"note: {note}" for note in notes(runs))])


def png(figure: Figure, dpi: int = 110) -> bytes:
    """A figure as the bytes of a PNG."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph")  # names in letters that the font has not are boxes in pictures, and whole in the page
        figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1280px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.25em 1em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}small{color:#777;white-space:nowrap}
dl{display:grid;grid-template-columns:minmax(7em,12em) 1fr;gap:.3em 1em}dt{font-weight:600}dd{margin:0}
img{max-width:100%}pre{background:#f6f6f6;padding:1em;overflow:auto;font-size:12px}"""


def _page(title: str, runs: dict[str, dict[str, Any]], pictures: dict[str, dict[str, bytes]], text: str = "") -> str:
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
        _localization(place[kind]["all"], f"{what}, {place[kind]['all']['images']} images{_without_map(place[kind]['all'])}")
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


def main(argv: list[str] | None = None) -> None:
    """Print the table, write the page."""
    flags, folders = positionals(argv)
    options = parse(ReportConfig, flags, prog="trainer.report")
    if not folders:
        raise InputError("no runs named: python -m trainer.report --out FILE.html RUN [RUN ...]")
    runs, pictures = {}, {}
    for folder in map(Path, folders):
        if not (folder / "report.json").is_file():
            raise InputError(f"{folder}: has no report.json; is it the folder of a finished run of trainer.train?")
        content = read_json(folder / "report.json")
        if not isinstance(content, dict) or "findings" not in content:
            raise InputError(f"{folder}: is a run of trainer.train_lungs; runs of trainer.train are compared here")
        if folder.resolve().name in runs:
            raise InputError(f"{folder}: a second run of that name; the columns could not be told apart, rename one folder")
        name = folder.resolve().name
        runs[name] = content
        pictures[name] = {kind: (folder / f"{kind}.png").read_bytes() for kind in ("panel", "curves", "no_lungs") if (folder / f"{kind}.png").is_file()}
    out = Path(options.out)
    if out.is_dir():
        raise InputError(f"--out {out}: is a folder; name the HTML file to write, such as {out / 'report.html'}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(out, _page("cxr-focus", runs, pictures))
    except OSError as error:
        raise InputError(f"--out {out}: cannot be written ({error.strerror})") from error
    print(table(runs))
    print(f"\nreport: {out.resolve()}")


if __name__ == "__main__":
    run(main)
