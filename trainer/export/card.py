"""The card of an export: what the model is, what it was trained on, how well it does, what it must not be used for."""

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.content import Content
from trainer.export.session import OPSET
from trainer.groups import limits_of
from trainer.lungs.load import load_segmenter
from trainer.lungs.segmenter import LungSegmenter
from trainer.report.paper import markdown
from trainer.report.tables import Cell, data, tables, training
from trainer.report.template import as_words, plain
from trainer.report.verdict import verdict
from trainer.report.words import chosen_by, shown_split

DESCRIBED = {
    "logits": "float [B,K]",
    "probability": "float [B,K]",
    "calibrated": "float [B,K], as val corrects it; NaN where it could not",
    "cam": "float [B,K,S,S] in [0,1], S = {size}: the Grad-CAM of each finding, over the square",
    "found": "bool [B]: whether there are lungs; without them the box is the whole image, and no region",
    "lung_box": "int64 [B,4], x0 y0 x1 y1 in pixels of S x S, ends exclusive",
    "lungs": "bool [B,S,S]",
    "region": "bool [B,{regions},S,S]: where these are expected: {names}",
}
SHIPPED = (
    "The lung segmenter, `lungs.safetensors` and whatever was made of it, ships with cxr-focus. It learned from masks "
    "of the Shenzhen set by Stirenko et al. (arXiv 1803.01199), which are under CC BY-NC-SA 4.0, and carries their "
    "terms: not for commercial use, share alike, name the source."
)
OWN = "The lung segmenter was one of the trainer's own choice: its terms are those of the masks that it learned from."


def card(
    content: Content, config: Mapping[str, Any], description: Mapping[str, Any], segmenter: LungSegmenter | None
) -> str:
    """The card as Markdown; ``config``: of the run, ``description``: content of export.json."""
    split = shown_split(content)
    figures = content[split]
    names = content["findings"]
    described = [
        (name, DESCRIBED[name].format(
            size=description["size"], regions=len(description["regions"]), names=", ".join(description["regions"])
        ))
        for name in description["outputs"]
    ]  # fmt: skip
    several = config["labels"]["kind"] == "any"
    of = limits_of(names, content.get("threshold"))
    thresholds = ", ".join(f"{name} {'none' if at is None else f'{at:.3f}'}" for name, at in of.items())
    alone = config["balance"]["policy"] == "fixed" and config["balance"]["lam"] == 1
    stretch = description["stored"]["aspect"] == "stretch"
    side = description["stored"]["size"]
    lungs = "" if segmenter is None else SHIPPED if _shipped(segmenter) else OWN
    return plain(
        "card.md",
        table=table,
        title=f"{', '.join(names[:4])}{' and others' if len(names) > 4 else ''}: a classifier of chest radiographs",
        verdict=verdict(content),
        training=training(content),
        findings=names,
        labels="each is there or not by itself" if several else "one an image",
        dataset=content["dataset"],
        data=data(content),
        attention=_loss(several, alone),
        opset=OPSET,
        side=side,
        outputs=description["outputs"],
        backbone=config["backbone"],
        lungs=lungs,
        described=described,
        packing="stretched to it." if stretch else "its longer side fits, the rest is black, the image in the middle.",
        snippet=_snippet(side, stretch),
        thresholds=thresholds,
        chosen=chosen_by(content),
        precision=content["training"].get("precision", ""),
        distance=", ".join(f"{name} {value:.1g}" for name, value in description["distance"].items()),
        split=split,
        images=figures["images"],
        resampled=figures.get("resampled", "images"),
        tables=tables(content, split),
        by=bool(figures.get("by")),
        written=description["written"],
        report=content.get("written", ""),
    )


def card_of_run(content: Content, stored: Mapping[str, Any], size: int, segmenter: LungSegmenter | None) -> str:
    """The card of a run that has no graph; ``stored``: how its images are packed; ``size``: of its input."""
    nothing: dict[str, Any] = {"outputs": [], "regions": [], "distance": {}}
    description = nothing | {"size": size, "stored": {"aspect": "stretch"} | dict(stored), "written": ""}
    return card(content, content["config"], description, segmenter)


def _loss(several: bool, alone: bool) -> str:
    beside = "alone" if alone else "and the place of the map, by the rules in `findings.yaml`"
    return f"Loss: {'binary ' if several else ''}cross-entropy {beside}."


def _shipped(segmenter: LungSegmenter) -> bool:
    return segmenter.fingerprint() == load_segmenter().fingerprint()


def _snippet(side: int, stretch: bool) -> str:
    lines = ['image = Image.open("FILE").convert("L")']
    if stretch:
        lines.append(f"image = image.resize(({side}, {side}), Image.Resampling.BOX)")
    else:
        lines += [
            f"image.thumbnail(({side}, {side}), Image.Resampling.BOX)",
            f'square = Image.new("L", ({side}, {side}))',
            f"square.paste(image, (({side} - image.width) // 2, ({side} - image.height) // 2))",
            "image = square",
        ]
    return "\n".join(lines)


def table(head: Sequence[Cell], rows: Sequence[Sequence[Cell]]) -> str:
    """A table in Markdown; what a page has in small print stands in brackets."""
    return markdown([_cell(cell) for cell in head], [[_cell(cell) for cell in row] for row in rows])


def _cell(cell: Cell) -> str:
    return as_words(cell).replace("|", "\\|")
