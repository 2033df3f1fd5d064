"""wandb, TensorBoard or nothing, through Accelerate's trackers: best effort, never in the way of the run."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from trainer.command import flat

PROJECT = "cxr-focus"
PATHS = ("shards", "out", "pretrained", "findings", "lungs.weights")  # settings of which only the last name is logged
# What wandb would take along unasked: host and command line, git remote and commit, code, packages, console, load of
# the machine.
UNSAID: dict[str, Any] = {
    "console": "off",
    "disable_git": True,
    "disable_code": True,
    "disable_job_creation": True,
    "save_code": False,
    "host": "",
    "program": "trainer.train",
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
}
WANDB_SECONDS = 60.0  # well below the time after which waiting processes give up


class Tracking:
    """Log scalars and pictures. Whatever fails becomes one warning, and tracking ends; the run goes on.

    Args:
        accelerator: made with ``log_with`` of the same kind.
        kind: none, wandb or tensorboard.
    """

    def __init__(self, accelerator: Accelerator, kind: str) -> None:
        self.accelerator, self.kind = accelerator, kind
        self.alive = kind != "none" and accelerator.is_main_process

    def start(self, run: Path, config: dict[str, Any]) -> None:
        """Open the tracker. ``run``: the run folder, where offline data goes; ``config``: the resolved settings."""
        self._attempt(lambda: self._start(run, config))

    def _start(self, run: Path, config: dict[str, Any]) -> None:
        options: dict[str, Any] = {}
        if self.kind == "wandb":
            import wandb

            mode = os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")
            if mode == "online":
                print(
                    "wandb: you are logged in, so scalars, settings and the panel of test radiographs go to its "
                    "server; --tracker none keeps them here"
                )
            elif mode == "offline":
                folder = run / "wandb"
                print(
                    f"wandb: scalars, settings and the panel are logged into {folder} and stay there; `wandb sync "
                    f"{folder}/offline-run-*` sends them"
                )
            settings = wandb.Settings(init_timeout=WANDB_SECONDS, silent=True, **UNSAID)
            options = {"wandb": {"mode": mode, "dir": str(run), "name": run.name, "settings": settings}}
        self.accelerator.init_trackers(PROJECT, config=without_paths(flat(config)), init_kwargs=options)
        if not self.accelerator.trackers:
            raise ModuleNotFoundError(f"{self.kind} is not installed")

    def log(self, figures: dict[str, Any], step: int) -> None:
        """Scalars; anything else is left out."""
        numbers = {name: value for name, value in figures.items() if isinstance(value, int | float)}
        self._attempt(lambda: self.accelerator.log(numbers, step=step))

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        """uint8 [H,W,3]."""

        def send() -> None:
            for tracker in self.accelerator.trackers:
                if self.kind == "tensorboard":
                    tracker.log_images({name: image[None]}, step=step, dataformats="NHWC")
                else:
                    tracker.log_images({name: [image]}, step=step)

        self._attempt(send)

    def finish(self) -> None:
        """Close what is open, once. (Accelerate's `end_training` would end the process group with it, on this process
        alone.)
        """

        def end() -> None:
            for tracker in self.accelerator.trackers:
                tracker.finish()

        self._attempt(end)
        self.alive = False

    def _attempt(self, action: Callable[[], object]) -> None:
        if not self.alive:
            return
        try:
            action()
        except Exception as error:  # a tracker may fail in any way; none of them is worth a run
            self.alive = False
            warnings.warn(
                f"tracking with {self.kind} ended ({type(error).__name__}: {error}); the run goes on without it",
                stacklevel=2,
            )


def without_paths(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings whose paths are cut to their last name."""
    return {
        name: os.path.basename(str(value).rstrip("/")) if name in PATHS else value for name, value in settings.items()
    }


def _logged_in() -> bool:
    import wandb

    return bool(wandb.login(prompt=False))
