import json
import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import two
from curves import ROOT, launch
from PIL import Image

from shards.dataset import Split
from shards.errors import InputError
from shards.loader import Loader
from shards.pack import pack
from shards.phantom import Phantoms
from shards.plan import EpochPlan
from trainer import checkpoint, evaluate, launching, predict
from trainer import train as loop
from trainer.augment import SWAPS, augment, draw
from trainer.balance import Balance, StepSums
from trainer.build import build
from trainer.command import resolve
from trainer.loop import Trainer
from trainer.lungs import LungSegmenter
from trainer.regions import wider
from trainer.report.__main__ import main as report_main
from trainer.report.words import PROBES
from trainer.run import FINDINGS
from trainer.tracking import Tracking

TASKS = ("ne", "np", "ns", "nep", "neps")
BACKBONES = ("pvt", "vgg", "resnet")
POLICIES = ("fixed", "published", "ratio", "balanced", "constrained")
FORMS = ("energy", "coverage", "published", "lift")
SMALL = [
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
    "--tracker",
    "none",
    "--log_every",
    "1",
]


@pytest.fixture
def flags(shards, segmenter, tmp_path):
    """Flags of a small run into tmp_path/run."""
    return ["--shards", str(shards), "--out", str(tmp_path / "run"), "--lungs.weights", str(segmenter), *SMALL]


def seeing(flags: list[str]) -> list[str]:
    """The flags with the segmenter of the package, which finds the lungs of phantoms; the untrained one finds none."""
    at = flags.index("--lungs.weights")
    return flags[:at] + flags[at + 2 :]


def lines(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# Fifteen runs meet every pair of backbone and task, policy or form.
# VGG's 130 million parameters take 25 s a run: one of its five is in the default tier.
@pytest.mark.parametrize(
    ("t", "b"),
    [pytest.param(t, b, marks=[pytest.mark.slow] if b == 1 and t else []) for t in range(5) for b in range(3)],
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
    printed = capsys.readouterr().out
    assert "energy in region" in printed
    assert f"report: {out / 'report.html'}" in printed

    names = {path.name for path in out.iterdir()}
    text_name = "resnet18_phantom_nep_la0.25_t0.1.txt"
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
        from PIL import Image

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


def test_images_without_lungs_are_listed_and_shown(flags, tmp_path, monkeypatch):
    monkeypatch.setattr("trainer.lungs.cleanup.believable", lambda masks, *_: torch.arange(len(masks)) % 2 == 0)
    loop.main([*flags, "--epochs", "1"])
    lost = json.loads((tmp_path / "run" / "report.json").read_text())["lungs_not_found"]
    split = Split(flags[1], "test", ("No Finding", "Effusion"))
    assert set(lost) == {"train", "val", "test"}
    assert lost["test"]
    assert set(lost["test"]) <= {split.key(i) for i in range(len(split))}
    assert (tmp_path / "run" / "no_lungs.png").is_file()
    assert "No lungs found" in (tmp_path / "run" / "report.html").read_text()


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


class Interrupted(Exception):
    """Stands for a signal, a crash, a power cut."""


# In the first epoch of 4 steps, in the second.
@pytest.mark.parametrize(("stop", "policy"), [(2, "ratio"), (6, "balanced"), (6, "constrained")])
def test_an_interrupted_run_goes_on_to_the_same_bits(flags, tmp_path, monkeypatch, stop, policy):
    # Cosine and the adaptive lambda carry state from step to step; augmentation and context swap are random; some lungs
    # are not found yet.
    flags = [
        *seeing(flags),
        "--epochs",
        "2",
        "--balance.policy",
        policy,
        "--optim.name",
        "adamw",
        "--optim.schedule",
        "cosine",
        "--optim.lr",
        "1e-3",
    ]
    flags += ["--augment.rotate", "5", "--augment.noise", "0.05", "--save_every", "1"]
    whole = flags.copy()
    whole[whole.index("--out") + 1] = str(tmp_path / "whole")
    build(resolve(whole)).train()

    ordinary = Trainer.step

    def dies(self, group, lam):
        if self.state.step == stop:
            raise Interrupted
        return ordinary(self, group, lam)

    monkeypatch.setattr(Trainer, "step", dies)
    with pytest.raises(Interrupted):
        build(resolve(flags)).train()
    monkeypatch.setattr(Trainer, "step", ordinary)
    # A line that was written after the last checkpoint is written again, not twice.
    with (tmp_path / "run/metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": stop + 1, "ce": 0.0}) + "\n" + '{"step": 9')  # and one that was cut short
    job = build(resolve(["--out", str(tmp_path / "run"), "--resume"]))
    assert job.state.step == stop
    job.train()

    one, other = (checkpoint.load(tmp_path / name / "checkpoints/last.pt") for name in ("whole", "run"))
    for name, value in one["model"].items():
        assert torch.equal(value, other["model"][name]), name
    assert str(one["balance"]) == str(other["balance"])
    assert one["balance"] != Balance(policy).state_dict()
    known = [checkpoint.load(tmp_path / name / "checkpoints/lungs.pt") for name in ("whole", "run")]
    assert all(
        torch.equal(known[0][n]["table"], known[1][n]["table"]) and (known[0][n]["table"][:, 8] > 0).all()
        for n in ("train", "val")
    )
    assert (one["state"]["best"], one["state"]["best_epoch"]) == (other["state"]["best"], other["state"]["best_epoch"])
    logs = [
        [{k: v for k, v in line.items() if k != "images_per_s"} for line in lines(tmp_path / name)]
        for name in ("whole", "run")
    ]
    assert logs[0] == logs[1]
    assert not resolve(["--config", str(tmp_path / "run/config.yaml")]).resume


