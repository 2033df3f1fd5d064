"""What a source says of findings: stored as it is, read as a task needs it."""

import json
from collections import defaultdict

import numpy as np
import pytest

from shards.dataset import Split
from shards.deal import by_findings
from shards.errors import InputError
from shards.index import write_index
from shards.names import known_as, lists, policy, same_as
from shards.pack import pack
from shards.rle import Runs, relative
from shards.sample import SILENT, TASKS, Asked, Labels, Sample, encode, labels_of, parse_meta
from shards.sources.item import Item, Outline, Source
from shards.targets import ABSENT, PRESENT, UNCERTAIN, UNKNOWN, MultiLabel, SingleLabel
from shards.tars import build_index

FIVE = lists()["chexpert5"]


def targets(said: Labels, task, asked: Asked = Asked(), *, training: bool = True):  # noqa: B008
    names = tuple(dict.fromkeys((*(name for names in said for name in names), *sorted(asked.names))))
    return task.reader(names, asked, training, "shards")(said)


UNLISTED_UNKNOWN = Asked(frozenset((*FIVE, "No Finding", "Support Devices", "Fracture")), absent=False)


@pytest.mark.parametrize(
    ("said", "unmentioned", "expected"),
    [
        (Labels(("Edema",), ("Cardiomegaly",), ("Atelectasis",)), "negative", (-2, 0, 0, 1, 0)),
        (Labels(("Edema",), ("Cardiomegaly",), ("Atelectasis",)), "ignore", (-2, 0, -1, 1, -1)),
        (Labels(("No Finding",)), "ignore", (0, 0, 0, 0, 0)),
        (Labels(("No Finding",), (), ("Edema",)), "ignore", (0, 0, 0, -2, 0)),
        (Labels(("Fracture",)), "ignore", None),  # nothing is known of the five
        (Labels(("Fracture",)), "negative", (0, 0, 0, 0, 0)),
    ],
)
def test_a_cell_of_chexpert(said, unmentioned, expected):
    assert targets(said, MultiLabel(FIVE, unmentioned), UNLISTED_UNKNOWN) == expected


def test_no_finding_says_nothing_of_devices():
    task = MultiLabel(("Edema", "Support Devices"), "ignore")
    assert targets(Labels(("No Finding",)), task, UNLISTED_UNKNOWN) == (ABSENT, UNKNOWN)
    assert targets(Labels(("No Finding", "Support Devices")), task, UNLISTED_UNKNOWN) == (ABSENT, PRESENT)


def test_who_was_not_asked_for_is_unknown_whatever_is_decided():
    task = MultiLabel(("Edema", "Hernia"), "negative")
    assert targets(Labels(("Edema",)), task, UNLISTED_UNKNOWN) == (PRESENT, UNKNOWN)
    assert targets(Labels(("Edema",)), task, Asked(frozenset(("Edema", "Hernia")))) == (PRESENT, ABSENT)


def test_dropped_images_are_measured_all_the_same():
    task = MultiLabel(("Edema", "Mass"), drop=("Edema",))
    said = Labels(("Mass",), (), ("Edema",))
    assert targets(said, task, training=True) is None
    assert targets(said, task, training=False) == (UNCERTAIN, PRESENT)


def test_only_uncertain_images_are_trained_on_not_measured():
    said, task = Labels((), (), ("Edema",)), MultiLabel(("Edema",), made=("Edema",))
    assert targets(said, task) == (UNCERTAIN,)
    assert targets(said, task, training=False) is None
    assert targets(said, MultiLabel(("Edema",))) is None, "nothing to learn from it"


def test_names_of_one_finding_are_one():
    said = Labels(("Effusion", "Pleural_Thickening"))
    task = MultiLabel(("Pleural Effusion", "pleural thickening"))
    assert targets(said, task) == (PRESENT, PRESENT)
    assert targets(Labels(("Pleural Effusion",)), SingleLabel(("No Finding", "Effusion"))) == (0, 1)
    assert same_as("Airspace Opacity") == same_as("Lung_Opacity") != same_as("Consolidation")
    with pytest.raises(InputError, match="'Effusion' and 'Pleural Effusion' are one finding under two names"):
        known_as("Effusion", ("Effusion", "Pleural Effusion"), "shards")


