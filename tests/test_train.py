"""The whole job: what a run trains, measures and writes."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import BACKBONES, FORMS, POLICIES, SMALL, TASKS, lines, seeing
from PIL import Image

from shards.dataset import Split
from shards.errors import InputError
from shards.loader import Loader
from shards.plan import EpochPlan
from trainer import evaluate, predict
from trainer import train as loop
from trainer.augment import SWAPS, augment, draw
from trainer.balance import StepSums
from trainer.build import build
from trainer.command import resolve
from trainer.lungs import LungSegmenter
from trainer.regions import wider
from trainer.report.__main__ import main as report_main
from trainer.run import FINDINGS


# Fifteen runs meet every pair of backbone and task, policy or form.
# VGG's 130 million parameters take 25 s a run: its five are in the slow tier.
@pytest.mark.parametrize(
    ("t", "b"),
    [pytest.param(t, b, marks=[pytest.mark.slow] if b == 1 else []) for t in range(5) for b in range(3)],
    ids=lambda v: str(v),
)
def test_every_task_backbone_and_policy_takes_two_steps(flags, t, b):
    policy, form = POLICIES[(t + b) % 5], FORMS[(t + 2 * b) % 4]
    if policy == "balanced" and form == "published":  # it has no gradient to balance
        form = "energy"
    job = build(
        resolve(
            [
                *flags,
                "--task",
                TASKS[t],
                "--backbone",
                BACKBONES[b],
                "--batch",
                "4",
                "--balance.policy",
                policy,
                "--attention.form",
                form,
            ]
        )
    )
    job.state.epoch = 5  # the published lambda begins at 1
    job.net.train()
    split = job.splits["train"]
    loader = Loader(split, EpochPlan(split.shard_sizes()), batch=4, workers=0).batches(5)
    before = {name: value.clone() for name, value in job.model.named_parameters()}
    for _, batch in zip(range(2), loader, strict=False):
        lam = job.balance.value(5)
        assert 0 < lam < 1
        sums = job.step([batch], lam)
        if job.balance.follows_losses:
            job.balance.update(StepSums(*sums.tolist()))
        assert torch.isfinite(sums).all()
        assert sums[0] > 0
        assert sums[2] == 4
        # No Finding (label 0) is no positive; the published form counts all images.
        assert sums[3] <= (batch.target[:, 0] == 0).sum()
    moved = [name for name, value in job.model.named_parameters() if (value != before[name]).any()]
    assert all(torch.isfinite(value).all() for value in job.model.parameters())
    assert len(moved) > len(before) / 2


def test_pairs_are_covered():
    for other, count in ((lambda t, b: (t + b) % 5, 5), (lambda t, b: (t + 2 * b) % 4, 4)):
        assert len({(b, other(t, b)) for t in range(5) for b in range(3)}) == 3 * count


def test_the_whole_job(flags, shards, tmp_path, capsys):
    out = tmp_path / "run"
    loop.main(
        [
            *flags,
            "--task",
            "nep",
            "--epochs",
            "2",
            "--attention.threshold",
            "0.1",
            "--balance.lam",
            "0.25",
            "--optim.lr",
            "1e-3",
        ]
    )
    printed, progress = capsys.readouterr()
    assert progress.count("of training are left") == 1
    assert "energy in region" in printed
    assert f"report: {out / 'report.html'}" in printed

    names = {path.name for path in out.iterdir()}
    text_name = "test_resnet_phantom_nep_la0.25_t0.1.txt"
    assert names >= {
        "config.yaml",
        "metrics.jsonl",
        "checkpoints",
        "model.safetensors",
        "lungs.safetensors",
        "report.json",
        "report.html",
    }
    assert names >= {text_name, "panel.png", "curves.png", "predictions_val.jsonl", "predictions_test.jsonl"}
    assert not [name for name in names if "partial" in name]

    text = (out / text_name).read_text().splitlines()
    assert text[0].startswith("Execution Time: ")
    assert text[0].endswith(" minutes")
    assert "-" * 30 in text
    assert "Metrics of unseen test data:" in text
    for figure in ("AUC Score:", "CAM energy inside:", "Pointing hit:"):
        assert any(figure in line for line in text)

    content = json.loads((out / "report.json").read_text())
    images = len((out / "predictions_test.jsonl").read_text().splitlines())
    assert images == sum(row["support"] for row in content["test"]["per_class"])
    assert content["training"]["epochs"] == 2
    assert content["test"]["localization"]["lesion"]["all"]["images"] > 0
    steps = [line for line in lines(out) if "ce" in line]
    assert len(steps) == 2 * -(-len(Split(shards, "train", ("No Finding", "Effusion", "Pneumothorax"))) // 8)
    assert {line["lambda"] for line in steps} == {0.25}
    assert {line["swapped"] for line in steps} == {0}  # the untrained segmenter finds no lungs
    assert sum("val_loss" in line for line in lines(out)) == 2

    # The same figures again, and on other shards beside them.
    before = content["test"]
    evaluate.main(["--run", str(out), "--shards", str(shards), "--workers", "0"])
    again = json.loads((out / "report.json").read_text())
    assert again["test"] == before
    assert again["training"] == content["training"]
    evaluate.main(["--run", str(out), "--shards", str(shards), "--workers", "0", "--out", str(tmp_path / "elsewhere")])
    assert json.loads((tmp_path / "elsewhere" / "report.json").read_text())["test"] == before

    # Predict the stored test images: the same probabilities as in the report.
    split = Split(shards, "test", tuple(content["findings"]))
    files = []
    for i in (0, 1):
        files.append(str(tmp_path / f"image{i}.png"))
        Image.fromarray(split.image(i)).save(files[-1])
    capsys.readouterr()
    predict.main(["--run", str(out), *files])
    told = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    known = [json.loads(line) for line in (out / "predictions_test.jsonl").read_text().splitlines()[:2]]
    for line, reference, file in zip(told, known, files, strict=True):
        assert line["image"] == file
        assert line["probability"] == pytest.approx(reference["probability"], abs=1e-3)
        assert Path(line["overlay"]).is_file()
        assert len(line["lung_box"] or [0] * 4) == 4

    report_main(["--out", str(tmp_path / "both.html"), str(out)])
    page = (tmp_path / "both.html").read_text()
    assert "data:image/png;base64," in page
    assert "http" not in page.replace("http-equiv", "")

    # The folder is taken now, and stays as it is.
    with pytest.raises(
        InputError,
        match=r"already holds another run; choose another folder, remove it, or go on with that run by --resume",
    ):
        loop.main([*flags, "--task", "nep"])
    assert json.loads((out / "report.json").read_text())["test"] == before


def test_lambda_one_calls_neither_cam_nor_segmenter(shards, tmp_path, monkeypatch):
    def never(*_args, **_kwargs):
        raise AssertionError("lambda = 1 pays nothing for attention")

    job = build(
        resolve(
            ["--shards", str(shards), "--out", str(tmp_path / "run"), *SMALL, "--balance.lam", "1", "--epochs", "1"]
        )
    )
    monkeypatch.setattr("trainer.classifier.grad_cam", never)
    monkeypatch.setattr("trainer.lungs.LungSegmenter.logits", never)
    job.train()
    assert job.state.step > 0
    assert all(line["attention"] is None for line in lines(tmp_path / "run") if "ce" in line)


def test_remembered_lungs_are_not_segmented_again(flags, monkeypatch):
    job = build(resolve([*flags, "--epochs", "3"]))
    images = []
    ordinary = LungSegmenter.find
    monkeypatch.setattr(
        "trainer.lungs.LungSegmenter.find", lambda self, x, size: images.append(len(x)) or ordinary(self, x, size)
    )
    job.train()
    assert sum(images) == len(job.splits["train"]) + len(job.splits["val"])


def test_training_swaps_surroundings_and_says_how_many(flags, tmp_path):
    own = seeing(flags)
    build(resolve([*own, "--batch", "16", "--epochs", "2"])).train()
    shares = [line["swapped"] for line in lines(tmp_path / "run") if "ce" in line]  # of two steps of 15 images an epoch
    want = np.mean([(draw(0, epoch, range(30))[:, SWAPS.start] < 0.75).float().mean() for epoch in (0, 1)])
    assert want - 0.1 <= np.mean(shares) <= want  # those that want to, less a few that find no partner
    own[own.index("--out") + 1] = str(tmp_path / "without")
    build(resolve([*own, "--batch", "16", "--epochs", "1", "--swap.probability", "0"])).train()
    assert {line["swapped"] for line in lines(tmp_path / "without") if "ce" in line} == {None}


def test_a_task_without_regions_is_plain_cross_entropy(tmp_path, flags, capsys):
    (tmp_path / "mine.yaml").write_text("Effusion: {region: null}\n")
    job = build(resolve([*flags, "--findings", str(tmp_path / "mine.yaml"), "--epochs", "1"]))
    assert "no region is known for Effusion: classification only" in capsys.readouterr().out
    assert not job.attends
    assert not job.swaps
    job.train()
    assert all(line["attention"] is None for line in lines(tmp_path / "run") if "ce" in line)
    flags[flags.index("--out") + 1] = str(tmp_path / "other")
    job = build(resolve([*flags, "--findings", str(tmp_path / "mine.yaml"), "--task", "nep"]))
    assert job.attends
    assert job.inside == {"No Finding", "Pneumothorax"}
    assert "context swap leaves out Effusion" in capsys.readouterr().out


def test_findings_belong_to_the_run(flags, tmp_path, shards):
    """A run keeps its own findings: evaluating, predicting and resuming ask nothing else, and another rule is another
    run.
    """
    mine = tmp_path / "mine.yaml"
    mine.write_text("Effusion:\n  region: {rectangles: [[0.1, 0.2, 0.4, 0.9]]}\n")
    loop.main([*flags, "--findings", str(mine), "--epochs", "1"])
    mine.unlink()
    rule = evaluate.open_run(tmp_path / "run").findings["Effusion"].rule
    assert rule is not None
    assert rule.rectangles == ((0.1, 0.2, 0.4, 0.9),)
    evaluate.main(["--run", str(tmp_path / "run"), "--shards", str(shards), "--workers", "0"])
    job = build(resolve(["--out", str(tmp_path / "run"), "--resume", "--epochs", "2"]))
    assert job.rules == {"Effusion": rule}
    kept = tmp_path / "run" / FINDINGS
    kept.write_text("Effusion:\n  region: {half: upper}\n")
    with pytest.raises(InputError, match="made with"):
        build(resolve(["--out", str(tmp_path / "run"), "--resume", "--epochs", "3"]))


def test_regions_follow_the_lungs(flags, tmp_path, shards):
    """The default: what is expected is cut to the lungs' outline in training and evaluation, and figures of the box
    stay comparable.
    """
    flags = [
        *seeing(flags),
        "--augment.rotate",
        "10",
        "--augment.shift",
        "0.1",
        "--epochs",
        "1",
        "--swap.probability",
        "0",
    ]
    job = build(resolve(flags))
    split = job.splits["train"]
    batch = next(iter(Loader(split, EpochPlan(split.shard_sizes()), batch=20, workers=0).batches(0)))
    seen = job.prepare(batch, True)
    ill = batch.target[:, 0] == 0
    truth = torch.stack([torch.from_numpy(split.mask(p)) for p in batch.index.tolist()]) > 0
    draws = draw(job.config.seed, 0, batch.index)
    lungs = augment(batch.image.float() / 255, draws, job.config.augment, masks=truth).masks
    region = seen.region > 0
    assert region[ill].flatten(1).any(1).all()
    assert not region[~ill].any()
    inside = (region & wider(lungs, 4)).flatten(1).sum(1) / region.flatten(1).sum(1).clamp(min=1)
    assert inside[ill].min() > 0.8, "the region lies in the true lungs, wherever augmentation has moved them"
    middle = region[ill][:, 40:56, 28:36].float().mean()  # below the middle of the chest: the heart and the spine
    assert middle < 0.5 * region[ill][:, 40:56, 14:22].float().mean()
    loop.main([*flags[: flags.index("--out")], *flags[flags.index("--out") + 2 :], "--out", str(tmp_path / "whole")])
    report = json.loads((tmp_path / "whole/report.json").read_text())
    place = report["test"]["localization"]
    assert report["regions_replaced"] == {"val": 0, "test": 0}
    assert place["expected"]["all"]["images"] == place["expected_box"]["all"]["images"] > 0
    assert place["expected"]["all"]["energy"] != place["expected_box"]["all"]["energy"]
    line = json.loads((tmp_path / "whole/predictions_test.jsonl").read_text().splitlines()[-1])
    assert ("expected" in line) == ("expected_box" in line) == (line["label"] != "No Finding")


def test_where_no_lungs_are_found_the_box_stands_in_and_is_counted(flags, tmp_path, capsys):
    loop.main([*flags, "--epochs", "1"])  # the untrained segmenter finds none
    report = json.loads((tmp_path / "run/report.json").read_text())
    positives = report["test"]["per_class"][1]["support"]
    assert report["regions_replaced"]["test"] == positives > 0
    place = report["test"]["localization"]
    assert place["expected_box"]["all"]["images"] == positives
    (text,) = (tmp_path / "run").glob("test_resnet_*.txt")
    assert f"Expected regions replaced by their part of the lung box (test): {positives}" in text.read_text()
    assert (
        f"its part of the lung box stands in: {report['regions_replaced']['val']} in val, {positives} in test"
        in (tmp_path / "run/report.html").read_text()
    )


def test_rules_of_the_lung_box_draw_no_outline(flags, tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("an outline was drawn")

    monkeypatch.setattr("trainer.augment.lung_masks", never)
    monkeypatch.setattr("trainer.look.lung_masks", never)
    job = build(resolve([*seeing(flags), "--findings", "published", "--epochs", "1"]))
    job.train()
    assert not job.regions.uses_lungs
    report = job.evaluator.measure("test")
    assert report.expected_box.isnan().all()


def test_patience_is_reset_by_a_better_model_and_ends_the_run(flags, monkeypatch):
    scores = iter([0.5, 0.4, 0.6, 0.55, 0.5, 0.9])
    monkeypatch.setattr(
        "trainer.loop.validation_figures",
        lambda *_: {"val_accuracy": next(scores), "val_auc": 0.5, "val_loss": 1.0, "val_weighted": 1.0},
    )
    job = build(resolve([*flags, "--epochs", "6", "--patience", "2", "--balance.lam", "1"]))
    job.train()
    assert job.state.epoch == 5  # 0.6 reset the count; 0.55 and 0.5 ended it before 0.9
    assert (job.state.best, job.state.best_epoch) == (0.6, 2)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (
            ["--batch", "50"],
            r"--batch 50 x 1 processes x --accumulate 1 = 50 images a step, but the train split has \d+; lower --batch "
            r"to at most \d+",
        ),
        (["--batch", "10", "--accumulate", "9"], r"--batch 10 x 1 processes x --accumulate 9 = 90"),
        (["--backbone", "resnett"], r"--backbone resnett: unknown; did you mean resnet"),
        (["--attention.layer", "layer7"], r"layer7: test_resnet has no such module"),
        (["--lungs.weights", "nowhere.safetensors"], r"nowhere\.safetensors: no such file"),
        (["--task", "No Finding,Nodule"], "has no images with finding 'Nodule'"),
        (["--shards", "nowhere"], r"--shards \S*nowhere: no such folder"),
        (["--pretrained", "weights.pt"], r"weights\.pt: no such file"),
    ],
)
def test_bad_input_leaves_nothing_behind(flags, tmp_path, more, words):
    with pytest.raises(InputError, match=words):
        loop.main([*flags, *more])
    assert not (tmp_path / "run").exists()


def test_a_loss_that_is_not_finite_stops_the_run_with_the_remedy(flags, monkeypatch):
    monkeypatch.setattr("trainer.task.OneOf.loss", lambda _task, logits, *_: logits.sum() * float("nan"))
    with pytest.raises(InputError, match=r"the loss is not finite .* lower --optim\.lr"):
        build(resolve(flags)).train()


def test_the_last_epoch_is_kept_where_that_is_asked_for(flags, tmp_path, monkeypatch):
    scores = iter([0.5, 0.9, 0.4])
    monkeypatch.setattr(
        "trainer.loop.validation_figures",
        lambda *_: {"val_accuracy": next(scores), "val_auc": 0.5, "val_loss": 1.0, "val_weighted": 1.0},
    )
    job = build(resolve([*flags, "--epochs", "3", "--best", "last", "--balance.lam", "1"]))
    job.train()
    assert job.state.best_epoch == 2
    assert evaluate.open_run(tmp_path / "run").metadata["epoch"] == "2"


def test_the_first_model_is_kept_whatever_its_figures(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(
        "trainer.loop.validation_figures",
        lambda *_: {"val_accuracy": 0.5, "val_auc": math.nan, "val_loss": math.inf, "val_weighted": math.inf},
    )
    build(resolve([*flags, "--epochs", "2", "--best", "loss", "--balance.lam", "1"])).train()
    assert (tmp_path / "run/model.safetensors").is_file()


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


def test_a_gradient_s_norm_that_overflows_is_no_loss_that_does(flags):
    job = build(resolve([*flags, "--balance.policy", "balanced"]))
    job.logged[4] = math.inf
    job.refuse_not_finite()
    job.logged[1] = math.inf
    with pytest.raises(InputError, match="the loss is not finite"):
        job.refuse_not_finite()


def test_a_dry_run_says_what_would_be_and_leaves_nothing(flags, tmp_path, capsys):
    before = set(tmp_path.rglob("*"))
    flags[flags.index("--out") + 1] = str(tmp_path / "deep" / "run")
    loop.main([*flags, "--dry_run", "--epochs", "7"])
    said = capsys.readouterr().out
    assert "all is well: 7 epochs of" in said
    assert "report: " not in said
    assert "Nothing was kept" in said
    assert set(tmp_path.rglob("*")) == before
    (tmp_path / "run").mkdir()
    flags[flags.index("--out") + 1] = str(tmp_path / "run")
    loop.main([*flags, "--dry_run", "--epochs", "1", "--balance.lam", "1"])
    assert list((tmp_path / "run").iterdir()) == []  # it was there, and stays
    loop.main([*flags, "--epochs", "1"])
    assert (tmp_path / "run/report.json").is_file()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(InputError, match="already holds another run"):
        loop.main([*flags, "--dry_run", "--epochs", "1"])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == kept
    with pytest.raises(InputError, match="--dry_run: is of a new run"):
        loop.main([*flags, "--dry_run", "--resume"])


def test_a_dry_run_finds_a_loss_that_is_not_finite(flags, tmp_path, monkeypatch):
    from trainer.loop import Trainer

    monkeypatch.setattr(Trainer, "step", lambda *_: torch.full((8,), torch.nan))
    with pytest.raises(InputError, match="finite"):
        loop.main([*flags, "--dry_run"])
    assert not (tmp_path / "run").exists()
