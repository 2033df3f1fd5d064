"""How many cores this process may use."""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def cores() -> int:
    """Cores that this process may use: those it is bound to, and no more than its control group's share (containers,
    SLURM).
    """
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([count, *(math.ceil(share) for share in _cgroup_shares())]))


def _cgroup_shares(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[float]:
    """The quotas of this process's control group and of those above it, in cores, where there are any (cgroup v2, then
    v1).
    """
    with suppress(OSError, ValueError):
        for line in own.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            folder = root / ("" if not controllers else "cpu") / path.lstrip("/")
            for at in (folder, *folder.parents):
                with suppress(OSError, ValueError):
                    if not controllers:
                        quota, period = (at / "cpu.max").read_text().split()
                        yield float(quota) / float(period)  # "max" is no number: no quota
                    elif (
                        "cpu" in controllers.split(",")
                        and (microseconds := float((at / "cpu.cfs_quota_us").read_text())) > 0
                    ):
                        yield microseconds / float((at / "cpu.cfs_period_us").read_text())
                if at == root:
                    break
