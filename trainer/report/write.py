"""Writing a run's reports."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shards import atomic
from shards.dataset import Split
from shards.errors import InputError, finite
from trainer.checkpoint import read_lines
from trainer.config import Config
from trainer.content import Content
from trainer.drawing import short
from trainer.gallery import Shown
from trainer.metrics import LOCALIZATION, measured
from trainer.outcome import Outcome
from trainer.report.figures import TILES, Tile, curves, panel, png, svg, without_lungs
from trainer.report.page import page
from trainer.report.words import MEASURED, is_published_kind, text_name, text_report, title
from trainer.task import Point


def write_run(
    out: Path,
    config: Config,
    content: Content,
    outcomes: dict[str, Outcome],
    shown: list[Tile],
    images: Sequence[Shown],
    splits: Mapping[str, Split],
    lost: Mapping[str, Sequence[int]],
) -> None:
    """Write report.json, the text report (of one finding an image), predictions, panel.png, curves.png, no_lungs.png
    and report.html into the run folder.

    Args:
        content: of report.json.
        shown: tiles of the panel; images: of the gallery.
        lost: by split, positions of the images in which no lungs were found.
    """
    history = read_lines(out / "metrics.jsonl")
    pictures = {"panel": png(panel(shown))} if shown else {}
    drawn = curves(history, outcomes, content["findings"], {n: dict(content[n]) for n in MEASURED if n in content})
    pictures |= {"curves": png(drawn)}
    if (sheet := without_lungs(splits, lost)) is not None:
        pictures["no_lungs"] = png(sheet)
    for name, data in pictures.items():
        atomic.write(out / f"{name}.png", data)
    pictures["curves"] = svg(drawn)
    if pictures["curves"].startswith(b"<"):
        atomic.write(out / "curves.svg", pictures["curves"])
    for name, outcome in outcomes.items():
        lines = _predictions(outcome, splits[name], content["threshold"], outcome.patients())
        atomic.write(out / f"predictions_{name}.jsonl", lines)
    text = text_report(content) if is_published_kind(content) else ""
    if text:
        atomic.write(out / text_name(config, content["dataset"]), text)
    atomic.write(
        out / "report.html",
        page(title(content), {content["run"]: content}, {content["run"]: pictures}, text, images),
    )
    atomic.write(out / "report.json", json.dumps(finite(content), indent=1))


def _predictions(outcome: Outcome, split: Split, point: Point = None, patients: np.ndarray | None = None) -> str:
    """One JSON line an image: key, the file that it was packed from where that is known, labels, probabilities,
    localization, and the number of its patient in this file.
    """
    said = outcome.task.lines(outcome.logits, outcome.target, point)
    lines: list[dict[str, Any]] = [
        {"key": split.key(i)} | ({"source": name} if (name := split.meta(i).get("source")) else {}) | line
        for i, line in enumerate(said)
    ]
    if patients is not None:
        lines = [line | {"patient": int(who)} for line, who in zip(lines, patients, strict=True)]
    one_each = not outcome.task.several and torch.equal(
        outcome.pairs.image, torch.arange(len(lines))
    )  # or figures stand under their finding
    for kind, table in outcome.tables().items():
        for pair in measured(table).nonzero().flatten().tolist():  # an energy that is null: the CAM is zero everywhere
            # The rest: IoU by threshold
            figures = {n: round(v, 6) for n, v in zip(LOCALIZATION, table[pair].tolist(), strict=False)}
            line, finding = lines[int(outcome.pairs.image[pair])], outcome.task.findings[outcome.pairs.finding[pair]]
            line[kind] = figures if one_each else line.get(kind, {}) | {finding: figures}
    return "".join(json.dumps(finite(line)) + "\n" for line in lines)


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
        raise InputError(
            f"--task {config.task}: a report with these names cannot be made ({error}); rename the findings in a file "
            "of --findings"
        ) from error
