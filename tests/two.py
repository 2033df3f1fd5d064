"""What each of several processes does, for test_train.py: accelerate launch tests/two.py WHAT FOLDER FLAGS...

train: an ordinary run; FOLDER/rank<r>.json gets the images of each epoch and lambda of each step.
gradients: one step in float64; FOLDER/rank<r>.pt gets the gradients before the optimizer's step, labels, sums.
signalled, validating: an ordinary run, of which the second process gets a SIGTERM, once, within its third step, or
while it validates.
apart: an ordinary run whose processes stand in folders of their own, as on machines without a common disk.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from shards.errors import run
from shards.loader import Loader
from shards.plan import EpochPlan
from trainer import build, launching
from trainer.command import resolve
from trainer.loop import Trainer, groups
from trainer.train import main as main_of_training


def gradients(argv: list[str]) -> tuple[dict[str, torch.Tensor], list[list[int]], torch.Tensor]:
    """Gradients of the first step in float64, the labels of each of its micro-batches on this process, and the sums
    that lambda follows.
    """
    ordinary = build.FocusClassifier
    build.FocusClassifier = lambda *args, **kwargs: ordinary(*args, **kwargs).double()  # type: ignore[assignment,misc]
    try:
        job = build.build(resolve(argv))
    finally:
        build.FocusClassifier = ordinary  # type: ignore[misc]
    kept: dict[str, torch.Tensor] = {}
    job.optimizer.step = lambda: kept.update(
        {n: p.grad.clone() for n, p in job.model.named_parameters() if p.grad is not None}
    )
    job.net.train()
    split, c, acc = job.splits["train"], job.config, job.accelerator
    plan = EpochPlan(split.shard_sizes(), c.seed)
    loader = Loader(split, plan, batch=c.batch, rank=acc.process_index, world=acc.num_processes, workers=0).batches(0)
    group = next(groups(loader, c.accumulate))
    sums = job.step(group, c.balance.lam)
    return kept, [b.target.argmax(1).tolist() for b in group], sums.cpu()


def watched(argv: list[str]) -> dict[str, list]:
    """An ordinary run, with what it saw."""
    seen: dict[str, list] = {"index": [], "lambda": []}
    ordinary = Trainer.step

    def step(self, group, lam):
        seen["index"] += [
            (self.state.epoch, i) for b in group for i, w in zip(b.index.tolist(), b.weight.tolist(), strict=True) if w
        ]
        seen["lambda"].append(lam.hex())
        return ordinary(self, group, lam)

    Trainer.step = step
    main_of_training(argv)
    return seen


def signalled(argv: list[str], where: str) -> None:
    """An ordinary run, of which the second process alone is asked to end, once."""
    name = "step" if where == "signalled" else "heed"
    ordinary, sent = getattr(Trainer, name), []

    def signals(self, *args):
        due = self.state.step == 2 if where == "signalled" else not sent
        if due and self.accelerator.process_index == 1:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return ordinary(self, *args)

    setattr(Trainer, name, signals)
    main_of_training(argv)


def main() -> None:
    what, folder, *argv = sys.argv[1:]
    rank = os.environ["RANK"]
    if what == "apart":
        (Path(folder) / rank).mkdir()
        os.chdir(Path(folder) / rank)
        launching.SEEN_SECONDS = 2.0
        main_of_training(argv)
    elif what in ("signalled", "validating"):
        signalled(argv, what)
    elif what == "train":
        (Path(folder) / f"rank{rank}.json").write_text(json.dumps(watched(argv)))
    else:
        torch.save(gradients(argv), Path(folder) / f"rank{rank}.pt")
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run(main)
