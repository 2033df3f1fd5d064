"""A run that is asked to end saves where it stands, on all processes, and goes on to the same weights."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from curves import ROOT
from safetensors.torch import load_file

from shards.errors import InputError
from trainer import train as loop
from trainer.command import resolve
from trainer.loop import Trainer
from trainer.measure import Evaluator
from trainer.stopping import Stop, Stopped
from trainer.training import Training

EPOCHS = ["--epochs", "2"]


def same(one, other):
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (one, other))
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def undisturbed(shards, segmenter, tmp_path_factory):
    from jobs import SMALL

    out = tmp_path_factory.mktemp("calm") / "run"
    flags = ["--shards", str(shards), "--out", str(out), "--lungs.weights", str(segmenter), *SMALL, *EPOCHS]
    loop.main([*flags, "--best", "last"])
    return out


def signalled_at(monkeypatch, step, number=signal.SIGTERM):
    """Once, within that step."""
    ordinary, sent = Trainer.step, []

    def step_(self, group, lam):
        if self.state.step == step and not sent:
            sent.append(True)
            os.kill(os.getpid(), number)
        return ordinary(self, group, lam)

    monkeypatch.setattr(Trainer, "step", step_)


@pytest.mark.parametrize(
    ("step", "number", "code"),
    [(1, signal.SIGTERM, 0), (3, signal.SIGUSR1, 0), (5, signal.SIGINT, 130)],
    ids=["in an epoch", "at its end", "in the next"],
)
def test_a_signal_loses_no_step(flags, tmp_path, undisturbed, monkeypatch, capfd, step, number, code):
    """Of 8 steps of 8 images the fourth is the last of an epoch of 30."""
    # A shell's job in the background ignores SIGINT
    given = signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    before = signal.getsignal(number)
    signalled_at(monkeypatch, step, number)
    begun = [*flags, *EPOCHS, "--best", "last", "--resume", "auto"]
    with pytest.raises(Stopped) as stopped:
        loop.main(begun)
    assert stopped.value.code == code
    assert signal.getsignal(number) == before
    signal.signal(number, given)
    said = capfd.readouterr().err
    assert f"{signal.Signals(number).name}: stopping after this batch" in said
    assert "stopped; --resume goes on from its last checkpoint" in said
    saved = torch.load(tmp_path / "run/checkpoints/last.pt", weights_only=False)
    assert saved["state"]["step"] == step + 1
    loop.main(begun)
    assert f"resumed after step {step + 1}" in capfd.readouterr().out
    assert same(tmp_path / "run", undisturbed)
    loop.main(begun)  # and once more by the script that is simply run again
    assert "nothing is left to train" in capfd.readouterr().out


@pytest.mark.parametrize("every", ["20", "1000"], ids=["saved before", "not saved before"])
def test_a_signal_while_it_validates(flags, tmp_path, undisturbed, monkeypatch, capfd, every):
    """Nor in the last step of an epoch, after which the handler had its look."""
    ordinary, sent = Evaluator.measure, []

    def measure(self, *args, **kwargs):
        if not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGHUP)
        ordinary(self, *args, **kwargs)
        pytest.fail("it went on")

    begun = [*flags, *EPOCHS, "--best", "last", "--save_every", every, "--resume", "auto"]
    monkeypatch.setattr(Evaluator, "measure", measure)
    ignored = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # as under nohup
    with pytest.raises(Stopped):
        loop.main(begun)
    signal.signal(signal.SIGHUP, ignored)
    monkeypatch.setattr(Evaluator, "measure", ordinary)
    assert "SIGHUP: stopping" in capfd.readouterr().err
    saved = torch.load(tmp_path / "run/checkpoints/last.pt", weights_only=False)
    assert (saved["state"]["step"], saved["state"]["epoch"]) == (4, 0)
    loop.main(begun)
    assert same(tmp_path / "run", undisturbed)


def test_resume_auto_is_told_by_the_folder(flags, tmp_path):
    out = tmp_path / "run"
    assert not resolve([*flags, "--resume", "auto"]).resume
    assert not resolve([*flags, "--resume=auto"]).resume
    out.mkdir()
    (out / "config.yaml").write_text(f"shards: x\nout: {out}\nepochs: 7\n")
    for form in (["--resume", "auto"], ["--resume=auto"]):
        config = resolve(["--out", str(out), *form])
        assert (config.resume, config.epochs) == (True, 7)
    with pytest.raises(InputError, match="--resume maybe: expected true or false"):
        resolve([*flags, "--resume", "maybe"])


def test_a_signal_that_comes_twice_is_one(flags, tmp_path):
    command = [sys.executable, "-m", "trainer.train", *flags, "--epochs", "50", "--log_every", "1"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ)
    until = time.monotonic() + 120
    log = tmp_path / "run/metrics.jsonl"
    while not log.exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert log.exists()
    os.kill(process.pid, signal.SIGSTOP)  # both are there when it wakes: one request by two ways
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGUSR1)
    os.kill(process.pid, signal.SIGCONT)
    assert process.wait(60) == 0
    process.stderr.close()
    assert (tmp_path / "run/checkpoints/last.pt").is_file()


def test_later_it_is_a_second_one(monkeypatch):
    sent = []
    monkeypatch.setattr("trainer.stopping.ECHO", 0.0)
    monkeypatch.setattr("trainer.stopping.os.kill", lambda pid, number: sent.append((pid, number)))
    before = signal.getsignal(signal.SIGUSR1)
    with Stop() as stop, stop.between_batches():
        for _ in range(2):
            signal.raise_signal(signal.SIGUSR1)
            assert stop.asked == signal.SIGUSR1
    assert sent == [(os.getpid(), signal.SIGUSR1)]
    assert signal.getsignal(signal.SIGUSR1) == before


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert not stop.asked
    finally:
        signal.signal(signal.SIGHUP, before)


def test_processes_agree_on_the_step():
    """Of several, the flag of the step before is read; at the end of an epoch that of this one."""

    class Many(Training):
        def __init__(self):
            self.accelerator = type("A", (), {"num_processes": 2})()
            self.unread = None
            self.asked = torch.zeros(1)

    job = Many()
    assert not job.asked_to_end(at_once=False)
    job.asked = torch.ones(1)
    assert not job.asked_to_end(at_once=False)
    job.asked = torch.zeros(1)
    assert job.asked_to_end(at_once=False)
    job.asked = torch.ones(1)
    assert job.asked_to_end(at_once=True)
