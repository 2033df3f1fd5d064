"""Who goes to train, val and test: never one patient into two of them.

Legend: N images in the order of their metadata; ``label`` int64 [N], class of the task or -1; ``patient`` [N] names;
``part`` int8 [N]: 0 train, 1 val, 2 test, -1 left out. A split is the rows of train, of val and of test, in order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shards.errors import InputError, listed
from shards.sample import EFFUSION, NO_FINDING, PNEUMOTHORAX, SPLITS

SHARES = (0.6, 0.2, 0.2)  # of train, val and test, as published
OFFICIAL_VAL = 0.125  # of the official train_val list, which is 70/10/20 (Wang et al., CVPR 2017, section 4.2)

# Wu, Japkowicz, Gilbert, Corizzo (DMKD 2026): sizes that rounding does not give, and images that change places so that
# no patient is in two parts.
PUBLISHED_SIZES = {"Cardiomegaly": (657, 218, 218)}
PUBLISHED_SWAPS = {
    PNEUMOTHORAX: (("00017801_004.png", "00017942_002.png"), ("00024749_000.png", "00025082_007.png")),
    EFFUSION: (("00022233_000.png", "00022245_002.png"),),
}


@dataclass
class Cases:
    """What a split is made from.

    names: image names [N], in the metadata's order; findings: set of findings of each image [N]; patient: [N];
    here: bool [N], whether the image is at hand. Images that are not keep their published place and are never drawn.
    """

    names: list[str]
    findings: list[tuple[str, ...]]
    patient: np.ndarray
    here: np.ndarray

    def labels(self, classes: Sequence[str]) -> np.ndarray:
        """Class k where classes[k] is an image's one finding, else -1: int64 [N]."""
        number: dict[tuple[str, ...], int] = {(name,): k for k, name in enumerate(classes)}
        return np.array([number.get(found, -1) for found in self.findings], np.int64)


def published(cases: Cases, classes: Sequence[str], seed: int, *, balanced: bool = True) -> list[np.ndarray]:
    """The published split, as far as it can be repeated: its positives are the published ones, No Finding is drawn by
    ``seed``.

    The rarest finding keeps its published parts; the others keep theirs but for patients that are in another part
    already, and with ``balanced`` as many are drawn in each part as the rarest has. No Finding comes from patients with
    none of the task's findings; where they are too few, they are fewer than the positives. Images that were swapped by
    hand have swapped their places in the order, too.
    """
    label, part = cases.labels(classes), np.full(len(cases.names), -1, np.int8)
    patients = _PatientParts(cases.patient)
    negative = classes.index(NO_FINDING) if NO_FINDING in classes else -1
    rarest_first = sorted((k for k in range(len(classes)) if k != negative), key=lambda k: int((label == k).sum()))
    most = np.full(3, len(label))  # how many of each later class a part takes
    for turn, k in enumerate(rarest_first):
        members = []  # of each part
        for p, rows in enumerate(_published_parts(cases, classes[k], np.flatnonzero(label == k))):
            rows = rows[patients.may_be_in(rows, p)]
            members.append(_draw(rows[cases.here[rows]], most[p], [seed, k, p]) if turn else rows)
        for p, rows in enumerate(members):
            part[rows] = p
            patients.settle(rows, p)
        if turn == 0 and balanced:
            most = np.array([int(cases.here[rows].sum()) for rows in members])
    if negative >= 0:
        positives = set(classes) - {NO_FINDING}
        ill = {cases.patient[i] for i, found in enumerate(cases.findings) if positives.intersection(found)}
        healthy = [i for i in np.flatnonzero(label == negative) if cases.here[i] and cases.patient[i] not in ill]
        _deal(part, patients, np.array(healthy, np.int64), [seed, negative], SHARES, most if balanced else None)
    part[~cases.here] = -1
    slot = np.arange(len(part))
    for one, other in (swap for name in classes for swap in PUBLISHED_SWAPS.get(name, ())):
        i, j = (cases.names.index(name) if name in cases.names else -1 for name in (one, other))
        if min(i, j) >= 0 and part[i] != part[j]:
            slot[[i, j]] = slot[[j, i]]
    return _ordered(part, slot)


