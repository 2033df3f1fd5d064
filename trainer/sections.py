"""The sections of the settings of `trainer.config`. No torch, no kornia."""

import re
from dataclasses import dataclass
from typing import Literal

Form = Literal["published", "coverage", "energy", "lift"]
Policy = Literal["fixed", "published", "ratio", "balanced", "constrained"]


def wrong_point(how: str) -> str:
    """What is wrong with a way of choosing thresholds (`trainer.multilabel.choose`); nothing, if nothing is."""
    if re.fullmatch(r"youden|f1|(sensitivity|specificity|ppv)=(0?\.\d+|1|1\.0)", how):
        return ""
    return (
        f"{how}: expected youden, f1, sensitivity=S, specificity=S or ppv=S with S from 0 to 1, such as sensitivity=0.9"
    )


@dataclass
class AttentionConfig:
    """What the attention loss asks of the CAM."""

    form: Form = "energy"
    """energy: the CAM's share in the region; lift: that, area-corrected; coverage: a soft count of its hot pixels;
    published: the hard one, gradient zero.
    """
    region: Literal["anatomy", "annotation", "both"] = "anatomy"
    """anatomy: where the finding is expected; annotation: an image's own lesions (boxes or masks), where it has some;
    both: these, else where it is expected.
    """
    annotated: float = 1.0
    """Share of the images with lesions whose lesions are used, for annotation and both: 0.01 tells what 1% annotated
    would give.
    """
    avoid: str = ""
    """Names of boxes or masks in the samples, with commas, such as devices, where no finding is expected: energy there
    is paid for. Lesions stay regions.
    """
    threshold: float = 0.5
    """CAM values above it are hot, in [0, 1]: for the forms published and coverage, and for the coverage that is
    reported.
    """
    layer: str = ""
    """Module whose output gives the CAM, such as stages.3; several, with commas: see fuse; input: the input's gradient;
    empty: the last feature map.
    """
    map: Literal["gradcam", "layercam"] = "gradcam"
    """gradcam: a channel's mean gradient weighs it; layercam: the gradient at every place, for earlier, finer layers.
    """
    fuse: Literal["mean", "product"] = "mean"
    """Of several layers: the mean of their normalised maps, or their product."""
    stride: Literal[0, 8, 16] = 0
    """Pixels of the input a position of the last feature map, for backbones that can; 0: their own, mostly 32."""
    mode: Literal["train", "eval"] = "train"
    """train: the CAM of the training forward, which costs nothing; eval: of a second forward in eval mode, as
    published.
    """


@dataclass
class LabelsConfig:
    """What a label is."""

    kind: Literal["one", "any"] = "one"
    """one: one finding an image, cross-entropy over classes; any: any number of them, some unknown, binary
    cross-entropy over the cells that are known.
    """
    uncertain: str = "ignore"
    """What training makes of uncertain cells: ignore, ones, zeros, smooth (a target from 0.55 to 0.85, drawn anew each
    epoch), smooth-zeros (0 to 0.3), drop (the image), for all or by finding ('Edema: ones, zeros'); chexpert: ones for
    Edema and Atelectasis, zeros for others. They are unknown in every figure.
    """
    unmentioned: Literal["negative", "ignore"] = "negative"
    """What a finding is of which the source says nothing, in sets that do not list all that is absent (CheXpert)."""
    operating_point: str = "youden"
    """How the threshold of each finding is chosen on val: youden, f1, sensitivity=0.9, specificity=0.9 or
    ppv=0.8. Of one finding an image with two classes, that of the second.
    """


@dataclass
class LossConfig:
    """The classification loss."""

    kind: Literal["bce", "focal", "asymmetric"] = "bce"
    """bce: (binary) cross-entropy; focal: less of what is easy; asymmetric: still less of what is easily absent."""
    mean: Literal["cells", "findings"] = "cells"
    """cells: the mean over all known cells; findings: over those of each finding, then over findings."""
    pos_weight: str = "none"
    """Weight of present cells (with labels.kind one: of classes): none, balanced (absent over present), a number, or by
    finding ('Hernia: 20').
    """


@dataclass
class BalanceConfig:
    """Lambda, the weight of cross-entropy; attention gets 1 - lambda."""

    policy: Policy | None = None
    """fixed: lam; published: max(0.2, 1 - 0.023 epoch); ratio: A / (CE + A); balanced: equal gradients at the CAM's
    layer; constrained: see epsilon; empty: fixed.
    """
    lam: float | None = None
    """Lambda of the policy fixed, in [0, 1], throughout (but see ramp); 1 is plain cross-entropy and pays nothing for
    attention; empty: 0.2, of a network from scratch falling to 0.4, and with the form published 0.5.
    """
    ramp: float | None = None
    """Share of the run in which lambda falls from 1 to lam (policy fixed), so that what a finding looks like is learnt
    before where it is; empty: 0.5 of a network from scratch where lam is empty, too, else 0.
    """
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
    layer_decay: float = 1.0
    """The learning rate of each layer below the head is so many times that of the one above it, such as 0.75."""
    frozen: int = 0
    """Epochs in which the head alone is trained, before the rest; for cosine."""
    ema: float = 0.0
    """Decay of a running mean of the weights, such as 0.999, which is then what is measured and kept (the last step's
    own stand beside it); 0: none.
    """


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
    lesions: bool = False
    """Whether all but the lesions of an annotated image comes from a healthy one whose lungs lie alike, too: against a
    shortcut within the lungs whose place is not known. On boxes of radiologists it costs AUC (bench/LOG.md).
    """
    devices: float | None = None
    """Share of the images without a finding that get the devices of another image of the batch: those that
    attention.avoid names, where they are; empty: 0.5 where it names some and attention is trained, else 0.
    """


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
