"""python -m trainer.regions show | learn: look at the rules; make one from a single annotated radiograph.

Hides the drawing and the arithmetic between pixels of a file and shares of a lung box.
"""

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure

from shards import atomic
from shards.errors import CommandParser, InputError, command_line, listed
from shards.pixels import fit, load_image
from shards.sample import EFFUSION, NO_FINDING
from trainer.augment import lung_masks
from trainer.drawing import LESION, LUNGS, REGION
from trainer.lungs import load_segmenter
from trainer.regions.place import Regions, between, wider
from trainer.rules import BOX, LIMIT, Finding, Rectangle, Rule, read_file, read_findings, to_yaml
from trainer.sections import Swap

SIZE = 512
BEYOND = Swap.dilate  # how far beyond the lung box a region may reach, in shares of its sides, to count as inside
# Of the lungs, or of what is between them, in shares of the image's side: disease at the pleura is not seen as lung.
DILATE = 0.04
MOST = 2 / 3  # share of a lesion that a place must hold to be its place; radiologists' boxes hold more than the lesion
SHOW = """examples:
  python -m trainer.regions show      # the ready-made findings on a synthetic radiograph
  python -m trainer.regions show --findings mine.yaml --image CHEST.png --out mine.png"""
LEARN = """example:
  python -m trainer.regions learn CHEST.png --box 1480,410,620,1180 --finding "Pleural plaque" --out plaque.yaml
then
  python -m trainer.train --findings plaque.yaml --task "No Finding,Pleural plaque" ..."""


def main(argv: list[str] | None = None) -> None:
    """Run one of the two commands."""
    plain: dict[str, Any] = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = CommandParser(prog="python -m trainer.regions", description=__doc__, **plain)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=CommandParser)
    show_ = commands.add_parser("show", help="print the findings and draw their regions", epilog=SHOW, **plain)
    show_.add_argument(
        "--findings", default="", help="a file of findings, or published (without it: the ready-made ones, nih)"
    )
    show_.add_argument("--image", type=Path, help="a radiograph to draw on (without it: a synthetic one)")
    show_.add_argument("--out", type=Path, default=Path("regions.png"), help="picture to write")
    learn_ = commands.add_parser("learn", help="a region rule from one annotated radiograph", epilog=LEARN, **plain)
    learn_.add_argument(
        "image", type=Path, metavar="IMAGE", help="the radiograph, any format that shards takes, DICOM included"
    )
    learn_.add_argument(
        "--box",
        action="append",
        required=True,
        metavar="X,Y,W,H",
        help="the lesion in pixels of the file; may be given several times",
    )
    learn_.add_argument("--finding", required=True, metavar="NAME", help="what it is called in the shards")
    learn_.add_argument(
        "--margin",
        type=float,
        default=0.05,
        help="how much larger than the box the region is, in shares of the lung box",
    )
    learn_.add_argument(
        "--one-sided", action="store_true", help="do not mirror a box that lies beside the midline to the other lung"
    )
    learn_.add_argument(
        "--images",
        choices=("only", "any"),
        default="only",
        help="which images count as the finding: with no other label, or any",
    )
    learn_.add_argument(
        "--out",
        type=Path,
        help="file of findings to write or extend (without it: NAME.yaml); the picture stands beside it",
    )
    a = command_line(parser, commands.choices, argv)
    show(a.findings, a.image, a.out) if a.command == "show" else learn(a)


