"""report.html: one file that needs nothing beside it."""

import json
from collections.abc import Mapping, Sequence

from shards.sample import NO_FINDING
from trainer.content import Content, Figures
from trainer.gallery import Shown
from trainer.report.tables import data, figure, tables, training
from trainer.report.template import render
from trainer.report.verdict import verdict
from trainer.report.versus import Versus
from trainer.report.words import (
    CAUTION,
    HEALTHY,
    MEANING,
    SUMMARY,
    chosen_by,
    notes,
    shown_split,
    summary,
)

HEADINGS = {  # of a picture: its heading, and what it shows for who cannot see it
    "panel": ("Where the model looks", "Twelve radiographs, each beside itself with its map and the outlines over it"),
    "curves": ("Curves", "Losses, lambda and figures by epoch; ROC, precision and recall, calibration"),
    "no_lungs": (
        "No lungs found: the whole image stands in for the box",
        "Radiographs in which no lungs were found",
    ),
}


def page(
    title: str,
    runs: dict[str, Content],
    pictures: dict[str, dict[str, bytes]],
    text: str = "",
    gallery: Sequence[Shown] = (),
    versus: Sequence[Versus] = (),
    about: str = "",
    links: Mapping[str, str] | None = None,
) -> str:
    """The page of one run, or of several side by side.

    Args:
        runs: content of report.json by name of the run; pictures: PNGs of each, by kind.
        text: the published text report; gallery: images of one run; versus: what differs between several;
            about: a paragraph of theirs; links: to the page of each.
    """
    first = next(iter(runs.values()))
    split = shown_split(first)
    values = [summary(content) for content in runs.values()]
    rows = [
        [name, *(figure(row[i]) for row in values)] for i, name in enumerate(SUMMARY) if any(row[i] for row in values)
    ]
    shown = {row[0] for row in rows}
    each = [
        {
            "name": name,
            "verdict": verdict(content) if len(runs) > 1 else [],
            "link": (links or {}).get(name, ""),
            "training": training(content),
            "data": data(content),
            "tables": tables(content, split if split in content else shown_split(content)),
            "pictures": [(kind, *HEADINGS[kind], png) for kind, png in pictures[name].items()],
            "regions": content.get("regions", ""),
            "settings": json.dumps({"training": content["training"], "config": content["config"]}, indent=1),
        }
        for name, content in runs.items()
    ]
    return render(
        "runs.html",
        title=title,
        first=first,
        split=split,
        notes=notes(runs),
        names=list(runs),
        summary=rows,
        meanings={name: meaning for name, meaning in MEANING.items() if name in shown},
        caution=CAUTION + (HEALTHY if NO_FINDING in first["findings"] else ""),
        cells=_of_what(first[split], chosen_by(first))
        if "per_finding" in first[split]
        else f"Intervals of 95% are over {first[split].get('resampled', 'images')}.",
        runs=each,
        text=text,
        verdict=verdict(first) if len(runs) == 1 else [],
        gallery=gallery,
        versus=versus,
        about=about,
    )


def _of_what(figures: Figures, how: str) -> str:
    """What the figures of several findings an image are over."""
    return (
        f"Of each finding over the images where it is known, {figures['cells']} cells in all; uncertain ones are "
        "unknown, whatever training made of them. "
        f"Thresholds are those that the run's val chose ({how}). Means are over the "
        f"{figures['defined']} of {len(figures['per_finding'])} findings of which there are images with and without. "
        f"Intervals of 95% are over {figures['resampled']}."
    )
