"""Findings as data: what a finding is called, where it is expected in the lung box, which images count as it.

A file of findings is YAML, name -> settings:

    Effusion:
      region: {within: lungs, dilate: 0.04, half: lower}
      images: only                   # only: images with no other label; any: whatever else they show
      source: where that is known from

A region is a place, a part of the lung box, or the part of a place. Places follow the lungs' outline: ``within`` it,
``between`` the two lungs, ``outside`` of all that, at their ``rim``. Parts are half, quadrant, lung, box or rectangles
in coordinates of the lung box as it appears in the image: 0 is its left or top edge, 1 its right or bottom edge. The
patient's right lung lies on the image's left. ``each`` is a part of either lung in coordinates of its own box, from the
spine, 0, to the chest wall, 1, and from top to base.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from shards.errors import InputError, listed, nearest, read_yaml
from shards.names import exact_or_known_as, lists, same_as
from shards.sample import NO_FINDING

READY = Path(__file__).with_name("findings")  # ready-made files
DEFAULT = "nih"
LIMIT = 3.0  # lung boxes from the edge: beyond it a number is no share of the box
Rectangle = tuple[float, float, float, float]

HALVES: dict[str, Rectangle] = {
    "upper": (0, 0, 1, 0.5),
    "lower": (0, 0.5, 1, 1),
    "left": (0, 0, 0.5, 1),
    "right": (0.5, 0, 1, 1),
}
PARTS = ("half", "quadrant", "lung", "box", "rectangles", "each")
PLACES = ("within", "between", "outside", "rim")
MOST_SIDED = 100.0  # at a lung that is seen a tenth smaller the other side's weight is 0.0067
FURTHEST = 0.2  # dilation of a place, in shares of the image's side
BOX: tuple[Rectangle, ...] = ((0.0, 0.0, 1.0, 1.0),)
LUNGS = {"right": HALVES["left"], "left": HALVES["right"]}  # the patient's
QUADRANTS = {
    f"{v} {h}": (HALVES[h][0], HALVES[v][1], HALVES[h][2], HALVES[v][3])
    for v in ("upper", "lower")
    for h in ("left", "right")
}


@dataclass(frozen=True)
class Rule:
    """Where a finding is expected, given the lungs.

    Without a ``place``: the union of rectangles left, top, right, bottom in lung-box coordinates, or with ``outside``
    all but it. Edges are rounded half to even to pixels and cut at the image; infinity is the image's own edge.

    With a ``place``, the part of it that the rectangles leave. ``within``: the lungs; ``between``: what has a lung on
    either side of it in its row, and is none (mediastinum, heart); ``outside``: neither of the two; ``rim``: what is at
    most ``dilate`` from the lungs' outline. An edge on the lung box's edge cuts nothing of a place inside the box, so
    that a dilated one is whole.

    Attributes:
        dilate: by how much the lungs (within), the space between them, or both together (outside) are wider than seen,
            in shares of the image's side.
        elsewhere: the weight in [0, 1) of the place beyond the rectangles; what they leave has weight 1.
        each: rectangles in coordinates of each lung's own box, spine, top, chest wall, base, of a place at the lungs,
            in place of ``rectangles``, which then stand in where lungs are unknown.
        sided: how much more weight the side has whose lung is seen smaller, as fluid, air and collapse make it: the
            sides' weights are as p to 1 - p, the larger one 1, where p = 1 / (1 + exp(-sided d)) and d is the
            difference of the two lungs' areas over their sum, beyond what the heart takes. 0: both have weight 1.
    """

    rectangles: tuple[Rectangle, ...] = ()
    outside: bool = False
    place: str = ""
    dilate: float = 0.0
    elsewhere: float = 0.0
    sided: float = 0.0
    each: tuple[Rectangle, ...] = ()

    def inside(self, margin: float = 0.0) -> bool:
        """Whether the region lies in the lung box, dilated by ``margin`` of its sides, or is a place of the lungs,
        which the swap keeps however wide it is.
        """
        if self.place:
            return self.place != "outside"
        return not self.outside and all(-margin - 1e-9 <= v <= 1 + margin + 1e-9 for r in self.rectangles for v in r)


@dataclass(frozen=True)
class Finding:
    """One entry of a file of findings. ``rule`` None: no place is known, it is trained by classification alone."""

    rule: Rule | None
    images: str = "only"
    source: str = ""


Findings = Mapping[str, Finding]


def read_findings(name: str = "") -> dict[str, Finding]:
    """A ready-made set (``nih``, ``published``), or a file on top of ``nih``: its findings replace and extend those.

    Raises:
        InputError: no such file, not YAML, an unknown setting, a region that is none; the message names the finding.
    """
    ready = sorted(path.stem for path in READY.glob("*.yaml"))
    if name in ("", *ready):
        return read_file(READY / f"{name or DEFAULT}.yaml")
    path = Path(name)
    if not path.is_file():
        raise InputError(f"--findings {name}: no such file, and no ready-made set ({', '.join(ready)})")
    known = read_findings()
    return known | read_file(path, known)


def read_file(path: Path, ready: Findings | None = None) -> dict[str, Finding]:
    """The findings of one file, and no others; errors as `read_findings`. An entry without a region has that of
    ``ready``.
    """
    content = read_yaml(path, "--findings")
    if not isinstance(content, dict):
        raise InputError(f"--findings {path}: expected `Name:` lines with settings under each: region, images, source")
    for name, entry in content.items():
        if not isinstance(name, str) or not isinstance(entry, dict):
            raise InputError(
                f"--findings {path}: {name}: expected a name with settings under it: region, images, source"
            )
        if "," in name:
            raise InputError(
                f"--findings {path}: {name}: must not hold a comma, which separates the findings of a --task"
            )
    if NO_FINDING in content:
        raise InputError(
            f"--findings {path}: {NO_FINDING} is the absence of findings; it has no region and cannot be declared"
        )
    return {
        name: _finding(entry, f"--findings {path}: {name}", (ready or {}).get(name)) for name, entry in content.items()
    }


def _finding(entry: dict[str, Any], where: str, ready: Finding | None) -> Finding:
    known = ("region", "images", "source")
    for key in entry:
        if key not in known:
            raise InputError(f"{where}: unknown setting {key}; {nearest(str(key), known)}")
    images = entry.get("images", "only")
    if images not in ("only", "any"):
        raise InputError(f"{where}: images: {images}: expected only (images with no other label) or any")
    if "region" not in entry and ready is not None:
        return Finding(ready.rule, images, str(entry.get("source", ready.source)))
    region = entry.get("region")
    return Finding(None if region is None else _rule(region, where), images, str(entry.get("source", "")))


def _rule(region: Any, where: str) -> Rule:
    known = (*PARTS, *PLACES, "dilate", "elsewhere", "sided")
    if not isinstance(region, dict):
        raise InputError(
            f"{where}: region: expected a place or a part of the lung box, such as {{within: lungs}} or {{half: lower}}"
        )
    for key in region:
        if key not in known:
            raise InputError(f"{where}: region: unknown setting {key}; {nearest(str(key), known)}")
    parts = [key for key in region if key in PARTS]
    places = [key for key in region if key in PLACES and not (key == "outside" and isinstance(region[key], bool))]
    outside = region.get("outside") is True
    for place in places:
        if region[place] != "lungs":
            raise InputError(
                f"{where}: region: {place}: {region[place]}: expected "
                f"{'true, false or ' if place == 'outside' else ''}lungs"
            )
    if len(places) > 1:
        raise InputError(f"{where}: region: expected at most one of {', '.join(PLACES)}, got {listed(places)}")
    if len(parts) != 1 and not (places and not parts):
        raise InputError(f"{where}: region: expected exactly one of {', '.join(PARTS)}, got {listed(parts) or 'none'}")
    place, part = places[0] if places else "", parts[0] if parts else "box"
    dilate, elsewhere, sided = (region.get(name, 0) for name in ("dilate", "elsewhere", "sided"))
    most, of = (FURTHEST, "the image's side") if place else (1, "the box's sides")
    if not _number(dilate) or not 0 <= dilate <= most:
        raise InputError(f"{where}: region: dilate: {dilate}: expected a share of {of}, 0 to {most:g}")
    if place == "rim" and dilate == 0:
        raise InputError(f"{where}: region: rim: expected its width beside it, such as dilate: 0.03")
    if not _number(elsewhere) or not 0 <= elsewhere < 1:
        raise InputError(f"{where}: region: elsewhere: {elsewhere}: expected a weight from 0 to below 1")
    if elsewhere and not (place and parts and part != "box"):
        raise InputError(
            f"{where}: region: elsewhere: is the weight of a place beyond its part; give both, such as {{within: "
            f"lungs, half: upper}}"
        )
    if not _number(sided) or not 0 <= sided <= MOST_SIDED:
        raise InputError(f"{where}: region: sided: {sided}: expected a slope from 0 to {MOST_SIDED:g}")
    if sided and place not in ("within", "rim"):
        raise InputError(f"{where}: region: sided: is of a place at the lungs, within or rim")
    if part == "each" and place not in ("within", "rim"):
        raise InputError(f"{where}: region: each: is a part of a place at the lungs, within or rim")
    rectangles = tuple(_part(part, region.get(part, True), where))
    each = rectangles if part == "each" else ()
    if each:
        rectangles = tuple(r for left, top, right, bottom in each for r in _both(left, top, right, bottom))
    if place and rectangles == BOX and (elsewhere or outside):
        what = "elsewhere: is the weight" if elsewhere else "outside: true takes what is left"
        raise InputError(
            f"{where}: region: {what} of a place beyond its part, and this part is all of it; name a narrower one, "
            "such as half: upper"
        )
    if place:
        return Rule(rectangles, outside, place, float(dilate), float(elsewhere), float(sided), each)
    return Rule(tuple((r[0] - dilate, r[1] - dilate, r[2] + dilate, r[3] + dilate) for r in rectangles), outside)


def _both(spine: float, top: float, wall: float, base: float) -> tuple[Rectangle, Rectangle]:
    """A part of each lung as parts of the box around both, in which they are as if each had half of it."""
    return (0.5 - wall / 2, top, 0.5 - spine / 2, base), (0.5 + spine / 2, top, 0.5 + wall / 2, base)


def _part(part: str, value: Any, where: str) -> Sequence[Rectangle]:
    """The rectangles of a part of the lung box."""
    if part in ("rectangles", "each"):
        return _rectangles(value, where, part)
    if part == "box":
        if value is not True:
            raise InputError(f"{where}: region: box: {value}: expected true")
        return BOX
    choices = {"half": HALVES, "quadrant": QUADRANTS, "lung": LUNGS}[part]
    if not isinstance(value, str) or value not in choices:
        raise InputError(f"{where}: region: {part}: {value}: expected one of {', '.join(choices)}")
    return [choices[value]]


def _rectangles(value: Any, where: str, part: str) -> list[Rectangle]:
    first, third, of = ("spine", "wall", "box of each lung") if part == "each" else ("left", "right", "lung box")
    said = (
        f"{where}: region: {part}: expected [[{first}, top, {third}, bottom], ...] in shares of the {of}, "
        f"{first} < {third}, top < bottom"
    )
    if not isinstance(value, list) or not value:
        raise InputError(said)
    for r in value:
        if not (isinstance(r, list) and len(r) == 4 and all(map(_number, r)) and r[0] < r[2] and r[1] < r[3]):
            hint = (
                " (the image's edge is .inf, with a point)"
                if isinstance(r, list) and {"inf", "-inf"} & set(map(str, r))
                else ""
            )
            raise InputError(f"{said}; got {r}{hint}")
        if any(LIMIT < abs(v) < math.inf for v in r):
            raise InputError(f"{said}; {r} looks like pixels (.inf is the image's edge)")
    return [(float(r[0]), float(r[1]), float(r[2]), float(r[3])) for r in value]


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)


def to_yaml(findings: Findings) -> str:
    """A file of findings that reads back as these."""
    content: dict[str, Any] = {}
    for name, finding in findings.items():
        entry: dict[str, Any] = {"region": None}
        if finding.rule is not None:
            entry["region"] = _region(finding.rule)
        entry |= {"images": finding.images} | ({"source": finding.source} if finding.source else {})
        content[name] = entry
    return yaml.safe_dump(content, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120)


def _region(rule: Rule) -> dict[str, Any]:
    """A rule as `_rule` reads it."""
    place: dict[str, Any] = {rule.place: "lungs"} if rule.place else {}
    place |= {name: value for name in ("dilate", "elsewhere", "sided") if (value := getattr(rule, name))}
    if not (rule.place and rule.rectangles == BOX):
        place["each" if rule.each else "rectangles"] = [
            [float(f"{v:.6g}") for v in r] for r in rule.each or rule.rectangles
        ]
    return place | ({"outside": True} if rule.outside else {})


def rules_of(findings: Findings) -> dict[str, Rule]:
    """The rules of those findings that have one."""
    return {name: finding.rule for name, finding in findings.items() if finding.rule is not None}


def of_task(findings: Findings, names: Iterable[str]) -> dict[str, Finding]:
    """Those of the names that are known, under one name or another of the same finding."""
    known = {name: exact_or_known_as(name, findings, "--findings") for name in names}
    return {name: findings[other] for name, other in known.items() if other is not None}


def task_findings(task: str, kind: str = "one") -> tuple[str, ...]:
    """The findings of a task: a ready-made list (`shards.names.lists`), or names separated by commas.

    Args:
        kind: ``one``: the findings are classes, at least two, as they stand; ``any``: No Finding is left out.
    """
    ready, healthy = lists(), same_as(NO_FINDING)
    names = ready.get(task) or tuple(name.strip() for name in task.split(","))
    if task not in ready and len(names) < 2 and (kind == "one" or not names[0] or same_as(names[0]) == healthy):
        more = "'No Finding,Cardiomegaly'" + ("" if kind == "one" else ", or one finding at least")
        raise InputError(f"--task {task}: unknown; {nearest(task, ready)}; or name two findings or more: --task {more}")
    same = {same_as(name): name for name in reversed(names)}
    if twice := next((name for name in names if name and same[same_as(name)] != name), None):
        raise InputError(f"--task {task}: {same[same_as(twice)]} and {twice} are names of one finding; leave one out")
    if not all(names) or len(same) < len(names):
        raise InputError(f"--task {task}: expected different names of findings, separated by commas")
    return names if kind == "one" else tuple(name for name in names if same_as(name) != healthy)


def without_rule(names: Sequence[str], rules: Iterable[str]) -> list[str]:
    """Positive findings that have no expected region: they are trained by classification only."""
    known = set(rules)
    return [name for name in names if name != NO_FINDING and name not in known]
