import numpy as np
import pytest
from PIL import Image

from shards.__main__ import main
from shards.errors import InputError
from shards.sources import folder_finding
from shards.stream import Split, read_index


def picture(path, value=100, size=(40, 30), mode="L"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full(size[::-1], value, np.uint8)).convert(mode).save(path)


@pytest.fixture
def class_folders(tmp_path):
    root = tmp_path / "images"
    for split in ("train", "val", "test"):
        for number, name in enumerate(("0NoFinding", "1Effusion", "2Nodule")):
            for i in range(2):
                picture(root / split / name / f"im.{i}.png", value=50 * number)
    return root


@pytest.mark.parametrize(
    ("folder", "finding"),
    [("0NoFinding", "No Finding"), ("1Effusion", "Effusion"), ("3SubcuEmphysema", "Subcutaneous Emphysema"), ("2_Nodule", "Nodule"), ("7", "7")],
)
def test_a_leading_digit_is_order(folder, finding):
    assert folder_finding(folder) == finding


def test_class_folders_become_shards(class_folders, tmp_path, capsys):
    picture(class_folders / "train" / "1Effusion" / "rgb.jpg", mode="RGB")
    (class_folders / "train" / "1Effusion" / "Thumbs.db").write_bytes(b"x")
    main(["folder", "--path", str(class_folders), "--out", str(tmp_path / "out"), "--size", "32"])
    assert "skipped 1: not an image file" in capsys.readouterr().out
    split = Split(tmp_path / "out", "train", ("No Finding", "Effusion"))
    assert split.counts() == {"No Finding": 2, "Effusion": 3}
    assert split.left_out == 2
    assert split.image(0).shape == (32, 32)
    assert split.key(0) == "0NoFinding-im_0"
    assert read_index(tmp_path / "out")["findings"] == ["No Finding", "Effusion", "Nodule"]
    main(["verify", str(tmp_path / "out")])


def test_a_class_missing_from_a_split_is_named(class_folders, tmp_path):
    for file in (class_folders / "val" / "1Effusion").iterdir():
        file.unlink()
    with pytest.raises(InputError, match=r"val: has no images of Effusion"):
        main(["folder", "--path", str(class_folders), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_a_corrupt_image_leaves_nothing_behind(class_folders, tmp_path):
    bad = class_folders / "test" / "1Effusion" / "im.1.png"
    bad.write_bytes(bad.read_bytes()[:40])
    with pytest.raises(InputError, match=r"im\.1\.png: cannot be decoded"):
        main(["folder", "--path", str(class_folders), "--out", str(tmp_path / "out")])
    assert [p.name for p in tmp_path.iterdir()] == ["images"]


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
        picture(tmp_path / "m" / f"a{i}_mask.png", value=1)  # a 0/1 mask
    for out in ("one", "two"):
        main(["masks", "--images", str(tmp_path / "i"), "--masks", str(tmp_path / "m"), "--out", str(tmp_path / out), "--size", "32"])
    val = Split(tmp_path / "one", "val", masks=True)
    assert len(val) == 2
    assert val.mask(0).all()
    for name in ("train/000000.tar", "val/000000.tar", "index.json"):
        assert (tmp_path / "one" / name).read_bytes().replace(b"one", b"two") == (tmp_path / "two" / name).read_bytes()


@pytest.mark.parametrize(("folder", "words"), [("m", "1 masks without an image: alone"), ("i", "1 images without a mask: alone")])
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
