"""Archives by their recipes, on made-up trees with real headers: every cell of every row against what was written by
hand.
"""

import csv
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from accelerate.state import AcceleratorState, GradientState
from jobs import SMALL, content_of
from trees import CHEXPERT, TREES, cells, chexpert, image, mimic, table

from shards.__main__ import main
from shards.dataset import Split
from shards.errors import InputError
from shards.names import lists
from shards.sample import Labels, clean_key
from shards.sources.recipe import names, read_recipe
from shards.sources.said import agreed
from shards.store import open_store
from shards.targets import MultiLabel, SingleLabel
from shards.verify import verify
from trainer import train

DICOM = {"vindr", "rsna", "siim"}
ASKED = {"rsna": 1, "siim": 1, "openi": 4}  # others: more than five


def pack(name: str, root: Path, *flags: str) -> Path:
    out = root.with_name(f"{root.name}_shards")
    main(
        [
            "archive",
            name,
            "--root",
            str(root),
            "--out",
            str(out),
            "--size",
            "64",
            "--format",
            "png",
            "--workers",
            "1",
            *flags,
        ]
    )
    return out


@pytest.fixture(scope="module", params=TREES)
def packed(request, tmp_path_factory):
    """Name, where it was packed to, what every image should say."""
    if request.param in DICOM:
        pytest.importorskip("pydicom", reason="the extra dicom is not installed")
    root = tmp_path_factory.mktemp("archive") / request.param
    wanted = TREES[request.param](root)
    return request.param, pack(request.param, root), wanted


def samples(out: Path) -> dict[str, tuple[str, dict]]:
    found = {}
    for name in open_store(out).index()["splits"]:
        split = Split(out, name)
        for p in range(len(split)):
            found[split.key(p)] = (name, split.meta(p))
    return found


def test_every_image_says_what_its_table_says(packed):
    name, out, wanted = packed
    found, index = samples(out), open_store(out).index()
    assert set(found) == {clean_key(str(Path(file).with_suffix(""))) for file in wanted}
    assert len(index["asked"]) == 1 + ASKED[name] if name in ASKED else len(index["asked"]) > 4
    for file, (split, present, absent, uncertain, boxes) in wanted.items():
        where, meta = found[clean_key(str(Path(file).with_suffix("")))]
        assert where == split or (not split and where in ("train", "val", "test")), file
        assert set(meta["findings"]) == present, file
        everything_else = set(index["asked"]) - present - {"No Finding"}
        assert set(meta["absent"]) - {"No Finding"} == (everything_else if absent == {"*"} else absent), file
        assert set(meta["uncertain"]) == uncertain, file
        assert len(meta["boxes"]) == boxes, file
        assert {box.finding for box in meta["boxes"]} <= present
        assert meta["archive"] == name


def test_it_verifies(packed):
    _, out, _ = packed
    assert verify(out, 1)[1] == []


def test_an_epoch_is_trained_on_it(packed, segmenter, tmp_path):
    name, out, _ = packed
    index = open_store(out).index()
    counts = {n: [entry["findings"][n] for entry in index["splits"].values()] for n in index["findings"]}
    task = [n for n in index["asked"] if n != "No Finding" and counts.get(n, [0])[0] >= 2][:6]
    flags = [
        "--shards",
        str(out),
        "--out",
        str(tmp_path / "run"),
        "--lungs.weights",
        str(segmenter),
        *SMALL,
        "--epochs",
        "1",
    ]
    train.main(
        [*flags, "--batch", "4", "--labels.kind", "any", "--task", ",".join(task), "--labels.uncertain", "chexpert"]
    )
    report = content_of(tmp_path / "run")
    assert set(report["val"]["per_finding"]) == set(task), name
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def test_no_recipe_is_without_a_tree():
    assert set(names()) == {*TREES, "mimic-negbio"}
    for name in names():
        recipe = read_recipe(name)
        assert recipe.known_from, name
    for name, task in (
        ("chexpert", "chexpert5"),
        ("chexpert", "chexpert14"),
        ("mimic", "mimic"),
        ("nih14", "nih14"),
        ("vinbigdata", "vindr"),
    ):
        assert set(lists()[task]) <= set(read_recipe(name).among), (name, task)


