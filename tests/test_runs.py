"""Runs that end well: what happens with several processes, at the second visit to a run, with other settings, and when
something fails.
"""

import errno
import html
import itertools
import json
import math
import os
import shutil
import socket
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image
from test_train import ROOT, SMALL, TOGETHER, launch, lines

from shards import atomic, errors
from shards.__main__ import main as shards_main
from shards.dataset import Split
from shards.errors import InputError, read_yaml
from shards.loader import Loader
from shards.pack import pack
from shards.phantom import Phantoms
from shards.plan import EpochPlan
from trainer import checkpoint, evaluate, launching, predict, train_lungs
from trainer import train as loop
from trainer.build import build
from trainer.classifier import FocusClassifier, Prediction
from trainer.command import resolve
from trainer.loop import Trainer
from trainer.report.__main__ import main as report_main
from trainer.report.words import file_name
from trainer.schedule import cosine, one_cycle
from trainer.tracking import Tracking


@pytest.fixture
def flags(shards, segmenter, tmp_path):
    """Flags of a small run into tmp_path/run."""
    return ["--shards", str(shards), "--out", str(tmp_path / "run"), "--lungs.weights", str(segmenter), *SMALL]


def content_of(run: Path) -> dict:
    return json.loads((run / "report.json").read_text())


# -- several processes ------------------------------------------------------------------------------------------


@TOGETHER
@pytest.mark.parametrize("tracker", ["tensorboard", "wandb"])
def test_an_ordinary_run_of_two_processes_ends_well(flags, tmp_path, tracker):
    own = [*flags, "--tracker", tracker, "--epochs", "1", "--batch", "4"]
    done = launch("--mixed_precision", "no", "-m", "trainer.train", *own)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    run = tmp_path / "run"
    assert {"report.json", "report.html", "model.safetensors", "panel.png"} <= {path.name for path in run.iterdir()}
    assert list(run.rglob("events.out.*" if tracker == "tensorboard" else "*.wandb"))
    if tracker == "tensorboard":
        return
    # And at the second visit.
    done = launch("--mixed_precision", "no", "-m", "trainer.train", "--out", str(run), "--resume")
    assert done.returncode == 0, done.stderr
    assert "nothing is left to train" in done.stdout


@TOGETHER
def test_evaluation_by_two_processes_is_that_of_one(flags, tmp_path, shards):
    loop.main([*flags, "--epochs", "1"])
    before = content_of(tmp_path / "run")
    done = launch(
        "--mixed_precision",
        "no",
        "-m",
        "trainer.evaluate",
        "--run",
        str(tmp_path / "run"),
        "--shards",
        str(shards),
        "--batch",
        "3",
    )
    assert done.returncode == 0, done.stderr
    after = content_of(tmp_path / "run")
    assert after["test"]["auc"] == pytest.approx(before["test"]["auc"])
    assert after["test"]["loss"] == pytest.approx(before["test"]["loss"], rel=1e-5)
    assert (
        after["test"]["localization"]["lesion"]["all"]["images"]
        == before["test"]["localization"]["lesion"]["all"]["images"]
    )


@TOGETHER
def test_two_processes_train_a_lung_segmenter(shards, tmp_path):
    small = [
        "--channels",
        "[4,4,8,8,8]",
        "--patch",
        "1",
        "--size",
        "32",
        "--batch",
        "4",
        "--epochs",
        "2",
        "--workers",
        "0",
    ]
    done = launch(
        "--mixed_precision",
        "no",
        "-m",
        "trainer.train_lungs",
        "--shards",
        str(shards),
        "--out",
        str(tmp_path / "run"),
        *small,
    )
    assert done.returncode == 0, done.stderr
    assert "weights: " in done.stdout
    # Validation is measured with the statistics that are saved: the figures of the log are those of the file.
    best = max(json.loads(line)["val_dice"] for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines())
    from trainer.launching import Accelerator
    from trainer.lung_report import measure
    from trainer.lungs import load_segmenter

    split = Split(shards, "val", masks=True)
    loader = Loader(split, EpochPlan(split.shard_sizes(), shuffle=False), batch=4)
    figures = measure(Accelerator(cpu=True), load_segmenter(tmp_path / "run"), loader, surface=False)
    assert figures[:, 0].mean() == pytest.approx(best, abs=1e-4)


