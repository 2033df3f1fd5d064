"""python -m trainer.train: train a classifier that looks where the finding is."""

if __name__ == "__main__":  # what is wrong with the settings is said before torch is imported, which takes seconds
    from shards.errors import run as _run
    from trainer.command import resolve as _resolve
    from trainer.command import there as _there

    _run(lambda: _there(_resolve(None).shards))


import contextlib
import itertools
import os
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from shards.dataset import Split
from shards.errors import InputError, run
from trainer import checkpoint, presence
from trainer.build import build
from trainer.command import resolve, to_yaml
from trainer.config import Config
from trainer.content import Content, Training
from trainer.evaluate import finish
from trainer.export.card import card_of_run
from trainer.launching import close, on_main, set_threads
from trainer.loop import Trainer, groups
from trainer.lungs.load import load_segmenter
from trainer.lungs.memory import LungFinder
from trainer.outcome import Outcome
from trainer.report.tables import tables
from trainer.report.words import SUMMARY, shown_split, summary, table
from trainer.run import FINDINGS, LUNGS, MODEL, open_run, shareable, stored_as
from trainer.tiles import tiles, worst_of_all
from trainer.training import NOT_FINITE, duration

REHEARSED = 8  # images with each finding, and as many without it, by which a dry run tries the end of a run


def main(argv: list[str] | None = None) -> None:
    """Parse, build, train, evaluate the best model, close."""
    set_threads()
    config = resolve(argv)
    presence.explained(lambda: dry_run(config) if config.dry_run else train(config))


def train(config: Config) -> None:
    """Build the run, train what is left of it, report it."""
    trainer = build(config)
    try:
        if trainer.finished:
            out, epochs = trainer.config.out, trainer.state.epoch
            trainer.accelerator.print(
                f"nothing is left to train: {out} has its {epochs} epochs and its report; raise --epochs to go on"
            )
        else:
            with trainer.stop:
                trainer.train()
                # What one process is torn out of, others wait for
                alone = trainer.accelerator.num_processes == 1
                with contextlib.nullcontext() if alone else trainer.stop.between_batches():
                    conclude(trainer)
    except KeyboardInterrupt:
        presence.done()
        kept = checkpoint.there(Path(trainer.config.out) / "checkpoints")
        went = "its last checkpoint" if kept else "the beginning, there is no checkpoint yet"
        trainer.accelerator.print(f"\n{trainer.config.out}: stopped; --resume goes on from {went}", file=sys.stderr)
        raise
    except Exception as error:
        presence.tell(error)  # a tracker may take minutes to close
        raise
    finally:
        trainer.close()
    close(trainer.accelerator)


def dry_run(config: Config) -> None:
    """All that a run does before its first epoch, two steps, its end with a few images, and the tracker; then nothing
    of it is left.
    """
    out = Path(config.out)
    new = [folder for folder in (out, *out.parents) if not folder.exists()]
    os.environ.setdefault("WANDB_MODE", "offline")  # nothing is sent
    trainer = build(config)
    acc, images = trainer.accelerator, len(trainer.plan)
    try:
        trainer.net.train()
        seconds = 0.0
        steps = itertools.islice(groups(trainer.loader.batches(0), config.accumulate), 2)
        for group in steps:
            began = time.monotonic()
            sums = trainer.step(group, trainer.balance.value(config.epochs - 1, 1.0) if trainer.attends else 1.0)
            if not bool(acc.reduce(sums, "sum").isfinite().all()):  # of all processes; waits for the device
                raise InputError(NOT_FINITE.format(step=0))
            seconds, taken = time.monotonic() - began, sum(batch.total for batch in group)
        trainer.tracking.log({"ce": 0.0}, 0)
        few = {n: Split(s.store, n, s.labels, of_each=REHEARSED) for n, s in trainer.evaluator.splits.items()}
        finders = {
            n: LungFinder(finder.segmenter, config.size, len(few[n]), few[n].fingerprint)
            for n, finder in trainer.evaluator.lungs.items()
        }
        trainer.evaluator = replace(trainer.evaluator, splits=few, lungs=finders)
        trainer.keep()
        content, outcomes = evaluated(trainer)
        if acc.is_main_process:
            track(trainer, content, outcomes)
        acc.print(
            f"all is well: {config.epochs} epochs of {images} images; a step of {taken} images took {seconds:.3g} "
            f"seconds, so that they take {duration(config.epochs * images / taken * seconds)}, and validation beside "
            f"them. Nothing was kept; leave out --dry_run to train"
        )
    except BaseException as error:
        if isinstance(error, Exception):
            presence.tell(error)
        trainer.close()
        _remove(out, new)  # whoever fails: the others may not come to it
        raise
    trainer.close()
    acc.wait_for_everyone()
    on_main(acc, lambda: _remove(out, new))
    close(acc)


