"""The processor cores that this process may use, and batches computed side by side on them.

The processor cores that this process may use, which in a container are fewer than the machine has.

Batches side by side: each computed by a thread of its own, instead of all threads sharing every operator.

Threads that share an operator wait for each other behind it, some hundred times a batch. Where another process keeps a
core busy, all wait for the one that shares that core, and for the scheduler to give it back: a small network then takes
ten times as long. Batches that are computed whole by one thread wait for nothing: a thread on a busy core just does
fewer of them. On a quiet machine they are faster too: what a layer writes is in the cache of the core that reads it
next, and each thread reuses its own memory.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

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
    # A line is hierarchy:controllers:path, such as 0::/user.slice (version 2) or 4:cpu,cpuacct:/docker/1234.
    for line in lines:
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


Item = TypeVar("Item")


Result = TypeVar("Result")


def side_by_side(
    work: Callable[[Item], Result], items: Iterable[Item], workers: int | None = None
) -> Iterator[Result]:
    """What ``work`` makes of each item, in their order.

    An item is taken when a worker is free, so that as many are held as there are workers. Ends with the error of the
    first item that has one; all that was begun has ended then.

    Args:
        work: computes with torch on the CPU, and may be called from several threads at once. It runs with gradients
            enabled or not as the caller's, and with a share of the caller's threads for its operators.
        items: taken one by one in the caller's thread.
        workers: at most so many at once; None for as many as torch has threads. With one, or within a worker, the
            caller does the work.
    """
    threads = torch.get_num_threads()
    workers = threads if workers is None else max(1, min(workers, threads))
    # Beside gradients these are a thread's own too.
    if workers == 1 or torch.is_autocast_enabled("cpu") or torch.is_inference_mode_enabled():
        yield from map(work, items)
        return
    grad, pool = torch.is_grad_enabled(), _pool(workers, threads // workers)

    def one(item: Item) -> Result:
        with torch.set_grad_enabled(grad):
            return work(item)

    begun: deque[Future[Result]] = deque()
    try:
        for item in items:
            begun.append(pool.submit(one, item))
            if len(begun) == workers:
                yield begun.popleft().result()
        while begun:
            yield begun.popleft().result()
    finally:
        wait(begun)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let the caller's operators run on one thread, beside workers: the others would keep spinning on their cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}


_turn = threading.Lock()

if hasattr(os, "register_at_fork"):  # threads do not survive a fork
    os.register_at_fork(after_in_child=_pools.clear)


def _pool(workers: int, threads: int) -> ThreadPoolExecutor:
    """So many workers, with so many threads each for torch's operators; made once, and kept until the process ends."""
    with _turn:
        if (workers, threads) in _pools:
            return _pools[workers, threads]
        own = torch.get_num_threads()
        begun = threading.Barrier(workers + 1)

        def begin() -> None:
            torch.get_num_threads()  # torch gives a thread its number at the first question, once
            torch.set_num_threads(threads)  # the thread's, and that of threads that have not asked yet
            begun.wait()

        pool = ThreadPoolExecutor(workers, "halfstep", begin)
        for _ in range(workers):
            pool.submit(int)
        begun.wait()
        torch.set_num_threads(own)
        _pools[workers, threads] = pool
        return pool
