"""python bench/places.py: how much of real lesions do the expected regions hold, and how large are they?

CXR_FOCUS_REAL_DATA names a folder with `lesions/{images,boxes.csv,polygons.json}`: radiologists' boxes, for some images
contours, as shares of the image. Lungs are found as in training, by the shipped segmenter. For each finding a table of
candidates, the ready-made rule first:

held: mean share of a lesion's area in the region, of the boxes and of the contours;
area: the region's share of the image;
held - area: what the region holds beyond what a region of its size anywhere would;
full: share of the region that is lesion, the CAM energy in the lesion of a map that is the same all over the region;
hit: how many lesions hold the peak of the region as a map of 7 x 7 positions, which knows the lungs' outline alone.

Where weights differ, all count each place by its weight. Ready-made rules were chosen by eye from them; those of
Effusion, Pneumothorax, Pneumonia and Consolidation by `hit` and by training (bench/LOG.md). The first line of a finding
has the one point that most of its lesions hold, chosen on one half of the images and tried on the other, in the mean of
60 halvings. Writes bench/places.md.
"""

import argparse
import csv
import json
import os
import sys
from collections import defaultdict
from datetime import date
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image, ImageDraw
from torch.nn import functional as F

from shards.pixels import fit, load_image
from trainer.augment import lung_masks
from trainer.lungs import load_segmenter
from trainer.regions import Regions
from trainer.rules import Rule, read_file, read_findings, rules_of

SIZE, STORED, GRID = 224, 512, 7
LEAST = 8  # images with boxes of a finding
REACHES = (0.0, 0.01, 0.02, 0.03, 0.04)
WITHIN = [f"{{within: lungs, dilate: {d:g}}}" for d in REACHES]
AIRSPACES = [
    *WITHIN,
    *(
        f"{{within: lungs, dilate: 0.03, each: [[0, 0.6, 0.7, 0.95]], elsewhere: {rest:g}, sided: {sided}}}"
        for rest in (0, 0.25, 0.5)
        for sided in (0, 10)
    ),
]
CANDIDATES = {
    "Effusion": [
        *(
            f"{{within: lungs, dilate: {d:g}, rectangles: [[0, {top:g}, 1, 1]]}}"
            for d in REACHES[2:]
            for top in (0.5, 0.55, 0.6, 0.7)
        ),
        "{rim: lungs, dilate: 0.04, half: lower}",
        *(
            f"{{within: lungs, dilate: {d:g}, each: [[0.33, {top:g}, 1, 1]], sided: {sided}}}"
            for d in (0.04, 0.06)
            for top in (0.6, 0.75, 0.85)
            for sided in (0, 10)
        ),
        "{within: lungs, dilate: 0.06, each: [[0.33, 0.75, 1, 1]], sided: 10, elsewhere: 0.25}",
    ],
    "Pneumothorax": [
        *(
            f"{{within: lungs, dilate: {d:g}, each: [[0, 0, 1, {base:g}]], sided: {sided}}}"
            for d in (0, 0.02, 0.04)
            for base in (0.25, 0.33, 0.5)
            for sided in (0, 10)
        ),
        *WITHIN,
        *(f"{{within: lungs, dilate: {d:g}, half: upper}}" for d in REACHES[1:]),
        "{rim: lungs, dilate: 0.04, half: upper}",
    ],
    "Cardiomegaly": [
        *(f"{{between: lungs, dilate: {d:g}}}" for d in REACHES),
        *(
            f"{{between: lungs, dilate: {d:g}, rectangles: [[{left:g}, 0.27, 1, 1]]}}"
            for d in REACHES
            for left in (0, 0.2)
        ),
    ],
    "Atelectasis": [
        *WITHIN,
        *(
            f"{{within: lungs, dilate: {d:g}, rectangles: [[0, {top:g}, 1, 1]]}}"
            for d in REACHES[2:]
            for top in (0.33, 0.5)
        ),
    ],
    "Pneumonia": AIRSPACES,
    "Infiltration": AIRSPACES,
    "Consolidation": AIRSPACES,
    "Pleural_Thickening": [*WITHIN, *(f"{{rim: lungs, dilate: {d:g}}}" for d in REACHES[1:])],
}


def rows(path: Path) -> list[dict[str, str]]:
    """Of a CSV."""
    with path.open() as file:
        return list(csv.DictReader(file))


