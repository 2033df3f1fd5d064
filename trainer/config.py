"""Settings: one dataclass per section, which become the command line, the YAML, the help and the errors
(`trainer.command`).

Precision is the launcher's
(`accelerate_config.yaml`, `accelerate launch --mixed_precision ...`) and is not configured here. Neither torch nor
kornia is imported, so that what is wrong with a command is said at once.
"""

import re
from dataclasses import dataclass, field
from typing import Any, Literal

from shards.errors import InputError, nearest
from shards.names import NUMBER, known_as, lists, policy
from shards.sample import TASKS
from trainer.rules import task_findings
from trainer.sections import (
    AttentionConfig,
    BalanceConfig,
    LabelsConfig,
    LossConfig,
    LungsConfig,
    OptimConfig,
    Strength,
    Swap,
    wrong_point,
)

CLAMPED = ("ratio", "balanced", "constrained")  # policies of lambda that have bounds
# LibAUC, jfhealthcare and EVA-X agree on it
CHEXPERT = "Edema: ones, Atelectasis: ones, zeros"
LAMBDA = 0.2
# A network from scratch learns attention first and alone then: its maps hardly depend on the image (bench/LOG.md).
SCRATCH_LAMBDA, SCRATCH_RAMP = 0.4, 0.5
UNSAID = (LAMBDA, SCRATCH_LAMBDA, 0.7)  # what stands in a run's config.yaml where nobody said it, today or once
PUBLISHED_LAMBDA = 0.5
LENT = 0.5  # share of the images without a finding that get the devices of others, where these are named
SWAPPED = 0.75  # share of the images whose surroundings are swapped where attention is trained


