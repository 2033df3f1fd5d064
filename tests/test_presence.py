"""Processes that are waited for, orphaned, frozen or gone: every one ends by itself, in one line that says why."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from curves import ROOT
from jobs import TOGETHER

from trainer import presence

DRIVER = """
import sys
from trainer import presence
presence.LATE, presence.LOST = 1.5, 2.0
from trainer import train
from shards.errors import run
run(lambda: train.main(sys.argv[1:]))
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def ranks(world, rank, port):
    """The environment of a process of several without a launcher."""
    own = {"WORLD_SIZE": world, "RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    own |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": 1}
    return os.environ | {name: str(value) for name, value in own.items()}


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(true, seconds=90):
    end = time.monotonic() + seconds
    while not true() and time.monotonic() < end:
        time.sleep(0.1)
    return true()


def children(pid):
    found = []
    for task in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += [int(task), *children(int(task))]
    return found


@TOGETHER
@pytest.mark.parametrize("rank", [0, 1])
def test_who_waits_says_for_whom(flags, rank):
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, *flags], cwd=ROOT, env=ranks(2, rank, port), stderr=subprocess.PIPE, text=True
    )
    try:
        line = next(line for line in process.stderr if "waits for" in line)
    finally:
        process.kill()
        process.communicate()
    whom = "process 1" if rank == 0 else "process 0"
    assert line.startswith(f"[process {rank}] this is process {rank} of 2 and waits for {whom} at 127.0.0.1:{port}")


@TOGETHER
def test_an_orphan_saves_and_ends(flags, tmp_path):
    """The launcher is killed; its trainer is not told."""
    command = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--quiet",
        "--config_file",
        "accelerate_config.yaml",
        "--mixed_precision",
        "no",
    ]
    flags = [*flags, "--epochs", "200", "--workers", "1"]
    launcher = subprocess.Popen(
        [*command, "-m", "trainer.train", *flags], cwd=ROOT, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    assert until((tmp_path / "run/metrics.jsonl").exists)
    trainers = children(launcher.pid)
    assert len(trainers) >= 2  # and its loader's
    launcher.kill()
    try:
        assert until(lambda: not any(map(alive, trainers)), 15)
    finally:
        for pid in filter(alive, trainers):
            os.kill(pid, signal.SIGKILL)
    said = launcher.communicate()[1]
    assert "the launcher is gone; this process saves where it stands and ends" in said
    assert "stopped; --resume goes on from its last checkpoint" in said
    assert torch.load(tmp_path / "run/checkpoints/last.pt", weights_only=True)["state"]["step"] > 0


@TOGETHER
@pytest.mark.parametrize("what", [signal.SIGSTOP, signal.SIGKILL])
def test_a_process_that_is_frozen_or_killed_ends_the_others(flags, tmp_path, what):
    """It is named, and what it had saved is there."""
    port = free_port()
    both = [*flags, "--batch", "4", "--epochs", "200", "--save_every", "2", "--timeout", "5"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DRIVER, *both], cwd=ROOT, env=ranks(2, k, port), stderr=subprocess.PIPE, text=True
        )
        for k in (0, 1)
    ]
    try:
        assert until((tmp_path / "run/checkpoints/last.pt").exists)
        processes[1].send_signal(what)
        assert processes[0].wait(25) == 1
        said = processes[0].stderr.read()
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    line = next((line for line in said.splitlines() if line.startswith("[process 0] error: ")), said)
    assert f"process 1 on {socket.gethostname()}" in line
    assert "--resume goes on from the last checkpoint" in line
    assert "Traceback" not in said


FAILING = DRIVER.replace(
    "from trainer import train\n",
    """
import os
from trainer import train
from shards.errors import InputError
from trainer.loop import Trainer
step = Trainer.step
def failing(self, *rest):
    if self.state.step == 3 and os.environ["RANK"] == FAILS:
        raise PROBLEM
    return step(self, *rest)
Trainer.step = failing
""",
)


@TOGETHER
@pytest.mark.parametrize(
    ("fails", "problem", "told"),
    [(0, "InputError('train-000001.tar: is damaged; restore it')", "train-000001.tar: is damaged; restore it"),
     (1, "InputError('train-000001.tar: is damaged; restore it')", "train-000001.tar: is damaged; restore it"),
     (1, "MemoryError('no room')", "MemoryError: no room")],
)  # fmt: skip
def test_what_one_process_fails_by_ends_the_others_with_its_words(flags, fails, problem, told):
    port = free_port()
    driver = FAILING.replace("FAILS", repr(str(fails))).replace("PROBLEM", problem)
    both = [*flags, "--batch", "4", "--epochs", "200", "--timeout", "60"]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", driver, *both], cwd=ROOT, env=ranks(2, k, port), stderr=subprocess.PIPE, text=True
        )
        for k in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=150)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    other = 1 - fails
    assert processes[other].returncode == 1
    assert f"[process {other}] error: process {fails} on {socket.gethostname()}: {told}" in said[other]
    assert "Traceback" not in said[other]
    if "InputError" in problem:
        assert processes[fails].returncode == 2
        assert f"error: {told}" in said[fails]


