"""Figures by a column of the samples, such as whether a drain is seen: what an average hides.

A shortcut shows where the images with a finding are split by it and compared with the same images without the finding:
pneumothorax is found where there is a chest drain, and missed where there is none (Oakden-Rayner et al., CHIL 2020,
"Hidden stratification").
"""

import math
from typing import Any

import numpy as np

from shards.errors import InputError, nearest
from shards.sample import NO_FINDING
from shards.targets import ABSENT, PRESENT
from trainer.metrics import LOCALIZATION, measured, summarize
from trainer.multilabel import RESAMPLES, Sorted
from trainer.outcome import Outcome

MOST = 12  # different values of a column; more are no groups
UNKNOWN = "(empty)"


def values_of(outcome: Outcome, column: str) -> list[str]:
    """What each image has in a column of its sample. InputError: none has it, or too many different ones."""
    split = outcome.split
    metas = [split.meta(p) for p in range(len(split))]
    if not any(column in meta for meta in metas):
        known = [name for name, value in metas[0].items() if isinstance(value, str | int | float)] if metas else []
        raise InputError(
            f"--by {column}: the {split.split} images have no such column; {nearest(column, known)} (shards csv "
            "--keep-column keeps columns of a table)"
        )
    found = [str(meta.get(column, "")).strip() or UNKNOWN for meta in metas]
    if len(set(found)) > MOST:
        raise InputError(f"--by {column}: has {len(set(found))} different values; expected at most {MOST} groups")
    return found


def by_column(outcome: Outcome, column: str) -> dict[str, dict[str, Any]]:
    """For each value of a column and each finding: its images with the finding; AUC of these against all images without
    it, wherever these are, and against those of the same value (each with a 95% interval over patients, or images where
    patients are not known); energy and pointing of their maps at lesions and expected regions.
    """
    values, target = np.array(values_of(outcome, column)), outcome.target.numpy()
    score = outcome.task.probabilities(outcome.logits).numpy()
    image, finding = outcome.pairs.image.numpy(), outcome.pairs.finding.numpy()
    groups, rng = outcome.patients(), np.random.default_rng(0)
    groups = np.arange(len(values)) if groups is None else groups
    drawn = [
        np.bincount(rng.integers(0, groups.max() + 1, groups.max() + 1), minlength=groups.max() + 1)[groups]
        for _ in range(RESAMPLES)
    ]
    content: dict[str, dict[str, Any]] = {}
    for value in sorted(set(values)):
        own = values == value
        of: dict[str, Any] = {}
        for k, name in enumerate(outcome.task.findings):
            present, absent = own & (target[:, k] == PRESENT), target[:, k] == ABSENT
            if name == NO_FINDING or not present.any():
                continue
            entry: dict[str, Any] = {"present": int(present.sum()), "absent": int((absent & own).sum())}
            for figure, others in (("auc", absent), ("auc_within", absent & own)):
                taken = np.flatnonzero(present | others)
                cells = Sorted.of(taken, present[taken], score[taken, k])
                area = cells.auc(np.ones(len(values), int))
                entry[figure] = area
                between = [cells.auc(often) for often in drawn] if not math.isnan(area) else []
                entry[f"{figure}_95"] = list(map(float, np.nanpercentile(between, [2.5, 97.5]))) if between else None
            pairs = own[image] & (finding == k)
            for kind, table in outcome.tables().items():
                if found := summarize(table[pairs & measured(table).numpy()][:, : len(LOCALIZATION)]):
                    entry[kind] = {n: found[n] for n in ("images", "energy", "energy_95", "pointing", "pointing_95")}
            of[name] = entry
        content[value] = {"images": int(own.sum()), "per_finding": of}
    return content
