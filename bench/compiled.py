"""python bench/compiled.py [--backbones pvt,resnet,vgg]: what --compile gives on this processor.

The default step with remembered lungs, a batch of 8 phantoms at 224 px, as it is and compiled, by turns in one process
for each backbone; seconds until the first compiled step is done, less where torch has it in its cache. That figures
agree is tested (tests/test_compile.py). Writes bench/compiled.md.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import torch
from step import processor

from shards.loader import Loader
from shards.pack import pack
from shards.phantom import Phantoms
from shards.plan import EpochPlan
from trainer.build import build
from trainer.command import resolve

HERE = Path(__file__).parent


def measure(root: Path, backbone: str, turns: int) -> str:
    """A row of the table."""
    flags = ["--shards", str(root / "shards"), "--task", "ne", "--backbone", backbone, "--pretrained", "false"]
    flags += ["--batch", "8", "--workers", "0", "--tracker", "none", "--out"]
    pair = [build(resolve([*flags, str(root / f"{backbone}{k}"), *more])) for k, more in enumerate(([], ["--compile"]))]
    split = pair[0].splits["train"]
    one = next(iter(Loader(split, EpochPlan(split.shard_sizes()), batch=8, workers=0).batches(0)))
    first, times = 0.0, [[], []]
    for turn in range(turns + 2):
        for k, trainer in enumerate(pair):
            trainer.net.train()
            began = time.perf_counter()
            trainer.step([one], 0.5)
            seconds = time.perf_counter() - began
            if turn >= 2:
                times[k].append(seconds)
            elif k and not turn:
                first = seconds
    low, middle, high = statistics.quantiles([b / a for a, b in zip(*times, strict=True)], n=4)
    before, after = map(statistics.median, times)
    ratio = f"{middle:.3f} ({low:.3f} to {high:.3f})"
    return f"{backbone} | {before:.3f} | {after:.3f} | {ratio} | {first:.0f}"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", default="pvt,resnet,vgg")
    parser.add_argument("--turns", type=int, default=8)
    parser.add_argument("--inside", type=Path, help="(shards are there; a process of its own)")
    a = parser.parse_args()
    if a.inside:
        print(f"ROW {measure(a.inside, a.backbones, a.turns)}")
        return
    text = f"# Compiled\n\n{(__doc__ or '').partition(chr(10) * 2)[2].strip()}\n\n{processor()}; torch "
    text += f"{torch.__version__}, float32, {date.today()}; {a.turns} turns.\n\n"
    text += "| backbone | seconds a step | compiled | compiled / as it is | seconds of the first |\n"
    text += "|---|---|---|---|---|\n"
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        pack(Phantoms(60, 0, size=512, findings=("No Finding", "Effusion")), root / "shards", dataset="phantom")
        for backbone in a.backbones.split(","):
            own = [sys.executable, __file__, "--inside", str(root), "--backbones", backbone, "--turns", str(a.turns)]
            done = subprocess.run(own, stdout=subprocess.PIPE, text=True, check=True)
            text += "".join(f"| {line[4:]} |\n" for line in done.stdout.splitlines() if line.startswith("ROW "))
    (HERE / "compiled.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