@TOGETHER
def test_a_machine_that_lacks_the_shards_says_so_to_the_others(trained, shards):
    """Of an evaluation, too; there is nothing to resume."""
    port = free_port()
    command = [sys.executable, "-m", "trainer.evaluate", "--run", str(trained), "--shards"]
    processes = [
        subprocess.Popen(
            [*command, str(where)],
            cwd=ROOT,
            env=ranks(2, rank, port) | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, where in enumerate((shards, shards / "none"))
    ]
    try:
        said = [process.communicate(timeout=150)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    lacks = f"error: --shards {shards / 'none'}: no such folder; make one with"
    assert lacks in said[1]
    assert f"process 1 on {socket.gethostname()}: {lacks[7:]}" in said[0]
    assert [process.returncode for process in processes] == [1, 2]
    assert not [line for line in said if "--resume" in line or "Traceback" in line]


def test_a_ring_of_three_sees_who_is_silent_and_where_all_are(monkeypatch):
    """In one process, over a store of its own."""
    port = free_port()
    server = torch.distributed.TCPStore("127.0.0.1", port, None, True, wait_for_workers=False)
    monkeypatch.setattr(presence, "EVERY", 0.05)
    left = []
    monkeypatch.setattr(presence.Presence, "_leave", lambda self, why: (left.append((self.rank, why)), self.over.set()))
    all_of_them = []
    for rank in range(3):
        for name, value in ranks(3, rank, port).items():
            monkeypatch.setenv(name, value)
        one = presence.Presence(timeout=1.0)
        one.place, one.used = f"step {rank}", True
        one.agreed.set()
        one.start()
        all_of_them.append(one)
    assert until(lambda: all(one.beats > 3 for one in all_of_them), 30)
    assert all_of_them[0].signs()[2][1] == "step 2"
    assert "all are alive: process 0 is at step 0, process 1" in all_of_them[0].whose_fault()
    # Nobody waits for the first one in a collective
    order = []

    def waits():
        all_of_them[1].meet(False)
        order.append("second")

    second = threading.Thread(target=waits)
    second.start()
    time.sleep(0.3)
    order.append("first")
    all_of_them[0].meet(True)
    second.join(10)
    assert order == ["first", "second"]
    # One falls silent: the one before it in the ring says so
    all_of_them[2].over.set()
    assert until(lambda: bool(left), 30)
    assert left[0][0] == 1
    assert "process 2 on" in left[0][1]
    assert "since step 2" in left[0][1]
    assert "process 2 on" in all_of_them[0].whose_fault()
    for one in all_of_them:
        one.end()
    del server


def test_a_process_that_is_done_is_not_missed(monkeypatch):
    """As the others are while the first one still sends its pictures to a tracker."""
    port = free_port()
    server = torch.distributed.TCPStore("127.0.0.1", port, None, True, wait_for_workers=False)
    monkeypatch.setattr(presence, "EVERY", 0.05)
    left = []
    monkeypatch.setattr(presence.Presence, "_leave", lambda self, why: (left.append((self.rank, why)), self.over.set()))
    two = []
    for rank in range(2):
        for name, value in ranks(2, rank, port).items():
            monkeypatch.setenv(name, value)
        two.append(presence.Presence(timeout=0.5))
        two[-1].start()
    assert until(lambda: all(one.all_here for one in two), 30)
    said = iter([[True, True], [True, False]])
    monkeypatch.setattr(presence, "here", two[0])
    presence.agree(lambda own: next(said) if own == [True] else own)
    assert two[0].used
    two[1].used = True
    two[1].agreed.set()
    assert until(lambda: all(one.beats > 3 for one in two), 30)
    two[1].end()
    time.sleep(1.5)
    assert not left
    presence.agree(lambda own: next(said) if own == [True] else own)  # one has no store: none uses it
    assert not two[0].used
    two[0].end()
    # One inside the store when Python ends would abort it
    assert not any(thread.is_alive() for one in two for thread in (one, one.meets))
    del server


def test_what_a_connection_that_broke_is():
    assert presence._of_connection(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"))
    assert not presence._of_connection(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        presence.explained(lambda: (_ for _ in ()).throw(RuntimeError("shapes")))


def test_nobody_is_watched_without_a_launcher(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "RANK", "ACCELERATE_DYNAMO_BACKEND", "CXR_FOCUS_SWEEP"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # a user's own, with nohup
    assert not presence.Presence(60.0).needed
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "NO")
    assert presence.Presence(60.0).needed