# -- what each of them has that others have not ------------------------------------------------------------------


def test_chexpert_lies_where_it_lies_and_says_what_it_leaves_out(tmp_path, capsys):
    chexpert(tmp_path / "any name")
    out = pack("chexpert", tmp_path / "any name")
    said = capsys.readouterr().out
    assert "left out 4: no frontal view (lateral)" in said
    assert "left out 1: No Finding and something else, or a thing and its contrary" in said
    index = open_store(out).index()
    assert (index["unlisted"], index["asked"][0]) == ("unknown", "No Finding")
    found = samples(out)
    assert found["train_patient00000_study1_view1_frontal"][1]["age"] == 60
    assert found["train_patient00000_study1_view1_frontal"][1]["patient"] == "patient00000"
    assert found["train_patient00000_study1_view1_frontal"][1]["study"] == "patient00000/study1"
    split = Split(out, "train", MultiLabel(lists()["chexpert5"], "ignore"))
    assert split.targets().shape == (18, 5), "of other rows no cell is known: Fracture, nothing, uncertain"
    shutil.rmtree(out)
    assert len(samples(pack("chexpert", tmp_path / "any name", "--views", "all", "--task", "chexpert5"))) == 51
    index = open_store(out).index()
    assert sorted(index["asked"]) == sorted(["No Finding", *lists()["chexpert5"]])


def test_mimics_labels_are_of_studies(tmp_path, capsys):
    mimic(tmp_path / "mimic")
    pack("mimic", tmp_path / "mimic")
    said = capsys.readouterr().out
    assert "left out 18: no frontal view (LATERAL)" in said
    assert "left out 9: of an unknown view" in said
    assert "1 rows of mimic-cxr-2.*-chexpert.csv are of no image of mimic-cxr-2.*-metadata.csv" in said
    (tmp_path / "mimic/mimic-cxr-2.0.0-chexpert.csv.gz").rename(tmp_path / "mimic/mimic-cxr-2.1.0-negbio.csv.gz")
    shutil.rmtree(tmp_path / "mimic_shards")
    pack("mimic-negbio", tmp_path / "mimic")
    with pytest.raises(InputError, match=r"has no mimic-cxr-2.*chexpert.csv, which MIMIC"):
        pack("mimic", tmp_path / "mimic", "--out", str(tmp_path / "x"))


@pytest.mark.parametrize("agree", ["any", "majority", "all"])
def test_readers_agree_as_wanted(tmp_path, agree):
    pytest.importorskip("pydicom", reason="the extra dicom is not installed")
    TREES["vindr"](tmp_path / "vindr")
    found = samples(pack("vindr", tmp_path / "vindr", "--agree", agree))
    first, nodule, healthy, two = (set(found[f"train_{i:032x}"][1]["findings"]) for i in range(4))
    assert healthy == {"No Finding"}
    assert first == ({"Cardiomegaly", "Pleural effusion"} if agree == "any" else {"Cardiomegaly"})
    assert nodule == {"any": {"Nodule/Mass"}, "majority": {"No Finding"}, "all": set()}[agree]
    assert two == (set() if agree == "all" else {"Pneumonia", "Lung Opacity"})
    task = SingleLabel(("No Finding", "Cardiomegaly"), ("Cardiomegaly",))
    out = tmp_path / "vindr_shards"
    healthy = [Split(out, n, task).counts()["No Finding"] for n in ("train",)]
    called = sum(meta["findings"] == ["No Finding"] for n, meta in found.values() if n == "train")
    assert healthy == [called], "whom the readers do not agree on is not healthy"