@dataclass
class Config:
    """Train a classifier that looks where the finding is."""

    shards: str
    """Folder or URL (s3, gs, http, https, file) of packed shards with train and val (and test)."""
    out: str
    """Run folder to make."""
    task: str = "ne"
    """ne, np, ns, nc, nep, neps, nih14, chexpert5, chexpert14, mimic, vindr, padchest, or names of findings separated
    by commas; of classes the first is class 0.
    """
    findings: str = ""
    """YAML file of findings and their regions, on top of the ready-made ones (nih); published: only the three of the
    paper.
    """
    backbone: str = "pvt"
    """pvt, vgg, resnet (the published ones), any timm model, hf-hub:USER/NAME, or local-dir:FOLDER with a config.json.
    """
    backbone_args: str = ""
    """Arguments of timm's model, such as 'drop_path_rate=0.1, patch_size=16'."""
    mean: float | None = None
    """Of the pixels, in [0, 1], as the weights were trained with; empty: the backbone's own."""
    std: float | None = None
    """Their standard deviation; give both or none."""
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
    best: Literal["accuracy", "auc", "loss", "last"] | None = None
    """What the model that is kept is best in, on val (loss: validation cross-entropy); last: the last epoch's, where
    val is too small to choose by; empty: accuracy, or with several findings an image auc.
    """
    sampler: Literal["shuffled", "balanced"] = "shuffled"
    """shuffled: every image once an epoch; balanced: as many draws an epoch, equally many for each finding and for
    none.
    """
    labels: LabelsConfig = field(default_factory=LabelsConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    swap: Swap = field(default_factory=Swap)
    augment: Strength = field(default_factory=Strength)
    lungs: LungsConfig = field(default_factory=LungsConfig)
    tracker: Literal["none", "wandb", "tensorboard"] = "wandb"
    """wandb stays in the run folder unless you are logged in; then scalars, settings, test images with their maps and
    the model go to its server.
    """
    workers: int = 2
    """Loader processes per process; 0: read in the training process."""
    decode: Literal["loader", "device"] = "loader"
    """Who decodes the radiographs that are trained on: whoever reads them, or the GPU, where fewer than three cores
    come to it (by nvJPEG, whose grays may differ a little; not tried on one yet).
    """
    log_every: int = 10
    """Steps between lines of metrics.jsonl and of the tracker."""
    save_every: int = 500
    """Steps between checkpoints within an epoch; one is written at the end of every epoch anyway."""
    keep: int = 2
    """Checkpoints that are kept: where the newest is damaged, the one before is gone on from."""
    timeout: float = 600.0
    """Seconds after which a process, or a loader process, that is waited for counts as gone, and the run ends."""
    compile: bool = False
    """Compile the backbone up to the CAM's layer (torch.compile): a slower start for faster steps, most on a GPU."""
    resume: bool = False
    """Go on with the run in --out; other flags are then taken from its config.yaml unless given again. auto, on the
    command line: go on if there is one, else start.
    """
    dry_run: bool = False
    """Check everything, take two steps, say how long it would take, and leave nothing."""

    def __post_init__(self) -> None:
        """Settle what is left empty and depends on the kind of labels, so that a run's config.yaml says it."""
        self.balance.policy = self.balance.policy or "fixed"
        if self.balance.ramp is None:
            chosen = self.balance.policy != "fixed" or self.balance.lam is not None
            falls = self.scratch and not chosen and self.attention.form != "published"
            self.balance.ramp = SCRATCH_RAMP if falls else 0.0
        self.balance.lam = self.lam
        self.best = self.best or ("auc" if self.labels.kind == "any" else "accuracy")

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
                ("swap.devices", self.lent_devices),
                ("balance.lam", self.lam),
                ("balance.ramp", self.balance.ramp or 0.0),
                ("balance.low", self.balance.low),
                ("balance.high", self.balance.high),
                ("augment.flip", self.augment.flip),
                ("augment.invert", self.augment.invert),
            )
            if not 0 <= value <= 1
        ]
        if (self.mean is None) != (self.std is None):
            lacking, given = ("std", "mean") if self.std is None else ("mean", "std")
            found.append(f"--{given} {getattr(self, given)}: needs --{lacking} beside it")
        elif self.mean is not None and self.std is not None and not (0 <= self.mean <= 1 and 0 < self.std <= 1):
            found.append(
                f"--mean {self.mean} --std {self.std}: expected shares of the full range, such as 0.53 and 0.26"
            )
        if self.swap.devices and not self.attention.avoid:
            found.append(f"--swap.devices {self.swap.devices}: which devices? name them by --attention.avoid")
        try:
            arguments(self.backbone_args)
        except InputError as error:
            found.append(str(error))
        if self.balance.low > self.balance.high:
            found.append(f"--balance.low {self.balance.low}: is above --balance.high {self.balance.high}")
        least = dict.fromkeys(("batch", "accumulate", "epochs", "patience", "log_every", "save_every", "keep"), 1)
        least |= {"size": 32, "workers": 0, "timeout": 5, "seed": 0}
        if self.dry_run and self.resume:
            found.append("--dry_run: is of a new run; leave --resume out")
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
        if not 0 < self.optim.layer_decay <= 1:
            found.append(f"--optim.layer_decay {self.optim.layer_decay}: must lie above 0 and not above 1")
        if not 0 <= self.optim.ema < 1:
            found.append(f"--optim.ema {self.optim.ema}: must lie in [0, 1), such as 0.999")
        if self.optim.frozen and self.optim.schedule != "cosine":
            found.append(
                f"--optim.frozen {self.optim.frozen}: is of --optim.schedule cosine, whose rate is a function of the "
                "images seen"
            )
        if self.optim.frozen >= self.epochs:
            found.append(f"--optim.frozen {self.optim.frozen}: leaves none of {self.epochs} epochs for the backbone")
        for name in ("weight_decay", "clip", "warmup", "frozen"):
            if getattr(self.optim, name) < 0:
                found.append(f"--optim.{name} {getattr(self.optim, name)}: must not be negative")
        if not 0 <= self.augment.scale < 1:
            found.append(f"--augment.scale {self.augment.scale}: must lie in [0, 1)")
        try:
            names = self.classes
        except InputError as error:
            return [*found, str(error)]
        return found + self._label_problems(names)

    def _label_problems(self, names: tuple[str, ...]) -> list[str]:
        """What is wrong with the settings of labels and their loss."""
        labels, loss, found = self.labels, self.loss, []
        for flag, text, read in (
            ("--labels.uncertain", labels.uncertain, lambda: self.uncertain),
            ("--loss.pos_weight", loss.pos_weight, lambda: self.pos_weight),
        ):
            try:
                for name in read() or ():
                    if name and known_as(name, names, flag) is None:
                        found.append(
                            f"{flag} {text}: {name} is no finding of --task {self.task}; {nearest(name, names)}"
                        )
            except InputError as error:
                found.append(str(error))
        if why := wrong_point(labels.operating_point):
            found.append(f"--labels.operating_point {why}")
        if labels.kind == "any":
            if self.task == Config.task:
                found.append(
                    f"--task {self.task}: is of one finding an image; name findings, or a list: "
                    f"{', '.join(name for name in lists() if name not in TASKS)}"
                )
            if self.best == "accuracy":
                found.append("--best accuracy: is of one finding an image; take auc, loss or last")
            if self.attention.form == "published":
                found.append(
                    "--attention.form published: is of one finding an image; take another with --labels.kind any"
                )
            return found
        of_any = [("labels", name) for name in ("uncertain", "unmentioned")] + [("loss", "mean")]
        if labels.operating_point != "youden" and len(names) != 2:
            found.append(
                f"--labels.operating_point {labels.operating_point}: is of two classes, or of --labels.kind any; "
                f"--task {self.task} has {len(names)}"
            )
        for section, name in of_any:
            if getattr(getattr(self, section), name) != getattr(type(getattr(self, section)), name):
                value = getattr(getattr(self, section), name)
                found.append(f"--{section}.{name} {value}: is of --labels.kind any")
        if loss.kind == "asymmetric":
            found.append("--loss.kind asymmetric: is of --labels.kind any; take bce or focal")
        if loss.pos_weight != "none" and self.attention.form == "published":
            found.append(
                "--loss.pos_weight: the form published is a mean over images that all count alike; leave one out"
            )
        return found

    def idle(self) -> list[str]:
        """Settings of a new run that others leave without effect."""
        found = []
        if self.balance.policy != "fixed" and self.balance.lam not in (self.default_lam, *UNSAID):
            found.append(
                f"--balance.lam {self.balance.lam}: is of the policy fixed, {self.balance.policy} finds its own; leave "
                "one of the two out"
            )
        if self.balance.policy != "fixed" and self.balance.ramp:
            found.append(
                f"--balance.ramp {self.balance.ramp}: is of the policy fixed, {self.balance.policy} finds its own way; "
                "leave one of the two out"
            )
        if self.attention.region == "anatomy" and self.attention.annotated != 1:
            found.append(
                f"--attention.annotated {self.attention.annotated}: no lesions are used with --attention.region "
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
    def classes(self) -> tuple[str, ...]:
        """The findings of the task. InputError: --task names none."""
        return task_findings(self.task, self.labels.kind)

    @property
    def uncertain(self) -> dict[str, str]:
        """What training makes of uncertain cells, by finding, "" for all others. InputError: no policy."""
        text = CHEXPERT if self.labels.uncertain == "chexpert" else self.labels.uncertain
        said = policy(text, "ignore|ones|zeros|smooth|smooth-zeros|drop", "--labels.uncertain")
        if self.labels.uncertain == "chexpert":  # a preset: of findings that are in the task
            said = {n: what for n, what in said.items() if not n or known_as(n, self.classes, "--task")}
        return said

    @property
    def pos_weight(self) -> dict[str, float] | None:
        """Weights of present cells by finding, "" for all others; None: balanced. InputError: neither."""
        if self.loss.pos_weight in ("none", "balanced"):
            return {} if self.loss.pos_weight == "none" else None
        numbers = policy(self.loss.pos_weight, f"{NUMBER}|none|balanced", "--loss.pos_weight")
        if {"none", "balanced"} & set(numbers.values()):
            raise InputError(f"--loss.pos_weight {self.loss.pos_weight}: none and balanced are for all findings alike")
        return {name: float(number) for name, number in numbers.items()}

    @property
    def chosen_by(self) -> str:
        """See ``best``."""
        return str(self.best)

    @property
    def lam(self) -> float:
        """Lambda of the policy fixed."""
        return self.default_lam if self.balance.lam is None else self.balance.lam

    @property
    def default_lam(self) -> float:
        """What it is where nothing is said."""
        if self.attention.form == "published":
            return PUBLISHED_LAMBDA
        return SCRATCH_LAMBDA if self.scratch else LAMBDA

    @property
    def scratch(self) -> bool:
        """Whether the network begins without any weights."""
        return self.pretrained.lower() == "false"

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

    @property
    def lent_devices(self) -> float:
        """Of the devices that are lent: as set, else on where they are named and attention has a gradient."""
        if self.swap.devices is not None:
            return self.swap.devices
        named = self.attention.avoid and not self.plain and self.attention.form != "published"
        return LENT if named else 0.0


def arguments(text: str) -> dict[str, Any]:
    """``img_size=518, qkv_bias=false``: names and numbers, true, false or words. InputError: not of that kind."""
    found: dict[str, Any] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, sign, value = (piece.strip() for piece in part.partition("="))
        if not sign or not name.isidentifier() or not value:
            raise InputError(f"--backbone_args {text}: expected NAME=VALUE, separated by commas, such as img_size=518")
        word = {"true": True, "false": False, "none": None}
        number = re.fullmatch(r"[+-]?(\d+)(\.\d*)?(e[+-]?\d+)?", value)
        plain: Any = value if number is None else float(value) if number[2] or number[3] else int(value)
        found[name] = word.get(value.lower(), plain)
    return found
