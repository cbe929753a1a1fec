"""The processor cores that this process may use, which in a container are fewer than the machine has."""

from __future__ import annotations

import math
import os
from pathlib import Path

CGROUPS = Path("/sys/fs/cgroup")
OWN_GROUP = Path("/proc/self/cgroup")


def available_cores() -> int:
    """How many threads can run at once: by the process's affinity and its control groups' quotas; at least 1.

    Parts of a core that a quota grants do not count: a thread that ran on one would stop for the rest of each period,
    and the others with it.
    """
    affinity = getattr(os, "sched_getaffinity", None)  # not on every system
    cores = len(affinity(0)) if affinity is not None else os.cpu_count() or 1
    return max(1, math.floor(min(cores, quota())))


def quota() -> float:
    """The least processor time per time that a control group around this process grants; infinite without one.

    Source: Linux kernel documentation, "Control Group v2" (``cpu.max``) and "CFS Bandwidth Control" (version 1).
    """
    granted = math.inf
    try:
        lines = OWN_GROUP.read_text().splitlines()
    except OSError:
        return granted
    for line in (
        lines
    ):  # hierarchy:controllers:path, such as 0::/user.slice (version 2) or 4:cpu,cpuacct:/docker/1234
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, read = CGROUPS, _version_2
        elif "cpu" in controllers.split(","):
            root, read = CGROUPS / "cpu", _version_1
        else:
            continue
        own = root / path.lstrip("/")
        # Within a container the path may be the host's, which is not there; what is mounted is the container's own.
        for folder in (own, *own.parents):
            if folder == root or root in folder.parents:
                granted = min(granted, read(folder))
    return granted


def _version_2(folder: Path) -> float:
    """``cpu.max``: microseconds granted, or ``max``, and the period."""
    try:
        granted, period = (folder / "cpu.max").read_text().split()
        return math.inf if granted == "max" else int(granted) / int(period)
    except (OSError, ValueError):
        return math.inf


def _version_1(folder: Path) -> float:
    """Two files; a quota of -1 is none."""
    try:
        granted, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return granted / period if granted > 0 else math.inf
    except (OSError, ValueError):
        return math.inf
