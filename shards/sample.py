"""THE contract: what a sample is, on disk and in memory.

A sample is one WebDataset record, members that share a key:

    <key>.jpg | .png | .webp   the radiograph, 8 bit, one channel
    <key>.json         {"findings": ["Effusion"], "absent": [], "uncertain": ["Edema"],
                        "boxes": [{"finding": "Effusion", "xyxy": [x0, y0, x1, y1]}],
                        "lesion_masks": [{"finding": "Effusion", "size": [H, W], "counts": "..."}], ...}
    <key>.mask.png     the lungs, 0 or 255, same size as the radiograph (only where they are known)

What a source says of a finding is kept as it is: present (``findings``), absent, uncertain, or nothing. What to make of
that is decided when training. Lesion boxes are pixels of the stored radiograph, ends exclusive; lesion masks are COCO's
run lengths (`shards.rle`) of its size. Other entries of the JSON are kept and ignored.
"""

import json
import math
import re
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from shards.errors import InputError, read_json
from shards.pixels import encode_image
from shards.rle import Runs

NO_FINDING = "No Finding"
EFFUSION = "Effusion"
PNEUMOTHORAX = "Pneumothorax"
SUBCUTANEOUS_EMPHYSEMA = "Subcutaneous Emphysema"
CARDIOMEGALY = "Cardiomegaly"
SUPPORT_DEVICES = "Support Devices"  # no disease: CheXpert and MIMIC-CXR have it beside No Finding
FINDINGS = (NO_FINDING, EFFUSION, PNEUMOTHORAX, SUBCUTANEOUS_EMPHYSEMA)

# The published tasks; class 0 first.
TASKS: dict[str, tuple[str, ...]] = {
    "ne": (NO_FINDING, EFFUSION),
    "np": (NO_FINDING, PNEUMOTHORAX),
    "ns": (NO_FINDING, SUBCUTANEOUS_EMPHYSEMA),
    "nc": (NO_FINDING, CARDIOMEGALY),
    "nep": (NO_FINDING, EFFUSION, PNEUMOTHORAX),
    "neps": (NO_FINDING, EFFUSION, PNEUMOTHORAX, SUBCUTANEOUS_EMPHYSEMA),
}

SPLITS = ("train", "val", "test")
SPLIT_NAMES = (
    {name: name for name in SPLITS}
    | {"training": "train", "testing": "test"}
    | dict.fromkeys(("valid", "validation", "validate", "dev"), "val")
)


class Labels(NamedTuple):
    """What a source says of an image: names of findings. Of one that stands in none of the three it says nothing."""

    present: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    uncertain: tuple[str, ...] = ()


# Of a sample without labels, or an empty one of the version before there were absent ones: it belongs to no task.
SILENT = Labels(uncertain=("",))


class Asked(NamedTuple):
    """What a source was asked for, for all of its images.

    names: findings of which it would say that they are there; absent: whether one of them that it does not list is
    absent (NIH lists what it sees), or unknown (CheXpert leaves the cell empty).
    """

    names: frozenset[str] = frozenset()
    absent: bool = True


@dataclass
class LesionBox:
    """A lesion: its finding and its box in pixels of the stored image, ``x0 y0 x1 y1``, ends exclusive."""

    finding: str
    xyxy: tuple[float, float, float, float]


@dataclass
class LesionMask:
    """A lesion: its finding and its outline, filled, as run lengths of the stored image."""

    finding: str
    runs: Runs


@dataclass
class Sample:
    """One radiograph. ``image`` and ``mask`` are uint8 ``[H, W]``; ``mask`` is 0 or 255, or None where unknown."""

    key: str
    image: np.ndarray
    findings: tuple[str, ...] = ()
    mask: np.ndarray | None = None
    boxes: list[LesionBox] = field(default_factory=list)
    absent: tuple[str, ...] = ()
    uncertain: tuple[str, ...] = ()
    lesion_masks: list[LesionMask] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    remarks: tuple[str, ...] = ()  # what is odd about it, to be counted and told


