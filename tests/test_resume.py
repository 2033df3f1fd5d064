"""The second visit to a run."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from curves import ROOT
from jobs import Interrupted, Stopped, content_of, lines, seeing, stop_at

from shards.errors import InputError
from trainer import checkpoint, launching
from trainer import train as loop
from trainer.balance import Balance
from trainer.build import build
from trainer.command import resolve
from trainer.loop import Trainer
from trainer.schedule import cosine


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
        (("--balance.lam", "0.3"), "--balance.lam 0.4"),
        (("--swap.probability", "0.3"), "no --swap.probability"),
        (("--backbone", "resnet34"), "--backbone test_resnet"),
        (("--size", "96"), "--size 64"),
    ):
        with pytest.raises(InputError, match=f"made with {words}; leave that as it was"):
            loop.main(["--out", out, "--resume", *given])
        assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before, (
            "a refused resume changed the run"
        )
    (tmp_path / "run/checkpoints/last.pt").write_bytes(b"not a checkpoint")
    with pytest.raises(InputError, match=r"last\.pt: damaged \(no checksum of .*manifest\.json is theirs\)"):
        loop.main(["--out", out, "--resume=true"])
    (tmp_path / "run/checkpoints/manifest.json").unlink()  # as of an earlier version
    with pytest.raises(InputError, match="is not a checkpoint of this trainer"):
        loop.main(["--out", out, "--resume=true"])


@pytest.mark.parametrize("how", ["cut off", "a bit", "gone"])
def test_a_damaged_checkpoint_is_stepped_over(flags, tmp_path, capfd, monkeypatch, how):
    """The one before is gone on from, to the weights of a run that nothing happened to."""
    begun = [*flags, "--epochs", "2", "--best", "last", "--save_every", "2"]
    calm = [str(tmp_path / "calm") if flag == str(tmp_path / "run") else flag for flag in begun]
    loop.main(calm)
    folder = tmp_path / "run/checkpoints"
    with monkeypatch.context() as patch:
        stop_at(patch, 7)
        with pytest.raises(Stopped):
            loop.main(begun)
    assert checkpoint.load(folder / "last.pt")["state"]["step"] == 6
    assert checkpoint.load(folder / "last_1.pt")["state"]["step"] == 4
    assert not (folder / "last_2.pt").exists()
    path = folder / "last.pt"
    content = path.read_bytes()
    half = len(content) // 2
    if how == "gone":  # a power cut between two names
        path.unlink()
    else:
        path.write_bytes(
            content[:half] + (b"" if how == "cut off" else bytes([content[half] ^ 1]) + content[half + 1 :])
        )
    capfd.readouterr()
    loop.main(["--resume", "--out", str(tmp_path / "run")])
    said = capfd.readouterr()
    if how != "gone":
        assert (
            "last.pt is damaged: it was cut off, or changed since it was written; it is kept as last.pt.dam" in said.err
        )
        assert "resumed after step 4 of last_1.pt, the last one that is sound" in said.out
    ours, theirs = (checkpoint.load(tmp_path / name / "checkpoints/last.pt")["model"] for name in ("run", "calm"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not list(folder.glob("last_*.pt"))  # of a finished run one is enough


def test_what_was_cut_off_while_it_was_written_changes_nothing(tmp_path, monkeypatch):
    """Three times in a row; then the older of two is still known."""
    path = tmp_path / "checkpoints/last.pt"
    checkpoint.save(path, {"step": 1}, keep=2)

    def power_cut(*_):
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", power_cut)
        patch.setattr(checkpoint, "write", lambda p, data: p.write_text(data))
        for step in (2, 3, 4):
            with pytest.raises(Interrupted):
                checkpoint.save(path, {"step": step}, keep=2)
    assert checkpoint.load(checkpoint.newest(path.parent)[0])["step"] == 1
    checkpoint.save(path, {"step": 5}, keep=2)
    path.write_bytes(b"")
    found, damaged = checkpoint.newest(path.parent)
    assert (checkpoint.load(found)["step"], damaged) == (1, [path])


def test_checkpoints_of_an_earlier_version_and_another_keep(tmp_path):
    """Without a manifest they are taken as they are, and known from the first new one on; fewer may be kept later."""
    folder = tmp_path / "checkpoints"
    checkpoint.save(folder / "lungs.pt", {"what": "lungs"})
    checkpoint.save(folder / "last.pt", {"step": 1})
    (folder / "manifest.json").unlink()
    checkpoint.save(folder / "last.pt", {"step": 2}, keep=3)
    assert all(checkpoint.sound(folder / name) for name in ("lungs.pt", "last.pt", "last_1.pt"))
    (folder / "last.pt").write_bytes(b"")
    found, damaged = checkpoint.newest(folder)
    assert (found.name, [path.name for path in damaged]) == ("last_1.pt", ["last.pt"])
    for step in (3, 4, 5):
        checkpoint.save(folder / "last.pt", {"step": step}, keep=3)
    assert checkpoint.load(folder / "last_2.pt")["step"] == 3
    checkpoint.save(folder / "last.pt", {"step": 6}, keep=2)
    assert sorted(path.name for path in folder.glob("last*.pt")) == ["last.pt", "last_1.pt"]


def test_how_a_step_is_computed_is_this_machine_s(flags, tmp_path):
    """An optimizer that was fused on a GPU goes on here without, and the other way round."""
    build(resolve([*flags, "--epochs", "1"])).train()
    path = tmp_path / "run/checkpoints/last.pt"
    content = checkpoint.load(path)
    for group in content["optimizer"]["param_groups"]:
        group["fused"] = True
    checkpoint.save(path, content)
    job = build(resolve(["--out", str(tmp_path / "run"), "--resume", "--epochs", "2"]))
    assert {group["fused"] for group in job.optimizer.param_groups} == {None}
    job.train()


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


def test_a_finished_run_is_left_as_it_is(trained, flags, tmp_path, capsys):
    out = str(tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    loop.main(["--resume", "--out", out])
    assert "nothing is left to train" in capsys.readouterr().out
    loop.main(["--resume", "--out", out, "--batch", "4"])  # nothing was done with it, so nothing is written of it
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    loop.main(["--resume", "--out", out, "--epochs", "2", "--batch", "4"])
    assert "note: images a step was 8 before, now it is 4" in capsys.readouterr().out
    assert json.loads((tmp_path / "run/report.json").read_text())["training"]["epochs"] == 2


def test_fewer_epochs_than_are_done_are_told(flags, tmp_path, capsys, monkeypatch):
    out = str(tmp_path / "run")
    stop_at(monkeypatch, 10)
    with pytest.raises(Stopped):
        loop.main([*flags, "--epochs", "5", "--save_every", "5"])
    monkeypatch.undo()
    loop.main(["--resume", "--out", out, "--epochs", "1"])
    assert "note: --epochs 1: more are done already; nothing is trained, and the report is" in capsys.readouterr().out
    assert (tmp_path / "run/report.json").exists()


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


def test_a_run_folder_belongs_to_one_process(flags, tmp_path):
    job = build(resolve([*flags, "--epochs", "1"]))
    job.train()
    command = [sys.executable, "-m", "trainer.train", "--out", str(tmp_path / "run"), "--resume", "--epochs", "2"]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONWARNINGS": "ignore"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2
    assert "another process is training there; wait for it, or stop it" in done.stderr


def test_an_interrupted_run_says_how_to_go_on(flags, tmp_path, capsys, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        loop.main([*flags, "--epochs", "1"])
    assert "stopped; --resume goes on from the beginning" in capsys.readouterr().err


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
    net = timm.create_model("test_resnet", num_classes=7)
    torch.save(net.state_dict(), tmp_path / "w.pt")
    flags[flags.index("--pretrained") + 1] = str(tmp_path / "w.pt")
    build(resolve([*flags, "--epochs", "1"])).train()
    assert "w.pt: 90 of 92 tensors are taken; fc.weight, fc.bias begin anew" in capsys.readouterr().out
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


def test_what_a_killed_process_left_of_a_checkpoint_goes(tmp_path):
    left = tmp_path / "checkpoints/.last.pt.4194305.partial"
    left.parent.mkdir()
    left.write_bytes(b"half")
    other = left.with_name(".model.safetensors.4194305.partial")
    other.write_bytes(b"of another file")
    checkpoint.save(tmp_path / "checkpoints/last.pt", {"a": torch.zeros(2)})
    assert not left.exists()
    assert other.exists()
    assert torch.equal(checkpoint.load(tmp_path / "checkpoints/last.pt")["a"], torch.zeros(2))
