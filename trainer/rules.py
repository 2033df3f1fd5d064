"""Findings as data: what a finding is called, where it is expected in the lung box, which images count as it.

A file of findings is YAML, name -> settings:

    Effusion:
      region: {half: lower}          # or quadrant, lung, box, rectangles; with dilate and outside
      images: only                   # only: images with no other label; any: whatever else they show
      source: Wu et al. 2026

Coordinates are those of the lung box as it appears in the image: 0 is its left or top edge, 1 its right or bottom edge. The
patient's right lung lies on the image's left.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from shards.errors import InputError, listed, nearest, read_yaml
from shards.sample import NO_FINDING, TASKS

READY = Path(__file__).with_name("findings")  # ready-made files
DEFAULT = "nih"
LIMIT = 3.0  # lung boxes from the edge: beyond it a number is no share of the box
Rectangle = tuple[float, float, float, float]

HALVES: dict[str, Rectangle] = {"upper": (0, 0, 1, 0.5), "lower": (0, 0.5, 1, 1), "left": (0, 0, 0.5, 1), "right": (0.5, 0, 1, 1)}
SHAPES = ("half", "quadrant", "lung", "box", "rectangles")
LUNGS = {"right": HALVES["left"], "left": HALVES["right"]}  # the patient's
QUADRANTS = {f"{v} {h}": (HALVES[h][0], HALVES[v][1], HALVES[h][2], HALVES[v][3]) for v in ("upper", "lower") for h in ("left", "right")}


@dataclass(frozen=True)
class Rule:
    """Rectangles left, top, right, bottom in lung-box coordinates; the region is their union, or with ``outside`` all but it.

    Edges are rounded half to even to pixels and cut at the image; infinity is the image's own edge.
    """

    rectangles: tuple[Rectangle, ...] = ()
    outside: bool = False

    def inside(self, margin: float = 0.0) -> bool:
        """Whether the region lies in the box, dilated by ``margin`` of its sides."""
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
    """The findings of one file, and no others; errors as `read_findings`. An entry without a region has that of ``ready``."""
    content = read_yaml(path, "--findings")
    if not isinstance(content, dict):
        raise InputError(f"--findings {path}: expected `Name:` lines with settings under each: region, images, source")
    for name, entry in content.items():
        if not isinstance(name, str) or not isinstance(entry, dict):
            raise InputError(f"--findings {path}: {name}: expected a name with settings under it: region, images, source")
        if "," in name:
            raise InputError(f"--findings {path}: {name}: must not hold a comma, which separates the findings of a --task")
    if NO_FINDING in content:
        raise InputError(f"--findings {path}: {NO_FINDING} is the absence of findings; it has no region and cannot be declared")
    return {name: _finding(entry, f"--findings {path}: {name}", (ready or {}).get(name)) for name, entry in content.items()}


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
    if not isinstance(region, dict):
        raise InputError(f"{where}: region: expected one of {', '.join(SHAPES)}, such as {{half: lower}}")
    shapes = [key for key in region if key in SHAPES]
    for key in region:
        if key not in (*SHAPES, "dilate", "outside"):
            raise InputError(f"{where}: region: unknown setting {key}; {nearest(str(key), (*SHAPES, 'dilate', 'outside'))}")
    if len(shapes) != 1:
        raise InputError(f"{where}: region: expected exactly one of {', '.join(SHAPES)}, got {listed(shapes) or 'none'}")
    (shape,), outside, dilate = shapes, region.get("outside", False), region.get("dilate", 0)
    if not isinstance(outside, bool):
        raise InputError(f"{where}: region: outside: {outside}: expected true or false")
    if not _number(dilate) or not 0 <= dilate <= 1:
        raise InputError(f"{where}: region: dilate: {dilate}: expected a share of the box's sides, 0 to 1")
    value = region[shape]
    if shape == "rectangles":
        rectangles = _rectangles(value, where)
    elif shape == "box":
        if value is not True:
            raise InputError(f"{where}: region: box: {value}: expected true")
        rectangles = [(0.0, 0.0, 1.0, 1.0)]
    else:
        choices = {"half": HALVES, "quadrant": QUADRANTS, "lung": LUNGS}[shape]
        if not isinstance(value, str) or value not in choices:
            raise InputError(f"{where}: region: {shape}: {value}: expected one of {', '.join(choices)}")
        rectangles = [choices[value]]
    return Rule(tuple((r[0] - dilate, r[1] - dilate, r[2] + dilate, r[3] + dilate) for r in rectangles), outside)


def _rectangles(value: Any, where: str) -> list[Rectangle]:
    said = f"{where}: region: rectangles: expected [[left, top, right, bottom], ...] in shares of the lung box, left < right, top < bottom"
    if not isinstance(value, list) or not value:
        raise InputError(said)
    for r in value:
        if not (isinstance(r, list) and len(r) == 4 and all(map(_number, r)) and r[0] < r[2] and r[1] < r[3]):
            hint = " (the image's edge is .inf, with a point)" if isinstance(r, list) and {"inf", "-inf"} & set(map(str, r)) else ""
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
            entry["region"] = {"rectangles": [[float(f"{v:.6g}") for v in r] for r in finding.rule.rectangles]}
            if finding.rule.outside:
                entry["region"]["outside"] = True
        entry |= {"images": finding.images} | ({"source": finding.source} if finding.source else {})
        content[name] = entry
    return yaml.safe_dump(content, sort_keys=False, default_flow_style=None, allow_unicode=True, width=120)


def rules_of(findings: Findings) -> dict[str, Rule]:
    """The rules of those findings that have one."""
    return {name: finding.rule for name, finding in findings.items() if finding.rule is not None}


def task_findings(task: str) -> tuple[str, ...]:
    """The finding of each class of a task: one of `TASKS`, or at least two names separated by commas."""
    if task in TASKS:
        return TASKS[task]
    names = tuple(name.strip() for name in task.split(","))
    if len(names) < 2:
        raise InputError(f"--task {task}: unknown; {nearest(task, TASKS)}; or name two findings or more: --task 'No Finding,Cardiomegaly'")
    if len(set(names)) < len(names) or not all(names):
        raise InputError(f"--task {task}: expected different names of findings, separated by commas")
    return names


def without_rule(names: Sequence[str], rules: Iterable[str]) -> list[str]:
    """Positive findings that have no expected region: they are trained by classification only."""
    known = set(rules)
    return [name for name in names if name != NO_FINDING and name not in known]
