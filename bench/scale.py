"""python bench/scale.py [--samples N] [--nodes 8] [--each 8]: the reader of many processes, simulated.

The plan of an epoch dealt to 64 processes on 8 nodes, batches of 32, ten million samples in shards of 1,000, no images:
is every sample read exactly once, also by a run that is resumed in between with other numbers; how far apart the
processes' shares are; how many bytes a node fetches with a cache of so many GB (the least recently used shard goes
first, as in `shards.cache`), if a shard has 60 MB; how long the plan takes a step. Writes bench/scale.md.
"""

import argparse
import time
from collections import OrderedDict
from datetime import date
from pathlib import Path

import numpy as np
from step import processor

from shards.plan import EpochPlan, Shares

BATCH, PER_SHARD, SHARD_GB = 32, 1000, 0.06
CACHES = (1, 10, 100, 1000)


class Cache:
    """Shards that a node has, and how many it has fetched."""

    def __init__(self, gigabytes: float) -> None:
        self.room = max(1, int(gigabytes / SHARD_GB))
        self.there: OrderedDict[int, None] = OrderedDict()
        self.fetched = 0

    def use(self, shard: int) -> None:
        """A sample of it is read."""
        if shard in self.there:
            self.there.move_to_end(shard)
            return
        self.fetched += 1
        self.there[shard] = None
        if len(self.there) > self.room:
            self.there.popitem(last=False)


def epoch(plan: EpochPlan, number: int, *, nodes: int, each: int, caches: dict[int, list[Cache]]) -> dict[str, float]:
    """Deal an epoch; halfway, as after a requeue, half as many nodes go on."""
    count, world = np.zeros(len(plan), np.uint8), nodes * each
    halfway = 0
    spread, seconds, steps = 0, 0.0, 0
    for start in Shares(plan, number, 0, batch=BATCH, rank=0, world=world).starts():
        if start >= len(plan) // 2:
            halfway = start
            break
        parts = []
        for rank in range(world):
            began = time.perf_counter()
            share = Shares(plan, number, 0, batch=BATCH, rank=rank, world=world).share(start)
            seconds += time.perf_counter() - began
            steps += 1
            parts.append(share.positions)
            count[share.positions] += share.counts
        spread = max(spread, max(map(len, parts)) - min(map(len, parts)))
        for node in range(nodes):
            own = np.concatenate(parts[node * each : (node + 1) * each])
            for shard in np.unique(own // PER_SHARD).tolist():
                for of in caches.values():
                    of[node].use(shard)
    fewer = max(1, world // 2)
    for rank in range(fewer):
        for share in Shares(plan, number, halfway, batch=BATCH, rank=rank, world=fewer):
            count[share.positions] += share.counts
    assert (count == 1).all(), "a sample was read twice, or not at all"
    return {"spread": spread, "microseconds": 1e6 * seconds / steps}


def main() -> None:
    """Simulate, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--each", type=int, default=8)
    a = parser.parse_args()
    shards = -(-a.samples // PER_SHARD)
    began = time.perf_counter()
    plan = EpochPlan([PER_SHARD] * (shards - 1) + [a.samples - PER_SHARD * (shards - 1)], seed=1)
    caches = {size: [Cache(size) for _ in range(a.nodes)] for size in CACHES}
    found = [epoch(plan, number, nodes=a.nodes, each=a.each, caches=caches) for number in (0, 1)]
    text = f"# The reader of many processes\n\n{(__doc__ or '').partition(chr(10) * 2)[2].strip()}\n\n"
    text += f"{processor()}, {date.today()}: {a.samples:,} samples, {a.nodes} nodes of {a.each} processes, "
    text += f"{time.perf_counter() - began:.0f} s for two epochs.\n\n"
    text += "- Every sample once in both epochs, each of them halved by a restart on half as many processes.\n"
    text += f"- Shares of a step differ by at most {max(one['spread'] for one in found):.0f} image.\n"
    text += f"- A share costs a process {found[1]['microseconds']:.0f} microseconds.\n\n"
    whole = shards * SHARD_GB
    text += "| cache of a node, GB | fetched by a node in half an epoch, GB | of what it reads |\n|---|---|---|\n"
    for size, of in caches.items():
        gigabytes = np.mean([cache.fetched for cache in of]) * SHARD_GB / 2
        text += f"| {size} | {gigabytes:.0f} | {gigabytes / (whole / 2):.2f} of the shards that are read |\n"
    (Path(__file__).parent / "scale.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