def _ordered(part: np.ndarray, slot: np.ndarray | None = None) -> list[np.ndarray]:
    rows = [np.flatnonzero(part == p) for p in range(3)]
    return rows if slot is None else [r[np.argsort(slot[r], kind="stable")] for r in rows]


def _published_parts(cases: Cases, finding: str, rows: np.ndarray) -> list[np.ndarray]:
    """The published parts of one finding: file order, 60/20/20, swaps by hand, and nobody in two of them."""
    sizes = PUBLISHED_SIZES.get(finding)
    if sizes is None or sum(sizes) != len(rows):
        val, test = (round(share * len(rows)) for share in SHARES[1:])
        sizes = len(rows) - val - test, val, test
    of_name = {cases.names[i]: int(i) for i in rows}
    order = rows.copy()
    for one, other in PUBLISHED_SWAPS.get(finding, ()):
        if one in of_name and other in of_name:
            i, j = (int(np.flatnonzero(rows == of_name[name])[0]) for name in (one, other))
            order[[i, j]] = order[[j, i]]
    parts = np.split(order, np.cumsum(sizes)[:2])
    # Findings without swaps: of a patient who straddles a border, the images after it are left out.
    seen: set[str] = set()
    kept = []
    for rows in parts:
        kept.append(rows[[cases.patient[i] not in seen for i in rows]] if len(rows) else rows)
        seen.update(cases.patient[rows].tolist())
    return kept


def official(
    cases: Cases, classes: Sequence[str], seed: int, test_names: set[str], *, balanced: bool = True
) -> list[np.ndarray]:
    """The archive's own test list; val is one eighth of the patients of the others, drawn by ``seed``."""
    label = np.where(cases.here, cases.labels(classes), -1)
    test = np.array([name in test_names for name in cases.names])
    part = by_patient(np.where(test, -1, label), cases.patient, seed, (1 - OFFICIAL_VAL, OFFICIAL_VAL, 0.0))
    part[test & (label >= 0)] = 2
    return _ordered(_balance(part, label, classes, seed) if balanced else part)


def at_random(
    cases: Cases, classes: Sequence[str], seed: int, shares: Sequence[float] = SHARES, *, balanced: bool = True
) -> list[np.ndarray]:
    """Patients dealt to the parts by ``seed``, so that every class has about ``shares`` of its images in each part."""
    label = np.where(cases.here, cases.labels(classes), -1)
    part = by_patient(label, cases.patient, seed, shares)
    return _ordered(_balance(part, label, classes, seed) if balanced else part)


def by_patient(label: np.ndarray, patient: np.ndarray, seed: int, shares: Sequence[float]) -> np.ndarray:
    """Deal whole patients, the rarest class first: part int8 [N], -1 where the label is -1."""
    part, patients = np.full(len(label), -1, np.int8), _PatientParts(patient)
    counts = np.bincount(label[label >= 0], minlength=1)
    for k in sorted(np.flatnonzero(counts).tolist(), key=lambda k: int(counts[k])):
        rows = np.flatnonzero(label == k)
        _deal(part, patients, rows, [seed, k], shares)
    return part


class _PatientParts:
    """The part of each patient who has one."""

    def __init__(self, patient: np.ndarray) -> None:
        self.patient = patient
        self.part: dict[str, int] = {}

    def settle(self, rows: np.ndarray, part: int) -> None:
        for name in self.patient[rows]:
            self.part[name] = part

    def may_be_in(self, rows: np.ndarray, part: int) -> np.ndarray:
        """Whether each row's patient may be in ``part``: bool."""
        return np.array([self.part.get(name, part) == part for name in self.patient[rows]], bool)


