import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shards.__main__ import main
from shards.dataset import Split
from shards.errors import InputError
from shards.sample import Labels
from shards.sources.folders import folder_finding
from shards.store import open_store
from shards.targets import SingleLabel


def picture(path, value=100, size=(40, 30), mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(size[::-1], value, np.uint8)).convert(mode).save(path)


@pytest.fixture
def class_folders(tmp_path):
    root = tmp_path / "images"
    for split in ("train", "val", "test"):
        for number, name in enumerate(("0NoFinding", "1Effusion", "2Nodule")):
            for i in range(2):
                picture(root / split / name / f"im.{i}.png", value=50 * number + 10 * i + len(split))
    return root


@pytest.mark.parametrize(
    ("folder", "finding"),
    [
        ("0NoFinding", "No Finding"),
        ("1Effusion", "Effusion"),
        ("3SubcuEmphysema", "Subcutaneous Emphysema"),
        ("2_Nodule", "Nodule"),
        ("7", "7"),
    ],
)
def test_a_leading_digit_is_order(folder, finding):
    assert folder_finding(folder) == finding


def test_class_folders_become_shards(class_folders, tmp_path, capsys):
    picture(class_folders / "train" / "1Effusion" / "rgb.jpg", mode="RGB")
    (class_folders / "train" / "1Effusion" / "Thumbs.db").write_bytes(b"x")
    main(["folder", "--path", str(class_folders), "--out", str(tmp_path / "out"), "--size", "32"])
    assert "left out 1: not an image file" in capsys.readouterr().out
    split = Split(tmp_path / "out", "train", ("No Finding", "Effusion"))
    assert split.counts() == {"No Finding": 2, "Effusion": 3}
    assert split.left_out == 2
    assert split.image(0).shape == (32, 32)
    assert {split.key(i) for i in range(5)} == {
        "0NoFinding-im_0",
        "0NoFinding-im_1",
        "1Effusion-im_0",
        "1Effusion-im_1",
        "1Effusion-rgb",
    }
    assert open_store(tmp_path / "out").index()["findings"] == ["No Finding", "Effusion", "Nodule"]
    main(["verify", str(tmp_path / "out")])