def test_resume_refuses_what_does_not_fit(flags, tmp_path):
    out = str(tmp_path / "run")
    with pytest.raises(InputError, match="holds no run"):
        loop.main([*flags, "--resume"])
    build(resolve([*flags, "--epochs", "1"])).train()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for given, words in (
        (("--task", "np"), "--task ne, other rules of its findings, other images in --shards"),
        (("--balance.lam", "0.3"), "--balance.lam 0.5"),
        (("--swap.probability", "0.3"), "no --swap.probability"),
        (("--backbone", "resnet34"), "--backbone resnet18"),
        (("--size", "96"), "--size 64"),
    ):
        with pytest.raises(InputError, match=f"made with {words}; leave that as it was"):
            loop.main(["--out", out, "--resume", *given])
        assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before, (
            "a refused resume changed the run"
        )
    (tmp_path / "run/checkpoints/last.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match="is not a checkpoint of this trainer"):
        loop.main(["--out", out, "--resume=true"])


def test_a_run_without_a_checkpoint_starts_from_the_beginning(flags, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = str(tmp_path / "run")
    build(resolve([*flags, "--epochs", "1"]))
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    loop.main(["--resume", "--out", out])
    assert "starts from the beginning" in capsys.readouterr().out
    steps = [line["step"] for line in lines(tmp_path / "run") if "ce" in line]
    assert steps == sorted(set(steps))


def test_a_finished_run_is_left_as_it_is(flags, tmp_path, capsys):
    out = str(tmp_path / "run")
    loop.main([*flags, "--epochs", "1"])
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    loop.main(["--resume", "--out", out])
    assert "nothing is left to train" in capsys.readouterr().out
    loop.main(["--resume", "--out", out, "--batch", "4"])  # nothing was done with it, so nothing is written of it
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    loop.main(["--resume", "--out", out, "--epochs", "2", "--batch", "4"])
    assert "note: images a step was 8 before, now it is 4" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/report.json").read_text())["training"]["epochs"] == 2


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
    (text,) = (tmp_path / "run").glob("resnet18_*.txt")
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


def test_a_run_of_an_earlier_version_keeps_its_rules(flags, tmp_path, monkeypatch, capsys):
    """What is ready-made may change; a run that was begun with it goes on with what it was begun with."""
    flags = seeing(flags)
    with monkeypatch.context() as earlier:
        earlier.setattr("trainer.rules.DEFAULT", "published")
        build(resolve([*flags, "--epochs", "1"])).train()
    (tmp_path / "run/checkpoints/lungs.pt").unlink()  # it kept boxes alone, in last.pt
    capsys.readouterr()
    job = build(resolve(["--out", str(tmp_path / "run"), "--resume", "--epochs", "2"]))
    assert (
        "note: the run keeps the rules of its own findings.yaml; the ready-made findings now say others"
        in capsys.readouterr().out
    )
    assert job.rules["Effusion"].place == ""
    job.train()
    (tmp_path / "mine.yaml").write_text("Effusion: {region: {within: lungs}}")
    with pytest.raises(InputError, match="other rules of its findings"):
        build(resolve(["--out", str(tmp_path / "run"), "--resume", "--findings", str(tmp_path / "mine.yaml")]))


def test_lungs_that_cannot_be_recalled_are_looked_for_again(flags, tmp_path, capsys):
    build(resolve([*flags, "--epochs", "1"])).train()
    path = tmp_path / "run/checkpoints/lungs.pt"
    path.write_bytes(path.read_bytes()[:100])
    capsys.readouterr()
    job = build(resolve(["--out", str(tmp_path / "run"), "--resume", "--epochs", "2"]))
    assert f"{path} is damaged: the lungs of all images are looked for again" in capsys.readouterr().out
    job.train()
    assert (checkpoint.load(path)["train"]["table"][:, 8] > 0).all()


def test_the_probes_of_a_run_are_reported(flags, tmp_path):
    loop.main([*flags, "--task", "nep", "--epochs", "1"])
    content = json.loads((tmp_path / "run/report.json").read_text())
    found = content["test"]["probe"]
    assert found["auc"] == content["test"]["auc"]
    for name in ("drop_outside", "drop_inside"):
        low, high = found[f"{name}_95"]
        assert low <= high
        assert -1 <= found[name] <= 1
    assert 0 <= found["random"]["energy"] <= 1
    assert -1 <= found["random"]["similarity"] <= 1
    assert content["iou_threshold"]["expected"] in range(15)
    place = content["test"]["localization"]["expected"]["all"]
    assert 0 <= place["iou"] <= 1
    assert place["iou_threshold"] == (1 + content["iou_threshold"]["expected"]) / 16
    text = (tmp_path / "run/resnet18_phantom_nep_la0.5_t0.5.txt").read_text()
    page = (tmp_path / "run/report.html").read_text()
    for figure in PROBES:
        assert figure in text
        assert figure in page


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
        (["--attention.layer", "layer7"], r"layer7: resnet18 has no such module"),
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
    monkeypatch.setattr("trainer.task.OneOf.loss", lambda _task, logits, _target, _weight: logits.sum() * float("nan"))
    with pytest.raises(InputError, match=r"the loss is not finite .* lower --optim\.lr"):
        build(resolve(flags)).train()


def test_fp16_on_a_cpu_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(InputError, match="fp16 on a CPU"):
        launching.start(0)


TOGETHER = pytest.mark.xdist_group("processes")  # one after the other: they meet at the same port


@TOGETHER
@pytest.mark.parametrize("policy", ["ratio", "balanced", pytest.param("constrained", marks=pytest.mark.slow)])
def test_two_processes_train_one_run(flags, tmp_path, policy):
    both = [*seeing(flags), "--batch", "4", "--epochs", "2", "--balance.policy", policy, "--save_every", "2"]
    done = launch("--mixed_precision", "bf16", str(ROOT / "tests/two.py"), "train", str(tmp_path), *both)
    assert done.returncode == 0, done.stderr
    ranks = [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in (0, 1)]
    images = len(Split(Path(flags[1]), "train", ("No Finding", "Effusion")))
    for epoch in (0, 1):
        seen = sorted(i for rank in ranks for e, i in rank["index"] if e == epoch)
        assert seen == list(range(images)), "every image once per epoch"
    assert ranks[0]["lambda"] == ranks[1]["lambda"]
    assert len(set(ranks[0]["lambda"])) > (1 if policy == "constrained" else 2)
    assert done.stdout.count("report: ") == 1
    assert (tmp_path / "run/report.json").is_file()
    lungs = checkpoint.load(tmp_path / "run/checkpoints/lungs.pt")
    assert (lungs["train"]["table"][:, 8] == 2).all(), "each process knows the lungs that the other found"
    report = json.loads((tmp_path / "run/report.json").read_text())
    assert report["regions_replaced"] == {"val": 0, "test": 0}

    # One process goes on with what two have begun.
    job = build(resolve(["--out", str(tmp_path / "run"), "--resume", "--epochs", "3"]))
    assert (job.state.epoch, job.state.position) == (2, 0)
    job.train()
    assert job.state.epoch == 3


@TOGETHER
@pytest.mark.parametrize("form", ["energy", "published"])
def test_two_processes_have_the_gradient_of_one(flags, tmp_path, form):
    # LayerNorm, float64, unequal positives on the processes and in the micro-batches; regions in the shape of the
    # lungs, moved with the images.
    flags = [
        *seeing(flags),
        "--augment.rotate",
        "5",
        "--augment.shift",
        "0.05",
        "--backbone",
        "pvt_v2_b0",
        "--optim.clip",
        "0",
        "--attention.form",
        form,
        "--swap.probability",
        "0",
    ]
    flags += ["--balance.policy", "balanced"] if form == "energy" else ["--balance.lam", "0.3"]
    done = launch(
        "--mixed_precision",
        "no",
        str(ROOT / "tests/two.py"),
        "gradients",
        str(tmp_path),
        *flags,
        "--batch",
        "3",
        "--accumulate",
        "5",
    )
    assert done.returncode == 0, done.stderr
    parts = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1)]
    positives = [sum(label > 0 for label in labels) for _, group, _ in parts for labels in group]
    assert len(set(positives)) > 1, "or this proves nothing"
    flags[flags.index("--out") + 1] = str(tmp_path / "one")
    one, _, sums = two.gradients([*flags, "--batch", "30"])
    assert torch.allclose(parts[0][2] + parts[1][2], sums, rtol=1e-6), "the sums that lambda follows"
    assert (sums[4:6] > 0).all() == (form == "energy")
    largest = max(value.abs().max() for value in one.values())
    assert largest > 0
    for gradients, _, _ in parts:
        assert gradients.keys() == one.keys()
        for name, value in one.items():
            assert torch.allclose(gradients[name], value, rtol=1e-7, atol=1e-12 * float(largest)), name