def test_one_finding_an_image_wants_to_be_sure():
    asked, task = Asked(frozenset(("No Finding", "Effusion", "Mass"))), SingleLabel(("No Finding", "Effusion"))
    assert targets(Labels(("Effusion",)), task, asked) == (0, 1)
    assert targets(Labels(("Effusion",), (), ("Mass",)), task, asked) is None
    assert targets(Labels((), (), ("Mass",)), task, asked) is None
    among = SingleLabel(("No Finding", "Effusion"), among=("Effusion",))
    assert targets(Labels(("Effusion",), (), ("Mass",)), among, asked) == (0, 1)
    assert targets(Labels((), (), ("Effusion",)), among, asked) is None


def test_healthy_is_who_shows_nothing_where_all_that_is_there_is_listed():
    task = SingleLabel(("No Finding", "Effusion"))
    assert targets(Labels(), task, Asked(frozenset(("Effusion",)))) == (1, 0)
    assert targets(Labels(), task, Asked(frozenset(("Effusion",)), absent=False)) is None


def test_lists_have_names_of_findings_that_are_different():
    for name, findings in lists().items():
        assert len({same_as(f) for f in findings}) == len(findings) > 0, name
    assert set(TASKS) < set(lists())
    assert len(lists()["nih14"]) == 14


def test_a_policy_for_all_or_by_finding():
    allowed = "ignore|ones|zeros"
    assert policy("ones", allowed, "--x") == {"": "ones"}
    assert policy("Edema: ones, Lung Opacity: ignore, zeros", allowed, "--x") == {
        "Edema": "ones",
        "Lung Opacity": "ignore",
        "": "zeros",
    }
    for text, words in (("twos", "'twos' is no value"), ("Edema: ones, Edema: zeros", "Edema is given twice")):
        with pytest.raises(InputError, match=words):
            policy(text, allowed, "--x")


class Drawn(Source):
    """Images of nothing, with labels."""

    def load(self, item: Item) -> Sample:
        return Sample(item.key, np.zeros((8, 8), np.uint8), item.findings, None, [], item.absent, item.uncertain)

    def version(self, item: Item) -> str:
        return ""


SAID = [
    Labels(("Effusion", "Mass"), ("Edema",)),
    Labels((), ("Effusion", "Mass"), ("Edema",)),
    Labels(("No Finding",)),
    Labels(),
]


@pytest.fixture
def several(tmp_path):
    """Twelve images: SAID in turn."""
    items = [Item("train", f"{i:02}", said.present, "", (), (), (), said.absent, said.uncertain)
             for i, said in enumerate(SAID * 3)]  # fmt: skip
    source = Drawn(items, classes=("Effusion",), asked=("No Finding", "Effusion", "Mass", "Edema"), unlisted="unknown")
    pack(source, tmp_path / "shards", dataset="several", per_shard=5, workers=1)
    return tmp_path / "shards"


def test_what_the_source_said_comes_back(several):
    split = Split(several, "train")
    assert split.said() == SAID * 3
    assert [labels_of(split.meta(i)) for i in range(12)] == SAID * 3
    index = json.loads((several / "index.json").read_text())
    assert (index["version"], index["unlisted"]) == (3, "unknown")
    assert index["asked"] == ["No Finding", "Effusion", "Mass", "Edema"]
    assert len(index["labels"]) == 4
    split = Split(several, "train", MultiLabel(("Effusion", "Edema"), "ignore"))
    assert split.targets().tolist() == [[1, 0], [0, -2], [0, 0]] * 3
    assert split.left_out == 3
    assert split.counts() == {"Effusion": 3, "Edema": 0}
    assert split.tally(UNCERTAIN).tolist() == [0, 3]
    assert Split(several, "train", MultiLabel(("Effusion",))).targets()[:, 0].tolist() == [1, 0, 0, 0] * 3
    build_index(several, dataset="several", asked=index["asked"], unlisted="unknown")
    assert json.loads((several / "index.json").read_text())["labels"] == index["labels"]


def test_shards_of_before_read_as_if_all_that_is_not_listed_were_absent(several):
    path = several / "index.json"
    index = json.loads(path.read_text())
    index |= {"version": 2, "labels": [labels.get("findings", []) for labels in index["labels"]]}
    del index["asked"], index["unlisted"]
    path.write_text(json.dumps(index))
    split = Split(several, "train", MultiLabel(("Effusion", "Edema"), "ignore"))
    assert split.targets().tolist() == [[1, 0], [0, 0]] * 3
    assert split.left_out == 6, "an empty row of before says nothing, as before"