def test_a_class_missing_from_a_split_is_named(class_folders, tmp_path):
    for file in (class_folders / "val" / "1Effusion").iterdir():
        file.unlink()
    with pytest.raises(InputError, match=r"val: has no images of Effusion"):
        main(["folder", "--path", str(class_folders), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_corrupt_image_leaves_nothing_that_looks_whole(class_folders, tmp_path):
    bad = class_folders / "test" / "1Effusion" / "im.1.png"
    bad.write_bytes(bad.read_bytes()[:40])
    with pytest.raises(
        InputError, match=r"im\.1\.png: cannot be decoded.*2 finished shards are kept in .*out\.partial"
    ):
        main(["folder", "--path", str(class_folders), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    bad = class_folders / "train" / "0NoFinding" / "im.0.png"
    bad.write_bytes(b"")
    with pytest.raises(InputError, match=r"im\.0\.png: cannot be decoded.*nothing was left there"):
        main(["folder", "--path", str(class_folders), "--out", str(tmp_path / "other")])
    assert not list(tmp_path.glob("other*"))


@pytest.mark.parametrize("content", [[], ["train"], ["train/0NoFinding"]])
def test_folders_without_images(tmp_path, content):
    (tmp_path / "images").mkdir()
    for name in content:
        (tmp_path / "images" / name).mkdir(parents=True, exist_ok=True)
    with pytest.raises(InputError, match=r"expected the folders|no images"):
        main(["folder", "--path", str(tmp_path / "images"), "--out", str(tmp_path / "out")])


def test_masks_are_matched_by_name_and_split_reproducibly(tmp_path):
    for i in range(10):
        picture(tmp_path / "i" / f"a{i}.jpg")
        (tmp_path / "m").mkdir(exist_ok=True)
        # A 0/1 mask
        Image.fromarray((np.arange(40) < 20).astype(np.uint8)[None].repeat(30, 0)).save(
            tmp_path / "m" / f"a{i}_mask.png"
        )
    for out in ("one", "two"):
        main(
            [
                "masks",
                "--images",
                str(tmp_path / "i"),
                "--masks",
                str(tmp_path / "m"),
                "--out",
                str(tmp_path / out),
                "--size",
                "32",
            ]
        )
    val = Split(tmp_path / "one", "val", masks=True)
    assert len(val) == 2
    assert val.mask(0)[:, :16].all()
    assert not val.mask(0)[:, 16:].any()
    for name in ("train/000000.tar", "val/000000.tar", "index.json"):
        assert (tmp_path / "one" / name).read_bytes().replace(b"one", b"two") == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize(
    ("folder", "words"), [("m", "1 masks without an image: alone"), ("i", "1 images without a mask: alone")]
)
def test_a_partner_that_is_missing(tmp_path, folder, words):
    for i in range(3):
        picture(tmp_path / "i" / f"a{i}.png")
        picture(tmp_path / "m" / f"a{i}.png")
    picture(tmp_path / folder / "alone.png")
    with pytest.raises(InputError, match=words):
        main(["masks", "--images", str(tmp_path / "i"), "--masks", str(tmp_path / "m"), "--out", str(tmp_path / "out")])


def test_a_mask_of_another_size(tmp_path):
    for i in range(3):
        picture(tmp_path / "i" / f"a{i}.png")
        picture(tmp_path / "m" / f"a{i}.png", size=(20, 20))
    with pytest.raises(InputError, match=r"is 20x20, its image 40x30"):
        main(["masks", "--images", str(tmp_path / "i"), "--masks", str(tmp_path / "m"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_existing_output_and_unknown_flags_are_refused(tmp_path, shards):
    with pytest.raises(InputError, match="already holds something"):
        main(["phantom", "--count", "40", "--out", str(shards)])
    with pytest.raises(InputError, match=r"--cuont.*did you mean --count"):
        main(["phantom", "--count", "40", "--cuont", "3", "--out", str(tmp_path / "x")])
    with pytest.raises(InputError, match="--help"):
        main(["phantoms", "--out", str(tmp_path / "x")])


# -- tables -----------------------------------------------------------------------------------------------------


@pytest.fixture
def listed_images(tmp_path):
    """40 images of 20 patients in a folder, and a function that writes the table and packs it."""
    rng = np.random.default_rng(0)
    (tmp_path / "files/a").mkdir(parents=True)
    for i in range(40):
        Image.fromarray(rng.integers(0, 255, (20, 30), np.uint8)).save(tmp_path / f"files/a/{i}.png")

    def packed(header, row, *flags, name="out", rows=40):
        (tmp_path / "table.csv").write_text("\n".join([header, *(row(i) for i in range(rows))]) + "\n")
        main(
            [
                "csv",
                "--csv",
                str(tmp_path / "table.csv"),
                "--images",
                str(tmp_path / "files"),
                "--out",
                str(tmp_path / name),
                "--size",
                "16",
                *flags,
            ]
        )
        return {split: Split(tmp_path / name, split) for split in open_store(tmp_path / name).index()["splits"]}

    return packed


def finding(i):
    return ("No Finding", "Effusion")[i // 2 % 2]


def test_a_table_with_patients_is_split_by_them(listed_images, capsys):
    splits = listed_images("path,finding,who", lambda i: f"a/{i}.png,{finding(i)},p{i // 2}", "--patient-column", "who")
    homes = [{split.meta(i)["patient"] for i in range(len(split))} for split in splits.values()]
    assert sum(map(len, homes)) == len(set.union(*homes)) == 20
    assert [len(split) for split in splits.values()] == [24, 8, 8]
    assert "counts as a patient" not in capsys.readouterr().out
    assert splits["train"].key(0).startswith("a_")


def test_a_table_without_patients_says_so(listed_images, capsys):
    listed_images("path,finding", lambda i: f"a/{i}.png,{finding(i)}", "--ratios", "0.5,0.5,0")
    assert "no --patient-column" in capsys.readouterr().out


def test_columns_by_name_several_findings_and_a_split_of_ones_own(listed_images):
    splits = listed_images(
        "label;file;part".replace(";", ","),
        lambda i: f"{'Mass/Nodule' if i % 2 else 'Mass'},a/{i}.png,{('train', 'valid')[i % 4 == 3]}",
        *("--path-column", "file", "--finding-column", "label", "--split-column", "part", "--separator", "/"),
        rows=16,
    )
    assert [len(split) for split in splits.values()] == [12, 4]
    assert set(splits["val"].findings()) == {("Mass", "Nodule")}


def test_findings_as_columns_of_0_and_1(listed_images, capsys):
    splits = listed_images(
        "path,Mass,Nodule",
        lambda i: f"a/{i}.png,{('1.0', '', '-1', '0')[i % 4]},{('0', '1', '0', '')[i % 4]}",
        "--finding-column",
        "Mass,Nodule",
    )
    assert {said for split in splits.values() for said in split.said()} == {
        Labels(("Mass",), ("Nodule",)),
        Labels(("Nodule",)),
        Labels((), ("Nodule",), ("Mass",)),
        Labels((), ("Mass",)),
    }
    index = splits["train"].store.index()
    assert (index["asked"], index["unlisted"]) == (["Mass", "Nodule"], "unknown")
    assert "left out" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("header", "row", "flags", "words"),
    [
        ("file,finding", "a/{i}.png,Mass", (), "has no column 'path'; its columns are file, finding"),
        ("path,finding", "b/{i}.png,Mass", (), "40 of 40 images that it lists are missing: .*b/0.png.* and 35 more"),
        (
            "path,finding",
            "a/{i}.png,Mas",
            ("--findings", "Mass,No Finding"),
            "row 2: the finding 'Mas' was not declared; did you mean Mass",
        ),
        ("path,finding", "a/{i}.png,", (), "row 2: no finding in column 'finding'; write 'No Finding'"),
        ("path,finding", "a/1.png,Mass", (), "1 images are listed more than once"),
        (
            "path,finding,s",
            "a/{i}.png,Mass,training2",
            ("--split-column", "s"),
            "unknown split 'training2'; expected train, val or test",
        ),
        (
            "path,finding,s,p",
            "a/{i}.png,Mass,{s},p",
            ("--split-column", "s", "--patient-column", "p"),
            "1 patients are in two splits: p",
        ),
        ("path,finding,s", "a/{i}.png,{f},{s}", ("--split-column", "s"), "the train split gets no image of Nodule"),
        ("path,finding,x", "a/{i}.png,Mass", (), "row 2 has 2 cells, the header 3"),
        ("path,finding", "a/{i}.png,Mass", ("--ratios", "0.5,0.5"), "--ratios 0.5,0.5: expected three shares"),
        ("path,finding", "a/{i}.png,Mass", ("--ratios", "0.9,0.9,0.1"), "add up to 1"),
        (
            "path,Mass,Nodule",
            "a/{i}.png,maybe,0",
            ("--finding-column", "Mass,Nodule"),
            "column 'Mass' holds 'maybe'; expected 1, 0, -1",
        ),
    ],
)
def test_tables_that_cannot_be_used(listed_images, tmp_path, header, row, flags, words):
    fill = {0: "train", 1: "val"}
    with pytest.raises(InputError, match=words):
        listed_images(header, lambda i: row.format(i=i, s=fill[i % 2], f=("Mass", "Nodule")[i % 2]), *flags)
    assert not list(tmp_path.glob("out*"))


def test_missing_images_can_be_left_out(listed_images, capsys):
    splits = listed_images(
        "path,finding", lambda i: f"a/{i}.png,Mass", "--on-bad", "skip", "--ratios", "0.5,0.25,0.25", rows=44
    )
    assert sum(len(split) for split in splits.values()) == 40
    assert "left out 4: listed but missing" in capsys.readouterr().out


def test_a_table_that_is_no_text(tmp_path):
    (tmp_path / "t.csv").write_bytes(bytes(range(256)))
    for content in (bytes(range(128, 256)), b"", b"path,finding\n"):
        (tmp_path / "t.csv").write_bytes(content)
        with pytest.raises(InputError, match=r"has no rows|cannot be read as a CSV"):
            main(["csv", "--csv", str(tmp_path / "t.csv"), "--out", str(tmp_path / "out")])


# -- NIH --------------------------------------------------------------------------------------------------------

HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient {},View "
    "Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
HEADER_2017, HEADER_2020 = HEADER.format("Gender") + ",", HEADER.format("Sex")


@pytest.fixture
def archive(tmp_path):
    """120 images of 40 patients in the archive's folders, its metadata, lists and boxes."""
    rng = np.random.default_rng(0)
    rows, names = [], []
    for p in range(40):
        for i in range(3):
            name = f"{p:08d}_{i:03d}.png"
            label = ("No Finding", "Effusion", ["No Finding", "Mass"][1], "No Finding")[p % 4]
            names.append(name)
            rows.append(f"{name},{label},{i},{p},058Y,M,PA,2500,2048,0.1,0.1,")
            folder = tmp_path / f"nih/images_{p % 3 + 1:03d}/images"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (64, 64), np.uint8)).save(folder / name)
    (tmp_path / "entry.csv").write_text("\n".join([HEADER_2017, *rows]))
    (tmp_path / "test_list.txt").write_text("\n".join(names[90:]))
    (tmp_path / "train_val_list.txt").write_text("\n".join(names[:90]))
    (tmp_path / "boxes.csv").write_text(
        "Image Index,Finding Label,Bbox [x,y,w,h],,,\n" + f"{names[3]},Effusion,512,256,256,128\n"
    )
    return tmp_path


def nih(root, *flags):
    return [
        "nih",
        "--images",
        str(root / "nih"),
        "--metadata",
        str(root / "entry.csv"),
        "--size",
        "32",
        "--out",
        str(root / "out"),
        *flags,
    ]


@pytest.mark.parametrize("how", ["published", "official", "random"])
def test_nih_as_downloaded(archive, how, capsys):
    main(nih(archive, "--task", "ne", "--split", how, "--boxes", str(archive / "boxes.csv")))
    index = open_store(archive / "out").index()
    assert index["findings"] == ["No Finding", "Effusion"]
    for name, entry in index["splits"].items():
        assert entry["findings"]["No Finding"] == entry["findings"]["Effusion"] > 0
        split = Split(archive / "out", name, ("No Finding", "Effusion"))
        for i in range(len(split)):
            meta = split.meta(i)
            assert meta["age"] == 58
            assert meta["source"].startswith(f"{int(meta['patient']):08d}")
            assert [box.xyxy for box in meta["boxes"]] == (
                [(16.0, 8.0, 24.0, 12.0)] if meta["source"] == "00000001_000.png" else []
            )
    main(["verify", str(archive / "out")])
    assert "not drawn" in capsys.readouterr().out


def test_the_newer_column_names_and_the_same_bytes_twice(archive):
    text = (archive / "entry.csv").read_text().replace(HEADER_2017, HEADER_2020).replace("058Y", "58")
    main(nih(archive, "--task", "ne"))
    one = {p.name: p.read_bytes() for p in (archive / "out").rglob("*.tar")}
    (archive / "entry.csv").write_text(text)
    (archive / "out").rename(archive / "before")
    main(nih(archive, "--task", "ne", "--workers", "2"))
    assert {p.name: p.read_bytes() for p in (archive / "out").rglob("*.tar")} == one
    main(
        [
            *nih(archive, "--task", "ne", "--seed", "1")[:-4],
            "--task",
            "ne",
            "--seed",
            "1",
            "--out",
            str(archive / "seed"),
        ]
    )
    assert {p.name: p.read_bytes() for p in (archive / "seed").rglob("*.tar")} != one


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--task", "ns"), "Subcutaneous Emphysema is not a label of NIH ChestX-ray14"),
        (("--task", "No Finding,Efusion"), "did you mean Effusion"),
        (("--task", "nx"), "--task nx: unknown"),
        (("--task", "No Finding,Hernia"), "the train split gets no image whose one finding is .*Hernia"),
        (("--task", "ne", "--split", "official", "--lists", "/nowhere"), "needs train_val_list.txt"),
        (("--task", "ne", "--boxes", "/nowhere.csv"), "--boxes /nowhere.csv: no such file"),
        (("--task", "ne", "--split", "best"), "invalid choice: 'best'"),
    ],
)
def test_nih_flags_that_cannot_be_used(archive, flags, words):
    with pytest.raises(InputError, match=words):
        main(nih(archive, *flags))
    assert not list(archive.glob("out*"))


def test_nih_files_that_cannot_be_used(archive):
    lost = archive / "nih/images_002/images/00000001_000.png"
    kept = lost.read_bytes()
    lost.unlink()
    with pytest.raises(InputError, match=r"1 of 60 images that it lists are missing: .*00000001_000\.png"):
        main(nih(archive, "--task", "ne"))
    main(nih(archive, "--task", "ne", "--on-bad", "skip"))
    (archive / "out").rename(archive / "without")
    lost.write_bytes(kept)
    (archive / "nih/images_001/images/00000001_000.png").write_bytes(kept)
    with pytest.raises(InputError, match="is there twice"):
        main(nih(archive, "--task", "ne"))
    (archive / "nih/images_001/images/00000001_000.png").unlink()
    text = (archive / "entry.csv").read_text()
    (archive / "entry.csv").write_text(text.replace("Finding Labels", "Labels"))
    with pytest.raises(InputError, match="has no column 'Finding Labels'; its columns are Image Index, Labels"):
        main(nih(archive, "--task", "ne"))
    (archive / "entry.csv").write_text(text.replace(",Mass,", ",Massive,"))
    with pytest.raises(InputError, match="labels that the archive does not have: Massive; did you mean Mass"):
        main(nih(archive, "--task", "ne"))


def test_the_archive_s_own_images(tmp_path):
    """The 48 originals, from the archive's layout, against its whole metadata."""
    real = os.environ.get("CXR_FOCUS_REAL_DATA")
    if not real:
        pytest.skip("CXR_FOCUS_REAL_DATA is not set")
    meta = Path(real) / "nih/meta"
    flags = ["nih", "--images", f"{real}/nih/original", "--metadata", str(meta / "Data_Entry_2017_v2020.csv.gz")]
    flags += ["--boxes", str(meta / "BBox_List_2017.csv.gz"), "--out", str(tmp_path / "out")]
    with pytest.raises(InputError, match=r"79\d\d of 7910 images that it lists are missing"):
        main([*flags, "--task", "ne"])
    flags += ["--task", "No Finding,Pneumonia", "--split", "random", "--no-balanced", "--on-bad", "skip"]
    with pytest.raises(InputError, match="the test split gets no image whose one finding is Pneumonia"):
        main(flags)
    main([*flags, "--ratios", "0.5,0.5,0"])
    main(["verify", str(tmp_path / "out")])
    assert sum(entry["samples"] for entry in open_store(tmp_path / "out").index()["splits"].values()) > 20


def table_of(tmp_path, rows, header="path,finding,patient"):
    (tmp_path / "t.csv").write_text(header + "\n" + "\n".join(rows) + "\n")
    return [
        "csv",
        "--csv",
        str(tmp_path / "t.csv"),
        "--images",
        str(tmp_path),
        "--out",
        str(tmp_path / "out"),
        "--size",
        "16",
    ]


def test_patients_are_the_same_with_a_blank_behind(tmp_path):
    rows = []
    for i in range(60):
        picture(tmp_path / f"{i}.png", value=4 * i)
        rows.append(f"{i}.png,{'Mass' if i // 2 % 2 else 'No Finding'},P{i // 2}{' ' if i % 2 else ''}")
    main([*table_of(tmp_path, rows), "--patient-column", "patient"])
    homes = {}
    for name in ("train", "val", "test"):
        split = Split(tmp_path / "out", name)
        for i in range(len(split)):
            assert homes.setdefault(split.meta(i)["patient"].strip(), name) == name


def test_tables_that_name_odd_paths_and_separators(tmp_path):
    picture(tmp_path / "other" / "a.png")
    picture(tmp_path / "in" / "b.png")
    flags = table_of(tmp_path, [f"{tmp_path}/other/a.png,Mass,1", f"{tmp_path}/in/b.png,No Finding,2"])
    flags[4] = str(tmp_path / "in")
    with pytest.raises(InputError, match=r"not below --images .*other/a\.png"):
        main(flags)
    with pytest.raises(InputError, match="--separator"):
        main([*flags, "--separator", ""])


def test_linked_folders_are_followed(tmp_path):
    from shards.files import walk

    picture(tmp_path / "elsewhere" / "a.png")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "root" / "link" / "loop").symlink_to(tmp_path / "root")
    assert [p.name for p in walk(tmp_path / "root")] == ["a.png"]


@pytest.mark.parametrize("values", [(1, 2), (127, 255), (1, 1), (255, 255)])
def test_masks_with_a_number_for_each_lung_keep_both(tmp_path, values):
    for i in range(2):
        picture(tmp_path / "i" / f"{i}.png", value=50 * i, size=(32, 32))
        lungs = np.zeros((32, 32), np.uint8)
        lungs[4:20, 2:12], lungs[4:20, 20:30] = values
        (tmp_path / "m").mkdir(exist_ok=True)
        Image.fromarray(lungs).save(tmp_path / "m" / f"{i}.png")
    main(
        [
            "masks",
            "--images",
            str(tmp_path / "i"),
            "--masks",
            str(tmp_path / "m"),
            "--out",
            str(tmp_path / "out"),
            "--size",
            "32",
        ]
    )
    mask = Split(tmp_path / "out", "train", masks=True).mask(0)
    assert mask[10, 5]
    assert mask[10, 25]


def test_folders_of_other_names(class_folders, tmp_path, capsys):
    (class_folders / "val").rename(class_folders / "Valid")
    (class_folders / "extra").mkdir()
    picture(class_folders / "train" / "1Effusion" / "sub" / "x.png")
    main(["folder", "--path", str(class_folders), "--out", str(tmp_path / "out"), "--size", "32"])
    said = capsys.readouterr()
    assert len(Split(tmp_path / "out", "val")) == 6
    assert "left out 1: a folder inside a class folder" in said.out
    assert "left out 1: a folder that is no split" in said.out


@pytest.mark.parametrize("kind", ["a radiograph", "all lung"])
def test_what_is_no_mask_is_refused(tmp_path, kind):
    rng = np.random.default_rng(0)
    for i in range(2):
        for folder in "im":
            (tmp_path / folder).mkdir(exist_ok=True)
            values = (
                rng.integers(0, 255, (32, 32), np.uint8)
                if folder == "i" or kind == "a radiograph"
                else np.full((32, 32), 255, np.uint8)
            )
            Image.fromarray(values).save(tmp_path / folder / f"{i}.png")
    with pytest.raises(InputError, match="is no lung mask"):
        main(
            [
                "masks",
                "--images",
                str(tmp_path / "i"),
                "--masks",
                str(tmp_path / "m"),
                "--out",
                str(tmp_path / "out"),
                "--size",
                "32",
            ]
        )
    with pytest.raises(InputError, match="--test-share nan"):
        main(
            [
                "masks",
                "--images",
                str(tmp_path / "i"),
                "--masks",
                str(tmp_path / "m"),
                "--out",
                str(tmp_path / "out"),
                "--test-share",
                "nan",
            ]
        )


def test_labels_that_cannot_be_meant(tmp_path):
    for i in range(12):
        picture(tmp_path / f"{i}.png", value=20 * i)
    with pytest.raises(InputError, match="No Finding and something else"):
        main(table_of(tmp_path, ["0.png,No Finding|Mass,1", "1.png,Mass,2"]))
    with pytest.raises(InputError, match="2 rows have no patient"):
        main(
            [*table_of(tmp_path, ["0.png,Mass,", "1.png,No Finding,NA", "2.png,Mass,3"]), "--patient-column", "patient"]
        )
    main(
        [
            *table_of(tmp_path, [f"{i}.png,{i % 2},{i}" for i in range(12)], "path,Mass,patient"),
            "--finding-column",
            "Mass",
        ]
    )
    assert open_store(tmp_path / "out").index()["findings"] == ["No Finding", "Mass"]


def test_rows_of_findings_that_are_not_wanted_can_be_left_out(tmp_path, capsys):
    for i in range(20):
        picture(tmp_path / f"{i}.png", value=12 * i)
    flags = [
        *table_of(tmp_path, [f"{i}.png,{('Mass', 'No Finding', 'Edema')[i % 3]},{i}" for i in range(20)]),
        "--findings",
        "No Finding,Mass",
    ]
    with pytest.raises(InputError, match=r"'Edema' was not declared.*--on-bad skip"):
        main(flags)
    main([*flags, "--on-bad", "skip"])
    assert "left out 6: a finding that was not declared" in capsys.readouterr().out


def test_a_url_is_no_place_to_pack_to(class_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="--out s3://bucket/x: shards are packed into a folder"):
        main(["folder", "--path", str(class_folders), "--out", "s3://bucket/x"])
    with pytest.raises(InputError, match="index works on a folder"):
        main(["index", "http://127.0.0.1:1/x"])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["images"]


def test_files_that_are_missing_are_named_in_the_index(tmp_path):
    for i in range(0, 20):
        if i != 7:
            picture(tmp_path / f"{i}.png", value=12 * i)
    main([*table_of(tmp_path, [f"{i}.png,{('Mass', 'No Finding')[i % 2]},{i}" for i in range(20)]), "--on-bad", "skip"])
    assert open_store(tmp_path / "out").index()["left_out"] == {"listed but missing": 1}


@pytest.mark.parametrize(
    ("header", "numbers"), [("path,finding,x0,y0,x1,y1", "10,6,30,24"), ("path,finding,x,y,w,h", "10,6,20,18")]
)
def test_lesion_boxes_of_a_table(tmp_path, header, numbers, capsys):
    rows = []
    for i in range(30):
        picture(tmp_path / f"{i}.png", value=4 * i)  # 40 x 30
        rows.append(f"{i}.png,{'Mass|Nodule' if i % 2 else 'No Finding'}")
    flags = table_of(tmp_path, rows, "path,finding")
    (tmp_path / "boxes.csv").write_text(
        f"{header}\n3.png,Mass,{numbers}\n3.png,Nodule,{numbers}\nother.png,Mass,1,1,2,2\n"
    )
    main([*flags, "--boxes", str(tmp_path / "boxes.csv"), "--ratios", "0.5,0.5,0"])
    printed = capsys.readouterr().out
    assert "left out 1: boxes of images that are not in" in printed
    assert "2 lesion boxes are on 1 of the images" in printed
    splits = [Split(tmp_path / "out", name) for name in ("train", "val")]
    found = {split.key(i): split.meta(i)["boxes"] for split in splits for i in range(len(split))}
    assert [(box.finding, box.xyxy) for box in found.pop("3")] == [
        (name, pytest.approx((4, 3.2, 12, 12.8))) for name in ("Mass", "Nodule")
    ]
    assert not any(found.values())


def test_a_column_that_looks_like_splits_is_not_passed_over(tmp_path, capsys):
    for i in range(20):
        picture(tmp_path / f"{i}.png", value=9 * i)
    rows = [f"{i}.png,{'Mass' if i % 2 else 'Normal'},train" for i in range(20)]
    main([*table_of(tmp_path, rows, "path,finding,split"), "--ratios", "0.5,0.5,0"])
    printed = capsys.readouterr().out
    assert "column 'split', for --split-column was not given" in printed
    assert "no image is called 'No Finding', as healthy ones must be" in printed
    (tmp_path / "t.csv").write_text("path:finding\n0.png:Mass\n")
    with pytest.raises(InputError, match="has no column 'path'; its columns are path:finding"):
        main(["csv", "--csv", str(tmp_path / "t.csv"), "--out", str(tmp_path / "other")])


def test_boxes_of_what_an_image_is_not_labelled_with_are_left_out(tmp_path, capsys):
    for i in range(4):
        picture(tmp_path / f"{i}.png", value=9 * i)
    flags = table_of(tmp_path, [f"{i}.png,{'Mass' if i % 2 else 'No Finding'}" for i in range(4)], "path,finding")
    (tmp_path / "boxes.csv").write_text("path,finding,x,y,w,h\n0.png,Mass,1,1,9,9\n1.png,Mass,1,1,9,9\n")
    main([*flags, "--boxes", str(tmp_path / "boxes.csv"), "--ratios", "0.5,0.5,0"])
    printed = capsys.readouterr().out
    assert "left out 1: boxes of findings that their image is not labelled with" in printed
    assert "1 lesion boxes are on 1 of the images" in printed


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path,finding,x0,y0,x1\n0.png,Mass,1,1,2", "has no column 'y1'"),
        ("file,finding,x,y,w,h\n0.png,Mass,1,1,2,2", "has no column 'path'; its columns are file"),
        ("path,finding,x,y,w,h\n0.png,Mass,1,1,two,2", "row 2: columns x, y, w, h hold no four numbers"),
        (
            "path,finding,x,y,w,h\n0.png,Mass,1,1,40,2",
            r"row 2: 1 1 41 3 is no box inside 0\.png, which is 40 wide and 30 high",
        ),
        ("path,finding,x0,y0,x1,y1\n0.png,Mass,5,1,5,2", "is no box"),
        ("path,finding,x,y,w,h\n0.png,Mass,nan,1,1,2", "is no box"),
        (
            "path,finding,x,y,w,h\nzero.png,Mass,1,1,2,2",
            r"none of its 1 boxes can be used \(1 boxes of images that are not in the table\)",
        ),
        (
            "path,finding,x,y,w,h\n0.png,Masss,1,1,2,2",
            r"none of its 1 boxes can be used \(1 boxes of 'Masss', which is no finding of the table \(did you mean "
            r"Mass\?\)\)",
        ),
        (
            "path,finding,x0,y0,x1,y1\n0.png,Mass,0.2,0.2,0.6,0.5",
            r"row 2: 0\.2 .* is less than a pixel of 0\.png \(40x30\): boxes are in pixels",
        ),
    ],
)
def test_boxes_that_are_none(tmp_path, text, words):
    for i in range(4):
        picture(tmp_path / f"{i}.png", value=9 * i)
    flags = table_of(tmp_path, [f"{i}.png,{'Mass' if i % 2 else 'No Finding'}" for i in range(4)], "path,finding")
    (tmp_path / "boxes.csv").write_text(text + "\n")
    with pytest.raises(InputError, match=words):
        main([*flags, "--boxes", str(tmp_path / "boxes.csv"), "--ratios", "0.5,0.5,0"])
    assert not (tmp_path / "out").exists()


