"""Trackers are never in the way, and get what the pages say."""

import socket
import sys
import time
import warnings

import pytest
from curves import ROOT

from trainer import train as loop
from trainer.loop import Trainer
from trainer.tracking import Tracking


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


def test_a_failed_run_ends_its_tracker(flags, monkeypatch):
    ended = []
    monkeypatch.setattr(Tracking, "finish", lambda self: ended.append(True))
    monkeypatch.setattr(Trainer, "step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loop.main([*flags, "--epochs", "1"])
    assert ended == [True]


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
