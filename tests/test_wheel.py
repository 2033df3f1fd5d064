"""The package as it is installed."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from curves import ROOT

from trainer import launching


def as_the_image_copies_it(folder: Path) -> Path:
    """What the Dockerfile copies before it installs the package, and nothing else."""
    text = (ROOT / "Dockerfile").read_text()
    for words in (line.split()[1:] for line in text.splitlines() if line.startswith("COPY ")):
        for name in words[:-1]:
            to = folder / words[-1].removeprefix("/src").strip("/")
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, to, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                to.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, to)
    return folder


def test_the_image_asks_for_what_there_is():
    """Extras are those of the package; no step needs what an earlier one has not made."""
    text = (ROOT / "Dockerfile").read_text()
    extras = re.search(r'"/src\[([\w,]+)\]"', text)[1].split(",")
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(extras) <= set(known)
    steps = [line.split()[0] for line in text.splitlines() if line[:1].isupper()]
    assert steps[:2] == ["ARG", "FROM"]
    assert text.index("python3 -m venv") < text.index("pip install") < text.index("USER ")


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
        str(as_the_image_copies_it(tmp_path / "source")),
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
        "launch/grids/paper.yaml",
        "trainer/report/published.csv",
        "trainer/report/templates/card.md",
        "trainer/lungs/weights/lung_unet.safetensors",
        "trainer/findings/nih.yaml",
    } <= names
    assert any(name.endswith("data/share/cxr-focus/accelerate_config.yaml") for name in names)

    # As it is used where there is no checkout: commands by name, from a folder of its own.
    home = tmp_path / "home"
    subprocess.run([sys.executable, "-m", "venv", "--system-site-packages", str(home)], check=True, timeout=300)
    paths = [path for path in sys.path if path.endswith("site-packages")]
    (site,) = home.glob("lib/python*/site-packages")
    (site / "outer.pth").write_text("\n".join(paths))  # torch and the others, from here
    install = [str(home / "bin/python"), "-m", "pip", "install", "--quiet", "--no-deps", "--force-reinstall"]
    subprocess.run([*install, str(wheel)], check=True, timeout=300)

    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def said(*words: str) -> str:
        command = [str(home / "bin" / words[0]), *words[1:]]
        done = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True, timeout=300)
        return done.stdout + done.stderr

    assert "usage:" in said("cxr-shards", "--help")
    config = Path(said("cxr-focus", "accelerate-config").strip())
    assert home in config.parents
    assert "mixed_precision: bf16" in config.read_text()
    assert said("cxr-train", "--shards", "nowhere", "--out", "x", "--config", "demo").startswith("error: ")
    assert said("cxr-train", "--config", "demos").startswith("error: --config demos: no such file")
    assert said("cxr-predict", "--run", "nowhere", "x.png").startswith("error: --run nowhere: is not a run folder")


def test_notes_of_the_start_are_not_among_the_data(monkeypatch, capsys):
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    launching.start(0, "fp16")
    captured = capsys.readouterr()
    assert not captured.out
    assert "fp16 needs a GPU" in captured.err
