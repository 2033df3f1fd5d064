"""Start Accelerate, and stop with the remedy where a launch would go wrong silently."""

import os
import socket
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, broadcast, broadcast_object_list, gather_object, set_seed

from shards.cores import cores
from shards.dataset import Split
from shards.errors import InputError
from shards.joined import Samples
from shards.loader import Loader
from shards.plan import BalancedPlan, EpochPlan
from shards.targets import PRESENT
from trainer import checkpoint, presence

__all__ = ["Accelerator", "start"]

ON_CPU = "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N -m ..."
TIMEOUT = 600.0  # seconds after which a process that is waited for counts as gone, where nothing else is said
SEEN_SECONDS = 60.0  # in which all machines must see the run folder
# What a launcher's configuration may ask for and this trainer does not do: the variable, the values that are fine, what
# to do.
REFUSED = (
    (
        "ACCELERATE_DYNAMO_BACKEND",
        ("", "no"),
        "the launcher would compile the CAM, too, whose second derivative torch.compile cannot take; launch without "
        "--dynamo_backend, and give the trainer --compile",
    ),
    (
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
        ("", "1"),
        "every loss would be divided once more; set it to 1 there, and accumulate with --accumulate",
    ),
    (
        "ACCELERATE_USE_FSDP",
        ("", "false", "0"),
        "FSDP shards the weights that the CAM is taken from; launch with --multi_gpu",
    ),
    (
        "ACCELERATE_USE_DEEPSPEED",
        ("", "false", "0"),
        "DeepSpeed takes over optimizer and loss; launch with --multi_gpu",
    ),
    ("ACCELERATE_USE_MEGATRON_LM", ("", "false", "0"), "Megatron-LM is for language models; launch with --multi_gpu"),
    (
        "ACCELERATE_USE_PARALLELISM_CONFIG",
        ("", "false", "0"),
        "only data parallelism is supported; launch with --multi_gpu",
    ),
    (
        "ACCELERATE_MIXED_PRECISION",
        ("", "no", "bf16", "fp16"),
        "bf16, fp16 and no are supported; launch with --mixed_precision bf16",
    ),
)


def start(seed: int, precision: str = "", *, timeout: float = 0.0, **options: Any) -> Accelerator:
    """The accelerator of this process, seeded.

    Args:
        seed: of all random numbers.
        timeout: seconds after which a process that is waited for counts as gone; 0: nobody is watched.
        precision: what to run in where no launcher says it; what a launcher says instead is told.
        options: of Accelerator.

    Raises:
        InputError: the launcher started several processes that do not see each other, or one where several were asked
            for; settings of the launcher that this trainer does not do; fp16 on a CPU.
    """
    # Torch warns about our use of gloo tensors and of channels_last strides in DDP buckets; neither is a user's
    # concern.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    for variable, fine, remedy in REFUSED:
        value = os.environ.get(variable, "").strip().lower()
        if value not in fine:
            raise InputError(f"the launcher's settings ask for {variable}={os.environ[variable]}: {remedy}")
    cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes")
    if torch.backends.mps.is_available() and not cpu:
        tell("Apple's GPU is not used: it has no float64, in which losses are summed; this runs on the CPU")
        options["cpu"] = True
    said = os.environ.get("ACCELERATE_MIXED_PRECISION", "")
    if precision and not said:
        alone = precision == "fp16" and not torch.cuda.is_available()
        options["mixed_precision"] = "no" if alone else precision
        if alone:
            tell("the run's fp16 needs a GPU; figures are taken in float32 and may differ in the last digits")
    if timeout:  # a collective fails after those who see why have said it
        presence.begin(timeout)
        options["kwargs_handlers"] = [InitProcessGroupKwargs(timeout=timedelta(seconds=timeout + 30))]
    accelerator = Accelerator(**options)
    if accelerator.num_processes > 1:
        presence.agree(gather_object)
    if precision and said and said != precision:
        tell(
            f"note: the run has the precision {precision}, the launcher says {said}: figures may differ in the last "
            "digits"
        )
    kind = str(accelerator.distributed_type).rpartition(".")[2]
    if kind not in (
        "NO",
        "MULTI_GPU",
        "MULTI_CPU",
        "MULTI_XPU",
        "MULTI_NPU",
        "MULTI_HPU",
        "MULTI_MLU",
        "MULTI_SDAA",
        "MULTI_MUSA",
    ):
        raise InputError(
            f"the launcher's settings ask for distributed_type {kind}, which is not supported; launch with --multi_gpu"
        )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise InputError(
            f"the launcher started {launched} processes, but each sees {accelerator.num_processes}: they would train "
            f"{launched} models into one folder. On a machine without GPUs launch with `{ON_CPU}`; "
            "with GPUs check `use_cpu` and `distributed_type` of your accelerate configuration"
        )
    # Accelerate's launcher for one process sets these two when it was asked for more, and starts one all the same.
    if (
        "WORLD_SIZE" not in os.environ
        and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    ):
        raise InputError(
            "the launcher was asked for several processes and started one: add --multi_gpu. On a machine without GPUs "
            f"launch with `{ON_CPU}`"
        )
    gpus = torch.cuda.device_count() if accelerator.device.type == "cuda" else 1
    if accelerator.num_processes == 1 and gpus > 1:
        tell(f"one of {gpus} GPUs is used; for all of them: accelerate launch --multi_gpu --num_processes {gpus} ...")
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "fp16":
        raise InputError(
            "fp16 on a CPU trains without loss scaling and diverges; use `accelerate launch --mixed_precision bf16` or "
            "`no`"
        )
    set_seed(seed)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True  # batches of an epoch have one size, or two
    return accelerator