def show(name: str, image: Path | None, out: Path) -> None:
    """Print what is declared and draw each region."""
    findings = read_findings(name)
    if Path(name).is_file():  # one's own first
        findings = {finding: findings[finding] for finding in [*read_file(Path(name)), *findings]}
    _writable(out, (".png", ".pdf", ".svg"))
    if image is None:
        from shards.phantom import phantom

        pixels, what = phantom("phantom", EFFUSION, np.random.default_rng(5), SIZE).image, "a synthetic radiograph"
    else:
        pixels, what = fit(load_image(image), SIZE), str(image)
    box, lungs, found = _lungs(pixels)
    width = max(map(len, findings))
    print(f"{'':{width}}  images  region; numbers are shares of the lung box: left top right bottom")
    for finding, entry in findings.items():
        print(
            f"{finding:{width}}  {entry.images:6}  {_words(entry.rule)}"
            + (f"  ({entry.source})" if entry.source else "")
        )
    _drawn(pixels, box, lungs, {n: f for n, f in findings.items() if f.rule is not None}).savefig(out, dpi=110)
    lost = "" if found else "; no lungs were found in it, so the whole image stands in for their box"
    print(f"wrote {out}: drawn on {what}{lost}")


def learn(a: argparse.Namespace) -> None:
    """Derive a rule from the boxes, add it to the file, draw it."""
    if not 0 <= a.margin <= 1:
        raise InputError(f"--margin {a.margin}: a share of the lung box lies in [0, 1]")
    image = load_image(a.image)
    height, width = image.shape
    lesions = [_box(text, width, height) for text in a.box]
    out, picture = _targets(a.finding, a.out)  # after the box, so that a wrong one leaves no new folder
    pixels = fit(image, SIZE)
    box, lungs, found = _lungs(pixels)
    if not found:
        raise InputError(
            f"{a.image}: no believable pair of lungs is seen in it, so a place cannot be told relative to them; take "
            "another radiograph"
        )
    rectangles: list[Rectangle] = []
    for lesion in lesions:
        relative = _relative(lesion, box)
        grown = left, top, right, bottom = _grown(relative, a.margin)
        if (far := max(map(abs, grown))) > LIMIT:
            raise InputError(
                f"--box: lies {far:.1f} lung boxes away from the lungs; is it in pixels of {a.image} "
                f"({width}x{height})?"
            )
        rectangles.append(grown)
        if relative[2] <= 0 or relative[0] >= 1 or relative[3] <= 0 or relative[1] >= 1:
            print(
                "note: the box lies wholly outside the lung box; look at the picture. Boxes are X,Y,W,H in pixels of "
                f"{a.image} ({width}x{height})"
            )
        beside = relative[2] <= 0.5 or relative[0] >= 0.5
        if beside and not a.one_sided:
            rectangles.append((round(1 - right, 2), top, round(1 - left, 2), bottom))
            print(
                "the box lies beside the midline: its mirror image belongs to the region, too (--one-sided leaves it "
                "out)"
            )
    held = _held(lesions, lungs)
    shares = ", ".join(f"{share:.0%} {where}" for where, share in held.items())
    print(
        f"of the lesion's area lies {shares} (within and between are {DILATE:g} of the image's side wider than seen, "
        "so they overlap)"
    )
    place = _place(held)
    rule = Rule(tuple(dict.fromkeys(rectangles)), place=place, dilate=DILATE if place in ("within", "between") else 0.0)
    if place:
        print(f"so the region is what the box leaves of that place: {_words(rule)}")
    else:
        print(
            f"none of them holds {MOST:.0%} of it, so the region is a part of the lung box, whatever the lungs' outline"
        )
    finding = Finding(rule, a.images, f"learned from one annotated radiograph ({a.image.name}), margin {a.margin:g}")
    before = out.read_text().rstrip("\n") + "\n" if out.is_file() else ""
    atomic.write(out, before + to_yaml({a.finding: finding}))
    _drawn(pixels, box, lungs, {a.finding: finding}, [tuple(v * SIZE for v in b) for b in lesions]).savefig(
        picture, dpi=110
    )
    if not place:
        print(f"{a.finding}: {_words(rule)}")
    if not rule.inside(BEYOND):
        where = "lies outside the lungs" if place else "reaches beyond the lung box"
        print(f"the lesion {where}, and so does the region: context swap will leave images of this finding as they are")
    ready = read_findings()
    other = [name for name in ready if name != a.finding and name.casefold() == a.finding.casefold()]
    if other:
        print(f"note: {a.finding} is not the ready-made {other[0]}: names count letter by letter")
    if a.finding in ready:
        print(
            f"note: {a.finding} is a ready-made finding; with --findings {out} this region takes the place of that one"
        )
    print(f"wrote {out} and {picture}; use it with --findings {out}")