def _remove(out: Path, new: list[Path]) -> None:
    """What a run has written into its folder, and the folders that it has made."""
    for path in out.iterdir() if out.is_dir() else ():
        with contextlib.suppress(OSError):  # another process may do the same
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for folder in new:
        with contextlib.suppress(OSError):
            folder.rmdir()


def conclude(trainer: Trainer) -> None:
    """Evaluate the best model, write and print its report, give the tracker its figures."""
    acc, out = trainer.accelerator, Path(trainer.config.out)
    acc.wait_for_everyone()
    content, outcomes = evaluated(trainer)
    if acc.is_main_process:
        checkpoint.drop_older(out / "checkpoints")
        trainer.tracking.attempt(lambda: track(trainer, content, outcomes))
        print(table({out.name: content}))
        print(f"report: {(out / 'report.html').resolve()}")


def evaluated(trainer: Trainer) -> tuple[Content, dict[str, Outcome]]:
    """Evaluate the best model, and write its report."""
    acc, config, state, out = trainer.accelerator, trainer.config, trainer.state, Path(trainer.config.out)
    trainer.model.load_state_dict(open_run(out).model.state_dict())
    training: Training = {
        "minutes": state.seconds / 60,
        "epochs": state.epoch,
        "asked_epochs": config.epochs,
        "step": state.step,
        "best_epoch": state.best_epoch + 1,
        "best": config.chosen_by,
        "images_per_s": state.images / max(state.seconds, 1e-9),
        "processes": acc.num_processes,
        "precision": acc.mixed_precision,
        "device": torch.cuda.get_device_name() if acc.device.type == "cuda" else acc.device.type,
        "map": trainer.model.has_map,
        "changes": state.changes,
    }
    return finish(trainer.evaluator, config, trainer.findings, training, out)


def track(trainer: Trainer, content: Content, outcomes: Mapping[str, Outcome]) -> None:
    """Give the tracker what came out: figures, pictures, tables, and the model with its card."""
    tracking, out, step = trainer.tracking, Path(trainer.config.out), trainer.state.step
    shown = shown_split(content)
    figures = dict(zip(SUMMARY, summary(content), strict=True))
    tracking.result({f"{shown}/{name}": pair[0] for name, pair in figures.items() if pair is not None}, step)
    for name in ("panel", "curves"):
        if (out / f"{name}.png").is_file():  # no image shows a finding of the task
            with Image.open(out / f"{name}.png") as picture:
                tracking.picture(name, np.asarray(picture.convert("RGB")), step)
    if not tracking.takes_models:
        return
    tracking.tables(
        {f"{shown}/{head[0].replace('/', '-')}": (head, rows) for head, rows in tables(content, shown)}, step
    )
    chosen = worst_of_all(trainer.evaluator, outcomes[shown], content.get("threshold"))
    tracking.images("radiographs", tiles(trainer.evaluator, shown, chosen), step)
    stored = stored_as(trainer.splits["train"])
    texts = {"README.md": card_of_run(content, stored, trainer.model.size, load_segmenter(out / LUNGS))}
    texts["config.yaml"] = to_yaml(shareable(trainer.config))
    files = {name: out / name for name in (MODEL, LUNGS, FINDINGS) if (out / name).is_file()}
    tracking.model(out.name, files, texts)


if __name__ == "__main__":
    run(main)