def test_a_rare_finding_beside_others_need_not_be_in_every_split(tmp_path):
    rows = []
    for i in range(12):
        picture(tmp_path / f"{i}.png", value=9 * i)
        found = "Mass|Hernia" if i == 1 else "Mass" if i % 2 else "No Finding"
        rows.append(f"{i}.png,{found},{('train', 'val', 'test')[i // 4]}")
    flags = [*table_of(tmp_path, rows, "path,finding,split"), "--split-column", "split"]
    with pytest.raises(InputError, match="the val split gets no image of Hernia"):
        main([*flags, "--findings", "No Finding,Mass,Hernia"])
    main(flags)
    assert Split(tmp_path / "out", "train", SingleLabel(("No Finding", "Mass"), ["Mass"])).counts() == {
        "No Finding": 2,
        "Mass": 2,
    }
    rows[1] = "1.png,Hernia,train"  # alone it is a class
    with pytest.raises(InputError, match="the val split gets no image of Hernia"):
        main([*table_of(tmp_path, rows, "path,finding,split"), "--split-column", "split"])


# -- kinds of trouble that people have --------------------------------------------------------------------------


@pytest.mark.parametrize("where", [("train", "val", "test"), ("train",)])
def test_hidden_folders_are_no_classes(class_folders, tmp_path, where, capsys):
    for split in where:
        for name in (".ipynb_checkpoints", "__MACOSX"):
            picture(class_folders / split / name / "x.png")
    picture(class_folders / "train/1Effusion/.ipynb_checkpoints/y.png")
    main(["folder", "--path", str(class_folders), "--out", str(tmp_path / "out"), "--size", "32"])
    assert open_store(tmp_path / "out").index()["findings"] == ["No Finding", "Effusion", "Nodule"]
    assert f"left out {2 * len(where) + 1}: a hidden folder" in capsys.readouterr().out


