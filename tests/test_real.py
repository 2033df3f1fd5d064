"""The same commands on real radiographs. CXR_FOCUS_REAL_DATA names a folder with lungs/{images,masks} and
effusion/{train,val,test}/<class>.
"""

import json
import os
from pathlib import Path

import pytest

from shards.__main__ import main as shards_main
from shards.dataset import Split
from shards.loader import Loader
from shards.plan import EpochPlan
from trainer import lung_report, train, train_lungs
from trainer.launching import Accelerator
from trainer.lungs import load_segmenter

REAL = Path(os.environ.get("CXR_FOCUS_REAL_DATA", ""))
pytestmark = pytest.mark.skipif(
    not os.environ.get("CXR_FOCUS_REAL_DATA"), reason="CXR_FOCUS_REAL_DATA is not set: no real radiographs"
)


def few(source: Path, target: Path, count: int) -> None:
    target.mkdir(parents=True)
    for path in sorted(source.iterdir())[:count]:
        (target / path.name).symlink_to(path)


def test_the_job_on_a_few_real_radiographs(tmp_path):
    names = [path.stem for path in sorted((REAL / "lungs/images").iterdir())][::12]
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        for path in (REAL / "lungs" / kind).iterdir():
            if path.stem in names:
                (tmp_path / kind / path.name).symlink_to(path)
    shards_main(
        [
            "masks",
            "--images",
            str(tmp_path / "images"),
            "--masks",
            str(tmp_path / "masks"),
            "--out",
            str(tmp_path / "lung_shards"),
        ]
    )
    small = [
        "--channels",
        "[8,16,32,64,128]",
        "--patch",
        "1",
        "--size",
        "64",
        "--epochs",
        "16",
        "--lr",
        "5e-3",
        "--workers",
        "0",
    ]
    weak = [
        "--augment.invert",
        "0",
        "--augment.flip",
        "0",
        "--augment.rotate",
        "5",
        "--augment.scale",
        "0.1",
        "--augment.gamma",
        "0.2",
    ]
    unpainted = [
        part
        for name in ("opacity", "gas", "collapse", "devices", "tone", "warp", "frame", "negative")
        for part in (f"--paint.{name}", "0")
    ]
    train_lungs.main(
        ["--shards", str(tmp_path / "lung_shards"), "--out", str(tmp_path / "unet"), *small, *weak, *unpainted]
    )
    (lungs,) = json.loads((tmp_path / "unet/report.json").read_text())["sources"].values()
    assert lungs["dice"] > 0.6, "real lungs are found after 16 epochs of some 40 images"
    split = Split(tmp_path / "lung_shards", "val", masks=True)
    shipped = lung_report.measure(
        Accelerator(cpu=True), load_segmenter(), Loader(split, EpochPlan(split.shard_sizes(), shuffle=False), batch=8)
    )
    assert shipped[:, 0].mean() > 0.93
    assert shipped[:, 2].mean() > 0.92

    for split, count in (("train", 12), ("val", 6), ("test", 6)):
        for folder in ("0NoFinding", "1Effusion"):
            few(REAL / "effusion" / split / folder, tmp_path / "effusion" / split / folder, count)
    shards_main(["folder", "--path", str(tmp_path / "effusion"), "--out", str(tmp_path / "shards"), "--size", "128"])
    shards_main(["verify", str(tmp_path / "shards")])
    small = [
        "--backbone",
        "resnet18",
        "--pretrained",
        "false",
        "--size",
        "64",
        "--batch",
        "8",
        "--workers",
        "0",
        "--epochs",
        "1",
        "--tracker",
        "none",
    ]
    train.main(["--shards", str(tmp_path / "shards"), "--out", str(tmp_path / "run"), *small])
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["findings"] == ["No Finding", "Effusion"]
    assert report["test"]["localization"]["expected"]["all"]["images"] == 6
    assert report["test"]["localization"]["lesion"]["all"] is None
    assert len(report["lungs_not_found"]["test"]) <= 2