def by_findings(
    found: Sequence[tuple[str, ...]], patient: np.ndarray, seed: int, shares: Sequence[float]
) -> np.ndarray:
    """The part of each image of several findings: int8 [N], no patient in two, each finding near its share.

    Patients of the rarest finding go first, each where most of that finding is still wanted, then most images
    (Sechidis, Tsoumakas and Vlahavas, "On the stratification of multi-label data", ECML PKDD 2011). Where no image has
    more than one finding, it is `by_patient`.
    """
    if all(len(names) <= 1 for names in found):
        codes = {names: k for k, names in enumerate(dict.fromkeys(found))}
        return by_patient(np.array([codes[names] for names in found], np.int64), patient, seed, shares)
    number = {name: k for k, name in enumerate(dict.fromkeys(name for names in found for name in names))}
    people, own = np.unique(patient, return_inverse=True)
    has = np.zeros((len(people), len(number) + 1))  # images of each patient with each finding; the last: all
    for who, names in zip(own.tolist(), found, strict=True):
        has[who, [*(number[name] for name in names), -1]] += 1
    total = has.sum(0)
    wanted = np.outer(np.asarray(shares, float) / sum(shares), total)
    order = np.random.default_rng([seed, len(people)]).permutation(len(people))
    rarest = np.where(has > 0, total, np.inf).argmin(1)
    part_of = np.zeros(len(people), np.int8)
    for who in order[np.argsort(total[rarest[order]], kind="stable")].tolist():
        left = wanted[:, rarest[who]], wanted[:, -1]
        part_of[who] = max(np.flatnonzero(shares).tolist(), key=lambda part: (left[0][part], left[1][part]))
        wanted[part_of[who]] -= has[who]
    return part_of[own]


def _deal(
    part: np.ndarray,
    patients: _PatientParts,
    rows: np.ndarray,
    seed: Sequence[int],
    shares: Sequence[float],
    need: np.ndarray | None = None,
) -> None:
    """Deal ``rows``, shuffled, to the parts: a patient's first image goes where most is lacking, the others follow it.

    All of them in about ``shares``; or, where ``need`` [3] is given, only so many to each part.
    """
    wanted = np.asarray(shares, float) * len(rows) if need is None else need
    got = np.zeros(3)
    for i in np.random.default_rng(list(seed)).permutation(rows):
        where = patients.part.get(patients.patient[i])
        if where is None:
            where = int(np.argmax(np.where(wanted > 0, 1 - got / np.maximum(wanted, 1e-9), -np.inf)))
        if need is None or got[where] < need[where]:
            part[i], patients.part[patients.patient[i]] = where, where
            got[where] += 1


def _draw(rows: np.ndarray, count: int, seed: Sequence[int]) -> np.ndarray:
    """``count`` of the rows (all, if there are fewer), in order."""
    if len(rows) <= count:
        return rows
    return np.sort(np.random.default_rng(list(seed)).choice(rows, count, replace=False))


def _balance(part: np.ndarray, label: np.ndarray, classes: Sequence[str], seed: int) -> np.ndarray:
    """As many of each class as the rarest has, part by part."""
    balanced = np.full_like(part, -1)
    for p in range(3):
        rows = [np.flatnonzero((part == p) & (label == k)) for k in range(len(classes))]
        count = min(map(len, rows))
        for k, members in enumerate(rows):
            balanced[_draw(members, count, [seed, p, k])] = p
    return balanced


def check(
    parts: Sequence[np.ndarray],
    label: np.ndarray,
    patient: np.ndarray,
    classes: Sequence[str],
    what: str,
    *,
    shares: Sequence[float] = SHARES,
) -> None:
    """InputError for a patient in two parts, or a class missing from a part that is to have a share."""
    part_of: dict[str, int] = {}
    torn = {str(name) for p, rows in enumerate(parts) for name in patient[rows] if part_of.setdefault(name, p) != p}
    if torn:
        raise InputError(
            f"{what}: {len(torn)} patients are in two splits: {listed(sorted(torn))}; split by patient, or correct the "
            "table"
        )
    for split, rows, share in zip(SPLITS, parts, shares, strict=True):
        missing = [name for k, name in enumerate(classes) if not (label[rows] == k).any()]
        if missing and share > 0:
            raise InputError(
                f"{what}: the {split} split gets no image whose one finding is {listed(missing)}; give more images of "
                "it, of more patients (each is in one split), another task, or `--split random` with other --ratios"
            )
