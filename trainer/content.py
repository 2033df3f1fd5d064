"""What report.json says, by name: mypy sees who exchanges two of its parts."""

from typing import Any, Literal, TypedDict

from trainer.calibration import Calibration

Measured = Literal["val", "test"]
POINTING = "centre of mass"  # what a map points to, `metrics.pointed`
Interval = list[float]  # the two ends of a 95% interval
# Localization of some pairs: images, without_map, iou_threshold, and for each name of `metrics.LOCALIZATION` its mean
# and, under ``<name>_95``, its interval.
Found = dict[str, Any]


class PerClass(TypedDict):
    """Figures of one class at the predicted class; with intervals also those of `OfFinding`, against the rest."""

    precision: float
    recall: float
    f1: float
    support: int


class OfFinding(TypedDict, total=False):
    """Figures of one finding over its known cells (`trainer.multilabel.Cells`); those at the threshold only where there
    is one.
    """

    positive: int
    negative: int
    unknown: int
    auc: float
    auc_95: Interval
    auprc: float
    auprc_95: Interval
    threshold: float | None
    sensitivity: float
    specificity: float
    ppv: float
    npv: float
    f1: float


class Probe(TypedDict):
    """See `Evaluator.probe`; random: energy, lift, similarity, their intervals; None where nothing can be compared."""

    auc: float
    drop_outside: float
    drop_outside_95: Interval
    drop_inside: float
    drop_inside_95: Interval
    random: Found | None


class OfLesions(TypedDict, total=False):
    """Figures of maps against known lesions (`trainer.papers`), of all pairs or those of a finding: of the model, of
    what knows no image (constant), of the expected region as a map, of random weights; true_positives: of the model
    where it says the finding is there.
    """

    images: int
    model: Found | None
    constant: Found | None
    region: Found | None
    random: Found | None
    true_positives: Found | None


class Figures(TypedDict, total=False):
    """Of a split: classification (`Task.figures`), localization by kind and finding (``all``: of all), the probe.

    Of several findings an image: auc, auprc and macro are means over the ``defined`` findings that have both present
    and absent cells, micro is of all cells together, ``resampled`` says over what intervals are: patients or images.
    """

    images: int
    cells: int
    auprc: float
    auprc_95: Interval
    defined: int
    per_finding: dict[str, OfFinding]
    per: dict[str, Any]  # `trainer.groups.per_unit`
    at_prevalence: dict[str, dict[str, float]]
    macro: dict[str, float]
    macro_findings: dict[str, int]
    micro: dict[str, float]
    chexpert5: float
    resampled: str
    accuracy: float
    accuracy_95: Interval
    auc: float
    auc_95: Interval
    loss: float
    calibration: dict[str, dict[str, Any]]  # by finding: `trainer.calibration.figures`
    macro_precision: float
    macro_recall: float
    macro_f1: float
    per_class: list[PerClass]
    confusion: list[list[int]]
    binary: dict[str, float]
    at_threshold: dict[str, float]
    localization: dict[str, dict[str, Found | None]]
    pointing: str  # `POINTING`; before, unsaid, it was of the largest pixel
    lesions: dict[str, OfLesions]
    by: dict[str, dict[str, dict[str, Any]]]  # column, value: `trainer.groups.by_column`
    probe: Probe | None


class Training(TypedDict, total=False):
    """How the model came about; ``unfinished``: the run has not ended, all else but best_epoch is unknown."""

    unfinished: bool
    minutes: float
    epochs: int
    asked_epochs: int  # of which patience may have spared some
    step: int
    best_epoch: int
    best: str
    images_per_s: float
    processes: int
    precision: str
    device: str
    map: bool
    changes: list[dict[str, Any]]


class Content(TypedDict, total=False):
    """All of it. run: its name. By split: images, the fingerprint of those measured or trained on; lungs_not_found,
    keys; regions_replaced, how many. From val: iou_threshold, box_threshold (by kind of map), numbers of
    `metrics.THRESHOLDS`; threshold, of the probability, one or by finding; operating_point, how it was chosen;
    calibration.
    """

    run: str
    findings: tuple[str, ...] | list[str]
    dataset: str
    training: Training
    images: dict[str, str]
    data: dict[str, dict[str, Any]]  # by split: images, patients, findings
    regions: str
    written: str
    lungs_not_found: dict[str, list[str]]
    regions_replaced: dict[str, int]
    iou_threshold: dict[str, int | None] | None
    box_threshold: dict[str, int | None]
    threshold: float | dict[str, float | None] | None
    operating_point: str
    calibration: Calibration | None
    foreign: bool  # of other images than the run's own: thresholds are those of the run's val
    val: Figures
    test: Figures
    config: dict[str, Any]
