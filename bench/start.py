"""python bench/start.py: how long a training on ten million images takes to its first step, and how much memory.

A synthetic index: every shard is a link to one tar of 250 images of 64 px, half of them with a lesion box. What is
measured is a process of its own: imports, then `build` with regions of both kinds, then the first step (both a tiny
network). Then the same with 14 findings an image, 20,000 different rows of labels, present, absent and uncertain.
Writes bench/start.md.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

import numpy as np
from step import processor

from shards.names import lists
from shards.pack import pack
from shards.phantom import Phantoms

HERE = Path(__file__).parent
MEASURE = """
import json, resource, sys, time
begin = time.perf_counter()
from trainer.build import build
from trainer.command import resolve
imported = time.perf_counter()
trainer = build(resolve(sys.argv[1:]))
built = time.perf_counter()
trainer.net.train()
trainer.step([next(trainer.loader.batches(0))], 0.5)
stepped = time.perf_counter()
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
used = len(trainer.annotations.used)
print(json.dumps([imported - begin, built - imported, stepped - built, peak, used, len(trainer.plan)]))
"""


def index_of(root: Path, copies: int) -> Path:
    """Packed shards whose train split has as many copies of one tar."""
    pack(
        Phantoms(418, 0, size=64, findings=("No Finding", "Effusion")),
        root / "one",
        dataset="x",
        per_shard=1000,
        workers=1,
    )
    many = root / "many"
    (many / "train").mkdir(parents=True)
    index = json.loads((root / "one/index.json").read_text())
    entry = index["splits"]["train"]
    (shard,) = entry["shards"]
    for i in range(copies):
        os.symlink(root / "one/train/000000.tar", many / f"train/{i:06d}.tar")
    entry["shards"] = [shard | {"name": f"train/{i:06d}.tar"} for i in range(copies)]
    entry["samples"] *= copies
    for split in ("val", "test"):
        os.symlink(root / "one" / split, many / split)
    for path in (root / "one").glob("*.npy"):
        table = np.load(path)
        if path.name.startswith("train"):
            count, table = len(table), np.tile(table, copies)
            if path.name == "train.boxes.npy":
                table["row"] += np.repeat(np.arange(copies, dtype="<u4") * shard["samples"], count)
        np.save(many / path.name, table)
    (many / "index.json").write_text(json.dumps(index))
    return many


def labelled(shards: Path) -> None:
    """Give each training image one of 20,000 rows of labels; lesion boxes are then of findings that some show."""
    index, rng = json.loads((shards / "index.json").read_text()), np.random.default_rng(0)
    states = rng.choice(3, (20_000, 14), p=(0.1, 0.8, 0.1))
    names = np.array(lists()["nih14"])
    rows = [
        {name: names[row == state].tolist() for state, name in enumerate(("findings", "absent", "uncertain"))}
        for row in states
    ]
    index |= {"labels": rows, "findings": names.tolist(), "asked": names.tolist(), "unlisted": "unknown"}
    for split, entry in index["splits"].items():
        np.save(shards / f"{split}.labels.npy", rng.integers(0, len(rows), entry["samples"]).astype("<u2"))
        entry["findings"] = dict.fromkeys(names.tolist(), 1)
    (shards / "index.json").write_text(json.dumps(index))


def main() -> None:
    """Make the index, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10_000_000)
    a = parser.parse_args()
    lines = []
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        many = index_of(root, a.images // 250)
        for shards, kind in ((root / "one", "one"), (many, "one"), (many, "any")):
            if kind == "any":
                labelled(many)
            task = ["--labels.kind", "any", "--task", "nih14"] if kind == "any" else []
            flags = [
                "--shards",
                str(shards),
                "--out",
                str(root / f"run_{shards.name}_{kind}"),
                "--backbone",
                "test_resnet",
            ]
            flags += ["--pretrained", "false", "--size", "64", "--workers", "0", "--tracker", "none"]
            command = [sys.executable, "-c", MEASURE, *flags, "--attention.region", "both", *task]
            done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            imported, built, step, peak, used, images = json.loads(done.stdout.splitlines()[-1])
            lines.append(
                f"| {14 if task else 1} | {images} | {used} | {imported:.1f} | {built:.1f} | {step:.1f} | {peak:.2f} |"
            )
    text = f"""# The start of a training

{date.today()}, {processor()}, float32 on the CPU. `python bench/start.py`

| findings | training images | with lesion boxes | imports, s | build, s | first step, s | peak memory, GB |
|---|---|---|---|---|---|---|
{chr(10).join(lines)}
"""
    (HERE / "start.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