def test_class_folders_without_splits_are_dealt(tmp_path, capsys):
    for name in ("0NoFinding", "1Effusion"):
        for i in range(10):
            picture(tmp_path / "images" / name / f"{i}.png", value=10 * i)
    main(["folder", "--path", str(tmp_path / "images"), "--out", str(tmp_path / "out"), "--size", "16"])
    assert [
        Split(tmp_path / "out", name, ("No Finding", "Effusion")).counts()["Effusion"]
        for name in ("train", "val", "test")
    ] == [6, 2, 2]
    assert (
        "no split folders: images are dealt to train, val and test, and one patient may be in two"
        in capsys.readouterr().out
    )
    main(
        [
            "folder",
            "--path",
            str(tmp_path / "images"),
            "--out",
            str(tmp_path / "test"),
            "--size",
            "16",
            "--ratios",
            "0,0,1",
        ]
    )
    assert list(open_store(tmp_path / "test").index()["splits"]) == ["test"]


def test_keys_of_like_names_stay_apart(tmp_path):
    names = ["a.png", "a.jpg", "COVID (1).png", "COVID(1).png", "胸部.png", "胸像.png", "plain.png"]
    for split in ("train", "val", "test"):
        for i, name in enumerate(names):
            picture(tmp_path / "images" / split / "Mass" / name, value=20 + 30 * i + len(split))
    main(["folder", "--path", str(tmp_path / "images"), "--out", str(tmp_path / "out"), "--size", "16"])
    split = Split(tmp_path / "out", "train")
    keys = {split.meta(i)["source"]: split.key(i) for i in range(len(split))}
    assert len(set(keys.values())) == len(names)
    assert keys["plain.png"] == "Mass-plain"
    assert keys["a.png"].startswith("Mass-a-")
    main(["verify", str(tmp_path / "out")])