def test_uncertain_votes_count():
    def read(*votes: str) -> Labels:
        labels = {"1": Labels(("Edema",)), "0": Labels((), ("Edema",)), "?": Labels((), (), ("Edema",))}
        return agreed([labels[vote] for vote in votes], "majority", False)

    assert read("1", "1", "0") == Labels(("Edema",), ("No Finding",))
    assert read("?", "?", "?") == read("1", "?", "0") == Labels((), ("No Finding",), ("Edema",))
    assert read("1", "0", "0") == read("?", "0", "0") == Labels((), ("Edema", "No Finding"))


def test_masks_are_kept(tmp_path):
    pytest.importorskip("pydicom", reason="the extra dicom is not installed")
    TREES["siim"](tmp_path / "siim")
    meta = samples(pack("siim", tmp_path / "siim"))["dicom-images-train_1_2_3_1_3_3_1_2_276_3_517875"][1]
    (mask,) = meta["lesion_masks"]
    drawn = mask.runs.mask()
    assert mask.finding == "Pneumothorax"
    assert drawn.shape == (64, 64)
    columns = np.flatnonzero(drawn.any(0))
    assert columns.min() == 130 * 64 // 1024, "run lengths go down the columns"
    assert set(columns) == {8, 32}, "both lines of the image"
    TREES["chestxdet"](tmp_path / "x")
    meta = samples(pack("chestxdet", tmp_path / "x"))["train_data_30000"][1]
    (mask,) = meta["lesion_masks"]
    assert mask.runs.mask()[9:40, 9:40].all()
    assert mask.runs.mask().sum() < 34 * 34


def test_ages_are_years(packed):
    name, out, _ = packed
    ages = {meta.get("age") for _, meta in samples(out).values()} - {None}
    assert all(isinstance(age, float | int) and 0 < age < 120 for age in ages)
    assert ages or name not in ("chexpert", "padchest", "nih14")


def test_overlap_is_told(tmp_path, capsys):
    TREES["nih14"](tmp_path / "nih")
    pack("nih14", tmp_path / "nih")
    said = capsys.readouterr().out
    assert (
        "images of NIH ChestX-ray14, all labels are also in RSNA Pneumonia, SIIM-ACR Pneumothorax, ChestX-Det"
    ) in said
    assert "12.5% of the patients of train are val, which the archive has not" in said


def test_names_in_another_normal_form_are_found(tmp_path):
    root = tmp_path / "own"
    names_ = ["Jos\u00e9", "Zo\u00eb", "A&b 'c'"]
    for i, name in enumerate(names_ * 4):
        image(root / f"{name}_{i}.png".replace("\u00e9", "e\u0301"), i)
    table(
        root / "t.csv",
        ["file", "labels"],
        [[f"{name}_{i}.jpg", ("a", "b;a", "normal")[i % 3]] for i, name in enumerate(names_ * 4)],
    )
    (tmp_path / "own.yaml").write_text(
        'title: Our own\nknown_from: us\ntables: [{files: t.csv}]\nimage: "{file}"\nunlisted: absent\n'
        "findings: {names: {column: labels, separator: ';', healthy: [normal]}}\n"
    )
    found = samples(pack(str(tmp_path / "own.yaml"), root))
    assert (
        sorted(tuple(sorted(meta["findings"])) for _, meta in found.values())
        == [("No Finding",)] * 4 + [("a",)] * 4 + [("a", "b")] * 4
    )


# -- bad input ------------------------------------------------------------------------------------------------------


def changed(root: Path, file: str, row: int, **cells_: str) -> None:
    """Cells of a table, changed."""
    with (root / file).open(newline="") as source:
        rows = list(csv.DictReader(source))
    rows[row] |= cells_
    table(root / file, list(rows[0]), [list(one.values()) for one in rows])


