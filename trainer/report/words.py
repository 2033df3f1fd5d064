"""Figures in words: names of files, the published text report, the summary of runs side by side."""

import hashlib
import json
import math
import re
from collections.abc import Sequence
from typing import Any, Literal

from shards.errors import listed
from shards.sample import NO_FINDING
from trainer.config import Config
from trainer.content import POINTING, Content, Figures, Found, Measured, Probe

MEASURED: tuple[Measured, ...] = ("val", "test")
LONGEST = 200  # bytes of a file name that is made of others' names; file systems take 255


def text_name(config: Config, dataset: str) -> str:
    """``<backbone>_<dataset>_<task>_la<lambda>_t<threshold>.txt`` as published; the published schedule is ``laa``."""
    lam = {"fixed": f"{config.lam:g}", "published": "a"}.get(str(config.balance.policy), config.balance.policy)
    task = config.task.replace(",", "-").replace(" ", "").replace("/", "-")
    return file_name(f"{config.backbone}_{dataset}_{task}_la{lam}_t{config.attention.threshold:g}", ".txt")


def file_name(text: str, suffix: str = "") -> str:
    """A name of one file, whatever the names in it: no folder, no control or foreign sign, and not too long, with a
    checksum where it was cut.
    """
    plain = re.sub(r"[^\w .,+=@()-]", "-", text).lstrip(".") or "-"
    data = plain.encode()
    if len(data) + len(suffix) > LONGEST:
        plain = (
            data[: LONGEST - len(suffix) - 9].decode(errors="ignore")
            + "-"
            + hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()[:8]
        )
    return plain + suffix


def printable(text: str) -> str:
    """Text that can be drawn, printed and written: what is none, as of a file's name in another encoding, becomes an
    escape.
    """
    return text.encode(errors="backslashreplace").decode()


def title(content: Content) -> str:
    """What was asked of a run, where, and which one it is."""
    asked = [name for name in content["findings"] if name != NO_FINDING]
    return f"{listed(asked, 4)} on {content['dataset']}: {content['run']}"


def is_published_kind(content: Content) -> bool:
    """Whether a report is of one finding an image, as the published text report is."""
    return all("per_class" in content[split] for split in MEASURED if split in content)


def text_report(content: Content) -> str:
    """The published text report, then what it lacks."""
    lines = [f"Execution Time: {content['training'].get('minutes', 0):.2f} minutes"]
    shown = [(split, content[split]) for split in MEASURED if split in content]
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
            lines.append(
                f"(Best Threshold above is chosen on {split} itself; the figures beside it, and these, are at the "
                "predicted class)"
            )
            lines += [f"Sensitivity: {b['sensitivity']:.4f}", f"Positive Predictive Value (PPV): {b['ppv']:.4f}"]
            lines += [f"Youden's Index: {b['youden']:.4f}", f"Discriminant Power: {b['dp']:.4f}"]
            if point := figures.get("at_threshold"):
                parts = (
                    f"{words} {point[name]:.4f}"
                    for name, words in (
                        ("sensitivity", "sensitivity"),
                        ("specificity", "specificity"),
                        ("youden", "Youden's index"),
                    )
                )
                lines.append(f"At the threshold {point['threshold']:.4f}, chosen on val: {', '.join(parts)}")
        for kind, what in KINDS.items():
            if kind not in figures["localization"]:
                continue
            found = figures["localization"][kind]["all"]
            if found is None:
                lines.append(f"Localization, {what}: no ground truth")
                continue
            lines.append(f"Localization, {what} ({found['images']} images{without_map(found)}):")
            for name, words in LOCALIZATION_WORDS.items():
                if name in found:
                    at = f" at {found['iou_threshold']:g}" if name == "iou" else ""
                    low, high = found[f"{name}_95"]
                    lines.append(f"  {words}{at}: {found[name]:.4f} [{low:.4f}, {high:.4f}]")
        if probe := figures.get("probe"):
            lines.append("Probes of the localization:")
            known = {words: pair for words, pair in probes(probe).items() if pair[0] is not None}
            lines += [
                f"  {words}: {value:.4f} [{low:.4f}, {high:.4f}]" for words, (value, (low, high)) in known.items()
            ]
    for name, keys in content["lungs_not_found"].items():
        lines.append(f"No lungs found, whole image used ({name}): {len(keys)}")
    lines += [
        f"Expected regions replaced by their part of the lung box ({name}): {n}"
        for name, n in content.get("regions_replaced", {}).items()
    ]
    return "\n".join(lines) + "\n"


def without_map(found: Found) -> str:
    """How many CAMs are zero everywhere: they have no energy, and miss."""
    return (
        f", {found['without_map']} of them without a map: no energy, pointing misses"
        if found.get("without_map")
        else ""
    )


KINDS = {
    "expected": "expected region",
    "expected_box": "part of the lung box, as published or as the rule has it",
    "lesion": "lesions",
}