def text_table(root: Path, rows: list[str], header: str = "path,finding,patient") -> str:
    return "\r\n".join([header, *rows]) + "\r\n"


EXCEL = {
    "plain": lambda text: text.encode(),
    "bom": lambda text: text.encode("utf-8-sig"),
    "semicolons": lambda text: text.replace(",", ";").encode("utf-8-sig"),
    "cp1252": lambda text: text.encode("cp1252"),
    "utf16": lambda text: text.replace(",", "\t").encode("utf-16"),
    "sep": lambda text: ("sep=;\r\n" + text.replace(",", ";")).encode(),
    "mac": lambda text: text.replace("\r\n", "\r").encode(),
    "blank": lambda text: (text.replace("\r\n", "\r\n\r\n") + ",,\r\n , ,\r\n").encode(),
    "spaces": lambda text: text.replace(",", " , ").encode(),
    "quoted": lambda text: text.replace(",", '","').replace("\r\n", '"\r\n"').encode()[:-1].join([b'"', b""]),
}


@pytest.mark.parametrize("kind", EXCEL)
def test_tables_as_spreadsheets_save_them(tmp_path, kind, capsys):
    names = [f"Müller {i}.png" for i in range(20)]
    for i, name in enumerate(names):
        picture(tmp_path / "images" / name, value=10 * i)
    rows = [f"{name},{('No Finding', 'Effusion')[i % 2]},P{i}" for i, name in enumerate(names)]
    (tmp_path / "t.csv").write_bytes(EXCEL[kind](text_table(tmp_path, rows)))
    command = [
        "csv",
        "--csv",
        str(tmp_path / "t.csv"),
        "--images",
        str(tmp_path / "images"),
        "--patient-column",
        "patient",
        "--size",
        "16",
    ]
    main([*command, "--out", str(tmp_path / "out")])
    split = Split(tmp_path / "out", "train", ("No Finding", "Effusion"))
    assert len(split) == 12
    assert all(split.meta(i)["source"] in names and split.meta(i)["patient"].startswith("P") for i in range(12))
    assert ("is read as Windows-1252" in capsys.readouterr().err) == (kind == "cp1252")


