"""Image files, looked at with a finished run."""

import itertools
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from curves import ROOT
from jobs import SMALL
from PIL import Image

import trainer
from shards.__main__ import main as shards_main
from shards.dataset import Split
from shards.errors import InputError
from shards.phantom import Phantoms
from trainer import evaluate, predict
from trainer import train as loop
from trainer.build import build
from trainer.command import resolve


@pytest.fixture(scope="module")
def padded(tmp_path_factory):
    """Class folders of 100 x 50 phantoms, packed with their aspect kept."""
    root = tmp_path_factory.mktemp("padded")
    source = Phantoms(100, 3, size=100, findings=("No Finding", "Effusion"))
    for item in source.items:
        folder = root / "images" / item.split / item.findings[0].replace(" ", "")
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(source.load(item).image[25:75]).save(folder / f"{item.key}.png")
    shards_main(
        [
            "folder",
            "--path",
            str(root / "images"),
            "--out",
            str(root / "shards"),
            "--size",
            "64",
            "--aspect",
            "pad",
            "--format",
            "png",
        ]
    )
    return root


def test_prediction_goes_on_after_a_bad_file_and_says_so(trained, flags, tmp_path, capsys):
    Image.fromarray(np.full((70, 90), 99, np.uint8)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_text("x")
    with pytest.raises(
        InputError,
        match=r"1 of 2 images could not be used: .*bad\.png: cannot be decoded as an image \(1 bytes; no known image "
        r"format\)",
    ):
        predict.main(
            [
                "--run",
                str(tmp_path / "run"),
                "--look_at",
                "Effusion",
                str(tmp_path / "bad.png"),
                str(tmp_path / "good.png"),
            ]
        )
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["lung_box"] is None  # a gray image has no lungs, so nothing is known of a region
    assert line["energy_in_region"] is None
    with pytest.raises(InputError, match="no such image file: nowhere"):
        predict.main(["--run", str(tmp_path / "run"), "nowhere.png"])
    with pytest.raises(InputError, match=r"--out \S*good\.png/x: cannot be written"):
        predict.main(
            ["--run", str(tmp_path / "run"), "--out", str(tmp_path / "good.png/x"), str(tmp_path / "good.png")]
        )
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"no such image file: \S*empty \(a folder without images\), nowhere\*"):
        predict.main(["--run", str(tmp_path / "run"), str(tmp_path / "empty"), "nowhere*"])
    (tmp_path / "more").mkdir()
    shutil.copy(tmp_path / "good.png", tmp_path / "more")
    capsys.readouterr()
    predict.main(["--run", str(tmp_path / "run"), str(tmp_path / "more"), str(tmp_path / "g*.png")])
    assert [json.loads(line)["image"] for line in capsys.readouterr().out.splitlines()] == [
        str(tmp_path / "more/good.png"),
        str(tmp_path / "good.png"),
    ]
    assert (tmp_path / "run/model.safetensors").stat().st_mode & 0o044


def test_predict_sees_what_training_saw(padded, tmp_path, capsys, monkeypatch):
    """The figures of one file by the report and by predict; its lung box in pixels of the file, which is not square."""
    monkeypatch.setattr("trainer.lungs.cleanup.believable", lambda masks, *_: torch.ones(len(masks), dtype=torch.bool))
    out = tmp_path / "run"
    loop.main(["--shards", str(padded / "shards"), "--out", str(out), *SMALL, "--epochs", "1"])
    split = Split(padded / "shards", "test", ("No Finding", "Effusion"))
    known = [json.loads(line) for line in (out / "predictions_test.jsonl").read_text().splitlines()]
    files = [next((padded / "images/test").rglob(split.meta(i)["source"])) for i in range(4)]
    capsys.readouterr()
    predict.main(["--run", str(out), *map(str, files)])
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    opened = evaluate.open_run(out)
    for i in range(4):
        assert told[i]["probability"] == pytest.approx(known[i]["probability"], abs=1e-5)
        stored = torch.from_numpy(split.image(i).copy())[None, None].float() / 255
        # Of the 64 x 64 square, in which the file has rows 16 to 48
        x0, y0, x1, y1 = opened.segmenter.find(stored, 64).boxes[0].tolist()
        wanted = [x0 * 100 / 64, (y0 - 16) * 50 / 32, x1 * 100 / 64, (y1 - 16) * 50 / 32]
        assert told[i]["lung_box"] == [
            round(min(max(v, 0), side)) for v, side in zip(wanted, (100, 50) * 2, strict=True)
        ]