def _targets(finding: str, out: Path | None) -> tuple[Path, Path]:
    """The YAML to write or extend and the picture beside it. InputError: no name for a finding, or one that the file
    has already.
    """
    if not finding.strip() or finding == NO_FINDING:
        raise InputError(f"--finding {finding!r}: expected the name of a finding")
    if "," in finding:
        raise InputError(f"--finding {finding!r}: must not hold a comma, which separates the findings of a --task")
    slug = re.sub(r"\W+", "_", finding).strip("_").lower()
    out = _writable(out or Path(f"{slug}.yaml"), (".yaml", ".yml"))
    if out.is_file() and finding in read_file(out):
        raise InputError(f"--out {out}: has a finding {finding!r} already; remove it there, or name another file")
    picture = out.with_name(f"{out.stem}_{slug}.png") if out.is_file() else out.with_suffix(".png")
    if picture.exists():
        raise InputError(f"--out {out}: its picture would replace {picture}; name another file")
    return out, picture


def _box(text: str, width: int, height: int) -> tuple[float, ...]:
    """``X,Y,W,H`` in pixels as left, top, right, bottom in shares of the image's sides."""
    try:
        x, y, w, h = (float(v) for v in text.split(","))
    except ValueError:
        raise InputError(f"--box {text}: expected four numbers X,Y,W,H in pixels of the file") from None
    if not (w > 0 and h > 0 and x >= 0 and y >= 0 and x + w <= width and y + h <= height):
        raise InputError(
            f"--box {text}: does not lie in the image of {width}x{height} pixels; expected X,Y,W,H with X + W <= "
            f"{width} and Y + H <= {height}"
        )
    if min(w, h) < 1:
        raise InputError(
            f"--box {text}: is less than a pixel; expected X,Y,W,H in pixels of the file ({width}x{height}), not in "
            "shares of it"
        )
    return x / width, y / height, (x + w) / width, (y + h) / height


def _relative(lesion: tuple[float, ...], box: torch.Tensor) -> list[float]:
    """Edges left, top, right, bottom in shares of the image's sides -> in shares of the lung box, int64 [4] in pixels
    of SIZE.
    """
    x0, y0, x1, y1 = (box / SIZE).tolist()
    return [(v - start) / extent for v, start, extent in zip(lesion, (x0, y0) * 2, (x1 - x0, y1 - y0) * 2, strict=True)]


def _grown(relative: list[float], margin: float) -> Rectangle:
    """Larger by the margin, which takes no edge further beyond the lung box than context swap allows.

    Outward to the grid of hundredths, which is finer than a lung box is known.
    """
    left, top = (math.floor(100 * max(v - margin, min(v, -BEYOND)) + 1e-9) / 100 for v in relative[:2])
    right, bottom = (math.ceil(100 * min(v + margin, max(v, 1 + BEYOND)) - 1e-9) / 100 for v in relative[2:])
    return left, top, right, bottom