def test_paths_as_other_systems_write_them(tmp_path):
    import unicodedata

    for i in range(20):
        picture(tmp_path / "images/Über" / f"Müller {i}.PNG", value=10 * i)
    written = [
        lambda i: f"Über\\Müller {i}.PNG",
        lambda i: unicodedata.normalize("NFD", f"Über/Müller {i}.PNG"),
        lambda i: f"Über/Müller {i}",
        lambda i: f"über/müller {i}.png",
    ]
    rows = [f"{written[i % 4](i)},{('No Finding', 'Effusion')[i % 2]},{i}" for i in range(20)]
    (tmp_path / "t.csv").write_text(text_table(tmp_path, rows))
    main(
        [
            "csv",
            "--csv",
            str(tmp_path / "t.csv"),
            "--images",
            str(tmp_path / "images"),
            "--out",
            str(tmp_path / "out"),
            "--size",
            "16",
        ]
    )
    assert len(Split(tmp_path / "out", "train")) == 12


def packed_table(root: Path, header: str, rows: list[str], *flags: str, images: int = 40) -> Path:
    rng = np.random.default_rng(0)
    (root / "images").mkdir(exist_ok=True)
    for i in range(images):
        Image.fromarray(rng.integers(0, 255, (30, 40), np.uint8)).save(root / f"images/{i}.png")
    (root / "t.csv").write_text("\n".join([header, *rows]) + "\n")
    main(
        [
            "csv",
            "--csv",
            str(root / "t.csv"),
            "--images",
            str(root / "images"),
            "--out",
            str(root / "out"),
            "--size",
            "16",
            *flags,
        ]
    )
    return root / "out"


def all_findings(root: Path) -> list[tuple[str, ...]]:
    return [found for name in open_store(root).index()["splits"] for found in Split(root, name).findings()]


def test_healthy_is_only_whom_the_table_calls_so(tmp_path):
    # No Finding, Effusion, Pneumonia, Support Devices: well; effusion; another disease; well with a device; not said
    kinds = ["1.0,,,", ",1.0,,", ",0.0,1.0,", "1.0,,,1.0", ",,,"]
    rows = [f"{i}.png,{kinds[i % 5]}" for i in range(40)]
    out = packed_table(
        tmp_path, "path,No Finding,Effusion,Pneumonia,Support Devices", rows, "--finding-column", "Effusion"
    )
    assert sorted(all_findings(out)) == [()] * 16 + [("Effusion",)] * 8 + [("No Finding",)] * 16
    healthy = [len(Split(out, name, ("No Finding", "Effusion"))) for name in ("train", "val", "test")]
    assert sum(healthy) == 24, "nobody else is healthy, although no finding that was asked for is there"


def test_a_device_is_no_disease(tmp_path):
    rows = [f"{i}.png,{('1,,', '1,,1', ',1,1')[i % 3]}" for i in range(36)]
    out = packed_table(
        tmp_path,
        "path,No Finding,Effusion,Support Devices",
        rows,
        "--finding-column",
        "No Finding,Effusion,Support Devices",
    )
    assert set(all_findings(out)) == {
        ("No Finding",),
        ("No Finding", "Support Devices"),
        ("Effusion", "Support Devices"),
    }
    (tmp_path / "out").rename(tmp_path / "before")
    with pytest.raises(InputError, match=r"row 2: says No Finding and something else \(Effusion\)"):
        packed_table(tmp_path, "path,No Finding,Effusion", ["0.png,1,1"], "--finding-column", "No Finding,Effusion")


def test_a_table_without_no_finding_says_who_is_taken_as_healthy(tmp_path, capsys):
    rows = [f"{i}.png,{('1,0,', '0,1,', '0,0,x', ',0,x')[i % 4]}" for i in range(40)]
    out = packed_table(tmp_path, "path,Effusion,Pneumonia,note", rows, "--finding-column", "Effusion")
    said = capsys.readouterr().out
    assert (
        "its 10 rows with a 0 for each of the findings named are taken as healthy; 10 others are not, for they have a "
        "1 in another column: Pneumonia 10" in said
    )
    assert sorted(all_findings(out)) == [()] * 20 + [("Effusion",)] * 10 + [("No Finding",)] * 10


