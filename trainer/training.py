"""Everything that a training consists of, and its checkpoint."""

import contextlib
import math
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from shards.dataset import Split
from shards.errors import InputError
from shards.loader import Loader
from trainer import checkpoint, presence
from trainer.average import Average
from trainer.balance import Balance, StepSums
from trainer.classifier import FocusClassifier
from trainer.command import flat
from trainer.config import Config
from trainer.launching import newest, on_main, tell
from trainer.losses import constant
from trainer.lungs.memory import LungFinder
from trainer.measure import Evaluator
from trainer.regions.lesions import Avoided, LesionRegions
from trainer.rules import Finding
from trainer.run import LAST_STEP, MODEL, read_report, save_model, stored_as
from trainer.schedule import Schedule
from trainer.stopping import Stop, Stopped
from trainer.task import Task
from trainer.tracking import Tracking
from trainer.upload import Download


@dataclass
class State:
    """Where the run is. All of it is saved and restored."""

    epoch: int = 0
    position: int = 0  # samples of the epoch that were trained on
    step: int = 0
    best: float = -math.inf
    best_epoch: int = -1
    since_best: int = 0  # epochs in a row without a better model
    seconds: float = 0.0  # of training, without evaluation and pauses
    images: int = 0  # trained on in those seconds
    warmup: int = 0  # images of the learning rate's warm-up, as the run began
    length: int = 0  # images of all epochs, as the run began: the way of lambda is a share of it
    # Of how it is carried out, at resumes: step, what, from, to
    changes: list[dict[str, Any]] = field(default_factory=list)


def duration(seconds: float) -> str:
    """``about 40 seconds``, ``12 minutes``, ``3.5 hours``."""
    for unit, length in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"about {seconds / length:.3g} {unit}" if unit == "hours" else f"about {seconds / length:.0f} {unit}"
    return f"about {seconds:.0f} seconds" if seconds >= 10 else "a few seconds"