LOCALIZATION_WORDS = {
    "energy": "CAM energy inside",
    "lift": "CAM energy inside minus area",
    "pointing": "Pointing hit",
    "pointing_near": "Pointing hit with tolerance",
    "coverage": "Coverage at the threshold",
    "iou_otsu": "IoU at Otsu's threshold",
    "iou": "IoU, threshold from val",
}


LESION_WORDS = {
    "pointing": "pointing",
    "hit": "hit rate of the largest pixel",
    "energy": "energy in lesion",
    "miou": "mIoU, Otsu",
    "t_iou 0.1": "T(IoU) 0.1",
    "t_iou 0.3": "T(IoU) 0.3",
    "t_iou 0.5": "T(IoU) 0.5",
    "t_iou 0.7": "T(IoU) 0.7",
    "t_iobb 0.1": "T(IoBB) 0.1",
    "t_iobb 0.5": "T(IoBB) 0.5",
    "t_iobb 0.9": "T(IoBB) 0.9",
}


def probes(probe: Probe) -> dict[str, tuple[float, list[float]]]:
    """The figures of `Evaluator.probe` in words, each with its 95% interval."""
    chance = probe["random"]
    figures: list[Any] = [
        (probe["drop_outside"], probe["drop_outside_95"]),
        (probe["drop_inside"], probe["drop_inside_95"]),
    ]
    figures += [
        (chance[name], chance[f"{name}_95"]) if chance else (None, [None, None]) for name in ("energy", "similarity")
    ]
    return dict(zip(PROBES, figures, strict=True))


def _classification_table(figures: Figures, findings: Sequence[str]) -> str:
    """Laid out as scikit-learn's classification_report with 3 digits, which the published code prints."""
    width = max(12, *map(len, findings))
    lines = [f"{'':>{width}} {'precision':>9} {'recall':>9} {'f1-score':>9} {'support':>9}", ""]
    rows = figures["per_class"]
    total = sum(row["support"] for row in rows)
    for name, row in zip(findings, rows, strict=True):
        lines.append(
            f"{name:>{width}} {row['precision']:>9.3f} {row['recall']:>9.3f} {row['f1']:>9.3f} {row['support']:>9}"
        )
    lines += ["", f"{'accuracy':>{width}} {'':>9} {'':>9} {figures['accuracy']:>9.3f} {total:>9}"]
    macro = [figures["macro_precision"], figures["macro_recall"], figures["macro_f1"]]
    means: tuple[Literal["precision", "recall", "f1"], ...] = ("precision", "recall", "f1")
    weighted = [sum(row[n] * row["support"] for row in rows) / total for n in means]
    for name, average in (("macro avg", macro), ("weighted avg", weighted)):
        lines.append(f"{name:>{width}} " + " ".join(f"{value:>9.3f}" for value in average) + f" {total:>9}")
    return "\n".join(lines) + "\n"


PROBES = (
    "AUC lost, outside blurred",
    "AUC lost, region blurred",
    "energy, random weights",
    "likeness to random weights",
)

SUMMARY = (
    "accuracy",
    "AUC",
    "AUPRC",
    "AUC, CheXpert's five",
    "energy in region",
    "lift over area",
    "pointing hit",
    "energy in lesion",
    "pointing at lesion",
    *PROBES,
)

NO_INTERVAL = [math.nan, math.nan]

MEANING = {
    "AUC": "area under the ROC curve; of more than two classes the mean over them, No Finding among them, each against "
    "the rest; of several findings an image the mean over findings",
    "AUPRC": "area under the precision-recall curve, the mean over the findings of which there are both images with "
    "and "
    "without; what guessing gets is the share of images with the finding",
    "AUC, CheXpert's five": "mean over Atelectasis, Cardiomegaly, Consolidation, Edema and Pleural Effusion",
    "energy in region": "share of the CAM's sum that lies in the region where the finding is expected (green; where "
    "its weight is a half or more), "
    "mean over the images of a finding",
    "lift over area": "that share minus the region's share of the image: 0 is no better than a map that is the same "
    "everywhere",
    "pointing hit": "share of those images whose CAM points into the region, with the centre of mass of its "
    "largest cell and those beside it",
    "energy in lesion": "as above, in the lesions (red) of the image's own finding, on images that have some",
    "pointing at lesion": "as above",
    PROBES[
        0
    ]: "fall of the AUC when everything but the expected region is blurred, paired by image: what the model gets from "
    "elsewhere on these "
    "images. Near 0 or below it does not mean that it reads the region: a mark that misleads on these images is no "
    "loss",
    PROBES[1]: "fall of the AUC when the expected region is blurred: what the model gets from there",
    PROBES[2]: "energy in region of the same network with random weights: what an untrained map gets for nothing",
    PROBES[
        3
    ]: "mean rank correlation of the model's CAMs with those of the random network; near 1, the maps do not depend on "
    "what was learned",
}