@pytest.mark.parametrize("word", ["nan", "NaN", "None", "null", "N/A", ""])
def test_nothing_is_no_finding(tmp_path, word, capsys):
    rows = [f"{i}.png,{('No Finding', 'Effusion', word)[i % 3]}" for i in range(36)]
    with pytest.raises(
        InputError,
        match=r"row 4: .*; write 'No Finding' where there is none, or leave such rows out with --on-bad skip",
    ):
        packed_table(tmp_path, "path,finding", rows)
    packed_table(tmp_path, "path,finding", rows, "--on-bad", "skip")
    assert "left out 12: no finding in column 'finding'" in capsys.readouterr().out


def test_two_spellings_of_a_finding_are_told(tmp_path, capsys):
    names = ("No finding", "Effusion", "effusion", "Pleural_Thickening", "Pleural Thickening")
    packed_table(tmp_path, "path,finding", [f"{i}.png,{names[i % 5]}" for i in range(40)])
    said = capsys.readouterr().out
    assert "'Effusion' (8) and 'effusion' (8) are findings of their own" in said
    assert (
        "'Pleural Thickening' (8) and 'Pleural_Thickening' (8)" in said
        or "'Pleural_Thickening' (8) and 'Pleural Thickening' (8)" in said
    )
    assert "'No finding' is read as 'No Finding'" in said


def test_a_comma_in_a_finding_is_refused_when_packing(tmp_path):
    with pytest.raises(InputError, match="'Effusion, left' must not hold a comma"):
        packed_table(
            tmp_path, "path,finding", [f'{i}.png,"{("No Finding", "Effusion, left")[i % 2]}"' for i in range(20)]
        )
    for split in ("train", "val"):
        picture(tmp_path / "folders" / split / "Mass, left" / "x.png")
    with pytest.raises(InputError, match="'Mass, left' must not hold a comma"):
        main(["folder", "--path", str(tmp_path / "folders"), "--out", str(tmp_path / "x")])


def test_patients_that_may_be_one_are_told(tmp_path, capsys):
    who = ["007", "7", "12", "12.0", "ab", "AB", "x", "y"]
    packed_table(
        tmp_path,
        "path,finding,p",
        [f"{i}.png,Mass,{who[i % 8]}" for i in range(40)],
        "--patient-column",
        "p",
        "--ratios",
        "0.6,0.4,0",
    )
    assert (
        "warning: 3 patients may stand under two IDs that differ only by zeros or case: '007' and '7', '12' and "
        "'12.0', 'AB' and 'ab'" in capsys.readouterr().err
    )


def test_one_patient_for_everybody_is_refused(tmp_path):
    with pytest.raises(InputError, match="column 'p' holds 'ANON' for all 40 images, so nobody can be split"):
        packed_table(tmp_path, "path,finding,p", [f"{i}.png,Mass,ANON" for i in range(40)], "--patient-column", "p")


@pytest.mark.parametrize(
    ("header", "box"),
    [
        ("x,y,width,height", "10,12,5,6"),
        ("x_min,y_min,x_max,y_max", "10,12,15,18"),
        ("X0,Y0,X1,Y1", "10,12,15,18"),
        ("x,y,w,h", "10,12,5,6"),
    ],
)
def test_a_row_for_each_box(tmp_path, header, box, capsys):
    rows = []
    for i in range(20):
        rows += [f"{i},{box},1", f"{i},1,2,3,4,1"] if i % 2 else [f"{i},,,,,0"]
    out = packed_table(
        tmp_path,
        f"patientId,{header},Target",
        rows,
        "--path-column",
        "patientId",
        "--finding-column",
        "Target",
        images=20,
    )
    split = Split(out, "train", ("No Finding", "Target"))
    assert split.counts() == {"No Finding": 6, "Target": 6}
    boxes = {tuple(round(v, 3) for v in box.xyxy) for i in range(len(split)) for box in split.meta(i)["boxes"]}
    assert tuple(v * s for v, s in zip((10, 12, 15, 18), (16 / 40, 16 / 30) * 2, strict=True)) == pytest.approx(
        max(boxes), abs=1e-3
    )
    assert "lesion boxes are taken from the table's own columns" in capsys.readouterr().out


def test_rows_of_an_image_that_disagree(tmp_path):
    for rows, words in (
        (["0.png,1,2,9,9,Mass", "0.png,,,,,No Finding"], "rows 2 and 3: say Mass, No Finding of one image"),
        (["0.png,1,2,9,9,Mass", "0.png,1,2,9,9,Mass"], "1 images are listed more than once"),
    ):
        with pytest.raises(InputError, match=words):
            packed_table(tmp_path, "path,x,y,w,h,finding", rows)


LUNGS = np.zeros((40, 40), np.uint8)
LUNGS[8:32, 4:16], LUNGS[8:32, 24:36] = 255, 255


@pytest.mark.parametrize("kind", ["gif", "palette", "alpha", "rgb", "bmp"])
def test_masks_of_any_kind(tmp_path, kind):
    for i in range(4):
        picture(tmp_path / "i" / f"{i}.png", size=(40, 40))
        (tmp_path / "m").mkdir(exist_ok=True)
        mask = Image.fromarray(LUNGS)
        made = {
            "gif": mask,
            "palette": mask.convert("P"),
            "bmp": mask,
            "alpha": Image.merge("RGBA", [*[Image.new("L", mask.size)] * 3, mask]),
            "rgb": Image.merge("RGB", [mask, *[Image.new("L", mask.size)] * 2]),
        }[kind]
        made.save(tmp_path / "m" / f"{i}.{kind if kind in ('gif', 'bmp') else 'png'}")
    main(
        [
            "masks",
            "--images",
            str(tmp_path / "i"),
            "--masks",
            str(tmp_path / "m"),
            "--out",
            str(tmp_path / "out"),
            "--size",
            "40",
        ]
    )
    assert (Split(tmp_path / "out", "train", masks=True).mask(0) == (LUNGS > 0)).all()


def test_masks_of_one_lung_are_told_and_two_folders_are_one_mask(tmp_path, capsys):
    for i in range(4):
        picture(tmp_path / "i" / f"{i}.png", value=40 * i, size=(40, 40))
        for name, columns in (("left", slice(20, 40)), ("right", slice(0, 20))):
            (tmp_path / name).mkdir(exist_ok=True)
            half = np.zeros_like(LUNGS)
            half[:, columns] = LUNGS[:, columns]
            Image.fromarray(half).save(tmp_path / name / f"{i}.png")
    command = ["masks", "--images", str(tmp_path / "i"), "--masks", str(tmp_path / "left"), "--size", "40"]
    main([*command, "--out", str(tmp_path / "one")])
    assert "warning: 4 of 4 samples: the mask shows a single lung; " in capsys.readouterr().out
    main([*command, "--masks", str(tmp_path / "right"), "--out", str(tmp_path / "both")])
    assert (Split(tmp_path / "both", "train", masks=True).mask(0) == (LUNGS > 0)).all()
    assert "warning" not in capsys.readouterr().out


