import json
import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from curves import ROOT

from shards.dataset import Split
from shards.errors import InputError
from shards.joined import Joined
from shards.loader import Loader
from shards.pack import pack
from shards.phantom import Phantoms
from shards.plan import EpochPlan
from trainer import lung_report, train_lungs
from trainer.launching import Accelerator
from trainer.lungs import load_segmenter

SMALL = ["--channels", "[4,4,8,8,8]", "--patch", "1", "--size", "32", "--batch", "8", "--epochs", "3", "--workers", "0"]


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    root = tmp_path_factory.mktemp("other") / "shards"
    pack(Phantoms(20, 9, size=64), root, dataset="elsewhere", per_shard=8)
    return root


def test_several_sources_are_trained_on_and_each_is_measured(shards, other, tmp_path, capsys):
    out = tmp_path / "run"
    train_lungs.main(["--shards", f"{shards},{other}", "--test", str(other), "--out", str(out), *SMALL])
    said = capsys.readouterr().out
    assert "phantom 60 + 20, elsewhere 12 + 4" in said
    report = json.loads((out / "report.json").read_text())
    assert {name: s["images"] for name, s in report["sources"].items()} == {
        "phantom": 20,
        "elsewhere": 4,
        "elsewhere (left out)": 20,
    }
    for summary in report["sources"].values():
        low, high = summary["dice_interval"]
        assert low <= summary["dice"] <= high
        assert set(summary["bottom"]) == {"bias", "deviation", "mean_absolute"}
    page = (out / "report.html").read_text()
    assert "elsewhere (left out)" in page
    assert "data:image/png;base64," in page
    assert load_segmenter(out).settings["channels"] == [4, 4, 8, 8, 8]
    with pytest.raises(InputError, match="already holds another run"):
        train_lungs.main(["--shards", str(shards), "--out", str(out), *SMALL])


def test_an_interrupted_training_goes_on_to_the_same_bits(shards, tmp_path, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    train_lungs.main(["--shards", str(shards), "--out", str(whole), *SMALL])
    ordinary = train_lungs.Trainer.end_epoch

    def stop(self, *arguments):
        ordinary(self, *arguments)
        if self.epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_lungs.Trainer, "end_epoch", stop)
        with pytest.raises(KeyboardInterrupt):
            train_lungs.main(["--shards", str(shards), "--out", str(stopped), *SMALL])
    with pytest.raises(InputError, match=r"the run was made with --size 32"):
        train_lungs.main(["--out", str(stopped), "--resume", "--size", "64"])
    with (stopped / "metrics.jsonl").open("a") as log:  # the power went between a line and its checkpoint
        log.write('{"epoch": 2, "loss": 9}\n')
    train_lungs.main(["--out", str(stopped), "--resume"])
    assert (whole / "lung_unet.safetensors").read_bytes() == (stopped / "lung_unet.safetensors").read_bytes()
    histories = [
        [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()] for out in (whole, stopped)
    ]
    assert [{k: v for k, v in line.items() if k != "seconds"} for line in histories[0]] == [
        {k: v for k, v in line.items() if k != "seconds"} for line in histories[1]
    ]


def test_a_second_phase_starts_from_other_weights(shards, tmp_path):
    train_lungs.main(["--shards", str(shards), "--out", str(tmp_path / "one"), *SMALL])
    second = [
        "--init",
        str(tmp_path / "one"),
        "--out",
        str(tmp_path / "two"),
        "--lr",
        "1e-9",
        "--batch",
        "8",
        "--epochs",
        "1",
        "--workers",
        "0",
    ]
    train_lungs.main(["--shards", str(shards), *second])
    one, two = (load_segmenter(tmp_path / name) for name in ("one", "two"))
    assert one.settings == two.settings
    for before, after in zip(one.unet.parameters(), two.unet.parameters(), strict=True):
        assert (before - after).abs().max() < 1e-6


def test_joined_splits_are_one(shards, other):
    parts = [Split(root, "train", masks=True) for root in (shards, other)]
    joined = Joined(parts)
    assert len(joined) == 72
    assert joined.shard_sizes().sum() == 72
    for position, part, at in ((0, 0, 0), (59, 0, 59), (60, 1, 0), (71, 1, 11)):
        assert (joined.image(position) == parts[part].image(at)).all()
        assert (joined.mask(position) == parts[part].mask(at)).all()
        assert joined.key(position) == parts[part].key(at)