@TOGETHER
def test_machines_without_a_common_disk_are_told_at_the_start(flags, tmp_path):
    flags[flags.index("--out") + 1] = "run"
    done = launch(
        "--mixed_precision", "no", str(ROOT / "tests/two.py"), "apart", str(tmp_path), *flags, "--epochs", "1"
    )
    assert done.returncode != 0
    assert (
        f"error: --out run: process 1 on {socket.gethostname()} does not see the main process's folder; give all "
        "machines one file system" in done.stderr
    )
    assert "epoch 1/1" not in done.stderr


def test_every_step_and_process_draws_its_own_masks():
    drawn = []
    for step, rank in itertools.product(range(3), range(2)):
        launching.seed_step(7, step, rank)
        drawn.append(torch.rand(4).tolist())
    assert len({tuple(d) for d in drawn}) == 6
    launching.seed_step(7, 1, 1)
    assert torch.rand(4).tolist() == drawn[3]


# -- settings of the launcher -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "value", "remedy"),
    [
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "launch without --dynamo_backend"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "accumulate with --accumulate"),
        ("ACCELERATE_USE_FSDP", "true", "launch with --multi_gpu"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "launch with --multi_gpu"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "launch with --multi_gpu"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "launch with --mixed_precision bf16"),
    ],
)
def test_settings_of_the_launcher_that_nobody_does_are_refused(flags, tmp_path, monkeypatch, variable, value, remedy):
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match=f"the launcher's settings ask for {variable}={value}: .*{remedy}"):
        loop.main(flags)
    assert not (tmp_path / "run").exists()


def test_what_the_launcher_says_by_default_is_fine(monkeypatch):
    for variable, value in (
        ("DYNAMO_BACKEND", "NO"),
        ("GRADIENT_ACCUMULATION_STEPS", "1"),
        ("USE_FSDP", "false"),
        ("MIXED_PRECISION", "bf16"),
    ):
        monkeypatch.setenv(f"ACCELERATE_{variable}", value)
    assert launching.start(0).mixed_precision == "bf16"


def test_apples_gpu_is_left_alone(monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    asked = {}
    ordinary = launching.Accelerator
    monkeypatch.setattr(launching, "Accelerator", lambda **options: asked.update(options) or ordinary(**options))
    assert launching.start(0).device.type == "cpu"
    assert asked["cpu"]
    assert "GPU is not used" in capsys.readouterr().err


def test_threads_are_those_that_the_process_may_use(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(launching, "cores", lambda: 3)
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    try:
        launching.set_threads()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


# -- the learning rate ------------------------------------------------------------------------------------------


def test_cosine_by_hand():
    assert [cosine(seen, 10, 100, 20) for seen in (0, 10)] == [1 / 3, 2 / 3]
    assert [cosine(seen, 10, 100, 20) for seen in (20, 60, 100)] == pytest.approx([1, 0.5, 0])
    reference = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(reference, 1.0, total_steps=101, pct_start=0.2)
    for step in range(100):
        factor, beta = one_cycle(step / 100)
        assert factor == pytest.approx(reference.param_groups[0]["lr"], abs=0.04)
        assert beta == pytest.approx(reference.param_groups[0]["betas"][0], abs=0.01)
        reference.step()
        schedule.step()


@pytest.mark.parametrize("changed", [["--batch", "8"], ["--accumulate", "2"], ["--epochs", "6"]])
def test_cosine_goes_on_whatever_the_batch(flags, tmp_path, monkeypatch, changed):
    flags = [
        *flags,
        "--balance.lam",
        "1",
        "--optim.schedule",
        "cosine",
        "--optim.lr",
        "0.001",
        "--optim.warmup",
        "3",
        "--batch",
        "4",
        "--epochs",
        "4",
    ]
    ordinary = Trainer.end_epoch

    def stops(self, bar):
        ordinary(self, bar)
        if self.state.epoch == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "end_epoch", stops)
        with pytest.raises(KeyboardInterrupt):
            loop.main(flags)
    job = build(resolve(["--out", str(tmp_path / "run"), "--resume", *changed]))
    job.train()
    steps = [line for line in lines(tmp_path / "run") if "ce" in line]
    n, epochs = 30, job.config.epochs
    before = 0.0
    for line in steps:
        if line["position"] > 2:
            assert line["lr"] == pytest.approx(0.001 * cosine(round(before * n), 1, epochs * n, 12), rel=1e-6)
        before = line["position"]
    rates = [line["lr"] for line in steps if line["position"] > 2]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 0.0004 > rates[-1] > 0


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


# -- one way for every image ------------------------------------------------------------------------------------


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


# -- the second visit to a run ----------------------------------------------------------------------------------


class Stopped(Exception):
    pass


def stop_at(monkeypatch, step: int):
    ordinary = Trainer.step

    def dies(self, group, lam):
        if self.state.step == step:
            raise Stopped
        return ordinary(self, group, lam)

    monkeypatch.setattr(Trainer, "step", dies)
    return ordinary


def test_dropout_and_stochastic_depth_resume_to_the_same_bits(flags, tmp_path, monkeypatch):
    timm_create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: timm_create(*a, **k, drop_rate=0.3, drop_path_rate=0.3))
    flags = [*flags, "--epochs", "1", "--save_every", "1", "--optim.lr", "1e-3", "--log_every", "3"]
    whole = flags.copy()
    whole[whole.index("--out") + 1] = str(tmp_path / "whole")
    build(resolve(whole)).train()
    ordinary = stop_at(monkeypatch, 2)
    with pytest.raises(Stopped):
        build(resolve(flags)).train()
    monkeypatch.setattr(Trainer, "step", ordinary)
    torch.rand(5)
    build(resolve(["--out", str(tmp_path / "run"), "--resume"])).train()
    one, other = (checkpoint.load(tmp_path / name / "checkpoints/last.pt")["model"] for name in ("whole", "run"))
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
    # The line of the log averages the steps before the stop, too.
    logs = [[line["ce"] for line in lines(tmp_path / name) if "ce" in line] for name in ("whole", "run")]
    assert logs[0] == logs[1]


