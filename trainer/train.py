"""python -m trainer.train: train a classifier that looks where the finding is."""

if __name__ == "__main__":  # what is wrong with the settings is said before torch is imported, which takes seconds
    from shards.errors import run as _run
    from trainer.command import resolve as _resolve

    def _check() -> None:
        _resolve(None)

    _run(_check)


import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from shards.errors import run
from trainer.build import build
from trainer.command import resolve
from trainer.content import Training
from trainer.evaluate import finish
from trainer.launching import close, set_threads
from trainer.loop import Trainer
from trainer.report.words import SUMMARY, shown_split, summary, table
from trainer.run import open_run


def main(argv: list[str] | None = None) -> None:
    """Parse, build, train, evaluate the best model, close."""
    set_threads()
    trainer = build(resolve(argv))
    try:
        if trainer.finished:
            out, epochs = trainer.config.out, trainer.state.epoch
            trainer.accelerator.print(
                f"nothing is left to train: {out} has its {epochs} epochs and its report; raise --epochs to go on"
            )
        else:
            trainer.train()
            conclude(trainer)
    except KeyboardInterrupt:
        kept = (Path(trainer.config.out) / "checkpoints" / "last.pt").is_file()
        went = "its last checkpoint" if kept else "the beginning, there is no checkpoint yet"
        trainer.accelerator.print(f"\n{trainer.config.out}: stopped; --resume goes on from {went}", file=sys.stderr)
        raise
    finally:
        trainer.tracking.finish()
    close(trainer.accelerator)


def conclude(trainer: Trainer) -> None:
    """Evaluate the best model, write and print its report, give the tracker its figures."""
    acc, config, state, out = trainer.accelerator, trainer.config, trainer.state, Path(trainer.config.out)
    acc.wait_for_everyone()
    trainer.model.load_state_dict(open_run(out).model.state_dict())
    training: Training = {
        "minutes": state.seconds / 60,
        "epochs": state.epoch,
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
    content = finish(trainer.evaluator, config, trainer.findings, training, out)
    if acc.is_main_process:
        if (out / "panel.png").is_file():  # no image shows a finding of the task
            with Image.open(out / "panel.png") as panel:
                trainer.tracking.picture("panel", np.asarray(panel.convert("RGB")), state.step)
        shown = shown_split(content)
        figures = dict(zip(SUMMARY, summary(content), strict=True))
        trainer.tracking.log(
            {f"{shown}/{name}": pair[0] for name, pair in figures.items() if pair is not None}, state.step
        )
        print(table({out.name: content}))
        print(f"report: {(out / 'report.html').resolve()}")


if __name__ == "__main__":
    run(main)