def lungs_of(folder: Path, names: list[str]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Boxes int64 [N,4], masks bool [N,SIZE,SIZE] as training sees them, and where they were found, bool [N]."""
    segmenter, parts = load_segmenter().to(memory_format=torch.channels_last), []
    for begin in range(0, len(names), 16):
        images = np.stack([fit(load_image(folder / name), STORED) for name in names[begin : begin + 16]])
        boxes, outlines, found = segmenter.find(torch.from_numpy(images)[:, None].float() / 255, SIZE)
        parts.append((boxes, lung_masks(outlines, boxes, (SIZE, SIZE)), found))
    boxes, masks, found = zip(*parts, strict=True)
    return torch.cat(boxes), torch.cat(masks), torch.cat(found)


def lesions_of(folder: Path) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """finding -> boxes or contours -> image -> its lesions, bool [SIZE,SIZE]."""
    found: dict[str, dict[str, dict[str, np.ndarray]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows(folder / "boxes.csv"):
        mask = found[row["finding"]]["boxes"].setdefault(row["image"], np.zeros((SIZE, SIZE), bool))
        x0, y0, x1, y1 = (SIZE * float(row[edge]) for edge in ("x0", "y0", "x1", "y1"))
        mask[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))] = True
    for name, shapes in json.loads((folder / "polygons.json").read_text()).items():
        for shape in shapes:
            picture = Image.new("1", (SIZE, SIZE))
            ImageDraw.Draw(picture).polygon([(x * SIZE, y * SIZE) for x, y in shape["points"]], fill=1)
            known = found[shape["finding"]]["contours"]
            known[name] = known.get(name, np.zeros((SIZE, SIZE), bool)) | np.asarray(picture)
    return found


def measured(lesions: torch.Tensor, weight: torch.Tensor) -> tuple[float, float, float, float]:
    """held, area, full, hit of lesions bool [N,S,S] and regions float [N,S,S]."""
    both, area = (lesions * weight).sum((1, 2)), weight.sum((1, 2))
    grid = F.adaptive_avg_pool2d(weight[:, None], GRID)
    peaks = F.interpolate(grid, lesions.shape[1:], mode="bilinear", align_corners=False).flatten(1).argmax(1)
    hit = float(lesions.flatten(1).gather(1, peaks[:, None]).float().mean())
    held, full = float((both / lesions.sum((1, 2))).mean()), float((both / area.clamp(min=1)).mean())
    return held, float(weight.mean()), full, hit


def constant(lesions: torch.Tensor) -> float:
    """Hits of one point of the image, of lesions bool [N,S,S]."""
    flat, rng, hits = lesions.flatten(1).float(), torch.Generator().manual_seed(0), []
    for _ in range(60):
        order = torch.randperm(len(flat), generator=rng)
        chosen, tried = order[: len(flat) // 2], order[len(flat) // 2 :]
        hits.append(float(flat[tried, int(flat[chosen].mean(0).argmax())].mean()))
    return float(np.mean(hits))


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--findings",
        default="",
        help="a file of findings, to see what its regions hold (without it: the ready-made ones)",
    )
    parser.add_argument("--write", type=Path, default=Path(__file__).with_name("places.md"))
    a = parser.parse_args()
    real = os.environ.get("CXR_FOCUS_REAL_DATA")
    if not real:
        sys.exit("error: set CXR_FOCUS_REAL_DATA to the folder with lesions/")
    folder = Path(real) / "lesions"
    boxed, rules = read_file(Path(__file__).with_name("boxed.yaml")), rules_of(read_findings(a.findings))
    truth = {
        finding: kinds
        for finding, kinds in lesions_of(folder).items()
        if finding in rules and len(kinds["boxes"]) >= LEAST
    }
    names = sorted({name for kinds in truth.values() for name in kinds["boxes"]})
    boxes, masks, found = lungs_of(folder / "images", names)
    at = {name: i for i, name in enumerate(names)}
    text = [f"# What the expected regions hold\n\nWritten by `bench/places.py`, {date.today()}; see there.\n"]
    for finding in sorted(truth, key=lambda name: -len(truth[name]["boxes"])):
        kinds = {
            kind: [name for name in of if found[at[name]]] for kind, of in truth[finding].items() if len(of) >= LEAST
        }
        told = ", ".join(f"{len(some)} images with {kind}" for kind, some in kinds.items())
        text += [
            f"## {finding}\n\n{told}; {sum(not found[at[n]] for n in truth[finding]['boxes'])} without lungs left out\n"
        ]
        text += [
            "| region | "
            + " | ".join(f"{what}, {kind}" for kind in kinds for what in ("held", "area", "held - area", "full", "hit"))
            + " |"
        ]
        text += ["|---" * (1 + 5 * len(kinds)) + "|"]
        points = [
            constant(torch.from_numpy(np.stack([truth[finding][kind][name] for name in some])))
            for kind, some in kinds.items()
        ]
        text += ["| one point |" + "".join(f" | | | | {hit:.3f} |" for hit in points)]
        candidates = {"**ready-made**": rules[finding]}
        if finding in boxed:
            candidates["part of the lung box"] = boxed[finding].rule or Rule()
        for region in CANDIDATES.get(finding, WITHIN):
            candidates[f"`{region}`"] = _rule(region)
        for words, rule in candidates.items():
            cells = [words]
            for kind, some in kinds.items():
                index = [at[name] for name in some]
                lesions = torch.from_numpy(np.stack([truth[finding][kind][name] for name in some]))
                regions = Regions([finding], {finding: rule}, SIZE)
                held, area, full, hit = measured(
                    lesions, regions(torch.zeros(len(some), dtype=torch.int64), boxes[index], masks[index]).weight
                )
                cells += [f"{held:.3f}", f"{area:.3f}", f"{held - area:.3f}", f"{full:.3f}", f"{hit:.3f}"]
            text.append("| " + " | ".join(cells) + " |")
        text.append("")
    print("\n".join(text))
    a.write.write_text("\n".join(text))


def _rule(region: str) -> Rule:
    """Of YAML."""
    from trainer.rules import _rule as of

    return of(yaml.safe_load(region), "candidate")


if __name__ == "__main__":
    main()