CAUTION = (
    "A region is where a finding is expected, not where it is: a model can look there and be wrong, so read these "
    "figures beside AUC, "
    "and where lesions are known, beside those of the lesions. Higher is better, but for the loss outside and the "
    "two rows of random weights."
)
HEALTHY = " The CAM of a No Finding image is that of its own class and has no region: nothing is asked of it."


def chosen_by(content: Content) -> str:
    """How val chose the thresholds; older reports say it in their settings."""
    return content.get("operating_point") or content["config"].get("labels", {}).get("operating_point", "youden")


def shown_split(content: Content) -> Measured:
    """The split that the summary is of: test, or val where there is no test."""
    return "test" if "test" in content else "val"


def summary(content: Content) -> list[tuple[float, list[float]] | None]:
    """The figures of `SUMMARY`, each with its 95% interval; None where there is no ground truth."""
    figures = content[shown_split(content)]
    pairs: list[tuple[float, list[float]] | None] = [
        (figures["accuracy"], figures["accuracy_95"]) if "accuracy" in figures else None,
        (figures["auc"], figures["auc_95"]),
        (figures["auprc"], figures.get("auprc_95", NO_INTERVAL)) if "auprc" in figures else None,
        (figures["chexpert5"], NO_INTERVAL) if "chexpert5" in figures else None,
    ]
    for kind, names in (("expected", ("energy", "lift", "pointing")), ("lesion", ("energy", "pointing"))):
        found = figures["localization"][kind]["all"]
        pairs += [(found[name], found[f"{name}_95"]) if found else None for name in names]
    probe = figures.get("probe")
    return pairs + (list(probes(probe).values()) if probe else [None] * len(PROBES))


def notes(runs: dict[str, Content]) -> list[str]:
    """What a reader of runs side by side must know."""
    parts = [
        f"{name} has not finished: its best model so far"
        for name, content in runs.items()
        if content["training"].get("unfinished")
    ]
    kinds = {
        json.dumps([c["findings"], c["dataset"], shown_split(c), c[shown_split(c)]["images"]]) for c in runs.values()
    }
    if len(kinds) > 1:
        parts.append("these runs differ in their findings or images: their figures cannot be compared")
    for name, content in runs.items():
        points = content.get("threshold")
        lacking = [finding for finding, point in points.items() if point is None] if isinstance(points, dict) else []
        if lacking:
            parts.append(f"{name}: val gives no threshold for {listed(lacking)}, so nothing is ever called that")
        scaling = content.get("calibration") or {}
        flat = [finding for finding, of in scaling.items() if finding in content["findings"] and of and of[0] == 0]
        if flat:
            parts.append(
                f"{name}: on val the probability of {listed(flat)} says nothing, or the opposite, of who has it; "
                "calibrated, it is the share there, for every image"
            )
        if shown_split(content) == "val" and "per_finding" in content["val"] and not content.get("foreign"):
            parts.append(
                f"{name}: there is no test split; the best epoch and the thresholds were chosen on the images that "
                "these figures are of"
            )
        lost, images = (
            len(content["lungs_not_found"].get(shown_split(content), ())),
            content[shown_split(content)]["images"],
        )
        if lost > images / 10:
            parts.append(
                f"{name}: in {lost} of {images} images no lungs were found, and regions are those of the whole image; "
                "they may be no frontal chest radiographs"
            )
    before = [
        name
        for name, content in runs.items()
        if content[shown_split(content)].get("pointing") != POINTING
        and (content[shown_split(content)].get("localization") or {}).get("expected", {}).get("all")
    ]
    if before:
        parts.append(
            f"{listed(before)}: measured when a map pointed to its largest pixel, and not to the centre of mass there; "
            "`python -m trainer.evaluate --run RUN` measures it anew"
        )
    if len({content.get("regions") for content in runs.values()}) > 1:
        parts.append("these runs differ in their expected regions: figures of the region cannot be compared")
    return parts


def table(runs: dict[str, Content]) -> str:
    """Runs side by side as text."""
    first = next(iter(runs.values()))
    counts = dict.fromkeys(str(content[shown_split(content)]["images"]) for content in runs.values())
    head = f"{shown_split(first)}, {' / '.join(counts)} images"
    width = max(len(head), *(len(name) for name in SUMMARY))
    columns = [max(10, len(name)) for name in runs]
    lines = [f"{head:{width}}  " + "  ".join(f"{name:>{c}}" for name, c in zip(runs, columns, strict=True))]
    values = [summary(content) for content in runs.values()]
    for i, name in enumerate(SUMMARY):
        cells = [
            "-" if (pair := row[i]) is None or pair[0] is None or math.isnan(pair[0]) else f"{pair[0]:.3f}"
            for row in values
        ]
        if set(cells) != {"-"}:
            lines.append(
                f"{name:{width}}  " + "  ".join(f"{cell:>{c}}" for cell, c in zip(cells, columns, strict=True))
            )
    return "\n".join([*lines, *(f"note: {note}" for note in notes(runs))])