BROKEN = {
    "a cell of 2": (
        "chexpert",
        lambda r: changed(r, "train.csv", 0, Edema="2"),
        "column 'Edema' holds '2'; expected 1, 0, -1",
    ),
    "yes": ("chexpert", lambda r: changed(r, "train.csv", 0, Edema="yes"), "column 'Edema' holds 'yes'; expected 1, 0"),
    "nan": ("chexpert", lambda r: changed(r, "train.csv", 0, Edema="nan"), "column 'Edema' holds 'nan'"),
    "a patient in two splits": (
        "chexpert",
        lambda r: (
            image(r / "valid/patient00003/study1/view1_frontal.jpg", 77),
            changed(r, "valid.csv", 0, Path="CheXpert-v1.0-small/valid/patient00003/study1/view1_frontal.jpg"),
        ),
        "1 patients are in two splits: patient00003",
    ),
    "files that are not there": (
        "chexpert",
        lambda r: shutil.rmtree(r / "train/patient00002"),
        r"2 of 48 images that it lists are missing: .*patient00002/study1/view1_frontal.jpg.* \\(there is no folder "
        r".*; in .*train there are "
        r"patient00000",
    ),
    "another suffix": (
        "chexpert",
        lambda r: [f.rename(f.with_suffix(".part")) for f in (r / "train/patient00002").rglob("*.jpg")],
        r"images that it lists are missing: .*another suffix is there: view1_frontal.part",
    ),
    "no table": (
        "chexpert",
        lambda r: (r / "train.csv").unlink(),
        "has no train.csv, in it or in a folder of it; is that CheXpert",
    ),
    "a column that is gone": (
        "nih14",
        lambda r: (r / "Data_Entry_2017_v2020.csv").write_text(
            (r / "Data_Entry_2017_v2020.csv").read_text().replace("Finding Labels", "Labels")
        ),
        "has no column 'Finding Labels'",
    ),
    "an image in no list": (
        "nih14",
        lambda r: (r / "test_list.txt").write_text("\n".join((r / "test_list.txt").read_text().split()[1:])),
        "1 images are in none of the lists: 00000016_000.png",
    ),
    "runs beyond the image": (
        "siim",
        lambda r: changed(r, "train-rle.csv", 0, **{" EncodedPixels": "1048570 10"}),
        "its last run ends at pixel 1048580",
    ),
    "runs that are none": (
        "siim",
        lambda r: changed(r, "train-rle.csv", 0, **{" EncodedPixels": "5 five"}),
        "is no list of pairs of start and length",
    ),
    "a polygon outside": (
        "chestxdet",
        lambda r: (r / "ChestX_Det_train.json").write_text(
            (r / "ChestX_Det_train.json").read_text().replace("[40, 40]", "[4000, 40]")
        ),
        "a polygon has the point 4000 40, outside of 64x64",
    ),
    "a polygon of two points": (
        "chestxdet",
        lambda r: (r / "ChestX_Det_train.json").write_text(
            (r / "ChestX_Det_train.json").read_text().replace(", [40, 40], [8, 40]]", "]")
        ),
        "a polygon of 2 points",
    ),
    "a box outside": (
        "rsna",
        lambda r: changed(r, "stage_2_train_labels.csv", 0, width="900"),
        "is no box inside 00000000.dcm, which is 64 wide and 64 high",
    ),
    "a cell that leaves the root": (
        "chexpert",
        lambda r: changed(r, "train.csv", 0, Path="../../etc/passwd.jpg"),
        "the image '../../etc/passwd.jpg' does not lie below --root",
    ),
    "an absolute path": (
        "chexpert",
        lambda r: changed(r, "train.csv", 0, Path="/etc/x.jpg"),
        "does not lie below --root",
    ),
    "two files of a name": (
        "nih14",
        lambda r: shutil.copytree(r / "images_001", r / "annotated"),
        "is there 2 times: .*annotated",
    ),
    "an image in two tables": (
        "chexpert",
        lambda r: changed(r, "valid.csv", 0, Path="CheXpert-v1.0-small/train/patient00000/study1/view1_frontal.jpg"),
        "says another split or patient of .*patient00000",
    ),
    "an image in two lists": (
        "nih14",
        lambda r: (r / "test_list.txt").write_text((r / "test_list.txt").read_text() + "\n00000001_000.png"),
        "images are in two of the lists of splits: 00000001_000.png",
    ),
    "a patient's column that is gone": (
        "nih14",
        lambda r: (r / "Data_Entry_2017_v2020.csv").write_text(
            (r / "Data_Entry_2017_v2020.csv").read_text().replace("Patient ID", "Who")
        ),
        "has no column 'Patient ID'",
    ),
    "two things of one image": (
        "rsna",
        lambda r: (r / "stage_2_detailed_class_info.csv").write_text(
            (r / "stage_2_detailed_class_info.csv").read_text() + "00000000,Normal\n"
        ),
        "says another thing of 00000000 than row 2",
    ),
}


