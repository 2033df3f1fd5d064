"""Settings: one dataclass per section, which become the command line, the YAML, the help and the errors
(`trainer.command`).

Precision is the launcher's
(`accelerate_config.yaml`, `accelerate launch --mixed_precision ...`) and is not configured here. Neither torch nor
kornia is imported, so that what is wrong with a command is said at once.
"""

from dataclasses import dataclass, field
from typing import Literal

from shards.errors import InputError
from trainer.rules import task_findings

Form = Literal["published", "coverage", "energy", "lift"]
Policy = Literal["fixed", "published", "ratio", "balanced", "constrained"]
CLAMPED = ("ratio", "balanced", "constrained")  # policies of lambda that have bounds
SWAPPED = 0.75  # share of the images whose surroundings are swapped where attention is trained


@dataclass
class AttentionConfig:
    """What the attention loss asks of the CAM."""

    form: Form = "energy"
    """energy: the CAM's share in the region; lift: that, area-corrected; coverage: a soft count of its hot pixels;
    published: the hard one, gradient zero.
    """
    region: Literal["anatomy", "annotation", "both"] = "anatomy"
    """anatomy: where the finding is expected; annotation: an image's own lesion boxes, where it has some; both: these,
    else where it is expected.
    """
    annotated: float = 1.0
    """Share of the images with lesion boxes whose boxes are used, for annotation and both: 0.01 tells what 1% annotated
    would give.
    """
    threshold: float = 0.5
    """CAM values above it are hot, in [0, 1]: for the forms published and coverage, and for the coverage that is
    reported.
    """
    layer: str = ""
    """Module whose output gives the CAM, such as stages.3; several, with commas: their mean; input: the input's
    gradient; empty: the last feature map.
    """
    mode: Literal["train", "eval"] = "train"
    """train: the CAM of the training forward, which costs nothing; eval: of a second forward in eval mode, as
    published.
    """


@dataclass
class BalanceConfig:
    """Lambda, the weight of cross-entropy; attention gets 1 - lambda."""

    policy: Policy = "fixed"
    """fixed: lam; published: max(0.2, 1 - 0.023 epoch); ratio: A / (CE + A); balanced: equal gradients at the CAM's
    layer; constrained: see epsilon.
    """
    lam: float = 0.5
    """Lambda of the policy fixed, in [0, 1]; 1 is plain cross-entropy and pays nothing for attention."""
    low: float = 0.2
    """Lower clamp of ratio, balanced and constrained."""
    high: float = 0.95
    """Upper clamp of these."""
    epsilon: float = 0.05
    """constrained: attention grows as long as validation cross-entropy stays within so many nats of its best."""


@dataclass
class OptimConfig:
    """Optimizer and schedule; the defaults are the published ones."""

    name: Literal["adam", "adamw"] = "adam"
    """Optimizer."""
    lr: float = 1e-5
    """Learning rate."""
    weight_decay: float = 0.0
    """Weight decay (adamw: decoupled)."""
    schedule: Literal["plateau", "cosine"] = "plateau"
    """plateau: times 0.1 after 10 epochs without a better validation loss, down to 1e-10; cosine: to 0 over the run."""
    warmup: int = 0
    """Steps of linear warm-up, for cosine; a resume counts them in the images that they had."""
    watch: Literal["classification", "weighted"] = "classification"
    """What plateau watches: validation cross-entropy, or (published) lambda-weighted with attention."""
    clip: float = 1.0
    """Largest norm of the gradient; 0: no clipping, as published."""


@dataclass(frozen=True)
class Swap:
    """Context swap."""

    probability: float | None = None
    """Share of the images whose surroundings come from another image of the batch; empty: 0.75 with attention, 0
    without.
    """
    dilate: float = 0.05
    """How far the kept box reaches beyond the lung box, in shares of its sides."""
    feather: float = 0.04
    """Width of the seam, in shares of the image's side."""


@dataclass(frozen=True)
class Strength:
    """How far each part of the transform may go; 0 leaves it out."""

    rotate: float = 0.0
    """Degrees to either side."""
    scale: float = 0.0
    """Relative change of size, 0.1 for 0.9 to 1.1 times."""
    shift: float = 0.0
    """Share of the image's side."""
    flip: float = 0.0
    """Probability of a left-right flip. A flipped chest has its heart on the wrong side."""
    contrast: float = 0.0
    """Relative change of contrast about the mean."""
    brightness: float = 0.0
    """Absolute change of brightness, in units of the full range."""
    gamma: float = 0.0
    """Exponent from 1 / (1 + gamma) to 1 + gamma."""
    noise: float = 0.0
    """Largest standard deviation of Gaussian noise, in units of the full range."""
    invert: float = 0.0
    """Probability of black for white."""


