"""Grids of trainings, and the published table of them."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import yaml
from curves import ROOT
from jobs import SMALL

from shards.errors import InputError
from trainer import sweep
from trainer.report import __main__ as report
from trainer.report import paper

GRID = {
    "base": {"shards": "S", "attention": {"threshold": 0.1}},
    "grid": {
        "backbone": ["pvt", "vgg"],
        "lambda": {1: {"balance.lam": 1}, "adaptive": {"balance": {"policy": "published"}}},
        "seed": [0, 1, 2],
    },
}


def grid_file(tmp_path, content):
    file = tmp_path / "grid.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False))
    return file


def test_a_grid_is_all_its_points(tmp_path):
    jobs = sweep.jobs_of(grid_file(tmp_path, GRID), tmp_path / "runs", ["--epochs", "3"])
    assert [job.out.name for job in jobs[:4]] == ["pvt_1_0", "pvt_1_1", "pvt_1_2", "pvt_adaptive_0"]
    assert len(jobs) == 12
    config = jobs[-1].config
    assert (config.backbone, config.balance.policy, config.seed, config.epochs) == ("vgg", "published", 2, 3)
    assert config.attention.threshold == 0.1
    assert len(sweep.jobs_of(sweep.Path("paper"), tmp_path, ["--shards", "S"])) == 60
    parts = [jobs[k::5] for k in range(5)]
    assert sorted(job.out.name for part in parts for job in part) == sorted(job.out.name for job in jobs)


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"base": {}}, "expected `base:` with flags"),
        ({"grid": {"seed": []}}, "grid: seed: expected a list of values"),
        ({"grid": {"seed": [0, 0]}}, "several runs would be called 0"),
        ({"grid": {"seed": [0]}, "bse": {}}, "bse: is neither of base and grid; did you mean base"),
        ({"base": {"out": "x"}, "grid": {"seed": [0]}}, "out and resume are the sweep's own"),
        ({"base": {"shards": "S"}, "grid": {"sed": [0]}}, r"0: unknown flag --sed; did you mean --seed"),
        ({"base": {"shards": "S"}, "grid": {"size": [224, "big"]}}, "big: --size big: expected a whole number"),
        ({"grid": {"seed": list(range(11000))}}, "has 11000 runs; at most 10000"),
        ("grid: {seed: [0]\n", "is not YAML"),
        ("grid: !!python/object/apply:os.system [ls]\n", "is not YAML"),
    ],
)
def test_what_is_wrong_with_a_grid_is_said_before_it_runs(tmp_path, content, match, monkeypatch):
    monkeypatch.setattr(sweep.Trainings, "run", lambda *_: pytest.fail("nothing may be trained"))
    with pytest.raises(InputError, match=match):
        sweep.main([str(grid_file(tmp_path, content)), "--out", str(tmp_path / "runs")])


def test_flags_of_the_sweep(tmp_path):
    file = str(grid_file(tmp_path, GRID))
    for part in ("0/3", "4/3", "x", "1/0"):
        with pytest.raises(InputError, match=f"--part {part}: expected I/N"):
            sweep.main([file, "--out", str(tmp_path), "--part", part])
    with pytest.raises(InputError, match="0 grids named"):
        sweep.main(["--out", str(tmp_path)])


class Fake:
    """In place of a training: leaves its folder as one does; the second one fails the first time."""

    def __init__(self, commands):
        self.commands = commands

    def __call__(self, command, **options):
        self.commands.append((command, options["env"].get("CUDA_VISIBLE_DEVICES")))
        out = sweep.Path(command[command.index("--out") + 1])
        fails = out.name.endswith("_1") and "--resume" not in command
        config = sweep.resolve([token for token in command[3:] if token != "--resume"])
        out.mkdir(exist_ok=True)
        (out / "config.yaml").write_text(sweep_yaml(config))
        if not fails:
            (out / "report.json").write_text(json.dumps({"training": {"epochs": 1}}))
        return Done(int(fails))


class Done:
    def __init__(self, code):
        self.code = code

    def wait(self):
        return self.code


def sweep_yaml(config):
    from trainer.command import to_yaml

    return to_yaml(config)


def test_what_failed_goes_on_and_what_is_finished_stays(tmp_path, monkeypatch, capsys):
    commands = []
    monkeypatch.setattr(sweep.subprocess, "Popen", Fake(commands))
    monkeypatch.setattr(sweep, "gpus", lambda: ["3", "5"])
    file = str(grid_file(tmp_path, {"base": {"shards": "S"}, "grid": {"seed": [0, 1, 2], "task": ["ne"]}}))
    file = str(grid_file(tmp_path, {"base": {"shards": "S"}, "grid": {"task": ["ne"], "seed": [0, 1, 2]}}))
    with pytest.raises(InputError, match=r"1 runs failed: ne_1; why stands in NAME\.log"):
        sweep.main([file, "--out", str(tmp_path / "runs")])
    assert {device for _, device in commands} <= {"3", "5"}
    assert len(commands) == 3
    commands.clear()
    sweep.main([file, "--out", str(tmp_path / "runs")])
    assert [command[-1] for command, _ in commands] == ["--resume"]
    assert "3 of 3 runs are finished" in capsys.readouterr().out
    # A run that was given more epochs and then stopped has a report of fewer
    path = tmp_path / "runs/ne_2/report.json"
    path.write_text(json.dumps({"training": {"epochs": 1, "asked_epochs": 4}}))
    commands.clear()
    sweep.main([file, "--out", str(tmp_path / "runs")])
    assert [command[command.index("--out") + 1][-4:] for command, _ in commands] == ["ne_2"]
    with pytest.raises(InputError, match=r"ne_0: is a run of other settings \(batch 32, in the grid 8\)"):
        sweep.main([file, "--out", str(tmp_path / "runs"), "--batch", "8"])
    commands.clear()
    sweep.main([file, "--out", str(tmp_path / "runs"), "--epochs", "200", "--part", "2/3"])  # more epochs: it goes on
    assert [command[-1] for command, _ in commands] == ["--resume"]


def test_a_sweep_that_is_asked_to_end_asks_its_trainings(tmp_path, monkeypatch, capsys):
    """By whatever signal; also one that ignores Ctrl-C, as of a shell's background."""
    code = (
        "import signal, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('up', flush=True);"
        "signal.signal(signal.SIGTERM, lambda *_: (print('asked', flush=True), sys.exit(0))); time.sleep(60)"
    )
    ordinary = subprocess.Popen
    begun = []

    def popen(command, **options):
        begun.append(ordinary([sys.executable, "-c", code], **options))
        return begun[-1]

    monkeypatch.setattr(sweep.subprocess, "Popen", popen)
    jobs = [sweep.Job(tmp_path / name, ()) for name in "abc"]
    log = tmp_path / "a.log"

    def up():
        return log.exists() and b"up" in log.read_bytes()

    def hang_up():
        until = time.monotonic() + 60
        while not up() and time.monotonic() < until:
            time.sleep(0.05)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGUSR1)

    threading.Thread(target=hang_up).start()
    with pytest.raises(KeyboardInterrupt) as stopped:
        sweep.Trainings(1, []).run(jobs)
    assert stopped.value.code == 0
    assert len(begun) == 1
    assert begun[0].wait(20) == 0
    assert b"asked" in log.read_bytes()