def test_a_finding_of_which_nothing_is_known_is_not_trained(several):
    with pytest.raises(InputError, match="has no images with finding 'Hernia'"):
        Split(several, "train", MultiLabel(("Effusion", "Hernia")))
    index = json.loads((several / "index.json").read_text())
    index["asked"].append("Support Devices")
    (several / "index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="nothing known of Support Devices: every image leaves it open"):
        Split(several, "train", MultiLabel(("Mass", "Support Devices"), "ignore"))
    assert Split(several, "train", MultiLabel(("Mass", "Support Devices"))).tally(ABSENT)[1] == 12


def test_many_different_rows_of_labels_have_room(tmp_path):
    rng = np.random.default_rng(0)
    names = [f"finding {k}" for k in range(20)]
    said = [
        Labels(tuple(n for n, there in zip(names, row, strict=True) if there)) for row in rng.random((70000, 20)) < 0.5
    ]
    parts = {"train": [_indexed(said)]}
    shards = {"train": [{"name": "train/000000.tar", "bytes": 0, "sha256": "0" * 64, "samples": len(said)}]}
    write_index(tmp_path, "many", names, defaultdict(list, shards), parts, {})
    (tmp_path / "train").mkdir()
    (tmp_path / "train/000000.tar").touch()
    split = Split(tmp_path, "train", MultiLabel(names))
    assert [s.present for s in split.said()] == [s.present for s in said]
    assert split.targets().sum() == sum(len(s.present) for s in said)


def _indexed(said):
    from shards.index import ID, ROW, Indexed

    return Indexed(np.zeros(len(said), ROW), said, np.zeros(len(said), ID), [], [])


@pytest.mark.parametrize(
    ("meta", "words"),
    [
        ({"findings": ["Mass"], "absent": ["Mass"]}, "Mass is said to be two of present, absent and uncertain"),
        ({"uncertain": "Mass"}, "uncertain must be a list of names"),
        ({"absent": [1]}, "absent must be a list of names"),
        ({"lesion_masks": [{"finding": "Mass", "size": [2, 2], "counts": [1, 2]}]}, "the runs cover 3 pixels"),
        ({"lesion_masks": [{"finding": "Mass", "size": [2, 2], "counts": "~"}]}, "no compressed run lengths"),
        ({"lesion_masks": [{"finding": "Mass", "size": [2], "counts": "4"}]}, "its JSON is not a sample's"),
        ({"lesion_masks": [{"finding": "Mass", "size": [2, 10**9], "counts": "4"}]}, "expected height and width"),
    ],
)
def test_json_that_contradicts_itself_is_refused(meta, words):
    with pytest.raises(InputError, match=words):
        parse_meta(json.dumps(meta).encode(), "a.json")


# -- lesion masks -------------------------------------------------------------------------------------------------


def test_runs_are_cocos():
    mask = np.zeros((3, 4), bool)
    mask[1:, 1] = mask[:2, 2] = True
    assert Runs.drawn(mask) == Runs((3, 4), "444") == Runs.of([3, 4], [4, 4, 4])  # as pycocotools 2.0 gives it
    mask = np.zeros((30, 40), bool)
    mask[5:20, 7:30] = True
    assert Runs.drawn(mask).counts == "g6??" + 43 * "0" + "W9"


def test_runs_of_any_mask_come_back():
    rng = np.random.default_rng(0)
    for _ in range(50):
        mask = rng.random(tuple(rng.integers(1, 40, 2))) < rng.choice([0, 0.02, 0.5, 1])
        runs = Runs.drawn(mask)
        assert (runs.mask() == mask).all()
        assert Runs.of(list(runs.size), runs.counts) == runs


def test_siims_runs_are_relative_and_by_column():
    mask = relative("1 2 3 1", (4, 3), "row 2")
    assert np.flatnonzero(mask.T.ravel()).tolist() == [1, 2, 6]
    for text, words in (
        ("1 2 3", "no list of pairs"),
        ("0 13", "its last run ends at pixel 13"),
        ("a b", "no list of pairs"),
    ):
        with pytest.raises(InputError, match=words):
            relative(text, (4, 3), "row 2")


def test_outlines_are_drawn_at_stored_size(tmp_path):
    from PIL import Image

    Image.new("L", (40, 20)).save(tmp_path / "a.png")
    outlines = (
        Outline("Mass", polygons=(((0.25, 0.5), (0.75, 0.5), (0.75, 1.0), (0.25, 1.0)),)),
        Outline("Pneumothorax", runs=("405 3",), size=(20, 40)),
    )
    item = Item("train", "a", ("Mass", "Pneumothorax"), str(tmp_path / "a.png"), outlines=outlines)
    sample = Source([item], size=16).load(item)
    mass, thin = (mask.runs.mask() for mask in sample.lesion_masks)
    assert mass.shape == (16, 16)
    assert mass[8:, 4:12].all()
    assert mass[:7].sum() == 0
    assert thin.any(), "a lesion of a few pixels does not vanish"
    again = parse_meta(encode(sample)["json"], "a")["lesion_masks"]
    assert [(mask.finding, mask.runs) for mask in again] == [(m.finding, m.runs) for m in sample.lesion_masks]


def test_two_names_of_one_finding_in_a_set(several, tmp_path):
    index = json.loads((several / "index.json").read_text())
    index["asked"].append("Pleural Effusion")
    (several / "index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match="'Effusion' and 'Pleural Effusion' are one finding under two names"):
        Split(several, "train", MultiLabel(("Effusion", "Edema")))
    # one finding an image is as it is spelt
    assert Split(several, "train", SingleLabel(("No Finding", "Effusion"), ("Effusion",))).counts()["Effusion"] == 3


# -- what a review found
# ------------------------------------------------------------------------------------------------


def test_rows_of_labels_have_room_in_every_split(tmp_path):
    names = [f"finding {k}" for k in range(20)]
    said = [
        Labels(tuple(name for bit, name in enumerate(names) if number >> bit & 1)) for number in range(1, 2**16 + 500)
    ]
    parts = {"train": [_indexed(said[:60000])], "val": [_indexed(said[60000:])]}
    for name, of in parts.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "000000.tar").touch()
        assert len(of) == 1
    shards = {
        name: [{"name": f"{name}/000000.tar", "bytes": 0, "sha256": "0" * 64, "samples": len(of[0].labels)}]
        for name, of in parts.items()
    }
    write_index(tmp_path, "many", names, defaultdict(list, shards), parts, {})
    for name, of in parts.items():
        assert Split(tmp_path, name).said() == of[0].labels


def test_nobody_is_healthy_of_whom_that_is_denied():
    asked, task = Asked(frozenset(("Effusion",))), SingleLabel(("No Finding", "Effusion"))
    assert targets(Labels((), ("No Finding",)), task, asked) is None
    assert targets(SILENT, task, asked) is None
    assert targets(SILENT, MultiLabel(("Effusion",)), asked) is None


def test_a_sample_without_labels_belongs_to_nothing():
    assert labels_of(parse_meta(b"{}", "x")) == SILENT
    assert labels_of(parse_meta(b'{"findings": []}', "x")) == Labels()
    assert labels_of(parse_meta(b'{"absent": ["Mass"]}', "x")) == Labels((), ("Mass",))


def test_what_a_set_was_not_asked_for_is_unknown_where_it_is_measured(several):
    (several / "train").rename(several / "val")
    for path in several.glob("train*.npy"):
        path.rename(several / path.name.replace("train", "val"))
    index = json.loads((several / "index.json").read_text().replace("train", "val"))
    (several / "index.json").write_text(json.dumps(index))
    split = Split(several, "val", MultiLabel(("Effusion", "Hernia")))
    assert set(split.targets()[:, 1].tolist()) == {ABSENT, UNKNOWN}, "absent only where No Finding says so"


@pytest.mark.parametrize("findings", [100, 14])
def test_dealt_parts_have_their_share_however_many_findings_there_are(findings):
    rng = np.random.default_rng(0)
    shown = rng.random((2000, findings)) < (0.03 if findings == 100 else 0.3)
    found = [tuple(f"f{k}" for k in np.flatnonzero(row)) for row in shown]
    patient = rng.integers(0, 1200, 2000)
    part = by_findings(found, patient, 0, (0.6, 0.2, 0.2))
    assert (part == by_findings(found, patient, 0, (0.6, 0.2, 0.2))).all()
    assert np.bincount(part) / 2000 == pytest.approx([0.6, 0.2, 0.2], abs=0.02)
    for who in np.unique(patient):
        assert len(set(part[patient == who])) == 1
    for k in range(findings):
        count = np.bincount(part[shown[:, k]], minlength=3)
        assert np.abs(count / count.sum() - [0.6, 0.2, 0.2]).max() < (0.17 if findings == 100 else 0.05), k