@dataclass(frozen=True)
class Painting:
    """How often each thing is painted: probabilities in [0, 1]; 0 leaves it out."""

    opacity: float = 0.0
    """Effusion with a meniscus, half and whole white-outs, consolidations, haze: one or two of them, at any strength.
    """
    gas: float = 0.0
    """Air where there is no lung: under the diaphragm, in the stomach, in the bowel, in the neck."""
    collapse: float = 0.0
    """Air without vessels in a part of a lung, darker than lung."""
    devices: float = 0.0
    """Tubes, leads, clips and boxes of metal, and letters."""
    tone: float = 0.0
    """Another tone curve, uneven exposure, another sharpness."""
    warp: float = 0.0
    """A smooth bend of image and mask, and another aspect."""
    frame: float = 0.0
    """A collimator's border around the lungs, black or white."""
    negative: float = 0.0
    """An image that is no frontal chest, with an empty mask: turned, a part, from the side, another limb, nothing."""


@dataclass
class LungsConfig:
    """The lung segmenter."""

    weights: str = ""
    """File of trainer.train_lungs (or its run folder), or the published U-Net; empty: the segmenter that ships with the
    package.
    """


@dataclass
class Config:
    """Train a classifier that looks where the finding is."""

    shards: str
    """Folder or URL (s3, gs, http, https, file) of packed shards with train and val (and test)."""
    out: str
    """Run folder to make."""
    task: str = "ne"
    """ne, np, ns, nc, nep, neps, or names of findings separated by commas; the first is class 0."""
    findings: str = ""
    """YAML file of findings and their regions, on top of the ready-made ones (nih); published: only the three of the
    paper.
    """
    backbone: str = "pvt"
    """pvt, vgg, resnet (the published ones) or any timm model."""
    pretrained: str = "true"
    """true: ImageNet weights from the hub; false: none; or a file (safetensors or a state dict), or a run folder of
    this trainer.
    """
    size: int = 224
    """Pixels of a side of the classifier's input."""
    batch: int = 32
    """Images per process and forward."""
    accumulate: int = 1
    """Batches per optimizer step; the step is that of one batch as large as all of them."""
    epochs: int = 100
    """Passes over the training images, at most."""
    seed: int = 0
    """Of weights, order and augmentation."""
    patience: int = 30
    """Stop after so many epochs in a row without a better model."""
    best: Literal["accuracy", "auc", "loss", "last"] = "accuracy"
    """What the model that is kept is best in, on val (loss: validation cross-entropy); last: the last epoch's, where
    val is too small to choose by.
    """
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    swap: Swap = field(default_factory=Swap)
    augment: Strength = field(default_factory=Strength)
    lungs: LungsConfig = field(default_factory=LungsConfig)
    tracker: Literal["none", "wandb", "tensorboard"] = "wandb"
    """wandb stays in the run folder unless you are logged in; then scalars, settings and a panel of test images go to
    its server.
    """
    workers: int = 2
    """Loader processes per process; 0: read in the training process."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl and of the tracker."""
    save_every: int = 500
    """Steps between checkpoints within an epoch; one is written at the end of every epoch anyway."""
    resume: bool = False
    """Go on with the run in --out; other flags are then taken from its config.yaml unless given again."""

    def problems(self) -> list[str]:
        """Everything that is wrong with the values, each naming its flag."""
        found = [
            f"--{name} {value}: must lie in [0, 1]"
            for name, value in (
                ("attention.threshold", self.attention.threshold),
                ("attention.annotated", self.attention.annotated),
                ("swap.probability", self.swap_probability),
                ("swap.dilate", self.swap.dilate),
                ("swap.feather", self.swap.feather),
                ("balance.lam", self.balance.lam),
                ("balance.low", self.balance.low),
                ("balance.high", self.balance.high),
                ("augment.flip", self.augment.flip),
                ("augment.invert", self.augment.invert),
            )
            if not 0 <= value <= 1
        ]
        if self.balance.low > self.balance.high:
            found.append(f"--balance.low {self.balance.low}: is above --balance.high {self.balance.high}")
        least = {
            "size": 32,
            "batch": 1,
            "accumulate": 1,
            "epochs": 1,
            "patience": 1,
            "workers": 0,
            "log_every": 1,
            "save_every": 1,
            "seed": 0,
        }
        found += [
            f"--{n} {getattr(self, n)}: must be at least {low}" for n, low in least.items() if getattr(self, n) < low
        ]
        if not self.optim.lr > 0:
            found.append(f"--optim.lr {self.optim.lr}: must be above 0")
        if self.balance.epsilon < 0:
            found.append(f"--balance.epsilon {self.balance.epsilon}: must not be negative")
        if self.balance.policy == "balanced" and (self.attention.mode == "eval" or self.attention.form == "published"):
            what = "--attention.mode eval" if self.attention.mode == "eval" else "--attention.form published"
            found.append(
                "--balance.policy balanced: needs an attention term with a gradient in the training forward, which "
                f"{what} has not"
            )
        if self.balance.policy == "constrained" and self.balance.high == 1:
            found.append(
                "--balance.high 1: constrained starts there, and from cross-entropy alone it would never move; lower it"
            )
        for name in ("weight_decay", "clip", "warmup"):
            if getattr(self.optim, name) < 0:
                found.append(f"--optim.{name} {getattr(self.optim, name)}: must not be negative")
        if not 0 <= self.augment.scale < 1:
            found.append(f"--augment.scale {self.augment.scale}: must lie in [0, 1)")
        try:
            task_findings(self.task)
        except InputError as error:
            found.append(str(error))
        return found

    def idle(self) -> list[str]:
        """Settings of a new run that others leave without effect."""
        found = []
        if self.balance.policy != "fixed" and self.balance.lam != BalanceConfig.lam:
            found.append(
                f"--balance.lam {self.balance.lam}: is of the policy fixed, {self.balance.policy} finds its own; leave "
                "one of the two out"
            )
        if self.attention.region == "anatomy" and self.attention.annotated != 1:
            found.append(
                f"--attention.annotated {self.attention.annotated}: no lesion boxes are used with --attention.region "
                "anatomy; take annotation or both"
            )
        if self.best == "last" and self.patience != Config.patience:
            found.append(
                f"--patience {self.patience}: with --best last no epoch is better than another, so none is waited for; "
                "leave one of the two out"
            )
        return found

    def unused(self) -> list[str]:
        """Settings without effect that a recipe may well bring along: they are told, not refused."""
        b, o, found = self.balance, self.optim, []
        for name, policies in (("low", CLAMPED), ("high", CLAMPED), ("epsilon", ("constrained",))):
            if b.policy not in policies and getattr(b, name) != getattr(BalanceConfig, name):
                found.append(f"--balance.{name} {getattr(b, name)} is of the policies {', '.join(policies)}")
        if o.schedule != "cosine" and o.warmup != OptimConfig.warmup:
            found.append(f"--optim.warmup {o.warmup} is of --optim.schedule cosine")
        if o.schedule != "plateau" and o.watch != OptimConfig.watch:
            found.append(f"--optim.watch {o.watch} is of --optim.schedule plateau")
        if self.plain:
            for name in ("form", "mode"):
                if getattr(self.attention, name) != getattr(AttentionConfig, name):
                    found.append(
                        f"--attention.{name} {getattr(self.attention, name)} trains nothing with lambda 1 throughout"
                    )
        if self.swap_probability == 0:
            found += [
                f"--swap.{n} {getattr(self.swap, n)} is of the context swap, which is off"
                for n in ("dilate", "feather")
                if getattr(self.swap, n) != getattr(Swap, n)
            ]
        return found

    @property
    def plain(self) -> bool:
        """Whether lambda is 1 throughout: cross-entropy, which pays nothing for attention."""
        return self.balance.policy == "fixed" and self.balance.lam == 1.0

    @property
    def looks(self) -> bool:
        """Whether training needs a feature map: cross-entropy alone does not."""
        return not self.plain or self.swap_probability > 0

    @property
    def swap_probability(self) -> float:
        """Of the context swap: as set, else on where attention has a gradient."""
        if self.swap.probability is not None:
            return self.swap.probability
        return 0.0 if self.plain or self.attention.form == "published" else SWAPPED