def test_a_resume_asks_for_no_pretrained_weights(flags, tmp_path, capsys):
    net = timm.create_model("resnet18", num_classes=7)
    torch.save(net.state_dict(), tmp_path / "w.pt")
    flags[flags.index("--pretrained") + 1] = str(tmp_path / "w.pt")
    build(resolve([*flags, "--epochs", "1"])).train()
    assert "w.pt: 120 of 122 tensors are taken; fc.weight, fc.bias begin anew" in capsys.readouterr().out
    (tmp_path / "w.pt").unlink()
    job = build(resolve(["--out", str(tmp_path / "run"), "--resume", "--epochs", "2"]))
    assert job.state.epoch == 1
    job.train()


def test_the_remedies_of_a_loss_that_is_not_finite_can_be_given(flags, tmp_path, capsys):
    build(resolve([*flags, "--epochs", "1"])).train()
    job = build(
        resolve(
            ["--out", str(tmp_path / "run"), "--resume", "--epochs", "2", "--optim.lr", "1e-6", "--optim.clip", "0.5"]
        )
    )
    assert "note: optim.lr was 1e-05 before, now it is 1e-06" in capsys.readouterr().out
    assert job.optimizer.param_groups[0]["lr"] == pytest.approx(1e-6)
    assert [change["what"] for change in job.state.changes] == ["optim.lr", "optim.clip"]


def test_another_precision_is_written_down(flags, tmp_path, monkeypatch):
    loop.main([*flags, "--epochs", "1"])
    launching.Accelerator._shared_state = {}
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    loop.main(["--out", str(tmp_path / "run"), "--resume", "--epochs", "2"])
    training = content_of(tmp_path / "run")["training"]
    assert training["changes"] == [{"step": 4, "what": "precision", "from": "no", "to": "bf16"}]
    assert "precision no up to step 4, then bf16" in (tmp_path / "run/report.html").read_text()


def test_a_report_is_of_its_checkpoint(flags, tmp_path, monkeypatch, capsys):
    loop.main([*flags, "--epochs", "1"])
    resume = ["--out", str(tmp_path / "run"), "--resume"]
    with monkeypatch.context() as patch:
        patch.setattr(loop, "finish", lambda *_: (_ for _ in ()).throw(Stopped()))
        with pytest.raises(Stopped):
            loop.main([*resume, "--epochs", "2"])  # trained, killed in the final evaluation
    assert content_of(tmp_path / "run")["training"]["epochs"] == 1
    capsys.readouterr()
    loop.main(resume)
    assert "nothing is left" not in capsys.readouterr().out
    assert content_of(tmp_path / "run")["training"]["epochs"] == 2