def tell(message: str) -> None:
    """A note, once, where it is in nobody's way: what `predict` prints is data."""
    if os.environ.get("RANK", "0") == "0":
        print(message, file=sys.stderr)


def set_threads() -> None:
    """As many threads as this process may use, where nobody said how many; several processes of a machine have a
    launcher that says it.
    """
    if "OMP_NUM_THREADS" not in os.environ and int(os.environ.get("WORLD_SIZE", "1")) == 1:
        torch.set_num_threads(cores())


def seed_step(seed: int, step: int, rank: int) -> None:
    """Random numbers of dropout and stochastic depth: others for each step and process, and the same again when a run
    is resumed.
    """
    torch.manual_seed(int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0]) >> 1)


def share_buffers(model: torch.nn.Module) -> None:
    """Give all processes the main one's BatchNorm statistics: each has kept its own since the last forward."""
    for buffer in model.buffers():
        broadcast(buffer)


def seen_by_all(accelerator: Accelerator, out: Path) -> None:
    """InputError on every process where one does not see the run folder of the main one: several machines need one file
    system.
    """
    if accelerator.num_processes == 1:
        return
    mark, found = out / ".seen", False
    token = [os.urandom(16).hex()]
    broadcast_object_list(token)
    if accelerator.is_main_process:
        mark.write_text(token[0])
    accelerator.wait_for_everyone()
    until = time.monotonic() + SEEN_SECONDS
    # A network's file system may take a while to show what another machine wrote
    while not found and time.monotonic() < until:
        with suppress(OSError):
            os.listdir(out.parent)
            found = mark.read_text() == token[0]
        if not found:
            time.sleep(0.2)
    blind = [
        name
        for name in gather_object([None if found else f"process {accelerator.process_index} on {socket.gethostname()}"])
        if name
    ]
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        mark.unlink(missing_ok=True)
    if blind:
        raise InputError(
            f"--out {out}: {', '.join(blind)} does not see the main process's folder; give all machines one file "
            "system and put --out there"
        )


def newest(accelerator: Accelerator, out: Path) -> tuple[Path | None, list[Path]]:
    """The checkpoint that a run goes on from, the same for all processes, and newer ones that are damaged. InputError:
    all are.
    """
    found: list[tuple[Path | None, list[Path]]] = [(None, [])]

    def look() -> None:
        found[0] = checkpoint.newest(out / "checkpoints")

    on_main(accelerator, look)
    if accelerator.num_processes > 1:
        broadcast_object_list(found)
    return found[0]


def plan_of(sampler: str, split: Split, seed: int) -> EpochPlan:
    """The epochs of training by ``--sampler``; groups that are balanced are the images of each finding, and those of
    none.
    """
    if sampler == "shuffled":
        return EpochPlan(split.shard_sizes(), seed)
    there = split.targets() == PRESENT
    groups = [np.flatnonzero(column) for column in (*there.T, ~there.any(1))]
    return BalancedPlan(split.shard_sizes(), groups, seed)


def loader_of(
    accelerator: Accelerator,
    samples: Samples,
    plan: EpochPlan,
    *,
    batch: int,
    workers: int,
    timeout: float = TIMEOUT,
    decode: str = "loader",
) -> Loader:
    """The loader of this process's share of a split; see `Loader`."""
    return Loader(
        samples,
        plan,
        batch=batch,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        workers=workers,
        pinned=accelerator.device.type == "cuda",
        timeout=timeout,
        decoder=accelerator.device if decode == "device" else None,
    )


def close(accelerator: Accelerator) -> None:
    """End what the processes have in common, once, whoever began to."""
    presence.end()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def on_main(accelerator: Accelerator, action: Callable[[], object]) -> None:
    """Something that the main process alone does, and of whose failure all learn: none is left waiting. InputError as
    ``action`` raises it.
    """
    problem, raised = "", None
    try:
        if accelerator.is_main_process:
            action()
    except InputError as error:
        problem = str(error)
    except Exception as error:
        raised, problem = error, f"the main process failed ({type(error).__name__}: {error})"
    finally:
        presence.meeting(accelerator.is_main_process)
    answer = [problem]
    if accelerator.num_processes > 1:
        broadcast_object_list(answer)
    if raised is not None:
        raise raised
    if answer[0]:
        raise InputError(answer[0])
