"""wandb, TensorBoard or nothing, through Accelerate's trackers: best effort, never in the way of the run."""

import os
import re
import secrets
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from accelerate import Accelerator

from shards import atomic
from trainer.command import flat
from trainer.report.template import as_words

if TYPE_CHECKING:
    from trainer.report.figures import Tile

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
_staged: list[str] = []  # folders that were chosen here for what wandb puts together before it is logged
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

    @property
    def takes_models(self) -> bool:
        """Whether there is a place for tables, images that layers lie over, and models."""
        return self.alive and self.kind == "wandb"

    def start(self, run: Path, config: dict[str, Any]) -> None:
        """Open the tracker. ``run``: the run folder, where offline data goes; ``config``: the resolved settings."""
        self.attempt(lambda: self._start(run, config))

    def _start(self, run: Path, config: dict[str, Any]) -> None:
        options: dict[str, Any] = {}
        if self.kind == "wandb":
            import wandb
            from wandb.env import DATA_DIR

            mode = os.environ.get("WANDB_MODE") or ("online" if _logged_in() else "offline")
            if mode == "online":
                print(
                    "wandb: you are logged in, so scalars, settings, up to 200 test radiographs with their maps, and "
                    "the model go to its server; --tracker none keeps them here"
                )
            elif mode == "offline":
                folder = run / "wandb"
                print(
                    f"wandb: scalars, settings, up to 200 test radiographs with their maps, and the model are logged "
                    f"into {folder} and stay there; `wandb sync {folder}/offline-run-*` sends them"
                )
            # Or radiographs of tables, and models, would stay in the user's home: wandb puts them together there
            if os.environ.get(DATA_DIR, "") in ("", *_staged):
                _staged.append(str(run.resolve() / "wandb"))
                os.environ[DATA_DIR] = _staged[-1]
            settings = wandb.Settings(init_timeout=WANDB_SECONDS, silent=True, **UNSAID)
            options = {"wandb": {"mode": mode, "dir": str(run), "name": run.name, "settings": settings}}
            if "WANDB_RUN_ID" not in os.environ:  # which an agent of a sweep sets
                options["wandb"] |= {"id": _id_of(run), "resume": "allow"}
        if self.kind == "tensorboard":
            print(f"tensorboard: scalars and settings are logged into {run}; `tensorboard --logdir {run}` shows them")
        self.accelerator.init_trackers(PROJECT, config=without_paths(flat(config)), init_kwargs=options)
        if not self.accelerator.trackers:
            raise ModuleNotFoundError(f"{self.kind} is not installed")

    def log(self, figures: Mapping[str, Any], step: int) -> None:
        """Scalars, those of training and of val in a section of their own each; anything else is left out."""
        numbers = {_section(name): value for name, value in figures.items() if isinstance(value, int | float)}
        self.attempt(lambda: self.accelerator.log(numbers, step=step))

    def result(self, figures: Mapping[str, float], step: int) -> None:
        """The figures of the finished run: scalars, and in wandb its summary, by which runs are sorted."""
        self.log(figures, step)
        self._wandb(lambda run: run.summary.update(dict(figures)))

    def tables(self, tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[object]]]], step: int) -> None:
        """Tables by name, each a head and rows; wandb alone has a place for them."""

        def send(run: Any) -> None:
            import wandb

            made = {
                name: wandb.Table(columns=list(head), data=[[as_words(cell) for cell in row] for row in rows])
                for name, (head, rows) in tables.items()
            }
            run.log(made, step=step)

        self._wandb(send)

    def images(self, name: str, shown: Sequence["Tile"], step: int) -> None:
        """A table of images, each with its map in three steps, region, lesion and lungs to be switched on."""

        def send(run: Any) -> None:
            import wandb

            table = wandb.Table(columns=["image", "what"], data=[[_overlaid(tile), tile.title] for tile in shown])
            run.log({name: table}, step=step)

        if shown:
            self._wandb(send)

    def model(self, name: str, files: Mapping[str, Path], texts: Mapping[str, str]) -> None:
        """The model as an artifact: files as they are, and texts. Files are not copied."""

        def send(run: Any) -> None:
            import wandb

            artifact = wandb.Artifact(re.sub(r"[^\w.-]", "-", name, flags=re.ASCII)[:100], type="model")
            for known_as, path in files.items():
                artifact.add_file(str(path), name=known_as, skip_cache=True, policy="immutable")
            for known_as, text in texts.items():
                own = Path(run.settings.sync_dir) / "card" / known_as
                own.parent.mkdir(parents=True, exist_ok=True)
                own.write_text(text)
                artifact.add_file(str(own), name=known_as, skip_cache=True, policy="immutable")
            run.log_artifact(artifact)

        self._wandb(send)

    def _wandb(self, action: Callable[[Any], object]) -> None:
        if self.kind == "wandb":
            self.attempt(lambda: action(self.accelerator.get_tracker("wandb", unwrap=True)))

    def picture(self, name: str, image: np.ndarray, step: int) -> None:
        """uint8 [H,W,3]."""

        def send() -> None:
            for tracker in self.accelerator.trackers:
                if self.kind == "tensorboard":
                    tracker.log_images({name: image[None]}, step=step, dataformats="NHWC")
                else:
                    tracker.log_images({name: [image]}, step=step)

        self.attempt(send)

    def finish(self) -> None:
        """Close what is open, once. (Accelerate's `end_training` would end the process group with it, on this process
        alone.)
        """

        def end() -> None:
            for tracker in self.accelerator.trackers:
                tracker.finish()

        self.attempt(end)
        self.alive = False

    def attempt(self, action: Callable[[], object]) -> None:
        """Something that is for the tracker alone: what fails in it ends tracking, with a warning."""
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


