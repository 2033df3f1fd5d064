"""What happens with several processes."""

import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import two
from curves import ROOT, launch
from jobs import TOGETHER, content_of, seeing
from safetensors.torch import load_file

from shards.dataset import Split
from shards.loader import Loader
from shards.plan import EpochPlan
from trainer import checkpoint, launching
from trainer import train as loop
from trainer.build import build
from trainer.command import resolve


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
def test_a_signal_to_one_process_ends_both_at_the_same_step(flags, tmp_path):
    """Exit code 0, a checkpoint of that step, and on to the weights of a run that nobody disturbed; the same while it
    validates.
    """
    both = [*flags, "--batch", "4", "--epochs", "2", "--best", "last"]
    two_py = str(ROOT / "tests/two.py")
    done = launch("--mixed_precision", "no", two_py, "signalled", str(tmp_path), *both)
    assert done.returncode == 0, done.stderr
    assert "stopped; --resume goes on from its last checkpoint" in done.stderr
    saved = checkpoint.load(tmp_path / "run/checkpoints/last.pt")
    assert 3 <= saved["state"]["step"] <= 5
    on = [str(tmp_path), "--out", str(tmp_path / "run"), "--resume"]
    done = launch("--mixed_precision", "no", two_py, "validating", *on)
    assert done.returncode == 0, done.stderr
    saved = checkpoint.load(tmp_path / "run/checkpoints/last.pt")
    assert (saved["state"]["epoch"], saved["state"]["position"]) == (0, 30)
    assert not (tmp_path / "run/model.safetensors").exists()
    done = launch("--mixed_precision", "no", two_py, "train", *on)
    assert done.returncode == 0, done.stderr
    calm = [str(tmp_path / "calm") if flag == str(tmp_path / "run") else flag for flag in both]
    done = launch("--mixed_precision", "no", two_py, "train", str(tmp_path), *calm)
    assert done.returncode == 0, done.stderr
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "calm"))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


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