@pytest.mark.parametrize("what", BROKEN)
def test_bad_input_is_one_clear_line(tmp_path, what):
    name, break_, words = BROKEN[what]
    if name in DICOM:
        pytest.importorskip("pydicom", reason="the extra dicom is not installed")
    TREES[name](tmp_path / "tree")
    break_(tmp_path / "tree")
    with pytest.raises(InputError, match=words.replace("\\\\(", r"\(")) as error:
        pack(name, tmp_path / "tree")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected `name: value` lines"),
        ("title: x\ntable: y\n", "unknown setting table; did you mean tables"),
        ("title: x\n", "says nothing of tables"),
        (
            'title: x\ntables: [{files: t.csv}]\nimage: "{f}"\nunlisted: no\nfindings: {names: {column: l}}\n',
            "unlisted: False: expected",
        ),
        (
            'title: x\ntables: [{files: t.csv}]\nimage: "{f}"\nunlisted: absent\nfindings: {words: {column: l}}\n',
            "expected one of cells, names",
        ),
        (
            'title: x\ntables: [{file: t.csv}]\nimage: "{f}"\nunlisted: absent\nfindings: {names: {column: l}}\n',
            "unexpected keyword argument 'file'",
        ),
        (
            'title: x\ntables: [{files: t.csv, split: trian}]\nimage: "{f}"\nunlisted: absent\nfindings: {names: '
            "{column: "
            "l}}\n",
            "tables: expected",
        ),
        (
            'title: x\ntables: [t.csv]\nimage: "{f}"\nunlisted: absent\nfindings: {names: {column: l}}\n',
            "expected {files: ...}",
        ),
        (
            'title: x\ntables: [{files: t.csv}]\nimage: "{f}"\nunlisted: absent\nview: {column: v, find: '
            '"("}\nfindings: '
            "{names: {column: l}}\n",
            "unterminated subpattern",
        ),
    ],
)
def test_a_recipe_that_is_none_says_why(tmp_path, text, words):
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(InputError, match=re.escape(words)):
        read_recipe(str(tmp_path / "r.yaml"))
    with pytest.raises(InputError, match="no ready-made archive; did you mean chexpert"):
        read_recipe("chexprt")


def test_a_task_that_the_archive_does_not_know(tmp_path):
    chexpert(tmp_path / "c")
    with pytest.raises(InputError, match="does not say anything of Hernia"):
        pack("chexpert", tmp_path / "c", "--task", "nih14")