def _section(name: str) -> str:
    """``val_auc`` is ``val/auc``, ``ce`` is ``train/ce``, ``test/AUC`` stays."""
    if "/" in name:
        return name
    return f"val/{name.removeprefix('val_')}" if name.startswith("val_") else f"train/{name}"


def _overlaid(tile: "Tile") -> Any:
    """An image for wandb with what can be laid over it; a map in quarters of its peak."""
    import wandb

    steps = np.digitize(tile.cam, [0.25, 0.5, 0.75])
    masks = {"map": {"mask_data": steps, "class_labels": {0: "below 25%", 1: "25%", 2: "50%", 3: "75% of its peak"}}}
    for name, mask in (("region", tile.region), ("lesion", tile.lesion), ("lungs", tile.lungs)):
        if mask.any():
            masks[name] = {"mask_data": mask.astype(np.uint8), "class_labels": {0: "elsewhere", 1: name}}
    boxes = {}
    if tile.lungs.any():
        rows, columns = (np.flatnonzero(tile.lungs.any(axis)) for axis in (1, 0))
        edges = {"minX": columns[0], "maxX": columns[-1] + 1, "minY": rows[0], "maxY": rows[-1] + 1}
        position = {name: int(value) for name, value in edges.items()}
        box = {"position": position, "class_id": 0, "domain": "pixel", "box_caption": "lungs"}
        boxes["lung box"] = {"box_data": [box], "class_labels": {0: "lungs"}}
    return wandb.Image((tile.image * 255).round().astype(np.uint8), masks=masks, boxes=boxes or None)


def _id_of(run: Path) -> str:
    """Of the run folder's wandb run, the same when it is resumed."""
    path = run / "wandb" / "id"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(path, secrets.token_hex(8))
    return path.read_text().strip()


def without_paths(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings whose paths are cut to their last name."""
    return {
        name: os.path.basename(str(value).rstrip("/")) if name in PATHS else value for name, value in settings.items()
    }


def _logged_in() -> bool:
    import wandb

    return bool(wandb.login(prompt=False))
