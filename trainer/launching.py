"""Start Accelerate, and stop with the remedy where a launch would go wrong silently."""

import os
import warnings
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

from shards.errors import InputError

__all__ = ["Accelerator", "start"]

ON_CPU = "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N --config_file accelerate_config.yaml -m ..."


def start(seed: int, **options: Any) -> Accelerator:
    """The accelerator of this process, seeded.

    Raises:
        InputError: the launcher started several processes that do not see each other, or one where several were asked for;
            fp16 on a CPU.
    """
    # Torch warns about our use of gloo tensors and of channels_last strides in DDP buckets; neither is a user's concern.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    accelerator = Accelerator(**options)
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise InputError(
            f"the launcher started {launched} processes, but each sees {accelerator.num_processes}: they would train "
            f"{launched} models into one folder. On a machine without GPUs launch with `{ON_CPU}`; "
            "with GPUs check `use_cpu` and `distributed_type` of your accelerate configuration"
        )
    # Accelerate's launcher for one process sets these two when it was asked for more, and starts one all the same.
    if "WORLD_SIZE" not in os.environ and {"ACCELERATE_MIXED_PRECISION", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        raise InputError(f"the launcher was asked for several processes and started one: add --multi_gpu. On a machine without GPUs launch with `{ON_CPU}`")
    gpus = torch.cuda.device_count() if accelerator.device.type == "cuda" else 1
    if accelerator.num_processes == 1 and gpus > 1:
        accelerator.print(f"one of {gpus} GPUs is used; for all of them: accelerate launch --multi_gpu --num_processes {gpus} ...")
    if accelerator.device.type == "cpu" and accelerator.mixed_precision == "fp16":
        raise InputError("fp16 on a CPU trains without loss scaling and diverges; use `accelerate launch --mixed_precision bf16` or `no`")
    set_seed(seed)
    torch.set_float32_matmul_precision("high")
    return accelerator