def test_sources_of_different_sizes_are_refused(shards, tmp_path):
    pack(Phantoms(20, 9, size=48), tmp_path / "small", dataset="small")
    with pytest.raises(InputError, match=r"different sizes: 64x64 in .* 48x48 in"):
        train_lungs.main(["--shards", f"{shards},{tmp_path / 'small'}", "--out", str(tmp_path / "run"), *SMALL])
    assert not (tmp_path / "run").exists()


def test_bad_settings_name_their_flag(shards, tmp_path):
    base = ["--shards", str(shards), "--out", str(tmp_path / "run")]
    for more, match in (
        (["--channels", "[4,8]"], "--channels"),
        (["--size", "40"], "--size 40: must be a multiple of 16 x --patch 2"),
        (["--paint.gas", "2"], r"--paint\.gas 2"),
        (["--batch", "100"], "--batch 100 x 1 processes is more than the 60"),
    ):
        with pytest.raises(InputError, match=match):
            train_lungs.main([*base, *more])


def test_figures_of_known_masks():
    truth = np.zeros((1, 100, 100), bool)
    truth[0, 20:80, 10:90] = True
    found = np.zeros_like(truth)
    found[0, 20:74, 14:90] = True
    figures = lung_report.compare(torch.from_numpy(found), torch.from_numpy(truth))[0].tolist()
    overlap = 54 * 76
    assert figures[0] == pytest.approx(2 * overlap / (54 * 76 + 60 * 80), abs=1e-3)
    assert figures[2] == pytest.approx(overlap / (60 * 80), abs=1e-3)
    assert figures[3:7] == pytest.approx([0.04, 0, 0, -0.06])
    assert figures[7] == 0
    assert lung_report.surface_distance(found[0], truth[0]) == pytest.approx(0.06)
    assert lung_report.surface_distance(truth[0], truth[0]) == 0
    assert np.isnan(lung_report.surface_distance(np.zeros_like(truth[0]), truth[0]))


def test_every_image_is_measured_once(shards):
    split = Split(shards, "val", masks=True)
    segmenter = train_lungs.LungSegmenter([2, 2, 2, 2, 2], 32).eval()
    figures = lung_report.measure(
        Accelerator(cpu=True), segmenter, Loader(split, EpochPlan(split.shard_sizes(), shuffle=False), batch=3)
    )
    assert figures.shape == (20, len(lung_report.COLUMNS))


def test_a_lung_run_goes_on_with_another_batch(shards, tmp_path, monkeypatch):
    small = [
        "--channels",
        "[4,4,8,8,8]",
        "--patch",
        "1",
        "--size",
        "32",
        "--batch",
        "8",
        "--epochs",
        "4",
        "--workers",
        "0",
    ]
    ordinary, rates = train_lungs.Trainer.end_epoch, []

    def stops(self, *rest):
        rates.append(self.optimizer.param_groups[0]["lr"])
        ordinary(self, *rest)
        if self.epoch == 2 and len(rates) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(train_lungs.Trainer, "end_epoch", stops)
    with pytest.raises(KeyboardInterrupt):
        train_lungs.main(["--shards", str(shards), "--out", str(tmp_path / "run"), *small])
    train_lungs.main(["--out", str(tmp_path / "run"), "--resume", "--batch", "16"])
    assert rates[0] > rates[1] > rates[2] > rates[3] > 0
    assert rates[3] < 0.1 * rates[0]


def test_a_lung_loss_that_is_not_finite_saves_nothing(shards, tmp_path, monkeypatch):
    ordinary = train_lungs.bce_dice
    monkeypatch.setattr(train_lungs, "bce_dice", lambda *a: ordinary(*a) * math.nan)
    small = [
        "--channels",
        "[4,4,8,8,8]",
        "--patch",
        "1",
        "--size",
        "32",
        "--batch",
        "8",
        "--epochs",
        "1",
        "--workers",
        "0",
    ]
    with pytest.raises(InputError, match="the loss is not finite in epoch 1, or a weight after it; lower --lr"):
        train_lungs.main(["--shards", str(shards), "--out", str(tmp_path / "run"), *small])
    assert [path.name for path in (tmp_path / "run").iterdir() if not path.name.startswith(".")] == ["config.yaml"]


def test_a_lung_run_folder_belongs_to_one_process(shards, tmp_path):
    small = [
        "--channels",
        "[4,4,8,8,8]",
        "--patch",
        "1",
        "--size",
        "32",
        "--batch",
        "8",
        "--epochs",
        "1",
        "--workers",
        "0",
    ]
    train_lungs.main(["--shards", str(shards), "--out", str(tmp_path / "run"), *small])
    command = [sys.executable, "-m", "trainer.train_lungs", "--out", str(tmp_path / "run"), "--resume"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONWARNINGS": "ignore"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2
    assert "another process is training there" in done.stderr