def test_a_report_of_an_unfinished_run_does_not_finish_it(flags, tmp_path, shards, capsys):
    build(resolve([*flags, "--epochs", "1"])).train()
    evaluate.main(["--run", str(tmp_path / "run"), "--shards", str(shards), "--workers", "0"])
    capsys.readouterr()
    loop.main(["--out", str(tmp_path / "run"), "--resume"])
    assert "nothing is left" not in capsys.readouterr().out
    assert "unfinished" not in content_of(tmp_path / "run")["training"]


@pytest.mark.parametrize("damage", [b"", b"[1, 2", b'"text"', b"[" * 100_000, b"\xff\xfe"])
def test_a_damaged_report_is_one_line_and_is_written_again(flags, tmp_path, shards, damage):
    loop.main([*flags, "--epochs", "1"])
    path = tmp_path / "run/report.json"
    path.write_bytes(damage)
    for main, argv in (
        (evaluate.main, ["--run", str(tmp_path / "run"), "--shards", str(shards)]),
        (report_main, ["--out", str(tmp_path / "x.html"), str(tmp_path / "run")]),
    ):
        with pytest.raises(InputError, match=r"report\.json: is not|is a run of trainer\.train_lungs"):
            main(argv)
    with (tmp_path / "run/metrics.jsonl").open("ab") as file:
        file.write(b"\xff\xfe not text\n" + b"[" * 100_000 + b"\n")
    loop.main(["--out", str(tmp_path / "run"), "--resume"])
    assert content_of(tmp_path / "run")["training"]["epochs"] == 1


def test_evaluate_leaves_what_it_does_not_measure(flags, tmp_path, shards):
    loop.main([*flags, "--epochs", "1"])
    before = content_of(tmp_path / "run")
    evaluate.main(["--run", str(tmp_path / "run"), "--shards", str(shards), "--workers", "1", "--batch", "3"])
    after = content_of(tmp_path / "run")
    assert after["images"] == before["images"]
    assert set(after["images"]) == {"train", "val", "test"}
    assert after["lungs_not_found"] == before["lungs_not_found"]
    assert after["config"] == before["config"]
    assert after["training"] == before["training"]
    # Packed anew, the same folder holds other images: their figures go beside the run's.
    shutil.copytree(shards, tmp_path / "before")
    other = tmp_path / "shards"
    pack(Phantoms(60, 5, size=64), other, dataset="phantom")
    text = (tmp_path / "run/config.yaml").read_text().replace(str(shards), str(other))
    (tmp_path / "run/config.yaml").write_text(text)
    evaluate.main(["--run", str(tmp_path / "run"), "--shards", str(other), "--workers", "0"])
    assert content_of(tmp_path / "run")["images"] == before["images"]
    assert (tmp_path / "run/evaluate_phantom/report.json").is_file()