def test_a_log_that_cannot_be_written_fails_its_run_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "finished", lambda job: True)
    monkeypatch.setattr(sweep.subprocess, "Popen", lambda *_, **__: Done(0))
    (tmp_path / "a.log").mkdir()
    jobs = [sweep.Job(tmp_path / name, ()) for name in "ab"]
    assert sweep.Trainings(1, []).run(jobs) == jobs[:1]
    assert "a: cannot be started (Is a directory" in capsys.readouterr().out


def content(backbone="pvt", lam=1.0, policy="fixed", findings=("No Finding", "Effusion"), accuracy=0.8):
    rows = [{"precision": 0.5, "recall": 0.5, "f1": 0.25, "support": 30}]
    rows.append({"precision": 0.9, "recall": 0.5, "f1": 0.75, "support": 10})
    figures = {"per_class": rows, "accuracy": accuracy, "auc": 0.7, "images": 40}
    config = {"backbone": backbone, "balance": {"lam": lam, "policy": policy}}
    return {"findings": list(findings), "dataset": "mine", "config": config, "test": figures}


def test_the_published_table():
    runs = {"a": content(), "b": content(accuracy=0.9), "c": content(policy="published", lam=None)}
    runs |= {"d": content(lam=0.7), "e": content(findings=("Effusion", "Mass")), "f": content("resnet18")}
    rows, notes = paper.table(runs)
    assert rows[0] == ["ne", "PVT", "accuracy, recall", "here, mine", "0.850 (2)", "", "", "", "0.800"]
    assert rows[1] == ["ne", "PVT", "accuracy, recall", "published, NIH", "0.817", "0.822", "0.828", "0.821", "0.855"]
    assert [row[4] for row in rows if row[2] == "precision" and row[3] == "here, mine"] == ["0.600 (2)", "0.600"]
    assert [row[3] for row in rows if row[1] == "resnet18"] == ["here, mine"] * 4
    assert len(notes) == 2
    assert "d is left out: its lambda" in notes[0]
    assert "e is left out: its findings" in notes[1]
    undefined = {"a": content()}
    undefined["a"]["test"]["auc"] = None
    assert [row[4] for row in paper.table(undefined)[0] if row[3] == "here, mine"][-1] == "undefined"
    for form in paper.FORMS.values():
        assert len(re.findall(r"0\.909", form(paper.HEAD, rows))) == 1
    assert list(csv.reader(paper.comma_separated(paper.HEAD, rows).splitlines()))[1] == rows[0]
    assert paper.latex(paper.HEAD, [["a_b", "50%", "x", "y", *["1"] * 5]]).count(r"a\_b & 50\% &") == 1


def test_every_published_figure_is_there():
    known = paper.published()
    assert len(known) == 4 * 3 * 4
    assert sum(len(of) for of in known.values()) == 84


@pytest.mark.slow
def test_a_grid_twice_interrupted_gives_the_same_table(shards, tmp_path):
    base = dict(zip((flag[2:] for flag in SMALL[::2]), SMALL[1::2], strict=True)) | {"shards": str(shards), "epochs": 2}
    lams = {"1": {"balance.lam": 1}, "adaptive": {"balance.policy": "published"}}
    file = grid_file(tmp_path, {"base": base, "grid": {"lambda": lams, "task": ["ne", "np"]}})
    tables = []
    for name, stops in (("calm", ()), ("rough", (1, 3))):  # while so many runs have begun
        command = [sys.executable, "-m", "trainer.sweep", str(file), "--out", str(tmp_path / name)]
        for begun in stops:
            process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
            while process.poll() is None and len(list((tmp_path / name).glob("*/metrics.jsonl"))) < begun:
                time.sleep(0.05)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0  # as a scheduler wants it of what can go on
        subprocess.run(command, cwd=ROOT, check=True)
        runs = sorted(str(run) for run in (tmp_path / name).iterdir() if run.is_dir())
        report.main(["--table", "paper", "--out", str(tmp_path / f"{name}.csv"), *runs])
        tables.append((tmp_path / f"{name}.csv").read_text())
    assert len(runs) == 4
    assert tables[0] == tables[1]
