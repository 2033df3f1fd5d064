"""python bench/reading.py: reading and packing side by side with what they are made of, and with other readers.

Reading, one core, batches of 32: `Loader.batches` against (a) bare decoding of the same bytes from memory, (b)
`webdataset`'s own pipeline on the same tars, (c) torchvision's ImageFolder on 1024 px PNGs resized to 512, (d) MosaicML
Streaming on the same bytes, where it is installed (`pip install mosaicml-streaming`). Packing:
`shards.pack` against decode, resize and encode of the same files in a bare loop. Alternating pairs; medians with
quartiles of the ratios go into bench/reading.md. Images are phantoms of 1024 px, or those of
CXR_FOCUS_REAL_DATA/nih/original.
"""

import argparse
import gc
import io
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from shards.dataset import Split
from shards.loader import Loader
from shards.pack import pack
from shards.phantom import Phantoms
from shards.pixels import encode_image
from shards.plan import EpochPlan
from shards.sources.item import Item, Source

BATCH = 32


def originals(folder: Path, count: int) -> list[Path]:
    """1024 px PNGs: of the NIH archive where they are at hand, phantoms otherwise."""
    real = os.environ.get("CXR_FOCUS_REAL_DATA")
    files = sorted(Path(real).glob("nih/original/*/images/*.png")) if real else []
    if files:
        return files
    source = Phantoms(max(20, count), 0, size=1024)
    for item in source.items[:count]:
        (folder / f"{item.key}.png").write_bytes(encode_image(source.load(item).image, "png"))
    return sorted(folder.glob("*.png"))