def test_evaluate_takes_the_run_s_own_precision(flags, tmp_path, shards, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    loop.main([*flags, "--epochs", "1"])
    before = content_of(tmp_path / "run")["test"]
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    evaluate.main(["--run", str(tmp_path / "run"), "--shards", str(shards), "--workers", "0"])
    assert content_of(tmp_path / "run")["test"] == before


def test_fine_tuning_from_a_run(flags, tmp_path, capsys):
    loop.main([*flags, "--epochs", "1"])
    flags[flags.index("--pretrained") + 1] = str(tmp_path / "run")
    flags[flags.index("--out") + 1] = str(tmp_path / "tuned")
    capsys.readouterr()
    job = build(resolve([*flags, "--task", "nep", "--epochs", "1"]))
    assert "model.safetensors: 120 of 122 tensors are taken; fc.weight, fc.bias begin anew" in capsys.readouterr().out
    first = evaluate.open_run(tmp_path / "run").model.state_dict()["net.conv1.weight"]
    assert torch.equal(job.model.state_dict()["net.conv1.weight"], first)


# -- what fails -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["loss", "weight"])
def test_nothing_that_is_not_finite_is_saved(flags, tmp_path, monkeypatch, where):
    ordinary = Trainer.step

    def spoilt(self, group, lam):
        sums = ordinary(self, group, lam)
        if self.state.step == 1:
            if where == "weight":
                with torch.no_grad():
                    next(self.model.parameters()).fill_(math.nan)
            else:
                sums = sums * math.nan
        return sums

    monkeypatch.setattr(Trainer, "step", spoilt)
    with pytest.raises(InputError, match=r"the loss is not finite in one of the steps up to 3.* lower --optim\.lr"):
        build(resolve([*flags, "--epochs", "2", "--save_every", "3", "--log_every", "10", "--batch", "4"])).train()
    assert not (tmp_path / "run/checkpoints").exists()
    assert not (tmp_path / "run/model.safetensors").exists()


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


def test_a_report_that_fails_costs_the_report(flags, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("trainer.report.write.panel", lambda *a, **k: Figure() if a[0][0].image.shape[0] == 8 else 1 / 0)
        with pytest.raises(
            InputError,
            match=r"the report could not be written \(ZeroDivisionError: division by zero\). The model is there",
        ):
            loop.main([*flags, "--epochs", "1"])
    assert (tmp_path / "run/model.safetensors").is_file()
    loop.main(["--out", str(tmp_path / "run"), "--resume"])
    assert (tmp_path / "run/report.json").is_file()


def test_what_the_report_needs_is_tried_at_the_start(flags, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.report.write.png", lambda *_: 1 / 0)
    with pytest.raises(InputError, match="a report with these names cannot be made"):
        loop.main([*flags, "--epochs", "1"])
    assert not (tmp_path / "run").exists()


NAMES = [
    "No Finding",
    *(f"A rather long name of a finding, as archives have them number {i}".replace(",", ";") for i in range(21)),
]


@pytest.mark.parametrize(
    ("names", "dataset"),
    [
        (NAMES, "phantom"),
        (["No Finding", "a $ or two $x^{$"], "phantom"),
        (["No Finding", "Über/<b>..\\胸水_"], "a/b"),
        (["No Finding", "x"], "/../../../escaped"),
    ],
)
def test_names_from_data_stay_names(tmp_path, segmenter, names, dataset):

    class Named(Phantoms):
        def __init__(self):
            super().__init__(8 * len(names) if len(names) > 8 else 60, 0, size=64, findings=("No Finding", "Effusion"))
            count: dict[str, int] = {}
            self.real = {item.key: item for item in self.items}
            for n, item in enumerate(self.items):
                k = count[item.split] = count.get(item.split, -1) + 1
                self.items[n] = replace(item, findings=(names[k % len(names)],))

        def load(self, item):
            sample = super().load(self.real[item.key])
            sample.findings, sample.boxes = item.findings, []
            return sample

    pack(Named(), tmp_path / "shards", dataset=dataset)
    flags = [
        "--shards",
        str(tmp_path / "shards"),
        "--out",
        str(tmp_path / "sub/run"),
        "--lungs.weights",
        str(segmenter),
        *SMALL,
    ]
    loop.main([*flags, "--task", ",".join(names), "--epochs", "1"])
    run = tmp_path / "sub/run"
    (text,) = run.glob("*.txt")
    assert len(text.name.encode()) < 255
    assert (run / "report.html").is_file()
    shutil.copytree(tmp_path / "shards", tmp_path / "other")
    evaluate.main(["--run", str(run), "--shards", str(tmp_path / "other"), "--workers", "0"])
    assert len(list(run.glob("evaluate_*/report.json"))) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "shards", "sub"]


def test_file_names_are_names_of_one_file():
    assert file_name("pvt_nih_ne_la0.5_t0.1", ".txt") == "pvt_nih_ne_la0.5_t0.1.txt"
    for text in ("../x", "/etc/passwd", "a\0b", "a\nb", "..", "", "x" * 999, "胸" * 200, "\udcff"):
        name = file_name(text, ".txt")
        assert "/" not in name
        assert not name.startswith(".")
        assert len(name.encode()) <= 200
    assert file_name("x" * 999) != file_name("x" * 998)


def test_files_whose_names_are_no_text_get_their_line(flags, tmp_path):
    loop.main([*flags, "--epochs", "1"])
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


def test_a_full_disk_is_one_line_and_what_was_there_stays(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    checkpoint.save(path, {"a": torch.zeros(3)})
    before = path.read_bytes()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("write_bytes", "open"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, name, full)
            for action in (
                lambda: atomic.write(path, "text"),
                lambda: atomic.append(path, "line"),
                lambda: checkpoint.save(path, {}),
            ):
                if name == "open" or action.__code__.co_names[1] == "write":
                    with pytest.raises(InputError, match=r"x\.pt: cannot be written \(No space left on device\)"):
                        action()
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.pt"]


@pytest.mark.skipif(sys.platform != "linux", reason="a small disk can be mounted on Linux only")
@pytest.mark.parametrize("size", ["2m", "50m", "90m"])
def test_a_run_on_a_full_disk_is_one_line(flags, tmp_path, size):
    (tmp_path / "disk").mkdir()
    flags[flags.index("--out") + 1] = str(tmp_path / "disk/run")
    inside = f'mount -t tmpfs -o size={size} tmpfs {tmp_path}/disk && exec "$0" "$@"'
    command = ["unshare", "--mount", "sh", "-c", inside, sys.executable, "-m", "trainer.train", *flags, "--epochs", "1"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONWARNINGS": "ignore"}, capture_output=True, text=True, timeout=300
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    assert "Traceback" not in done.stderr
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if line.startswith("error: ") and "cannot be written (" in line]


def test_an_error_of_the_system_that_names_no_file_is_one_line_where_a_disk_is_full(capsys):
    def main():
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(SystemExit, match="2"):
        errors.run(main)
    assert "error: a file: cannot be written (No space left on device); free space" in capsys.readouterr().err


def test_deeply_nested_yaml_is_one_line(tmp_path):
    (tmp_path / "x.yaml").write_text("[" * 20_000)
    with pytest.raises(InputError, match=r"x\.yaml: is (nested too deeply|not YAML)"):
        read_yaml(tmp_path / "x.yaml", "--config")


def test_a_failed_run_ends_its_tracker(flags, monkeypatch):
    ended = []
    monkeypatch.setattr(Tracking, "finish", lambda self: ended.append(True))
    monkeypatch.setattr(Trainer, "step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loop.main([*flags, "--epochs", "1"])
    assert ended == [True]


def test_the_first_model_is_kept_whatever_its_figures(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "trainer.loop.validation_figures",
        lambda *_: {"val_accuracy": 0.5, "val_auc": math.nan, "val_loss": math.inf, "val_weighted": math.inf},
    )
    build(resolve([*flags, "--epochs", "2", "--best", "loss", "--balance.lam", "1"])).train()
    assert (tmp_path / "run/model.safetensors").is_file()


# -- trackers ---------------------------------------------------------------------------------------------------


def test_wandb_takes_along_what_the_readme_says_and_no_more(flags, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_MODE", "offline")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loop.main([*flags, "--tracker", "wandb", "--epochs", "1", "--balance.lam", "1"])
    said = capsys.readouterr().out
    assert f"logged into {tmp_path / 'run/wandb'} and stay there; `wandb sync" in said
    until = time.monotonic() + 60  # wandb's own process writes after the run has closed it
    while (
        b"test/accuracy"
        not in (kept := b"".join(path.read_bytes() for path in (tmp_path / "run/wandb").rglob("*.wandb")))
        and time.monotonic() < until
    ):
        time.sleep(0.5)
    assert b"test/accuracy" in kept
    assert b"val_auc" in kept
    for secret in (socket.gethostname(), str(tmp_path), str(ROOT), "git@", sys.executable, "--balance.lam"):
        assert secret.encode() not in kept, secret
    names = {path.name for path in (tmp_path / "run/wandb").rglob("*") if path.is_file()}
    assert not names & {"wandb-metadata.json", "requirements.txt", "output.log", "conda-environment.yaml"}


def test_test_figures_go_to_tensorboard(flags, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        loop.main([*flags, "--tracker", "tensorboard", "--epochs", "1"])
        tags = set()
        for folder in {path.parent for path in tmp_path.rglob("events.out.*")}:
            events = EventAccumulator(str(folder))
            events.Reload()
            tags |= set(events.Tags()["scalars"])
    assert {"test/accuracy", "test/AUC"} <= tags


# -- the report -------------------------------------------------------------------------------------------------


def test_every_operating_point_says_its_threshold(flags, tmp_path):
    loop.main([*flags, "--epochs", "1"])
    content = content_of(tmp_path / "run")
    point = content["threshold"]
    assert content["test"]["at_threshold"]["threshold"] == point == content["val"]["at_threshold"]["threshold"]
    known = [json.loads(line) for line in (tmp_path / "run/predictions_test.jsonl").read_text().splitlines()]
    ill = [line for line in known if line["label"] == "Effusion"]
    share = sum(line["probability"]["Effusion"] >= point - 1e-6 for line in ill) / len(ill)
    assert content["test"]["at_threshold"]["sensitivity"] == pytest.approx(share)
    page = html.unescape((tmp_path / "run/report.html").read_text())
    assert f"<td>{point:.3f}, the best Youden's index on val</td>" in page
    assert "threshold of the best Youden" not in page
    assert "float:left" not in page
    text = next((tmp_path / "run").glob("*.txt")).read_text()
    assert f"At the threshold {point:.4f}, chosen on val" in text
    assert "(Best Threshold above is chosen on test itself" in text


def test_a_cam_that_is_zero_everywhere_lies_nowhere(flags, tmp_path, shards, capsys, monkeypatch):
    loop.main([*flags, "--epochs", "1"])
    ordinary = FocusClassifier.forward

    def dead(self, *args, **kwargs):
        logits, cam = ordinary(self, *args, **kwargs)
        return Prediction(logits, None if cam is None else torch.zeros_like(cam))

    monkeypatch.setattr(FocusClassifier, "forward", dead)
    monkeypatch.setattr("trainer.lungs.cleanup.believable", lambda masks, *_: torch.ones(len(masks), dtype=torch.bool))
    evaluate.main(["--run", str(tmp_path / "run"), "--shards", str(shards), "--workers", "0"])
    place = content_of(tmp_path / "run")["test"]["localization"]["lesion"]["all"]
    assert place["energy"] is None
    assert place["without_map"] == place["images"]
    assert place["pointing"] == 0
    assert "of them without a map: no energy, pointing misses" in (tmp_path / "run/report.html").read_text()
    line = json.loads((tmp_path / "run/predictions_test.jsonl").read_text().splitlines()[-1])
    assert line.get("expected", line.get("lesion", {"energy": None}))["energy"] is None
    Image.fromarray(Split(shards, "test").image(0)).save(tmp_path / "x.png")
    capsys.readouterr()
    predict.main(["--run", str(tmp_path / "run"), "--look_at", "Effusion", str(tmp_path / "x.png")])
    captured = capsys.readouterr()
    assert json.loads(captured.out)["energy_in_region"] is None
    assert "the CAM of Effusion is zero everywhere" in captured.err


# -- backbones --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("backbone", "batch"), [("resnet18", "29"), ("repvit_m0_9", "7")])
def test_no_batch_of_one_image_ends_an_epoch(flags, backbone, batch, tmp_path):
    """30 images: 29 and one of old; BatchNorm behind pooling, or a map of 1 x 1, cannot do with one."""
    flags[flags.index("--size") + 1] = "32"
    flags[flags.index("--backbone") + 1] = backbone
    build(resolve([*flags, "--batch", batch, "--epochs", "1", "--balance.lam", "1"])).train()
    flags[flags.index("--out") + 1] = str(tmp_path / "other")
    with pytest.raises(
        InputError,
        match="normalises over the images of a batch, and the smallest one of an epoch has a single image; choose "
        "another --batch",
    ):
        build(resolve([*flags, "--batch", "1", "--epochs", "1", "--balance.lam", "1"]))
    assert not (tmp_path / "other").exists()


def test_a_backbone_without_a_map_trains_by_cross_entropy(flags, tmp_path, shards, monkeypatch, capsys):
    from trainer.classifier import FocusClassifier

    monkeypatch.setattr(
        "trainer.classifier.to_maps", lambda *_: (_ for _ in ()).throw(InputError("is not a feature map"))
    )
    with pytest.raises(InputError, match=r"--backbone resnet18: gives no feature map .*--balance\.lam 1"):
        FocusClassifier("resnet18", 2, size=64, pretrained="false")
    with pytest.raises(InputError, match="gives no feature map"):
        loop.main([*flags, "--epochs", "1"])
    assert not (tmp_path / "run").exists()
    loop.main([*flags, "--epochs", "1", "--balance.lam", "1"])
    assert "resnet18 has no feature map: it is trained by cross-entropy" in capsys.readouterr().out
    content = content_of(tmp_path / "run")
    assert content["test"]["localization"]["lesion"]["all"] is None
    assert "no feature map, so nothing is said of where it looks" in (tmp_path / "run/report.html").read_text()
    Image.fromarray(Split(shards, "test").image(0)).save(tmp_path / "x.png")
    capsys.readouterr()
    predict.main(["--run", str(tmp_path / "run"), str(tmp_path / "x.png")])
    assert json.loads(capsys.readouterr().out)["cam_of"] is None


# -- commands ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module", ["trainer.train", "trainer.train_lungs", "trainer.evaluate", "trainer.predict", "trainer.report"]
)
def test_wrong_settings_are_told_before_torch_is_imported(tmp_path, module):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    wrong = "--epochz" if "train" in module.partition(".")[2] else "--ouut"
    command = [sys.executable, "-m", module, "--out", "y", wrong, "3"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: unknown flag {wrong}; did you mean --")


def test_recipes_have_names(tmp_path):
    config = resolve(["--config", "published", "--shards", "x", "--out", str(tmp_path / "y")])
    assert (config.findings, config.attention.form) == ("published", "published")
    with pytest.raises(
        InputError, match=r"--config publishd: no such file, and no ready-made recipe; did you mean published"
    ):
        resolve(["--config", "publishd"])


def test_settings_that_do_nothing_are_told(flags, capsys):
    idle = ["--optim.warmup", "5", "--balance.high", "0.9", "--attention.form", "coverage", "--swap.dilate", "0.1"]
    build(resolve([*flags, *idle, "--balance.lam", "1"]))
    said = capsys.readouterr().out
    for words in (
        "--optim.warmup 5 is of --optim.schedule cosine",
        "--balance.high 0.9 is of the policies",
        "--attention.form coverage trains nothing",
    ):
        assert f"note: {words}" in said
    assert "note: --swap.dilate 0.1 is of the context swap, which is off" in said


def test_the_wheel_has_recipes_and_weights(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(tmp_path),
        str(ROOT),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode and "setuptools" in done.stderr:
        pytest.skip("setuptools is too old to build here")
    assert done.returncode == 0, done.stderr
    import zipfile

    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "launch/recipes/published.yaml",
        "launch/demo.sh",
        "trainer/lungs/weights/lung_unet.safetensors",
        "trainer/findings/nih.yaml",
    } <= names


def test_weights_that_are_not_finite_after_the_last_step_are_one_line(flags, tmp_path, monkeypatch):
    ordinary = Trainer.step

    def spoilt(self, group, lam):
        sums = ordinary(self, group, lam)
        if self.state.step == 3:  # the last of the epoch
            with torch.no_grad():
                next(self.model.parameters()).fill_(math.nan)
        return sums

    monkeypatch.setattr(Trainer, "step", spoilt)
    with pytest.raises(InputError, match="or a weight after them"):
        build(resolve([*flags, "--epochs", "1"])).train()
    assert not (tmp_path / "run/model.safetensors").exists()


def test_predict_says_that_a_run_has_not_finished(flags, tmp_path, shards, capsys):
    build(resolve([*flags, "--epochs", "1"])).train()
    evaluate.main(["--run", str(tmp_path / "run"), "--shards", str(shards), "--workers", "0"])
    Image.fromarray(Split(shards, "test").image(0)).save(tmp_path / "x.png")
    predict.main(["--run", str(tmp_path / "run"), str(tmp_path / "x.png")])
    assert "has not finished: its best model so far is used" in capsys.readouterr().err


def test_another_run_s_report_is_never_overwritten(flags, tmp_path, shards):
    loop.main([*flags, "--epochs", "1"])
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/config.yaml").write_text("")
    with pytest.raises(InputError, match="is another run's folder"):
        evaluate.main(
            [
                "--run",
                str(tmp_path / "run"),
                "--shards",
                str(shards),
                "--out",
                str(tmp_path / "theirs"),
                "--workers",
                "0",
            ]
        )


def test_notes_of_the_start_are_not_among_the_data(monkeypatch, capsys):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    launching.start(0, "fp16")
    captured = capsys.readouterr()
    assert not captured.out
    assert "fp16 needs a GPU" in captured.err


def test_a_gradient_s_norm_that_overflows_is_no_loss_that_does(flags):
    job = build(resolve([*flags, "--balance.policy", "balanced"]))
    job.logged[4] = math.inf
    job.refuse_not_finite()
    job.logged[1] = math.inf
    with pytest.raises(InputError, match="the loss is not finite"):
        job.refuse_not_finite()