@TOGETHER
def test_processes_that_do_not_see_each_other_are_told_so(flags, tmp_path):
    # With `use_cpu: true` accelerate starts two processes that, since 1.11 or so, each believe they are alone.
    text = (ROOT / "accelerate_config.yaml").read_text()
    (tmp_path / "wrong.yaml").write_text(
        text.replace("num_processes: 1", "num_processes: 2").replace("'NO'", "MULTI_GPU") + "use_cpu: true\n"
    )
    start = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(tmp_path / "wrong.yaml"),
        "-m",
        "trainer.train",
        *flags,
        "--epochs",
        "1",
    ]
    done = subprocess.run(
        start,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    if done.returncode == 0:  # older ones do what was meant
        assert "8 images x 2 processes" in done.stdout
        return
    assert "error: the launcher started 2 processes, but each sees 1" in done.stderr
    assert "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu" in done.stderr
    assert not (tmp_path / "run").exists()


@TOGETHER
def test_errors_of_two_processes_are_short(flags):
    done = launch("-m", "trainer.train", *flags, "--batch", "400")
    assert done.returncode != 0
    assert "error: --batch 400 x 2 processes" in done.stderr
    assert "lower --batch to at most" in done.stderr


def test_a_tracker_that_fails_is_a_warning(tmp_path):
    class Broken:
        is_main_process = True
        trackers = ()

        def init_trackers(self, *_args, **_kwargs):
            raise ConnectionError("no route to host")

        def log(self, *_args, **_kwargs):
            raise AssertionError("tracking has ended")

        end_training = log

    tracking = Tracking(Broken(), "tensorboard")
    with pytest.warns(
        UserWarning, match=r"tracking with tensorboard ended \(ConnectionError: no route to host\); the run goes on"
    ):
        tracking.start(tmp_path, {})
    tracking.log({"ce": 1.0}, 1)  # nothing is called any more
    tracking.finish()


def test_tensorboard_gets_scalars_settings_and_the_panel(flags, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        loop.main([*flags, "--tracker", "tensorboard", "--epochs", "1", "--balance.lam", "1"])
        tags: dict[str, set] = {"scalars": set(), "images": set()}
        for folder in {path.parent for path in tmp_path.rglob("events.out.*")}:
            events = EventAccumulator(str(folder))
            events.Reload()
            for kind, names in tags.items():
                names.update(events.Tags()[kind])
    assert tags["scalars"] >= {"ce", "lambda", "val_accuracy", "val_auc"}
    assert "panel" in tags["images"]


def test_wandb_offline_keeps_everything_in_the_run_folder(flags, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loop.main([*flags, "--tracker", "wandb", "--epochs", "1", "--balance.lam", "1"])
    assert list((tmp_path / "run/wandb").rglob("*.wandb"))
    assert list((tmp_path / "run/wandb").rglob("media/images/panel*.png"))


def test_an_unfinished_run_is_called_so(flags, tmp_path, capsys):
    job = build(resolve([*flags, "--epochs", "2"]))
    job.train()  # trained, but not evaluated
    run = str(tmp_path / "run")
    evaluate.main(["--run", run, "--shards", flags[1], "--workers", "0"])
    assert "has not finished: these are figures of its best model so far" in capsys.readouterr().out
    report_main(["--out", str(tmp_path / "page.html"), run])
    assert "note: run has not finished" in capsys.readouterr().out
    assert "has not finished" in (tmp_path / "page.html").read_text()


def test_images_that_the_run_was_trained_on_are_counted(flags, tmp_path, shards, capsys):
    """Shards whose test images are another's training images: evaluating there is no test."""
    loop.main([*flags, "--epochs", "1"])
    other = tmp_path / "other"
    shutil.copytree(shards, other)
    index = json.loads((other / "index.json").read_text())
    index["splits"] = {"test": index["splits"]["train"]}
    for old, new in (("train.npy", "test.npy"), ("train.labels.npy", "test.labels.npy")):
        (other / old).replace(other / new)
        index["splits"]["test"]["tables"][new] = index["splits"]["test"]["tables"].pop(old)
    (other / "index.json").write_text(json.dumps(index))
    train, test = (Split(shards, name, ("No Finding", "Effusion")) for name in ("train", "test"))
    assert evaluate.overlap(train, Split(other, "test", ("No Finding", "Effusion"))) == (len(train), 0)
    assert evaluate.overlap(train, test) == (0, 0)
    run = str(tmp_path / "run")
    evaluate.main(["--run", run, "--shards", str(other), "--workers", "0"])
    assert (
        f"WARNING: of the {len(train)} test images {len(train)} have the name or the bytes of a training image of this "
        "run, patients are not known" in capsys.readouterr().out
    )
    evaluate.main(["--run", run, "--shards", str(other), "--workers", "0"])  # the same once more
    third = tmp_path / "third"
    pack(Phantoms(100, 9, size=64), third, dataset="phantom")
    with pytest.raises(InputError, match="holds the report of other images"):
        evaluate.main(["--run", run, "--shards", str(third), "--workers", "0"])
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/config.yaml").write_text("")
    with pytest.raises(InputError, match="is another run's folder"):
        evaluate.main(["--run", run, "--shards", str(third), "--out", str(tmp_path / "theirs"), "--workers", "0"])
    text = (tmp_path / "run/config.yaml").read_text().replace(str(shards), str(tmp_path / "gone"))
    (tmp_path / "run/config.yaml").write_text(text)
    evaluate.main(["--run", run, "--shards", str(third), "--out", str(tmp_path / "there"), "--workers", "0"])
    assert "it was not checked whether some are among these" in capsys.readouterr().out


def test_patients_that_the_run_was_trained_on_are_counted(tmp_path):
    class Seen(Phantoms):
        def load(self, item):
            sample = super().load(item)
            sample.extra["patient"] = f"P{int(item.key[-2:]) % 40}"
            return sample

    pack(Seen(100, 0, size=64), tmp_path / "shards", dataset="phantom")
    train, test = (Split(tmp_path / "shards", name, ("No Finding", "Effusion")) for name in ("train", "test"))
    known = {train.meta(p)["patient"] for p in range(len(train))}
    images = sum(test.meta(p)["patient"] in known for p in range(len(test)))
    assert images > 0
    assert evaluate.overlap(train, test) == (0, images)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (
            ["--balance.lam", "0.3", "--balance.policy", "ratio"],
            r"--balance\.lam 0\.3: is of the policy fixed, ratio finds its own",
        ),
        (
            ["--attention.annotated", "0.1"],
            r"--attention\.annotated 0\.1: no lesion boxes are used with --attention\.region anatomy",
        ),
        (["--best", "last", "--patience", "3"], "--patience 3: with --best last no epoch is better"),
    ],
)
def test_settings_without_effect_are_told(flags, given, words):
    with pytest.raises(InputError, match=words):
        resolve([*flags, *given])


def test_images_under_other_names_are_known_by_their_bytes(tmp_path):
    class Renamed(Phantoms):
        def load(self, item):
            sample = super().load(item)
            sample.key = f"x{sample.key}"
            return sample

    split = {}
    for kind in (Phantoms, Renamed):
        pack(kind(40, 0, size=64), tmp_path / kind.__name__, dataset="phantom")
        split[kind] = Split(tmp_path / kind.__name__, "train", ("No Finding", "Effusion"))
    assert evaluate.overlap(split[Phantoms], split[Renamed]) == (len(split[Renamed]), 0)


def test_a_run_folder_belongs_to_one_process(flags, tmp_path):
    job = build(resolve([*flags, "--epochs", "1"]))
    job.train()
    command = [sys.executable, "-m", "trainer.train", "--out", str(tmp_path / "run"), "--resume", "--epochs", "2"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONWARNINGS": "ignore"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2
    assert "another process is training there; wait for it, or stop it" in done.stderr


def test_maps_that_are_zero_are_nothing_to_compare_with(flags, tmp_path, monkeypatch):
    def dead(model, seed):
        twin = model.untrained().eval()
        torch.nn.init.zeros_(twin.net.fc.weight)
        return twin

    monkeypatch.setattr("trainer.measure.random_twin", dead)
    loop.main([*flags, "--epochs", "1"])
    assert json.loads((tmp_path / "run/report.json").read_text())["test"]["probe"]["random"] is None
    assert "energy, random weights" not in (tmp_path / "run/resnet18_phantom_ne_la0.5_t0.5.txt").read_text()


def test_an_interrupted_run_says_how_to_go_on(flags, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop.main([*flags, "--epochs", "1"])
    assert "stopped; --resume goes on from the beginning" in capsys.readouterr().err


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


def test_reports_of_what_is_no_run(flags, tmp_path):
    (tmp_path / "lungs").mkdir()
    (tmp_path / "lungs/report.json").write_text('{"dice": 0.9}')
    (tmp_path / "lungs/config.yaml").write_text("")
    (tmp_path / "lungs/lung_unet.safetensors").write_bytes(b"")
    for main, argv, words in (
        (report_main, ["--out", str(tmp_path / "x.html"), str(tmp_path / "lungs")], "is a run of trainer.train_lungs"),
        (report_main, ["--out", str(tmp_path / "x.html"), str(tmp_path)], "has no report.json"),
        (evaluate.main, ["--run", str(tmp_path / "lungs"), "--shards", flags[1]], "is a run of trainer.train_lungs"),
    ):
        with pytest.raises(InputError, match=words):
            main(argv)
    loop.main([*flags, "--epochs", "1"])
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match="is a folder; name the HTML file"):
        report_main(["--out", str(tmp_path / "folder"), str(tmp_path / "run")])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "lungs", "run"]


def test_prediction_goes_on_after_a_bad_file_and_says_so(flags, tmp_path, capsys):
    loop.main([*flags, "--epochs", "1"])
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


def test_a_launch_for_several_processes_that_starts_one(monkeypatch):
    for name in ("ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, {"ACCELERATE_MIXED_PRECISION": "no"}.get(name, "29500"))
    with pytest.raises(InputError, match="was asked for several processes and started one: add --multi_gpu"):
        launching.start(0)
