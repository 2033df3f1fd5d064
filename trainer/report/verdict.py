"""What came out, in a paragraph: what was asked, how well it is answered, where the model looks, what it gets wrong."""

import math
from typing import Any

from shards.errors import listed
from trainer.content import Content, Figures
from trainer.report.words import shown_split

Pair = tuple[float, list[float]]


def verdict(content: Content) -> list[str]:
    """Sentences on the split that the report shows, each with its figures and their 95% intervals."""
    split = shown_split(content)
    figures = content[split]
    findings = [str(name) for name in content["findings"]]
    return [
        *_asked(content, figures, findings, split),
        *(
            _looks(figures)
            if content["training"].get("map", True)
            else ["Its backbone has no map, so where it looks is open."]
        ),
        *_wrong(figures, findings),
    ]


def _asked(content: Content, figures: Figures, findings: list[str], split: str) -> list[str]:
    of = f"{figures['images']} {split} images"
    patients = content.get("data", {}).get(split, {}).get("patients")
    of += f" of {patients} patients" if patients else ""
    if "per_finding" in figures:
        asked = f"Asked was which of {len(findings)} findings a radiograph shows: {listed(findings, 20)}."
        area = "The mean area under the ROC curve"
        if figures["defined"] < len(findings):
            area += f" of the {figures['defined']} findings that can be measured"
    else:
        asked = f"Asked was which of these a radiograph shows: {', '.join(findings)}."
        area = "The area under the ROC curve"
    sentence = f"On {of} {area[0].lower()}{area[1:]} is {told(figures['auc'], figures.get('auc_95'))}"
    low = (figures.get("auc_95") or [math.nan])[0]
    chance = not unknown(low) and low <= 0.5
    return [asked, f"{sentence}{': that is not shown to be better than chance' if chance else ''}."]


def _looks(figures: Figures) -> list[str]:
    return [*_region(figures), *_lesions(figures)]


def _region(figures: Figures) -> list[str]:
    found = figures["localization"].get("expected", {}).get("all")
    if found and found.get("without_map") == found["images"]:
        return ["All its maps are zero everywhere: it looks nowhere."]
    if not found or unknown(found["energy"]):
        return ["Nothing is said of where it looks: no finding has an expected region here."]
    said = f"Of the energy of its maps {percent(found['energy'], found.get('energy_95'))} lies where the finding is "
    said += f"expected, {100 * found['lift']:+.0f} points against a map that is alike everywhere"
    probe = figures.get("probe")
    random = (probe["random"] or {}) if probe else {}
    chance, dead = random.get("energy"), random.get("without_map")
    of = f" ({dead} of its maps are zero everywhere)" if dead else ""
    said += f"; the same network with random weights has {percent(chance)}{of}." if not unknown(chance) else "."
    if dead := found.get("without_map"):
        said += f" {dead} of {found['images']} have no map (it is zero everywhere) and are left out of that."
    return [said]


def _lesions(figures: Figures) -> list[str]:
    found: dict[str, Any] = dict((figures.get("lesions") or {}).get("all") or {})
    model, constant = found.get("model"), found.get("constant")
    if not model or unknown(model.get("energy")):
        if figures["localization"].get("lesion", {}).get("all"):
            return []  # of a report from before there were such figures, or of maps that are all zero
        return ["Lesions are not known here, so whether it looks at them is open."]
    what = "pairs of an image and a finding" if "per_finding" in figures else "images"
    at = "pointing" if "pointing" in model else "hit"  # of reports from before
    said = f"On the {found['images']} {what} with known lesions the maps have "
    said += f"{percent(model['energy'], model.get('energy_95'))} of their energy in these and point into "
    said += f"{percent(model[at], model.get(f'{at}_95'))} of them"
    if not constant or unknown(constant.get("energy")):
        return [f"{said}."]
    said += f"; the mean lesion of val, which knows no image, has {percent(constant['energy'])} and points into "
    said += percent(constant[at])
    region = found.get("region")
    if region and not unknown(region.get(at)):  # of reports from before there is none
        said += f"; the expected region itself, drawn as a map, {percent(region['energy'])} and {percent(region[at])}"
    said += "."
    if constant["images"] != model["images"]:
        return [said]  # of other pairs: no comparison
    floors = {"the mean lesion": constant} | ({"the region": region} if region and not unknown(region.get(at)) else {})
    shown = []
    for name, words in {"energy": "its maps have more in the lesions", at: "its maps point into more of them"}.items():
        lowest = (model.get(f"{name}_95") or [math.nan])[0]
        if beaten := [floor for floor, of in floors.items() if lowest > of[name]]:
            shown.append(f"{words} than {' and '.join(beaten)}")
    if not shown:
        return [said, "So it is not shown to know more of the place than these."]
    return [said, f"So {', and '.join(shown)}."]


def _wrong(figures: Figures, findings: list[str]) -> list[str]:
    if "per_finding" in figures:
        low = [
            (of["sensitivity"], name)
            for name, of in figures["per_finding"].items()
            if not unknown(of.get("sensitivity")) and not unknown(of.get("auc"))
        ]
        if not low:
            return []
        worst = sorted((of["auc"], name) for name, of in figures["per_finding"].items() if not unknown(of.get("auc")))
        return [
            f"It is weakest at {worst[0][1]} (AUC {worst[0][0]:.2f}); at their thresholds it misses most often "
            f"{min(low)[1]} ({100 * (1 - min(low)[0]):.0f}% of its images)."
        ]
    confusion = figures["confusion"]
    missed = [
        (line[j], findings[i], findings[j]) for i, line in enumerate(confusion) for j in range(len(line)) if i != j
    ]
    total = sum(count for count, _, _ in missed)
    if not total:
        return ["It gets no image wrong."]
    most, is_, called = max(missed)
    return [
        f"It gets {total} images wrong ({100 * total / figures['images']:.0f}%), most often ({most}) {is_} that it "
        f"takes for {called}."
    ]


def told(value: float, interval: list[float] | None) -> str:
    """``0.751 (0.684 to 0.812)``."""
    if unknown(value):
        return "undefined"
    known = interval if interval and not unknown(interval[0]) else None
    return f"{value:.3f} ({known[0]:.3f} to {known[1]:.3f})" if known else f"{value:.3f}"


def percent(value: float | None, interval: list[float] | None = None) -> str:
    """``24% (19 to 29)``."""
    if value is None or unknown(value):
        return "an unknown share"
    known = interval if interval and not unknown(interval[0]) else None
    share = f"{100 * value:.0f}%"
    return f"{share} ({100 * known[0]:.0f} to {100 * known[1]:.0f})" if known else share


def unknown(value: float | None) -> bool:
    """Whether there is no such figure."""
    return value is None or math.isnan(value)