def test_overlays_and_maps_are_of_the_file_s_own_size(padded, tmp_path, capsys, monkeypatch):
    """The file is not square, and was packed with its aspect kept; its name is an odd one."""
    monkeypatch.setattr("trainer.lungs.cleanup.believable", lambda masks, *_: torch.ones(len(masks), dtype=torch.bool))
    out = tmp_path / "run"
    loop.main(["--shards", str(padded / "shards"), "--out", str(out), *SMALL, "--epochs", "1", "--seed", "1"])
    file = tmp_path / "Th\u00f6rax $1$ 50%.png"
    cxr, files = trainer.load(out), sorted((padded / "images/test").rglob("*.png"))
    shutil.copy(next(one for one in files if cxr.predict(one).energy_in_region["Effusion"]), file)
    (tmp_path / "list.txt").write_text(f"{file.name}\n\n{file}\n")
    capsys.readouterr()
    predict.main(["--run", str(out), "--look_at", "Effusion", "--cam", "npy", f"@{tmp_path / 'list.txt'}"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["image"] for line in lines] == [str(file)] * 2
    assert len({line["overlay"] for line in lines} | {line["cam"] for line in lines}) == 4

    seen = cxr.predict(file)
    finding = lines[0]["cam_of"]
    for line in lines:
        with Image.open(line["overlay"]) as picture:
            assert (picture.size, picture.mode) == ((100, 50), "RGB")
        cam = np.load(line["cam"])
        assert cam.dtype == np.float32
        assert cam == pytest.approx(seen.cam[finding], abs=1e-4)
    assert seen.probability == pytest.approx(lines[0]["probability"], abs=1e-6)
    assert list(seen.lung_box) == lines[0]["lung_box"]
    assert seen.lungs.shape == seen.region[finding].shape == (50, 100)
    rows, columns = np.nonzero(seen.lungs)
    x0, y0, x1, y1 = seen.lung_box  # what holds them, but for rounding to pixels of either size
    assert np.abs([columns.min() - x0, rows.min() - y0, columns.max() + 1 - x1, rows.max() + 1 - y1]).max() <= 4
    # What share of the map lies in the region: at the file's size as in the square, where the padding has no part of it
    share = (seen.cam[finding] * seen.region[finding]).sum() / seen.cam[finding].sum()
    assert share >= lines[0]["energy_in_region"] - 0.05

    capsys.readouterr()
    predict.main(
        ["--run", str(out), "--out", str(tmp_path / "none"), "--no-overlay", "--batch", "3", str(padded / "shards")]
    )
    many = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    index = json.loads((padded / "shards/index.json").read_text())
    assert len(many) == sum(entry["samples"] for entry in index["splits"].values())
    assert "overlay" not in many[0]
    assert not (tmp_path / "none").exists()


def test_no_image_is_overwritten_and_files_of_one_name_stay_apart(trained, tmp_path, capsys):
    for folder in ("a", "b", "c"):
        (tmp_path / folder).mkdir()
        Image.fromarray(np.full((40, 50), 90, np.uint8)).save(tmp_path / folder / "view1.png")
    before = (tmp_path / "a/view1.png").read_bytes()
    with pytest.raises(InputError, match=r"--out \S*a: would overwrite \S*view1.png; name another folder"):
        predict.main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "a"), str(tmp_path / "a")])
    assert (tmp_path / "a/view1.png").read_bytes() == before
    capsys.readouterr()
    predict.main(["--run", str(tmp_path / "run"), "--out", str(tmp_path / "o"), *(str(tmp_path / f) for f in "abc")])
    drawn = [json.loads(line)["overlay"] for line in capsys.readouterr().out.splitlines()]
    assert [path.rpartition("/")[2] for path in drawn] == ["view1.png", "view1_2.png", "view1_3.png"]


def test_a_loaded_run_takes_pixels_and_says_what_it_cannot(trained, flags, tmp_path):
    cxr = trainer.load(tmp_path / "run")
    image = Split(flags[1], "test", ("No Finding", "Effusion")).image(0)
    seen = cxr.predict(image)
    assert set(seen.probability) == set(seen.cam) == {"No Finding", "Effusion"}
    assert sum(seen.probability.values()) == pytest.approx(1)
    assert seen.predicted == [max(seen.probability, key=seen.probability.get)]
    point = json.loads((tmp_path / "run/report.json").read_text())["threshold"]
    assert seen.threshold == {"Effusion": point}
    assert seen.positive == {"Effusion": seen.probability["Effusion"] >= point}
    assert isinstance(cxr.model, torch.nn.Module)
    assert not cxr.model.training
    for wrong, words in (
        (image / 255.0, "float64"),
        (image[..., None], r"\[64, 64, 1\]"),
        (image[:0], r"\[0, 64\]"),
    ):
        with pytest.raises(InputError, match=f"an image of .*{words}.*expected gray pixels, uint8"):
            cxr.predict(wrong)
    with pytest.raises(InputError, match="is not a run folder"):
        trainer.load(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"@\S*none.txt: cannot be read as a list"):
        predict.main(["--run", str(tmp_path / "run"), f"@{tmp_path / 'none.txt'}"])
    with pytest.raises(InputError, match="--batch 0: must be at least 1"):
        predict.main(["--run", str(tmp_path / "run"), "--batch", "0", "x.png"])