def test_an_inverted_mask_is_refused(tmp_path):
    for i in range(4):
        picture(tmp_path / "i" / f"{i}.png", size=(40, 40))
        (tmp_path / "m").mkdir(exist_ok=True)
        Image.fromarray(255 - LUNGS).save(tmp_path / "m" / f"{i}.png")
    with pytest.raises(
        InputError, match=r"is white along 100% of its border, so it shows all but the lungs; invert it"
    ):
        main(["masks", "--images", str(tmp_path / "i"), "--masks", str(tmp_path / "m"), "--out", str(tmp_path / "out")])


def test_nih_copies_with_other_suffixes(archive):
    for n, path in enumerate(sorted((archive / "nih").rglob("*.png"))):
        if n % 2:
            path.rename(path.with_suffix(".PNG"))
        else:
            Image.open(path).save(path.with_suffix(".jpeg"))
            path.unlink()
    main(nih(archive, "--task", "ne"))
    assert len(Split(archive / "out", "train", ("No Finding", "Effusion"))) == 36


def test_a_subset_of_nih_is_counted_by_finding(archive):
    for path in list((archive / "nih").rglob("*.png"))[::2]:
        path.unlink()
    with pytest.raises(
        InputError, match=r"images that it lists are missing: .*\(there are No Finding \d+ of 60, Effusion \d+ of 30\)"
    ):
        main(nih(archive, "--task", "ne"))


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "train-0.tar")
    with pytest.raises(InputError, match=r"train-0\.tar: not a whole tar file \(not a file\)"):
        main(["index", str(tmp_path)])
    for split in ("train", "val"):
        picture(tmp_path / "images" / split / "Mass" / "x.png")
        os.mkfifo(tmp_path / "images" / split / "Mass" / "y.png")
    main(["folder", "--path", str(tmp_path / "images"), "--out", str(tmp_path / "out"), "--size", "16"])
    assert len(Split(tmp_path / "out", "train")) == 1


def test_a_mask_with_a_number_for_each_lobe(tmp_path):
    lobes = np.zeros((40, 40), np.uint8)
    for k, (rows, columns) in enumerate(
        [(slice(8, 20), slice(4, 16)), (slice(20, 32), slice(4, 16)), (slice(8, 32), slice(24, 36))]
    ):
        lobes[rows, columns] = k + 1
    lobes[8:14, 24:36], lobes[26:32, 4:16] = 4, 5
    for i in range(4):
        picture(tmp_path / "i" / f"{i}.png", size=(40, 40))
        (tmp_path / "m").mkdir(exist_ok=True)
        Image.fromarray(lobes).save(tmp_path / "m" / f"{i}.png")
    main(
        [
            "masks",
            "--images",
            str(tmp_path / "i"),
            "--masks",
            str(tmp_path / "m"),
            "--out",
            str(tmp_path / "out"),
            "--size",
            "40",
        ]
    )
    assert (Split(tmp_path / "out", "train", masks=True).mask(0) == (LUNGS > 0)).all()


def test_columns_that_are_there_twice_are_refused(tmp_path):
    with pytest.raises(InputError, match="has 2 columns 'finding'; rename one"):
        packed_table(tmp_path, "path,finding,finding", ["0.png,Mass,Nodule"])


def test_paths_from_the_folder_above(tmp_path):
    out = packed_table(tmp_path, "path,finding", [f"images/{i}.png,Mass" for i in range(40)])
    assert sum(len(Split(out, name)) for name in ("train", "val", "test")) == 40


def test_images_whose_rows_disagree_can_be_left_out(tmp_path, capsys):
    rows = [f"{i}.png,1,2,9,9,Mass" for i in range(40)] + ["0.png,,,,,No Finding"]
    out = packed_table(tmp_path, "path,x,y,w,h,finding", rows, "--on-bad", "skip")
    assert sum(len(Split(out, name)) for name in ("train", "val", "test")) == 39
    assert "left out 1: rows of one image that disagree" in capsys.readouterr().out


def test_images_beside_the_class_folders_are_counted(class_folders, tmp_path, capsys):
    picture(class_folders / "loose.png")
    picture(class_folders / "train/loose.png")
    picture(class_folders / "train/1Effusion/deep/er/x.png")
    picture(class_folders / "holdout/1Effusion/x.png")
    main(["folder", "--path", str(class_folders), "--out", str(tmp_path / "out"), "--size", "32"])
    said = capsys.readouterr().out
    assert f"left out 1: images in no class folder, in {class_folders}" in said
    assert f"left out 1: images in no class folder, in {class_folders}/train" in said
    assert f"left out 1: a folder inside a class folder ({class_folders}/train/1Effusion/deep, with 1 images)" in said
    assert "left out 1: a folder that is no split (holdout, with 1 images)" in said


def test_another_spelling_is_named_where_a_split_lacks_a_finding(tmp_path):
    rows = [f"{i}.png,{('No Finding', 'Effusion')[i % 2] if i else 'effusion'}" for i in range(40)]
    with pytest.raises(InputError, match=r"gets no image of effusion \(is it 'Effusion', spelt otherwise\?\)"):
        packed_table(tmp_path, "path,finding", rows)


def test_decimal_commas_of_spreadsheets(tmp_path):
    rows = [f"{i}.png;{('No Finding', 'Mass')[i % 2]};{';;;' if i % 2 == 0 else '2,5;3,5;10,0;5,5'}" for i in range(40)]
    out = packed_table(tmp_path, "path;finding;x;y;w;h", rows)
    split = Split(out, "train", ("No Finding", "Mass"))
    boxes = [box.xyxy for i in range(len(split)) for box in split.meta(i)["boxes"]]
    assert boxes[0] == pytest.approx((2.5 * 16 / 40, 3.5 * 16 / 30, 12.5 * 16 / 40, 9 * 16 / 30))


def test_devices_are_no_disease_of_the_ill_or_the_healthy(tmp_path):
    rows = [f"{i}.png,{('1,,', '1,,1', ',1,', ',1,1')[i % 4]}" for i in range(40)]
    out = packed_table(
        tmp_path,
        "path,No Finding,Effusion,Support Devices",
        rows,
        "--finding-column",
        "No Finding,Effusion,Support Devices",
    )
    counts = [Split(out, name, ("No Finding", "Effusion")).counts() for name in ("train", "val", "test")]
    assert sum(c["No Finding"] for c in counts) == sum(c["Effusion"] for c in counts) == 20
