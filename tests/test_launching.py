"""Launches that would go wrong silently are refused."""

import os

import pytest
import torch

from shards.errors import InputError
from trainer import launching
from trainer import train as loop


def test_fp16_on_a_cpu_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(InputError, match="fp16 on a CPU"):
        launching.start(0)


def test_a_launch_for_several_processes_that_starts_one(monkeypatch):
    for name in ("ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, {"ACCELERATE_MIXED_PRECISION": "no"}.get(name, "29500"))
    with pytest.raises(InputError, match="was asked for several processes and started one: add --multi_gpu"):
        launching.start(0)


@pytest.mark.parametrize(
    ("variable", "value", "remedy"),
    [
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "launch without --dynamo_backend"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "accumulate with --accumulate"),
        ("ACCELERATE_USE_FSDP", "true", "launch with --multi_gpu"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "launch with --multi_gpu"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "launch with --multi_gpu"),
        ("ACCELERATE_MIXED_PRECISION", "fp8", "launch with --mixed_precision bf16"),
    ],
)
def test_settings_of_the_launcher_that_nobody_does_are_refused(flags, tmp_path, monkeypatch, variable, value, remedy):
    monkeypatch.setenv(variable, value)
    with pytest.raises(InputError, match=f"the launcher's settings ask for {variable}={value}: .*{remedy}"):
        loop.main(flags)
    assert not (tmp_path / "run").exists()


def test_what_the_launcher_says_by_default_is_fine(monkeypatch):
    for variable, value in (
        ("DYNAMO_BACKEND", "NO"),
        ("GRADIENT_ACCUMULATION_STEPS", "1"),
        ("USE_FSDP", "false"),
        ("MIXED_PRECISION", "bf16"),
    ):
        monkeypatch.setenv(f"ACCELERATE_{variable}", value)
    assert launching.start(0).mixed_precision == "bf16"


def test_apples_gpu_is_left_alone(monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    asked = {}
    ordinary = launching.Accelerator
    monkeypatch.setattr(launching, "Accelerator", lambda **options: asked.update(options) or ordinary(**options))
    assert launching.start(0).device.type == "cpu"
    assert asked["cpu"]
    assert "GPU is not used" in capsys.readouterr().err


def test_threads_are_those_that_the_process_may_use(monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(launching, "cores", lambda: 3)
    monkeypatch.setattr(os, "cpu_count", lambda: 128)
    try:
        launching.set_threads()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
