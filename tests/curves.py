"""Small trainings of which every figure is kept in golden/curves.json: a change that shall change nothing is seen to
change nothing.

`python tests/curves.py` writes that file anew, after a change that is meant to move a figure; the commit then says why.
"""

import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # how many threads add up decides the last bits

import torch

ROOT = Path(__file__).parents[1]
FILE = Path(__file__).parent / "golden" / "curves.json"
COMMON = [
    "--pretrained",
    "false",
    "--size",
    "64",
    "--epochs",
    "2",
    "--tracker",
    "none",
    "--log_every",
    "1",
    "--workers",
    "0",
    "--task",
    "nep",
]
MOVING = [
    "--augment.rotate",
    "8",
    "--augment.scale",
    "0.1",
    "--augment.shift",
    "0.05",
    "--augment.flip",
    "0.2",
    "--augment.contrast",
    "0.2",
]
MOVING += ["--augment.gamma", "0.2", "--augment.noise", "0.02", "--augment.invert", "0.1"]
BEFORE = ["--findings", str(FILE.with_name("findings.yaml"))]  # of defaults that have changed since
RUNS = {
    "resnet": ["--backbone", "test_resnet", "--optim.lr", "1e-4", *BEFORE, "--balance.lam", "0.5", *MOVING],
    "vit": [
        "--backbone",
        "test_vit",
        *BEFORE,
        "--attention.region",
        "both",
        "--attention.annotated",
        "0.5",
        "--swap.lesions",
        "true",
        "--balance.policy",
        "balanced",
        "--accumulate",
        "2",
    ],
    "published": [
        "--backbone",
        "test_resnet",
        "--findings",
        "published",
        "--attention.form",
        "published",
        "--balance.policy",
        "ratio",
    ],
}
MEASURED = ("accuracy", "auc", "loss", "localization", "probe", "at_threshold")
TIMED = ("images_per_s",)


def machine() -> str:
    """Where figures come out the same to the last bit: processor, its instructions, torch."""
    model = platform.processor()
    with contextlib.suppress(OSError):
        model = next(
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        )
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def launch(*command: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Two processes on the CPU, one thread each."""
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore",
    }
    start = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        str(ROOT / "accelerate_config.yaml"),
        "--multi_gpu",
    ]
    return subprocess.run(
        [*start, "--num_processes", "2", *command],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
    )


def flags(name: str, shards: Path, out: Path, processes: int = 1) -> list[str]:
    """The command line of a run; two processes take as many images a step as one."""
    return ["--shards", str(shards), "--out", str(out), *COMMON, *RUNS[name], "--batch", str(8 // processes)]


def figures(out: Path) -> dict[str, Any]:
    """Of a finished run: every line of its log, and what its report measures."""

    def refuse(constant: str) -> float:
        raise ValueError(f"{constant} is no JSON")

    lines = [json.loads(line, parse_constant=refuse) for line in (out / "metrics.jsonl").read_text().splitlines()]
    report = json.loads((out / "report.json").read_text(), parse_constant=refuse)
    measured = {split: {name: report[split].get(name) for name in MEASURED} for split in ("val", "test")}
    return {"log": [{k: v for k, v in line.items() if k not in TIMED} for line in lines], "report": measured}


def main() -> None:
    from accelerate.state import AcceleratorState, GradientState

    from shards.pack import pack
    from shards.phantom import Phantoms
    from trainer import train

    with tempfile.TemporaryDirectory() as name:
        shards, runs = Path(name) / "shards", {}
        pack(Phantoms(100, 0, size=64), shards, dataset="phantom", per_shard=7)
        for run in RUNS:
            train.main(flags(run, shards, Path(name) / run))
            AcceleratorState._reset_state(True)
            GradientState._reset_state()
            runs[run] = figures(Path(name) / run)
        done = launch("--mixed_precision", "no", "-m", "trainer.train", *flags("resnet", shards, Path(name) / "two", 2))
        assert done.returncode == 0, done.stderr
        runs["resnet, two processes"] = figures(Path(name) / "two")
    FILE.write_text(json.dumps({"machine": machine(), "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