def decode(data: bytes) -> np.ndarray:
    """The bare thing."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("L"))


def seconds(work: Callable[[], int]) -> float:
    """Seconds an image."""
    gc.collect()
    begin = time.perf_counter()
    count = work()
    return (time.perf_counter() - begin) / count


def compare(name: str, ours: Callable[[], int], other: Callable[[], int], pairs: int, floor: str) -> str:
    """Alternate both; the speed of ours as a multiple of the other's, median and quartiles."""
    ours()
    other()
    ratios, mine, theirs = [], [], []
    for n in range(pairs):
        first, second = (ours, other) if n % 2 else (other, ours)
        a, b = seconds(first), seconds(second)
        ours_s, other_s = (a, b) if n % 2 else (b, a)
        ratios.append(other_s / ours_s)
        mine.append(1 / ours_s)
        theirs.append(1 / other_s)
    low, middle, high = statistics.quantiles(ratios, n=4)
    line = (
        f"| {name} | {statistics.median(mine):.0f} | {statistics.median(theirs):.0f} | {middle:.3f} | {low:.3f} to "
        f"{high:.3f} | {floor} |"
    )
    print(line, flush=True)
    return line


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--images", type=int, default=600)
    parser.add_argument("--write", type=Path, default=Path(__file__).with_name("reading.md"))
    a = parser.parse_args()
    torch.set_num_threads(1)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[-1]})  # one core for everybody
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        (root / "png/train/x").mkdir(parents=True)
        files = originals(root / "png/train/x", 48)
        repeated = [files[i % len(files)] for i in range(a.images)]
        items = [Item("train", f"{i:06d}", ("No Finding",), str(path)) for i, path in enumerate(repeated)]
        pack(Source(items), root / "shards", dataset="bench", per_shard=200, workers=1)
        split = Split(root / "shards", "train")
        plan = EpochPlan(split.shard_sizes(), 0)
        order = plan.order(0, 0, len(split))
        payload = [split._member(int(p), "image") for p in order]

        def ours() -> int:
            return sum(len(b.index) for b in Loader(split, plan, batch=BATCH, workers=0).batches(0))

        def bare() -> int:
            for data in payload:
                decode(data)
            return len(payload)

        def theirs() -> int:
            import webdataset

            urls = [f"{split.store.name}/{shard['name']}" for shard in split.shards]
            pipeline = (
                webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
                .shuffle(200)
                .map(lambda s: decode(s["jpg"]))
            )
            return sum(1 for _ in pipeline)

        def image_folder() -> int:
            from torchvision.datasets import ImageFolder
            from torchvision.transforms import Compose, Grayscale, Resize

            folder = files[0].parent.parent
            data = ImageFolder(
                str(folder), Compose([Grayscale(), Resize((512, 512))]), is_valid_file=lambda p: p.endswith(".png")
            )
            for i in range(min(24, len(data))):
                np.asarray(data[i][0])
            return min(24, len(data))

        def streaming() -> list[str]:
            """A row beside MosaicML Streaming, whose samples hold the same bytes; none where it is not installed."""
            try:
                from streaming import MDSWriter, StreamingDataset
            except ImportError:
                return []
            with MDSWriter(out=str(root / "mds"), columns={"image": "bytes"}) as writer:
                for data in payload:
                    writer.write({"image": bytes(data)})
            there = StreamingDataset(local=str(root / "mds"), shuffle=True, batch_size=BATCH)
            read = lambda: sum(1 for sample in there if decode(bytearray(sample["image"])).size)  # noqa: E731
            return [compare("reading / MosaicML Streaming", ours, read, a.pairs, "")]

        few = items[:96]

        def packing() -> int:
            with tempfile.TemporaryDirectory() as out:
                sys.stderr.flush()
                pack(Source(few), Path(out) / "s", dataset="bench", workers=1)
            return len(few)

        def loop() -> int:
            for item in few:
                image = Image.open(item.image).convert("L").resize((512, 512), Image.Resampling.BOX)
                image.save(io.BytesIO(), "JPEG", quality=95)
            return len(few)

        lines = [
            compare("reading / bare decoding", ours, bare, a.pairs, ">= 0.97"),
            compare("bare decoding / itself", bare, bare, a.pairs, ""),
            compare("reading / webdataset", ours, theirs, a.pairs, ">= 1.25"),
            *streaming(),
            compare("reading / ImageFolder, 1024 px PNG", ours, image_folder, a.pairs, ">= 12"),
            compare("packing / decode, resize, encode", packing, loop, a.pairs, ">= 0.85"),
        ]
        rates = {line.split("|")[1].strip(): float(line.split("|")[2]) for line in lines}
        packed, read = rates["packing / decode, resize, encode"], rates["reading / bare decoding"]
        memory = measure_memory(str(root / "shards"))
    projection = "\n".join(
        f"| {cores} | {112120 / packed / cores:.3g} | {112120 / read / cores:.2g} |" for cores in (2, 16, 256)
    )
    text = f"""# Reading and packing

{date.today()}, {platform.processor() or platform.machine()}, {os.cpu_count()} cores, one of them used;
torch {torch.__version__}, Pillow {Image.__version__};
{a.images} images of 512 px as JPEG (quality 95) in tars of 200, {a.pairs} alternating pairs. `python bench/reading.py`

| ours / other | ours, images/s | other, images/s | ratio | quartiles | wanted |
|---|---|---|---|---|---|
{chr(10).join(lines)}

Private memory of a reading process beyond its imports, MB, after 1, 2, 3 and 4 epochs:
{", ".join(f"{m:.1f}" for m in memory)}.

On paper, the 112,120 images of NIH ChestX-ray14 at these rates, if cores and disks scale (seconds):

| cores | packing | one epoch read |
|---|---|---|
{projection}
"""
    a.write.write_text(text)
    print(text)


def measure_memory(root: str) -> list[float]:
    """Private MB that reading adds to a process, epoch by epoch."""
    import subprocess

    code = """
import sys, torch, numpy
from shards.dataset import Split
from shards.loader import Loader
from shards.plan import EpochPlan
def private():
    return sum(int(line.split()[1]) for line in open('/proc/self/smaps_rollup') if line.startswith('Private')) / 1000
before = private()
split = Split(sys.argv[1], 'train'); plan = EpochPlan(split.shard_sizes(), 0); out = []
for epoch in range(4):
    for _ in Loader(split, plan, batch=32, workers=0).batches(epoch): pass
    out.append(private() - before)
print(*out)
"""
    return [
        float(x)
        for x in subprocess.run(
            [sys.executable, "-c", code, root], check=True, capture_output=True, text=True
        ).stdout.split()
    ]


if __name__ == "__main__":
    main()