def _lungs(pixels: np.ndarray) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Box int64 [4] and mask bool [SIZE,SIZE] of the lungs of a uint8 [SIZE,SIZE] image, as training sees them, and
    whether they were found.

    By the shipped segmenter.
    """
    with torch.no_grad():
        boxes, outlines, found = load_segmenter().find(torch.from_numpy(pixels.copy())[None, None].float() / 255, SIZE)
    return boxes[0], lung_masks(outlines, boxes, (SIZE, SIZE))[0], bool(found[0])


def _held(lesions: Sequence[tuple[float, ...]], lungs: torch.Tensor) -> dict[str, float]:
    """How much of the lesions' area each place holds, in words of `rules.PLACES`. Within and between are wider than
    seen, so they overlap.
    """
    lesion = torch.zeros_like(lungs)
    for left, top, right, bottom in lesions:
        lesion[math.floor(top * SIZE) : math.ceil(bottom * SIZE), math.floor(left * SIZE) : math.ceil(right * SIZE)] = (
            True
        )
    reach = round(DILATE * SIZE)
    within, middle = wider(lungs[None], reach)[0], wider(between(lungs[None]), reach)[0]
    places = {"within": within, "between": middle, "outside": ~within & ~middle}
    return {name: float((lesion & place).sum() / lesion.sum()) for name, place in places.items()}


def _place(held: dict[str, float]) -> str:
    """The place that holds the lesion: the one that holds most, the lungs where it is nearly as much; none where that
    is too little.
    """
    name = max(held, key=lambda place: held[place] + 0.05 * (place == "within"))
    return name if held[name] >= MOST else ""


def _words(rule: Rule | None) -> str:
    if rule is None:
        return "none: classification only"
    text = listed((" ".join(f"{v:g}" for v in r) for r in rule.each or rule.rectangles), 4)
    text = f"{text} of each lung, from the spine" if rule.each else text
    text = f"all but {text}" if rule.outside else text
    if not rule.place:
        return text
    place = {
        "within": "within the lungs",
        "between": "between the lungs",
        "outside": "outside the lungs",
        "rim": "at the lungs' rim",
    }[rule.place]
    part = (
        ""
        if rule.rectangles == BOX and not rule.outside
        else f", in {text}" + (f" (elsewhere weight {rule.elsewhere:g})" if rule.elsewhere else "")
    )
    sided = ", more where the lung is seen smaller" if rule.sided else ""
    return place + (f", dilated {rule.dilate:g}" if rule.dilate else "") + part + sided


def _writable(path: Path, kinds: tuple[str, ...]) -> Path:
    """``path``, which has one of these suffixes, and whose folder exists."""
    if path.suffix.lower() not in kinds or path.is_dir():
        raise InputError(f"--out {path}: expected a file name that ends in {' or '.join(kinds)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {path}: cannot be written ({error.strerror})") from error
    return path


def _drawn(
    pixels: np.ndarray,
    box: torch.Tensor,
    lungs: torch.Tensor,
    findings: dict[str, Finding],
    lesions: list[Any] | None = None,
) -> Figure:
    """One panel a finding: lungs cyan, their box dotted, region green (the paler, the less its weight), annotated boxes
    red.
    """
    rules = {name: finding.rule for name, finding in findings.items() if finding.rule is not None}
    columns = min(4, len(rules))
    rows = math.ceil(len(rules) / columns)
    figure = Figure(figsize=(max(4.2, 3.1 * columns), 3.4 * rows + 0.4), layout="constrained")
    count = len(rules)
    weights = Regions(list(rules), rules, SIZE)(
        torch.arange(count), box.repeat(count, 1), lungs.repeat(count, 1, 1)
    ).weight.numpy()
    x0, y0, x1, y1 = box.tolist()
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.axis("off")
    for ax, name, weight in zip(axes.flat, rules, weights, strict=False):
        ax.imshow(pixels, cmap="gray", vmin=0, vmax=255)
        ax.imshow(np.concatenate([np.broadcast_to([0.49, 0.99, 0.0], (*weight.shape, 3)), 0.3 * weight[..., None]], 2))
        ax.plot(np.array([x0, x1, x1, x0, x0]) - 0.5, np.array([y0, y0, y1, y1, y0]) - 0.5, color=LUNGS, lw=0.8, ls=":")
        for mask, colour in ((lungs.numpy(), LUNGS), (weight >= 0.5, REGION)):
            if mask.any():
                ax.contour(mask, levels=[0.5], colors=[colour], linewidths=1.0)
        for left, top, right, bottom in lesions or []:
            ax.plot([left, right, right, left, left], [top, top, bottom, bottom, top], color=LESION, lw=1)
        ax.set_title(name, fontsize=10)
    figure.supxlabel(
        "cyan: lungs, dotted their box   green: expected region" + ("   red: annotated" if lesions else ""), fontsize=8
    )
    return figure