def test_all_cells_unknown_in_val_is_a_warning_and_a_null(tmp_path, segmenter, capsys):
    rows, out = [], tmp_path / "c"
    for i in range(24):
        for split in ("train", "valid"):
            image(
                out / f"{split}/patient{i + 100 * (split == 'valid'):05}/study1/view1_frontal.jpg",
                i + 50 * (split == "valid"),
            )
    for split in ("train", "valid"):
        said = [
            {"Edema": "1.0" if i % 2 else "0.0"} | ({"Fracture": "1.0" if i % 3 else "0.0"} if split == "train" else {})
            for i in range(24)
        ]
        rows = [
            [
                f"x/{split}/patient{i + 100 * (split == 'valid'):05}/study1/view1_frontal.jpg",
                "F",
                9,
                "Frontal",
                "AP",
                *cells(one, CHEXPERT),
            ]
            for i, one in enumerate(said)
        ]
        table(out / f"{split}.csv", ["Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *CHEXPERT], rows)
    shards = pack("chexpert", out)
    flags = [
        "--shards",
        str(shards),
        "--out",
        str(tmp_path / "run"),
        "--lungs.weights",
        str(segmenter),
        *SMALL,
        "--epochs",
        "1",
    ]
    flags += ["--labels.kind", "any", "--labels.unmentioned", "ignore"]
    train.main([*flags, "--task", "Edema,Fracture"])
    said = capsys.readouterr().out
    assert re.search(
        r"val: 24 images, Edema 12 of 24, Fracture 0 of 0 \(24 unknown\); warning: Fracture cannot be "
        r"measured",
        said,
    )
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["val"]["per_finding"]["Fracture"]["auc"] is None
    assert report["threshold"]["Fracture"] is None
    assert report["val"]["defined"] == 1
    assert report["val"]["auc"] == report["val"]["per_finding"]["Edema"]["auc"]


OURS = 'title: x\ntables: [{files: t.csv}]\nimage: "{f}"\nunlisted: absent\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("findings: {names: {separator: ;}}", "findings: names: says nothing of column"),
        ("findings: {names: labels}", "expected settings under it: column"),
        ("findings: {names: {column: l, seperator: ;}}", "unknown setting seperator; did you mean separator"),
        ("findings: {names: {column: l}}\npatient: {column: p, find: p.*}", "has no group (...) that is taken"),
        ("findings: {names: {column: l}}\nboxes: {colums: [a]}", "unknown setting colums; did you mean columns"),
        ("findings: {names: {column: l}}\nboxes: {columns: [a, b, c, d], finding: x, kind: side}", "corners or sides"),
        ("findings: {runs: {column: l, finding: x}}", "findings: runs: says nothing of size"),
        ("findings: {names: {column: l}}\namong: a", "among: a: expected a list"),
        ("findings: {names: {column: l}}\nval_share: x", "val_share: x: expected a number"),
        ("findings: {names: {column: l}}\nlists: [a]", "expected settings under it"),
        ("findings: {names: {column: l}}\nhealthy: {column: l}", "healthy: says nothing of values"),
    ],
)
def test_what_is_wrong_within_a_recipe_is_named(tmp_path, text, words):
    (tmp_path / "r.yaml").write_text(OURS + text)
    with pytest.raises(InputError, match=re.escape(words)):
        read_recipe(str(tmp_path / "r.yaml"))


def test_words_of_a_recipe_are_of_any_case(tmp_path):
    root = tmp_path / "own"
    kinds = ("a", "CLEAR", "b;Unchanged", "EXCLUDE", "nan")
    for i in range(20):
        image(root / f"{i}.png", i)
    table(root / "t.csv", ["f", "l"], [[f"{i}.png", kinds[i % 5]] for i in range(20)])
    words = "findings: {names: {column: l, separator: ;, healthy: [Clear], nothing: [Unchanged], leave_out: [Exclude]}}"
    (tmp_path / "own.yaml").write_text(OURS + words)
    found = [tuple(meta["findings"]) for _, meta in samples(pack(str(tmp_path / "own.yaml"), root)).values()]
    assert sorted(found) == [("No Finding",)] * 4 + [("a",)] * 4 + [("b",)] * 4


def test_of_a_task_nobody_becomes_healthy_who_shows_something_else(tmp_path):
    TREES["nih14"](tmp_path / "nih")
    out = pack("nih14", tmp_path / "nih", "--task", "Effusion")
    found = [meta for name, meta in samples(out).values() if name == "train"]
    called = sum(meta["findings"] == ["No Finding"] for meta in found)
    assert (
        Split(out, "train", SingleLabel(("No Finding", "Effusion"))).counts()["No Finding"] == called < len(found) / 2
    )
