"""Trackers are never in the way, and get what the pages say."""

import json
import re
import socket
import struct
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
    assert tags["scalars"] >= {"train/ce", "train/lambda", "val/accuracy", "val/auc"}
    assert "panel" in tags["images"]


def test_wandb_offline_keeps_everything_in_the_run_folder(flags, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loop.main([*flags, "--tracker", "wandb", "--epochs", "1", "--balance.lam", "1"])
    assert list((tmp_path / "run/wandb").rglob("*.wandb"))
    assert list((tmp_path / "run/wandb").rglob("media/images/panel*.png"))


def records_of(folder):
    """What an offline run of wandb has written: a log of LevelDB's kind, 7 bytes before its first record, blocks of
    32 KiB, a record's parts each behind checksum, length and kind (1 whole, 2 first, 3 middle, 4 last).
    """
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("*.wandb")
    data, at, parts, found = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # padding
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts = (b"" if kind in (1, 2) else parts) + data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(parts)
            found.append(record)
    return found


def artifacts_of(record):
    """Those that a record logs, here or there by wandb's version."""
    return [one for one in (record.request.log_artifact.artifact, record.artifact) if one.name]


def test_wandb_has_the_result_the_model_and_one_run_for_a_run(flags, tmp_path, monkeypatch):
    """Read back: test figures in the summary, settings as they were used, tables, images with layers, an artifact; a
    resumed run goes on in the same one.
    """
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_DATA_DIR", raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "home"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loop.main([*flags, "--tracker", "wandb", "--epochs", "1"])
        loop.main(["--out", str(tmp_path / "run"), "--resume", "--epochs", "2"])
    assert not (tmp_path / "home").exists()  # what is put together before it is logged stays in the run, too
    folders = sorted((tmp_path / "run/wandb").glob("offline-run-*"))
    assert len(folders) == 2
    ids = set()
    for folder in folders:
        records = records_of(folder)
        ids |= {record.run.run_id for record in records if record.HasField("run")}
        summary = {u.key: u.value_json for r in records for u in r.summary.update}
        summary |= {item.key: item.value_json for r in records for item in r.history.item}
        assert 0 <= float(summary["test/AUC"]) <= 1
        settings = {u.key: u.value_json for r in records for u in (*r.config.update, *r.run.config.update)}
        assert (settings["balance.lam"], settings["swap.probability"]) == ("0.4", "0.75")
        (artifact,) = [one for record in records for one in artifacts_of(record) if one.type == "model"]
        names = {entry.path for entry in artifact.manifest.contents}
        assert {"model.safetensors", "lungs.safetensors", "README.md", "config.yaml", "findings.yaml"} <= names
        assert "Not a medical device" in (folder / "card/README.md").read_text()
        assert str(tmp_path) not in (folder / "card/README.md").read_text() + (folder / "card/config.yaml").read_text()
        assert list(folder.rglob("media/images/panel*.png"))
        (images,) = folder.rglob("media/table/radiographs*.table.json")
        rows = json.loads(images.read_text())["data"]
        assert len(rows) == len((tmp_path / "run/predictions_test.jsonl").read_text().splitlines())
        tables = [one for record in records for one in artifacts_of(record) if one.type == "run_table"]
        (own,) = [one for one in tables if "radiographs" in one.name]
        pictures = [entry.path for entry in own.manifest.contents if entry.path.endswith(".png")]
        assert len([path for path in pictures if "/mask/" not in path]) == len(rows)
        assert len([path for path in pictures if "/mask/" in path]) > 1  # each once, so that equal ones are one
    assert len(ids) == 1


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
    assert b"val/auc" in kept
    (folder,) = (tmp_path / "run/wandb").glob("offline-run-*")
    records = records_of(folder)
    for artifact in [one for record in records for one in artifacts_of(record)]:
        for entry in artifact.manifest.contents:
            entry.local_path = ""  # of a file to be sent, which is not sent with it
    kept = b"".join(record.SerializeToString() for record in records)
    for secret in (socket.gethostname(), str(tmp_path), str(ROOT), "git@", sys.executable, "--balance.lam"):
        assert not re.search(rb"\b" + re.escape(secret.encode()) + rb"\b", kept), secret  # a short one is in any noise
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