def check_key(key: str, where: str) -> str:
    """Return ``key``; refuse one that could leave a folder or that WebDataset would cut differently."""
    if not key or key.startswith("/") or ".." in key.split("/") or "\\" in key or "\0" in key:
        raise InputError(f"{where}: the sample key {key!r} is not a plain relative name; rename the file")
    return key


def clean_key(name: str) -> str:
    """A file name as a key: WebDataset ends a key at the first dot, so only letters, digits, ``_`` and ``-`` stay."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name).strip("_") or "image"


def spelling(name: str) -> str:
    """What two spellings of one finding have in common:
    letters, whatever their case, without what stands for a blank.
    """
    return re.sub(r"[\s_-]", "", name).casefold()


def encode(sample: Sample, form: str = "jpg") -> dict[str, Any]:
    """The members of a sample as ``webdataset.TarWriter`` takes them; ``form`` is one of `FORMATS`."""
    record: dict[str, Any] = {"__key__": check_key(sample.key, "packing"), form: encode_image(sample.image, form)}
    meta = sample.extra | {
        "findings": list(sample.findings),
        "absent": list(sample.absent),
        "uncertain": list(sample.uncertain),
        "boxes": [{"finding": box.finding, "xyxy": [float(v) for v in box.xyxy]} for box in sample.boxes],
    }
    if sample.lesion_masks:
        meta["lesion_masks"] = [
            {"finding": mask.finding, "size": list(mask.runs.size), "counts": mask.runs.counts}
            for mask in sample.lesion_masks
        ]
    record["json"] = json.dumps(meta, sort_keys=True).encode()
    if sample.mask is not None:
        record["mask.png"] = encode_image(sample.mask, "png")
    return record


def parse_meta(data: bytes, where: str) -> dict[str, Any]:
    """The JSON member, checked: ``findings``, ``absent``, ``uncertain`` are lists of names, of which none stands in
    two, ``boxes`` a list of LesionBox, ``lesion_masks`` one of LesionMask.
    """
    try:
        meta = read_json(data, where)
        labels = {name: meta.get(name) or [] for name in ("findings", "absent", "uncertain")}
        boxes = []
        for box in meta.get("boxes", []):
            x0, y0, x1, y1 = (float(v) for v in box["xyxy"])
            if not all(map(math.isfinite, (x0, y0, x1, y1))):
                raise ValueError(f"the box {box['xyxy']} of a lesion is none")
            boxes.append(LesionBox(str(box["finding"]), (x0, y0, x1, y1)))
        masks = [
            LesionMask(str(mask["finding"]), Runs.of(mask["size"], mask["counts"]))
            for mask in meta.get("lesion_masks") or []
        ]
        for name, found in labels.items():
            if not isinstance(found, list) or not all(isinstance(f, str) for f in found):
                raise ValueError(f"{name} must be a list of names")
        every = [name for found in labels.values() for name in dict.fromkeys(found)]
        if len(set(every)) < len(every):
            twice = next(name for name in every if every.count(name) > 1)
            raise ValueError(f"{twice} is said to be two of present, absent and uncertain")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(
            f"{where}: its JSON is not a sample's ({error}); see shards/sample.py for the contract"
        ) from error
    silent = "findings" not in meta and not any(labels.values())
    return meta | labels | ({"silent": True} if silent else {}) | {"boxes": boxes, "lesion_masks": masks}


def labels_of(meta: dict[str, Any]) -> Labels:
    """Of the JSON member as `parse_meta` gives it."""
    if meta.get("silent") is True:
        return SILENT
    return Labels(*(tuple(dict.fromkeys(meta[name])) for name in ("findings", "absent", "uncertain")))


def split_of_folder(name: str) -> str:
    """train, val or test for any of the names that people give them; empty for all others."""
    return SPLIT_NAMES.get(name.strip().lower(), "")
