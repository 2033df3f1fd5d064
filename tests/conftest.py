"""Small phantoms and a small segmenter, made once; threads limited so that processes do not fight for two cores."""

import os
import shutil
from pathlib import Path

# Before torch is there: two workers of pytest, or two processes of a test, share two cores
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from jobs import SMALL

from shards.pack import pack
from shards.phantom import Phantoms
from trainer.lungs import LungSegmenter

os.environ.setdefault("WANDB_MODE", "offline")
GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps its state in the process; each test starts without one."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> Path:
    """100 phantoms of 64 px with all four findings: 60 train, 20 val, 20 test, in small tars."""
    root = tmp_path_factory.mktemp("data") / "shards"
    pack(Phantoms(100, 0, size=64), root, dataset="phantom", per_shard=7)
    return root


@pytest.fixture(scope="session")
def segmenter(tmp_path_factory) -> Path:
    """A tiny segmenter that has seen nothing: its boxes are as good as any for mechanics."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("lungs") / "lung_unet.safetensors"
    LungSegmenter([2, 4, 8, 16, 32], 32).eval().save(path)
    return path


@pytest.fixture(scope="session")
def golden() -> dict:
    return dict(np.load(GOLDEN / "published.npz"))


@pytest.fixture
def flags(shards, segmenter, tmp_path):
    """Flags of a small run into tmp_path/run."""
    return ["--shards", str(shards), "--out", str(tmp_path / "run"), "--lungs.weights", str(segmenter), *SMALL]


@pytest.fixture(scope="session")
def one_epoch(shards, segmenter, tmp_path_factory) -> Path:
    """A finished run of one epoch; made once, for all who look at it."""
    from trainer import train

    out = tmp_path_factory.mktemp("finished") / "run"
    train.main(["--shards", str(shards), "--out", str(out), "--lungs.weights", str(segmenter), *SMALL, "--epochs", "1"])
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    return out


@pytest.fixture
def trained(one_epoch, tmp_path) -> Path:
    """That run as tmp_path/run: as ``train.main([*flags, "--epochs", "1"])`` leaves it."""
    shutil.copytree(one_epoch, tmp_path / "run")
    return tmp_path / "run"
