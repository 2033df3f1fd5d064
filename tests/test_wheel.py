"""The package as it is installed."""

import subprocess
import sys

import pytest
from curves import ROOT

from trainer import launching


def test_the_wheel_has_recipes_and_weights(tmp_path):
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(tmp_path),
        str(ROOT),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    if done.returncode and "setuptools" in done.stderr:
        pytest.skip("setuptools is too old to build here")
    assert done.returncode == 0, done.stderr
    import zipfile

    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {
        "launch/recipes/published.yaml",
        "launch/demo.sh",
        "trainer/lungs/weights/lung_unet.safetensors",
        "trainer/findings/nih.yaml",
    } <= names


def test_notes_of_the_start_are_not_among_the_data(monkeypatch, capsys):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    launching.start(0, "fp16")
    captured = capsys.readouterr()
    assert not captured.out
    assert "fp16 needs a GPU" in captured.err
