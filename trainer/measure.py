"""What is measured of a model on a split, every image once, over all processes."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from accelerate import Accelerator
from torch.nn import functional as F

from shards.batch import Batch
from shards.dataset import Split
from shards.loader import Loader
from shards.plan import EpochPlan
from trainer.cam import normalize_cam
from trainer.classifier import FocusClassifier, evaluating
from trainer.content import Probe
from trainer.gather import Table
from trainer.launching import TIMEOUT, loader_of
from trainer.look import Located, Seen, look
from trainer.losses import attention_term
from trainer.lungs.memory import LungFinder
from trainer.metrics import (
    LOCALIZATION,
    THRESHOLDS,
    localize,
    measured,
    rank_correlation,
    summarize,
    without_dead,
)
from trainer.outcome import Outcome
from trainer.probe import blurred, probed, random_twin
from trainer.regions.lesions import LesionRegions, attended_regions
from trainer.regions.place import PUBLISHED, Regions, has_region
from trainer.rules import Rule
from trainer.sections import AttentionConfig
from trainer.task import Task
from trainer.upload import ahead


@dataclass
class Evaluator:
    """A model, and the splits that it is measured on.

    Args:
        model: unwrapped; its mode is restored.
        task: what its labels are.
        attention: form and threshold of the attention term, and which regions it follows.
        size: S, pixels of a side of the classifier's input.
        seed: of the random weights of `probe`.
        rules: of the expected regions, by finding.
        splits, lungs: by name of a split; without lungs there are no expected regions.
        batch, workers: images a process and forward, processes that read.
        timeout: seconds without a batch after which those processes count as stuck.
        between: called before each batch, on all processes alike.
    """

    accelerator: Accelerator
    model: FocusClassifier
    task: Task
    attention: AttentionConfig
    size: int
    seed: int
    rules: Mapping[str, Rule]
    splits: Mapping[str, Split]
    lungs: Mapping[str, LungFinder]
    batch: int
    workers: int
    timeout: float = TIMEOUT
    between: Callable[[], None] = lambda: None

    def __post_init__(self) -> None:
        self.loaders: dict[str, Loader] = {}

    def loader(self, name: str) -> Loader:
        """Of a split, in its order; made once, so that its processes stay."""
        if name not in self.loaders:
            split = self.splits[name]
            plan = EpochPlan(split.shard_sizes(), shuffle=False)
            self.loaders[name] = loader_of(
                self.accelerator, split, plan, batch=self.batch, workers=self.workers, timeout=self.timeout
            )
        return self.loaders[name]

    def regions(self, split: Split) -> Regions:
        """Where the findings of a split's classes are expected."""
        return Regions(split.classes, self.rules, self.size, self.accelerator.device)

    @torch.no_grad()
    def measure(self, name: str, *, cams: bool = True, blur: str = "", twin: FocusClassifier | None = None) -> Outcome:
        """Run the model over a split, every image once over all processes.

        Args:
            name: of the split.
            cams: take CAMs, of every pair, where the model has a map. False: logits only.
            blur: ``outside`` or ``inside``: of the expected regions, before the model sees the image (see
                `trainer.probe`).
            twin: another model, in eval mode, on the same images, whose CAMs are compared with this one's.
        """
        split, model, device = self.splits[name], self.model, self.accelerator.device
        columns, cams = len(LOCALIZATION) + len(THRESHOLDS), cams and model.has_map
        lungs = self.lungs.get(name) if cams or blur else None
        regions = self.regions(split)
        # What figures can be compared by that were measured before regions followed the lungs' outline: the published
        # region, else the rule's part of the box.
        boxed = Regions(
            split.classes,
            {finding: PUBLISHED.get(finding, rule) for finding, rule in self.rules.items()},
            self.size,
            device,
        )
        target = torch.from_numpy(split.targets())
        pairs = self.task.pairs(target)
        images = Table(len(split), {"logits": len(split.classes)})
        of_pairs = Table(
            len(pairs.image),
            {
                "expected": columns,
                "expected_box": columns,
                "lesion": columns,
                "similarity": 1,
                "term": 1,
                "replaced": 1,
            },
        )
        drawn = LesionRegions(split, exact=True)

        with evaluating(model):
            for batch in ahead(self.loader(name).batches(0), device):
                self.between()
                index, own, raw = batch.index, batch.weight > 0, batch.image.to(device, non_blocking=True)
                change = self._blur(batch, split.classes, regions, blur) if blur and lungs is not None else None
                # One forward for the first pair of every image, which gives the logits, too; then one for the second
                # pair of those that have one, ...
                first, count = (torch.searchsorted(pairs.image, index + after) for after in (0, 1))
                count -= first
                for turn in range(max(1, int(count.max())) if cams else 1):
                    if turn:
                        further = count > turn
                        index, own, raw, first, count = (
                            index[further],
                            own[further],
                            raw[further.to(device)],
                            first[further],
                            count[further],
                        )
                    has_pair = count > turn
                    pair = torch.where(has_pair, first + turn, 0)
                    finding = (
                        torch.where(has_pair, pairs.finding[pair], 0) if len(pairs.finding) else torch.zeros_like(index)
                    )
                    classes = finding.to(device, non_blocking=True)
                    seen = look(
                        self.accelerator, model, raw, index, classes, lungs, regions, finding, cam=cams, change=change
                    )
                    if not turn:
                        images.write(
                            index, own, {"logits": seen.logits}, {"logits": torch.ones(len(raw), dtype=torch.bool)}
                        )
                    if cams:
                        lesions = drawn.regions(index, finding, raw.shape[-2:], self.size).to(device)
                        part = (
                            boxed(finding, seen.boxes, None).region
                            if regions.uses_lungs and seen.boxes is not None
                            else None
                        )
                        figures, known = self._localized(seen, lesions, part)
                        if twin is not None:
                            figures["similarity"], known["similarity"] = (
                                self._similarity(seen, classes, twin),
                                torch.ones(len(raw), dtype=torch.bool),
                            )
                        of_pairs.write(pair, own & has_pair, figures, known)
        of = of_pairs.gather(self.accelerator) if cams else of_pairs.nothing()
        return Outcome(
            split=split,
            task=self.task,
            logits=images.gather(self.accelerator)["logits"].float(),
            target=target,
            pairs=pairs,
            term=of["term"][:, 0],
            expected=of["expected"],
            expected_box=of["expected_box"],
            lesion=of["lesion"],
            similarity=of["similarity"][:, 0],
            replaced=~of["replaced"][:, 0].isnan(),
        )

    def _blur(
        self, batch: Batch, findings: tuple[str, ...], regions: Regions, where: str
    ) -> Callable[[Located], torch.Tensor]:
        """What makes the images of a batch blurred, in or outside the regions of findings of the task."""

        def change(located: Located) -> torch.Tensor:
            assert located.boxes is not None
            region = torch.zeros_like(located.images[:, 0], dtype=torch.bool)
            whose = probed(batch.target == 1, batch.index, findings, self.rules)
            for k in range(len(findings)):
                if whose[:, k].any():
                    of_finding = regions(torch.full((len(whose),), k), located.boxes, located.lungs).region
                    region |= of_finding & whose[:, k].to(region.device)[:, None, None]
            return blurred(located.images, region if where == "inside" else ~region)

        return change

    def _localized(
        self, seen: Seen, lesions: torch.Tensor, boxed: torch.Tensor | None
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Figures of the CAMs of a batch by name, and which of its images have them.

        Args:
            lesions: bool [B,S,S]; boxed: the region as a part of the lung box, where it is not that anyway.
        """
        assert seen.cam is not None
        figures, known = {}, {}
        kinds = {"expected": seen.region, "lesion": lesions} | ({"expected_box": boxed} if boxed is not None else {})
        for kind, region in kinds.items():
            figures[kind] = without_dead(localize(seen.cam, region, self.attention.threshold, seen.raw_cam), seen.cam)
            known[kind] = has_region(region)
        if seen.expected is not None:
            known["replaced"] = seen.expected.replaced
        weight = seen.expected.weight if seen.expected is not None else torch.zeros_like(seen.images[:, 0])
        weight = attended_regions(weight, lesions, self.attention.region)
        figures["term"] = attention_term(
            self._trained_cam(seen), weight, self.attention.threshold, self.attention.form
        )[:, None]
        known["term"] = has_region(weight)
        return figures, known

    def _trained_cam(self, seen: Seen) -> torch.Tensor:
        """The CAM [B,S,S] that the attention term is of: the label's, but the predicted class's as published."""
        assert seen.cam is not None
        if self.attention.form != "published":
            return seen.cam
        with self.accelerator.autocast():
            predicted = self.model(seen.images, None, cam=True).cam
        assert predicted is not None
        return normalize_cam(predicted, self.size)

    def _similarity(self, seen: Seen, classes: torch.Tensor, twin: FocusClassifier) -> torch.Tensor:
        """Rank correlation of the CAMs with those of a twin: [B,1]."""
        with self.accelerator.autocast():
            other = twin(seen.images, classes, cam=True).cam
        assert other is not None
        assert seen.raw_cam is not None
        return rank_correlation(_grays(seen.raw_cam), _grays(other))[:, None]

    def random(self) -> "Evaluator":
        """The same of the network with random weights."""
        other = replace(self, model=random_twin(self.model, self.seed).to(self.accelerator.device))
        other.loaders = self.loaders
        return other

    def probe(self, name: str, seen: Outcome) -> Probe | None:
        """Two tests that a localization figure cannot pass by chance; None where no finding has an expected region.

        blur: the drop in AUC when everything outside the expected region is blurred, and when everything inside is,
        with paired intervals: a model that reads the region loses by the second alone. random: the CAMs of the same
        network with random weights (Adebayo et al., "Sanity checks for saliency maps", NeurIPS 2018): their energy and
        lift, and the rank correlation of its maps with the model's.

        Args:
            seen: what `measure` found on that split.
        """
        if name not in self.lungs or not measured(seen.expected).any():
            return None
        auc, drops = seen.auc(), []
        for where in ("outside", "inside"):
            changed = self.measure(name, cams=False, blur=where)
            drops.append(
                (auc - changed.auc(), self.task.auc_interval(seen.logits, seen.target, changed.logits, seen.patients))
            )
        with evaluating(self.model):
            chance = self.random().measure(name, twin=self.model)
        # A map that is zero everywhere, which some networks have before they are trained, is no map to compare with
        known = ~chance.expected[:, 0].isnan()
        figures = summarize(chance.expected[known][:, : len(LOCALIZATION)])
        similarity = summarize(chance.similarity[known][:, None], ("similarity",))
        names = ("images", "energy", "energy_95", "lift", "lift_95", "similarity", "similarity_95")
        compared = {name: value for name, value in {**(figures or {}), **(similarity or {})}.items() if name in names}
        compared["without_map"] = int(measured(chance.expected).sum() - known.sum())
        (outside, outside_95), (inside, inside_95) = drops
        return {
            "auc": auc,
            "drop_outside": outside,
            "drop_outside_95": outside_95,
            "drop_inside": inside,
            "drop_inside_95": inside_95,
            "random": compared if figures and similarity else None,
        }


def _grays(cam: torch.Tensor) -> torch.Tensor:
    """A CAM [B,h,w] in at most 16 x 16 cells of 256 grays: what differs by less, such as the last bits of a sum, is a
    tie of ranks.
    """
    side = min(cam.shape[-1], 16)
    return (normalize_cam(F.adaptive_avg_pool2d(cam, side), side) * 255).round()


def validation_figures(outcome: Outcome, lam: float, attention: AttentionConfig) -> dict[str, Any]:
    """Accuracy, AUC, cross-entropy; with attention also its term, the weighted loss and the energy in the region."""
    report = outcome.report()
    figures: dict[str, Any] = {f"val_{name}": report[name] for name in ("accuracy", "auc", "loss") if name in report}
    known = ~outcome.term.isnan()
    if known.any():
        term = outcome.term[known].sum() / (len(outcome.logits) if attention.form == "published" else known.sum())
        place = report["localization"]["lesion" if attention.region == "annotation" else "expected"]["all"]
        figures |= {"val_attention": float(term), "val_energy": place and place["energy"]}
    figures["val_weighted"] = lam * figures["val_loss"] + (1 - lam) * figures.get("val_attention", 0.0)
    return figures
