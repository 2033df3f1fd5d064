"""What processes must have in common, and a machine must have, before the first step."""

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from shards.errors import InputError
from trainer import guards
from trainer.build import build
from trainer.command import resolve


def test_processes_that_are_not_alike_are_told_apart():
    own = {"--batch": "8", "timm": "1.0", "the train images": "ab"}
    alike = [("process 0 on a", 100.0, own), ("process 1 on b", 130.0, dict(own))]
    assert guards.compared(alike) == []
    late = [alike[0], ("process 1 on b", 20.0, own), ("process 2 on c", 110.0, own)]
    assert guards.compared(late) == [
        "note: the clock of process 1 on b is -80 s from that of process 0 on a; set them by NTP"
    ]
    other = [*alike, ("process 2 on c", 100.0, own | {"timm": "1.1", "--batch": "4"})]
    with pytest.raises(InputError) as error:
        guards.compared(other)
    assert "--batch is 4 in process 2 on c, 8 in process 0 on a, timm is 1.1 in process 2" in str(error.value)
    with pytest.raises(InputError, match="the train images is None in process 1 on b"):
        guards.compared([alike[0], ("process 1 on b", 100.0, {"--batch": "8", "timm": "1.0"})])


def test_a_disk_without_room_is_told_before_anything_is_written(flags, tmp_path, monkeypatch):
    monkeypatch.setattr(guards.shutil, "disk_usage", lambda _: SimpleNamespace(free=50_000_000))
    with pytest.raises(InputError, match=r"needs some \d+ MB there \(the model, and --keep 2 checkpoints\), and 50 MB"):
        build(resolve([*flags, "--backbone", "resnet18"]))
    assert not (tmp_path / "run").exists()
    config = resolve(flags)
    model = torch.nn.Linear(1000, 1000)  # 4 MB: 3 x 3 + 2 times that
    monkeypatch.setattr(guards.shutil, "disk_usage", lambda _: SimpleNamespace(free=45_000_000))
    guards.room(tmp_path / "new/run", model, config)
    monkeypatch.setattr(guards.shutil, "disk_usage", lambda _: SimpleNamespace(free=40_000_000))
    with pytest.raises(InputError, match="the run needs some 44 MB"):
        guards.room(tmp_path / "new/run", model, config)
    (tmp_path / "run/checkpoints").mkdir(parents=True)  # what a resume writes over is room, too
    (tmp_path / "run/checkpoints/last.pt").write_bytes(bytes(8_000_000))
    guards.room(tmp_path / "run", model, config)


def test_batches_must_fit_into_shared_memory(flags, monkeypatch):
    config = resolve([*flags, "--batch", "32", "--workers", "4"])
    monkeypatch.setattr(guards.os, "statvfs", lambda _: SimpleNamespace(f_bavail=16384, f_frsize=4096))
    guards.shared_memory(config, (256, 256), 1)  # 17 MB in the 64 of a container
    with pytest.raises(InputError, match=r"need 537 MB of /dev/shm for 8 processes, and 67 MB are free; use fewer"):
        guards.shared_memory(config, (512, 512), 8)
    monkeypatch.setattr(guards, "SHM", Path("/nowhere"))
    guards.shared_memory(config, (512, 512), 8)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert guards.on_this_machine() == 4
    assert os.environ["LOCAL_WORLD_SIZE"] == "4"