def test_predict_brightens_deep_images_as_the_shards_did(tmp_path, segmenter, capsys):
    rng = np.random.default_rng(0)
    for split, name in itertools.product(("train", "val", "test"), ("0NoFinding", "1Effusion")):
        folder = tmp_path / "images" / split / name
        folder.mkdir(parents=True)
        for i in range(8):
            values = rng.integers(0, 900 if i else 4000, (64, 64)).astype(np.uint16)
            Image.fromarray(values).save(folder / f"{split}{i}.png")
    shards_main(
        [
            "folder",
            "--path",
            str(tmp_path / "images"),
            "--out",
            str(tmp_path / "shards"),
            "--size",
            "64",
            "--format",
            "png",
        ]
    )
    loop.main(
        [
            "--shards",
            str(tmp_path / "shards"),
            "--out",
            str(tmp_path / "run"),
            "--lungs.weights",
            str(segmenter),
            *SMALL,
            "--epochs",
            "1",
        ]
    )
    split = Split(tmp_path / "shards", "test", ("No Finding", "Effusion"))
    known = [json.loads(line) for line in (tmp_path / "run/predictions_test.jsonl").read_text().splitlines()]
    files = [str(next((tmp_path / "images/test" / folder).glob(split.meta(i)["source"]))) for i, folder in enumerate(
        ("0NoFinding", "1Effusion")[split.targets()[i].argmax()] for i in range(len(split)))]  # fmt: skip
    capsys.readouterr()
    predict.main(["--run", str(tmp_path / "run"), *files])
    for line, reference in zip(map(json.loads, capsys.readouterr().out.splitlines()), known, strict=True):
        assert line["probability"] == pytest.approx(reference["probability"], abs=1e-5)


def test_files_whose_names_are_no_text_get_their_line(trained, flags, tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    os.makedirs(folder)
    buffer = np.random.default_rng(0).integers(0, 255, (70, 90), dtype=np.uint8)
    Image.fromarray(buffer).save(tmp_path / "x.png")
    os.rename(tmp_path / "x.png", folder + b"/im\xff$1$.png")
    Image.fromarray(buffer).save(tmp_path / "plain.png")
    command = [
        sys.executable,
        "-m",
        "trainer.predict",
        "--run",
        str(tmp_path / "run"),
        os.fsdecode(folder + b"/im\xff$1$.png"),
        str(tmp_path / "plain.png"),
    ]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONWARNINGS": "ignore"}, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
    assert b"Traceback" not in done.stderr


def test_predict_says_that_a_run_has_not_finished(flags, tmp_path, shards, capsys):
    build(resolve([*flags, "--epochs", "1"])).train()
    evaluate.main(["--run", str(tmp_path / "run"), "--shards", str(shards), "--workers", "0"])
    Image.fromarray(Split(shards, "test").image(0)).save(tmp_path / "x.png")
    predict.main(["--run", str(tmp_path / "run"), str(tmp_path / "x.png")])
    assert "has not finished: its best model so far is used" in capsys.readouterr().err


def test_what_is_drawn_is_what_the_threshold_calls_present(trained, shards, tmp_path, capsys):
    """Where the most probable class is another one, that is counted and said."""
    report = json.loads((tmp_path / "run/report.json").read_text())
    for threshold, drawn in ((0.0, "Effusion"), (1.1, None)):
        (tmp_path / "run/report.json").write_text(json.dumps(report | {"threshold": threshold}))
        images = [Image.fromarray(Split(shards, "test").image(i)) for i in range(8)]
        for i, image in enumerate(images):
            image.save(tmp_path / f"x{i}.png")
        predict.main(["--run", str(tmp_path / "run"), "--no-overlay", str(tmp_path / "x*.png")])
        said = capsys.readouterr()
        lines = [json.loads(line) for line in said.out.splitlines()]
        assert {line["positive"]["Effusion"] for line in lines} == {drawn is not None}
        assert all(line["cam_of"] == (drawn or line["predicted"]) for line in lines)
        apart = sum((line["predicted"] == "Effusion") != line["positive"]["Effusion"] for line in lines)
        assert (f"in {apart} of 8 images `predicted`" in said.err) == (apart > 0)
