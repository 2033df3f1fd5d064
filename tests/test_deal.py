import csv
import gzip
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest

from shards.deal import Cases, at_random, check, official, published
from shards.errors import InputError
from shards.sample import SPLITS, TASKS

GOLDEN = json.loads((Path(__file__).parent / "golden" / "splits.json").read_text())["findings"]


@pytest.fixture(scope="module")
def archive() -> Cases:
    """The whole metadata of NIH ChestX-ray14."""
    path = Path(os.environ.get("CXR_FOCUS_REAL_DATA", "")) / "nih/meta/Data_Entry_2017_v2020.csv.gz"
    if not path.is_file():
        pytest.skip("CXR_FOCUS_REAL_DATA names no folder with nih/meta/Data_Entry_2017_v2020.csv.gz")
    with gzip.open(path, "rt", newline="") as file:
        rows = list(csv.DictReader(file))
    findings = [tuple(row["Finding Labels"].split("|")) for row in rows]
    return Cases(
        [row["Image Index"] for row in rows],
        findings,
        np.array([row["Patient ID"] for row in rows]),
        np.ones(len(rows), bool),
    )


def synthetic(patients=300, seed=0) -> Cases:
    """Patients with 1 to 6 images; two of three are healthy."""
    rng = np.random.default_rng(seed)
    names, findings, patient = [], [], []
    for p in range(patients):
        for i in range(rng.integers(1, 7)):
            names.append(f"{p:08d}_{i:03d}.png")
            found = [("No Finding",), ("Effusion",), ("Pneumothorax",), ("Effusion", "Mass")]
            findings.append(found[rng.choice(4, p=[0.5, 0.25, 0.15, 0.1]) if p % 3 == 0 else 0])
            patient.append(str(p))
    return Cases(names, findings, np.array(patient), np.ones(len(names), bool))


def counts(cases, parts, classes):
    label = cases.labels(classes)
    return [[int((label[rows] == k).sum()) for k in range(len(classes))] for rows in parts]


@pytest.mark.parametrize(("task", "finding"), [("ne", "Effusion"), ("np", "Pneumothorax"), ("nc", "Cardiomegaly")])
@pytest.mark.parametrize("balanced", [True, False])
def test_positives_are_the_published_ones(archive, task, finding, balanced):
    classes = TASKS[task]
    parts, label = published(archive, classes, 0, balanced=balanced), archive.labels(TASKS[task])
    check(parts, label, archive.patient, classes, task)
    for split, rows in zip(SPLITS, parts, strict=True):
        names = [archive.names[i] for i in rows if label[i] == 1]
        assert len(names) == GOLDEN[finding][split]["count"]
        assert hashlib.sha256("\n".join(names).encode()).hexdigest() == GOLDEN[finding][split]["sha256"]
        if balanced:
            assert (label[rows] == 0).sum() == len(names)


def test_three_classes_of_the_archive(archive):
    parts, label = published(archive, TASKS["nep"], 0), archive.labels(TASKS["nep"])
    check(parts, label, archive.patient, TASKS["nep"], "nep")
    assert counts(archive, parts, TASKS["nep"]) == [[1316] * 3, [439] * 3, [439] * 3]
    for split, rows in zip(SPLITS, parts, strict=True):
        names = [archive.names[i] for i in rows if label[i] == 2]
        assert hashlib.sha256("\n".join(names).encode()).hexdigest() == GOLDEN["Pneumothorax"][split]["sha256"]


@pytest.mark.parametrize("task", ["ne", "np", "nc", "nep"])
def test_no_finding_comes_from_patients_without_the_findings_and_from_the_seed(archive, task):
    classes = TASKS[task]
    parts, label = published(archive, classes, 3), archive.labels(classes)
    ill = {archive.patient[i] for i, found in enumerate(archive.findings) if set(found) & set(classes[1:])}
    assert not [i for rows in parts for i in rows if label[i] == 0 and archive.patient[i] in ill]
    again, other = published(archive, classes, 3), published(archive, classes, 4)
    assert all((a == b).all() for a, b in zip(parts, again, strict=True))
    assert any(len(a) != len(b) or (a != b).any() for a, b in zip(parts, other, strict=True))


@pytest.mark.parametrize("balanced", [True, False])
@pytest.mark.parametrize("task", ["ne", "nep", "pair"])
@pytest.mark.parametrize("how", ["published", "random", "official"])
def test_nobody_is_in_two_parts(how, task, balanced):
    cases = synthetic()
    classes = {"pair": ("Effusion", "Pneumothorax")}.get(task) or TASKS[task]
    if how == "official":
        test = {name for name, who in zip(cases.names, cases.patient, strict=True) if int(who) % 5 == 0}
        parts = official(cases, classes, 0, test, balanced=balanced)
        assert {cases.names[i] for i in parts[2]} <= test
        assert not {cases.names[i] for rows in parts[:2] for i in rows} & test
    else:
        split = published if how == "published" else at_random
        parts = split(cases, classes, 0, balanced=balanced)
    label = cases.labels(classes)
    check(parts, label, cases.patient, classes, how)
    assert all(label[i] >= 0 for rows in parts for i in rows)
    if balanced:
        assert all(len(set(row)) == 1 for row in counts(cases, parts, classes))


def test_random_ratios_are_met():
    cases = synthetic(2000)
    parts = at_random(cases, TASKS["nep"], 0, (0.7, 0.1, 0.2), balanced=False)
    table = np.array(counts(cases, parts, TASKS["nep"]))
    assert np.abs(table / table.sum(0) - np.array([0.7, 0.1, 0.2])[:, None]).max() < 0.03
    everything = at_random(cases, TASKS["ne"], 0, (0.8, 0.2, 0.0), balanced=False)
    assert len(everything[2]) == 0
    check(everything, cases.labels(TASKS["ne"]), cases.patient, TASKS["ne"], "x", shares=(0.8, 0.2, 0))


def test_images_that_are_not_at_hand_are_left_out_and_the_others_keep_their_parts():
    whole, cases = synthetic(), synthetic()
    cases.here[::3] = False
    before, after = published(whole, TASKS["ne"], 0), published(cases, TASKS["ne"], 0)
    label = cases.labels(TASKS["ne"])
    for a, b in zip(before, after, strict=True):
        assert cases.here[b].all()
        assert [i for i in a if label[i] == 1 and cases.here[i]] == [i for i in b if label[i] == 1]
        assert (label[b] == 0).sum() == (label[b] == 1).sum()


def test_what_check_refuses():
    label, patient = np.array([0, 1, 0, 1]), np.array(["a", "a", "b", "c"])
    with pytest.raises(InputError, match="1 patients are in two splits: a"):
        check(
            [np.array([0, 3]), np.array([1, 2]), np.array([], int)],
            label,
            patient,
            ("No Finding", "Effusion"),
            "x",
            shares=(0.8, 0.2, 0),
        )
    with pytest.raises(InputError, match="the val split gets no image whose one finding is Effusion"):
        check(
            [np.array([0, 1]), np.array([2]), np.array([], int)],
            label,
            patient,
            ("No Finding", "Effusion"),
            "x",
            shares=(0.8, 0.2, 0),
        )
