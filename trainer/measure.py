"""What is measured of a model on a split, every image once, over all processes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from shards.dataset import Split
from shards.loader import Loader
from shards.plan import EpochPlan
from trainer.classifier import FocusClassifier, evaluating, normalize_cam
from trainer.config import AttentionConfig
from trainer.launching import loader_of
from trainer.look import Located, Seen, look
from trainer.losses import attention_term
from trainer.lungs.memory import LungFinder
from trainer.metrics import (
    LOCALIZATION,
    THRESHOLDS,
    at_threshold,
    auc_interval,
    best_threshold,
    binary_report,
    classification_report,
    localize,
    measured,
    multiclass_auc,
    rank_correlation,
    summarize,
    wilson,
    without_dead,
)
from trainer.probe import blurred, probed, random_twin
from trainer.regions.lesions import chosen, lesion_regions
from trainer.regions.place import PUBLISHED, Regions, placed
from trainer.rules import Rule


@dataclass
class Outcome:
    """What was measured for every image of a split, in its order, on every process.

    logits float [N,K]; labels int64 [N]; term float [N], the attention term of the trained form, NaN without a region;
    expected, expected_box, lesion float [N,21], columns of `metrics.localize` against the expected region (where its weight is a half or more), against
    what it was as a part of the lung box (the published region, else the rule's own part), and against lesion boxes, NaN where there is no such ground truth;
    replaced bool [N], whether that part stands in for the region; similarity float [N], rank correlation with the CAM of a twin, NaN without one.
    """

    logits: torch.Tensor
    labels: torch.Tensor
    term: torch.Tensor
    expected: torch.Tensor
    expected_box: torch.Tensor
    lesion: torch.Tensor
    similarity: torch.Tensor
    replaced: torch.Tensor

    def tables(self) -> dict[str, torch.Tensor]:
        """The kinds of localization, which are never mixed; ``expected_box`` has figures only where a rule follows the lungs' outline."""
        return {"expected": self.expected, "expected_box": self.expected_box, "lesion": self.lesion}

    def thresholds(self) -> dict[str, int | None]:
        """For each kind which of `metrics.THRESHOLDS` gives the best mean IoU here."""
        return {kind: best_threshold(table[measured(table)]) for kind, table in self.tables().items()}

    def operating_point(self) -> float | None:
        """The probability from which on a task with two classes says class 1, by Youden's index on these images; None of other tasks."""
        if self.logits.shape[1] != 2:
            return None
        threshold = binary_report(self.logits, self.labels)["best_threshold"]
        return threshold if math.isfinite(threshold) else None

    def report(
        self, findings: tuple[str, ...], *, intervals: bool = False, chosen: dict[str, int | None] | None = None, threshold: float | None = None
    ) -> dict[str, Any]:
        """Classification and localization figures; from validation ``chosen``, thresholds of the IoU, and ``threshold``, of the probability."""
        figures = classification_report(self.logits, self.labels)
        if threshold is not None:
            figures["at_threshold"] = at_threshold(self.logits, self.labels, threshold)
        if intervals:
            figures |= {"accuracy_95": wilson(figures["accuracy"], len(self.labels)), "auc_95": auc_interval(self.logits, self.labels)}
        figures["localization"] = {}
        for kind, table in self.tables().items():
            at = (chosen or {}).get(kind)
            names = LOCALIZATION if at is None else (*LOCALIZATION, "iou")
            columns = list(range(len(LOCALIZATION))) + ([] if at is None else [len(LOCALIZATION) + at])
            known = measured(table)
            each = {name: summarize(table[known & (self.labels == k)][:, columns], names) for k, name in enumerate(findings)}
            if kind == "expected_box" and not known.any():
                continue
            figures["localization"][kind] = {"all": summarize(table[known][:, columns], names)} | {n: f for n, f in each.items() if f}
            if at is not None and known.any():
                figures["localization"][kind]["all"]["iou_threshold"] = THRESHOLDS[at]
        return figures


class Table:
    """Figures of a split's images by position, gathered from all processes: each image is written once, by one of them.

    Args:
        count: images of the split.
        widths: columns of each figure. An image may lack any of them.
    """

    def __init__(self, count: int, widths: Mapping[str, int]) -> None:
        self.widths = {"count": 1} | {part: width for name, wide in widths.items() for part, width in ((name, wide), (f"has {name}", 1))}
        self.rows = torch.zeros(count, sum(self.widths.values()), dtype=torch.float64)

    def write(self, index: torch.Tensor, counts: torch.Tensor, figures: Mapping[str, torch.Tensor], known: Mapping[str, torch.Tensor]) -> None:
        """Figures [B,width] of images int64 [B] on the CPU, as far as ``counts`` float [B] is not 0, and bool [B] whether each image has them."""
        device = next(iter(figures.values())).device
        given = {"count": torch.ones(len(index), 1)} | dict(figures) | {f"has {name}": has[:, None] for name, has in known.items()}
        row = [given[name].to(device).float() if name in given else torch.zeros(len(index), width, device=device) for name, width in self.widths.items()]
        self.rows[index] += torch.where(counts[:, None] > 0, torch.cat(row, 1).cpu().double(), 0.0)

    def gather(self, accelerator: Accelerator) -> dict[str, torch.Tensor]:
        """Every figure of all images, float64 [n,width], NaN where an image lacks it."""
        rows = accelerator.reduce(self.rows.to(accelerator.device), "sum").cpu()
        of = dict(zip(self.widths, rows.split(list(self.widths.values()), 1), strict=True))
        assert (of["count"] == 1).all(), "every image is evaluated exactly once"
        return {name: torch.where(of[f"has {name}"] > 0, of[name], torch.nan) for name in self.widths if f"has {name}" in self.widths}


@dataclass
class Evaluator:
    """A model, and the splits that it is measured on.

    Args:
        model: unwrapped; its mode is restored.
        attention: form and threshold of the attention term, and which regions it follows.
        size: S, pixels of a side of the classifier's input.
        seed: of the random weights of `probe`.
        rules: of the expected regions, by finding.
        splits, lungs: by name of a split; without lungs there are no expected regions.
        batch, workers: images a process and forward, processes that read.
    """

    accelerator: Accelerator
    model: FocusClassifier
    attention: AttentionConfig
    size: int
    seed: int
    rules: Mapping[str, Rule]
    splits: Mapping[str, Split]
    lungs: Mapping[str, LungFinder]
    batch: int
    workers: int

    def __post_init__(self) -> None:
        self.loaders: dict[str, Loader] = {}

    def loader(self, name: str) -> Loader:
        """Of a split, in its order; made once, so that its processes stay."""
        if name not in self.loaders:
            split = self.splits[name]
            plan = EpochPlan(split.shard_sizes(), shuffle=False)
            self.loaders[name] = loader_of(self.accelerator, split, plan, batch=self.batch, workers=self.workers)
        return self.loaders[name]

    def regions(self, split: Split) -> Regions:
        """Where the findings of a split's classes are expected."""
        return Regions(split.classes, self.rules, self.size, self.accelerator.device)

    @torch.no_grad()
    def measure(self, name: str, *, cams: bool = True, blur: str = "", twin: FocusClassifier | None = None) -> Outcome:
        """Run the model over a split, every image once over all processes.

        Args:
            name: of the split.
            cams: take CAMs, of the label's class, where the model has a map. False: logits only.
            blur: ``outside`` or ``inside``: of the expected region, before the model sees the image (see `trainer.probe`).
            twin: another model, in eval mode, on the same images, whose CAMs are compared with this one's.
        """
        split, model, device = self.splits[name], self.model, self.accelerator.device
        columns, cams = len(LOCALIZATION) + len(THRESHOLDS), cams and model.has_map
        lungs = self.lungs.get(name) if cams or blur else None
        regions = self.regions(split)
        # What figures can be compared by that were measured before regions followed the lungs' outline: the published region, else the rule's part of the box.
        boxed = Regions(split.classes, {finding: PUBLISHED.get(finding, rule) for finding, rule in self.rules.items()}, self.size, device)
        widths = {"logits": len(split.classes), "expected": columns, "expected_box": columns, "lesion": columns}
        table = Table(len(split), widths | {"similarity": 1, "term": 1, "replaced": 1})

        def change(located: Located) -> torch.Tensor:
            """The images, blurred in or outside the regions of findings of the task."""
            assert located.boxes is not None
            whose = torch.tensor(probed(batch.label.tolist(), batch.index, split.classes, self.rules))
            region = regions(whose, located.boxes, located.lungs).region
            return blurred(located.images, region if blur == "inside" else ~region)

        with evaluating(model):
            for batch in self.loader(name).batches(0):
                raw, labels = batch.image.to(device, non_blocking=True), batch.label.to(device, non_blocking=True)
                changed = change if blur and lungs is not None else None
                seen = look(self.accelerator, model, raw, batch.index, labels, lungs, regions, batch.label, cam=cams, change=changed)
                figures, known = {"logits": seen.logits}, {"logits": torch.ones(len(raw), dtype=torch.bool)}
                if cams:
                    lesions = lesion_regions(split, batch.index, raw.shape[-2:], self.size).to(device)
                    kinds = {"expected": seen.region, "lesion": lesions}
                    if seen.boxes is not None and regions.uses_lungs:
                        kinds["expected_box"] = boxed(batch.label, seen.boxes, None).region
                    assert seen.cam is not None
                    for kind, region in kinds.items():
                        figures[kind] = without_dead(localize(seen.cam, region, self.attention.threshold), seen.cam)
                        known[kind] = placed(region)
                    if seen.expected is not None:
                        known["replaced"] = seen.expected.replaced
                    if twin is not None:
                        figures["similarity"] = self._similarity(seen, labels, twin)
                        known["similarity"] = known["logits"]
                    weight = seen.expected.weight if seen.expected is not None else torch.zeros_like(seen.images[:, 0])
                    weight = chosen(weight, lesions, self.attention.region)
                    figures["term"] = attention_term(self._trained_cam(seen), weight, self.attention.threshold, self.attention.form)[:, None]
                    known["term"] = placed(weight)
                table.write(batch.index, batch.weight, figures, known)
        of = table.gather(self.accelerator)
        return Outcome(
            of["logits"].float(),
            torch.from_numpy(split.labels.astype(np.int64)),
            of["term"][:, 0],
            of["expected"],
            of["expected_box"],
            of["lesion"],
            of["similarity"][:, 0],
            ~of["replaced"][:, 0].isnan(),
        )

    def _trained_cam(self, seen: Seen) -> torch.Tensor:
        """The CAM [B,S,S] that the attention term is of: the label's, but the predicted class's as published."""
        assert seen.cam is not None
        if self.attention.form != "published":
            return seen.cam
        with self.accelerator.autocast():
            predicted = self.model(seen.images, None, cam=True).cam
        assert predicted is not None
        return normalize_cam(predicted, self.size)

    def _similarity(self, seen: Seen, labels: torch.Tensor, twin: FocusClassifier) -> torch.Tensor:
        """Rank correlation of the CAMs with those of a twin: [B,1]."""
        with self.accelerator.autocast():
            other = twin(seen.images, labels, cam=True).cam
        assert other is not None
        assert seen.raw_cam is not None
        return rank_correlation(_grays(seen.raw_cam), _grays(other))[:, None]

    def probe(self, name: str, seen: Outcome) -> dict[str, Any] | None:
        """Two tests that a localization figure cannot pass by chance; None where no finding has an expected region.

        blur: the drop in AUC when everything outside the expected region is blurred, and when everything inside is, with paired intervals:
        a model that reads the region loses by the second alone. random: the CAMs of the same network with random weights (Adebayo et al.,
        "Sanity checks for saliency maps", NeurIPS 2018): their energy and lift, and the rank correlation of its maps with the model's.

        Args:
            seen: what `measure` found on that split.
        """
        if name not in self.lungs or not measured(seen.expected).any():
            return None
        found: dict[str, Any] = {"auc": multiclass_auc(seen.logits, seen.labels)}
        for where in ("outside", "inside"):
            changed = self.measure(name, cams=False, blur=where)
            drop = found["auc"] - multiclass_auc(changed.logits, changed.labels)
            found[f"drop_{where}"], found[f"drop_{where}_95"] = drop, auc_interval(seen.logits, seen.labels, changed.logits)
        twin = random_twin(self.model, self.seed).to(self.accelerator.device)
        other = replace(self, model=twin)
        other.loaders = self.loaders
        with evaluating(self.model):
            chance = other.measure(name, twin=self.model)
        # A map that is zero everywhere, which some networks have before they are trained, is no map to compare with: nothing is in the region.
        known = chance.expected[:, 0] > 0  # NaN is not
        figures = summarize(chance.expected[known][:, : len(LOCALIZATION)])
        similarity = summarize(chance.similarity[known][:, None], ("similarity",))
        names = ("images", "energy", "energy_95", "lift", "lift_95", "similarity", "similarity_95")
        found["random"] = {name: value for name, value in {**figures, **similarity}.items() if name in names} if figures and similarity else None
        return found


def _grays(cam: torch.Tensor) -> torch.Tensor:
    """A CAM [B,h,w] in at most 16 x 16 cells of 256 grays: what differs by less, such as the last bits of a sum, is a tie of ranks."""
    side = min(cam.shape[-1], 16)
    return (normalize_cam(F.adaptive_avg_pool2d(cam, side), side) * 255).round()


def validation_figures(outcome: Outcome, lam: float, attention: AttentionConfig, findings: tuple[str, ...]) -> dict[str, Any]:
    """Accuracy, AUC, cross-entropy; with attention also its term, the weighted loss and the energy in the region."""
    report = outcome.report(findings)
    figures = {"val_accuracy": report["accuracy"], "val_auc": report["auc"], "val_loss": report["loss"]}
    known = ~outcome.term.isnan()
    if known.any():
        term = outcome.term[known].sum() / (len(known) if attention.form == "published" else known.sum())
        place = report["localization"]["lesion" if attention.region == "annotation" else "expected"]["all"]
        figures |= {"val_attention": float(term), "val_energy": place and place["energy"]}
    figures["val_weighted"] = lam * figures["val_loss"] + (1 - lam) * figures.get("val_attention", 0.0)
    return figures
