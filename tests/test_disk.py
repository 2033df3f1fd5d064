"""A full disk is one line, and what was there stays."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from curves import ROOT

from shards import atomic, errors
from shards.errors import InputError
from trainer import checkpoint


def test_a_full_disk_is_one_line_and_what_was_there_stays(tmp_path, monkeypatch):
    path = tmp_path / "x.pt"
    checkpoint.save(path, {"a": torch.zeros(3)})
    before = path.read_bytes()

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("write_bytes", "open"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, name, full)
            for action in (
                lambda: atomic.write(path, "text"),
                lambda: atomic.append(path, "line"),
                lambda: checkpoint.save(path, {}),
            ):
                if name == "open" or action.__code__.co_names[1] == "write":
                    with pytest.raises(InputError, match=r"x\.pt: cannot be written \(No space left on device\)"):
                        action()
    assert path.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json", "x.pt"]


@pytest.mark.skipif(sys.platform != "linux", reason="a small disk can be mounted on Linux only")
@pytest.mark.parametrize("size", ["50m", *(pytest.param(size, marks=pytest.mark.slow) for size in ("2m", "90m"))])
def test_a_run_on_a_full_disk_is_one_line(flags, tmp_path, size):
    (tmp_path / "disk").mkdir()
    flags[flags.index("--out") + 1] = str(tmp_path / "disk/run")
    inside = f'mount -t tmpfs -o size={size} tmpfs {tmp_path}/disk && exec "$0" "$@"'
    flags += ["--backbone", "resnet18", "--epochs", "1"]
    command = ["unshare", "--mount", "sh", "-c", inside, sys.executable, "-m", "trainer.train", *flags]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"PYTHONWARNINGS": "ignore"}, capture_output=True, text=True, timeout=300
    )
    if "unshare" in done.stderr or "mount:" in done.stderr:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    assert "Traceback" not in done.stderr
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "cannot be written (" in line or "the run needs some" in line  # the least that a run needs is known before


def test_an_error_of_the_system_that_names_no_file_is_one_line_where_a_disk_is_full(capsys):
    def main():
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(SystemExit, match="2"):
        errors.run(main)
    assert "error: a file: cannot be written (No space left on device); free space" in capsys.readouterr().err