class Clock:
    """Seconds of training; what runs while it is paused does not count."""

    def __init__(self) -> None:
        self.counted = 0.0
        self.since: float | None = None  # when it was started; None: it is paused

    def start(self) -> None:
        """Count from now on."""
        self.since = time.monotonic()

    @property
    def seconds(self) -> float:
        """So far."""
        return self.counted + (time.monotonic() - self.since if self.since is not None else 0.0)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within the block nothing counts."""
        self.counted, self.since = self.seconds, None
        try:
            yield
        finally:
            self.start()


@dataclass(kw_only=True)
class Training:
    """Everything a run consists of; saved, and restored by ``--resume``."""

    config: Config
    accelerator: Accelerator
    splits: dict[str, Split]
    model: FocusClassifier
    net: Any  # the model as Accelerate prepared it
    optimizer: Any
    schedule: Schedule
    balance: Balance
    lungs: dict[str, LungFinder]
    evaluator: Evaluator
    tracking: Tracking
    task: Task
    findings: dict[str, Finding]  # of the task
    annotations: LesionRegions | None  # lesions that are used as regions
    avoided: Avoided | None  # where regions have no part
    attends: bool  # whether there is an attention loss
    identity: dict[str, Any]
    state: State = field(default_factory=State)

    def __post_init__(self) -> None:
        device = self.accelerator.device
        self.clock = Clock()
        # `StepSums` of this process since the last line of the log
        self.logged = torch.zeros(len(StepSums._fields), dtype=torch.float64, device=device)
        self.average = Average(self.model, self.config.optim.ema) if self.config.optim.ema else None
        self.before = (0, 0.0)  # images and seconds that were counted when it was resumed
        self.stop = Stop()
        self.loader: Loader
        self.saved_at = 0  # step of the last checkpoint
        self.asked = torch.zeros(1)  # of the last step, above 0: a process was asked to end
        self.unread: Download | None = None  # that of the step, or batch, before
        self.evaluator.between = self.heed
        self.unseen: Download | None = None  # sums of the last step, of which lambda does not know yet

    def close(self) -> None:
        """End the tracker, and the loaders' processes."""
        self.tracking.finish()
        for loader in (self.loader, *self.evaluator.loaders.values()):
            loader.close()

    def settle(self) -> None:
        """One backward of nothing. In it DDP learns in which order gradients come, by which it then groups them anew,
        and from three processes on the order of a sum depends on the group: without this a resumed run, which begins
        with the old groups, differs from an undisturbed one in the last bits.
        """
        if self.accelerator.num_processes < 3:
            return
        size, device = self.config.size, self.accelerator.device
        before = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        self.net.train()
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            for _ in range(2):  # the groups change at the beginning of the second
                logits = self.net(torch.rand(2, 1, size, size, device=device)).logits
                (logits.float().sum() * 0).backward()
        with torch.no_grad():
            for name, buffer in self.model.named_buffers():
                buffer.copy_(before[name])
        self.optimizer.zero_grad()

    def averaged(self) -> contextlib.AbstractContextManager[None]:
        """Within the block the model has the weights that are measured and kept."""
        return self.average.applied() if self.average else contextlib.nullcontext()

    def refuse_not_finite(self) -> None:
        """InputError on every process where losses since the last line, or weights, are not finite: nothing of the kind
        is ever saved.
        """
        sums = StepSums(*self.accelerator.reduce(self.logged.clone(), "sum").tolist())
        # Norms of gradients may overflow in half precision: lambda leaves such a step out.
        if not math.isfinite(sums.ce + sums.attention) or checkpoint.not_finite(self.model):
            raise InputError(NOT_FINITE.format(step=self.state.step))

    def keep(self) -> None:
        """The model as it is now, as the best one; where weights are averaged, those of the last step beside it."""
        stored, precision = stored_as(self.splits["train"]), self.accelerator.mixed_precision

        def write(name: str) -> None:
            path = Path(self.config.out) / name
            on_main(
                self.accelerator,
                lambda: save_model(path, self.model, self.config, stored, self.state.epoch, precision),
            )

        with self.averaged():
            write(MODEL)
        if self.average:
            write(LAST_STEP)

    def save(self) -> None:
        """The checkpoint that `--resume` goes on from. Every process takes part: lungs are shared first."""
        self.refuse_not_finite()
        for finder in self.lungs.values():
            finder.share(self.accelerator)
        logged = self.accelerator.reduce(self.logged.clone(), "sum").tolist()
        self.state.seconds = self.clock.seconds
        unseen = self.unseen.get().tolist() if self.unseen is not None else None
        scaler = self.accelerator.scaler
        folder = Path(self.config.out) / "checkpoints"

        def write() -> None:
            if not all(finder.memory.saved for finder in self.lungs.values()):  # after the first epoch all are
                checkpoint.save(
                    folder / "lungs.pt", {name: finder.memory.state_dict() for name, finder in self.lungs.items()}
                )
            content = {
                "identity": self.identity,
                "launch": self.launch(),
                "state": asdict(self.state),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "schedule": self.schedule.state_dict(),
                "scaler": scaler.state_dict() if scaler is not None else None,
                "balance": self.balance.state_dict(),
                "average": self.average.state_dict() if self.average else None,
                "logged": logged,
                "unseen": unseen,
            }
            checkpoint.save(folder / "last.pt", content, keep=self.config.keep)

        presence.at(presence.SAVING)
        on_main(self.accelerator, write)
        presence.at(f"step {self.state.step}")
        for finder in self.lungs.values():
            finder.memory.saved = True
        self.saved_at = self.state.step
        self.accelerator.wait_for_everyone()

    def recall_lungs(self, path: Path) -> None:
        """The lungs that the run has found; what does not fit is looked for again, which is said."""
        if not path.is_file():
            return  # cross-entropy alone looks for none, and earlier versions kept boxes alone
        try:
            remembered = checkpoint.load(path) if checkpoint.sound(path) else {}
        except InputError:
            remembered = {}
        if not remembered:
            self.accelerator.print(f"{path} is damaged: the lungs of all images are looked for again")
            return
        for name, finder in self.lungs.items():
            if name not in remembered or not finder.memory.load_state_dict(remembered[name]):
                self.accelerator.print(
                    f"the lungs of the {name} images are looked for again: these are not the images that were "
                    "segmented before"
                )

    def tell_pace(self, bar: Any) -> None:
        """How long it will take, by the first steps since it was started; said once."""
        state, images = self.state, len(self.loader.plan)
        pace = (state.images - self.before[0]) / max(state.seconds - self.before[1], 1e-9)
        left = (self.config.epochs - state.epoch) * images - state.position
        if not pace:
            return
        finds = "; the first epoch finds the lungs, too" if self.lungs and not self.state.epoch else ""
        bar.write(
            f"at the pace of the first steps, {pace:.3g} images/s{finds}, {duration(left / pace)} of training are left "
            f"for {left} images, and validation of {len(self.splits['val'])} after each epoch",
            file=sys.stderr,
        )

    def asked_to_end(self, *, at_once: bool) -> bool:
        """Whether a signal has asked any process to end. All have the same answer at the same step, of several
        processes that of the step before, for which no device is waited for, but ``at_once``.
        """
        if self.accelerator.num_processes == 1:
            return bool(self.stop.asked)
        before, self.unread = self.unread, Download(self.asked)
        return any(bool(one.get()) for one in (before, self.unread if at_once else None) if one is not None)

    def heed(self) -> None:
        """Between two batches that are measured: `Stopped` on every process where a signal has asked one to end."""
        if self.accelerator.num_processes > 1:
            asked = constant((float(bool(self.stop.asked)),), self.accelerator.device)
            self.asked = self.accelerator.reduce(asked, "sum")
        if self.asked_to_end(at_once=False):
            raise self.stopped()

    def stopped(self) -> Stopped:
        """What all processes end by; said where the signal came to another one."""
        if not self.stop.asked:
            self.accelerator.print("another process was asked to end: stopping with it", file=sys.stderr)
        return Stopped(self.stop.asked or signal.SIGTERM)

    def leave(self) -> None:
        """Save, and raise `Stopped` on every process."""
        with self.clock.paused():
            self.save()
        raise self.stopped()

    def launch(self) -> dict[str, Any]:
        """How the run is carried out: it may change, but not unsaid."""
        c, acc = self.config, self.accelerator
        # The rate may be a function of the run's length
        return {
            "images a step": c.batch * acc.num_processes * c.accumulate,
            "precision": acc.mixed_precision,
            "optim.lr": c.optim.lr,
            "optim.clip": c.optim.clip,
            "decode": c.decode,
        } | ({"epochs": c.epochs} if c.optim.schedule == "cosine" else {})

    def restore(self) -> None:
        """Model, optimizer, schedule, scaler, lambda, lungs, position; then the log is cut back to that step."""
        out = Path(self.config.out)
        path, damaged = newest(self.accelerator, out)
        if path is None:
            self.accelerator.print(f"{out} was stopped before its first checkpoint: it starts from the beginning")
            if self.accelerator.is_main_process:
                checkpoint.rewind(out / "metrics.jsonl", -1)
            return
        content = checkpoint.load(path)
        words = {
            "shards": "other images in --shards",
            "lungs.weights": "another --lungs.weights",
            "findings": "other rules of its findings",
        }
        before = flat(asdict(Config(shards="", out="")))  # what the run's version had no setting for was as it is now
        checkpoint.refuse_other(out, before | content["identity"], self.identity, words)
        self.model.load_state_dict(content["model"])
        for group in content["optimizer"]["param_groups"]:  # how it is computed here, not where it was saved
            group["fused"] = self.optimizer.param_groups[0].get("fused")
        self.optimizer.load_state_dict(content["optimizer"])
        self.schedule.load_state_dict(content["schedule"])
        if content["scaler"] is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(content["scaler"])
        self.balance.load_state_dict(content["balance"])
        if self.average:
            self.average.load_state_dict(content["average"])
        self.recall_lungs(path.with_name("lungs.pt"))
        if self.accelerator.is_main_process:
            for one in damaged:
                tell(checkpoint.DAMAGED.format(one, checkpoint.put_aside(one).name))
        self.state = State(**content["state"])
        self.saved_at = self.state.step
        presence.at(f"step {self.state.step}")
        was = content["launch"]
        for name, value in self.launch().items():
            if was.get(name, value) != value:
                self.accelerator.print(f"note: {name} was {was[name]} before, now it is {value}")
                self.state.changes.append({"step": self.state.step, "what": name, "from": was[name], "to": value})
        self.schedule.scale(self.config.optim.lr / was.get("optim.lr", self.config.optim.lr))
        self.state.warmup = self.state.warmup or self.config.optim.warmup * was["images a step"]
        self.state.length = self.state.length or was.get("epochs", self.config.epochs) * len(self.splits["train"])
        self.clock.counted = self.state.seconds
        self.before = (self.state.images, self.state.seconds)
        # Sums of all processes since the last line of the log; earlier versions kept fewer
        if self.accelerator.is_main_process:
            logged = content.get("logged", [])
            self.logged[: len(logged)] += torch.tensor(logged, dtype=torch.float64, device=self.accelerator.device)
        if content.get("unseen") is not None:
            self.unseen = Download(torch.tensor(content["unseen"], dtype=torch.float64))
        if self.accelerator.is_main_process:
            checkpoint.rewind(out / "metrics.jsonl", self.state.step)
        after = f" of {path.name}, the last one that is sound" if damaged else ""
        self.accelerator.print(
            f"resumed after step {self.state.step}{after}: {self.state.epoch} epoch{'s' * (self.state.epoch != 1)} and "
            f"{self.state.position} images of the next are done"
        )
        done = self.state.epoch + self.state.position / len(self.splits["train"])
        if done > self.config.epochs:
            self.accelerator.print(
                f"note: --epochs {self.config.epochs}: more are done already; nothing is trained, and the report is "
                "that of the best of them"
            )

    @property
    def finished(self) -> bool:
        """Whether nothing is left to do: the epochs are done and the report is of this very checkpoint."""
        try:
            training = read_report(Path(self.config.out)).get("training", {})
        except (InputError, OSError):
            return False  # a damaged one is written again
        of = training.get("step", self.state.step) == self.state.step and training.get("epochs") == self.state.epoch
        return self.done and of and not training.get("unfinished")

    @property
    def done(self) -> bool:
        """Whether epochs or patience are used up."""
        return self.state.epoch >= self.config.epochs or self.state.since_best >= self.config.patience


NOT_FINITE = (
    "the loss is not finite in one of the steps up to {step}, or a weight after them; lower --optim.lr, set "
    "--optim.clip 1, or launch with "
    "--mixed_precision bf16 or no. --resume with one of these goes on from the last checkpoint, which is sound"
)
