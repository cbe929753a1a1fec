"""What observing costs over the float forward, and what a core costs that another process keeps busy.

A plain process with the allocator's defaults, 512 images in batches of 64; alone, and beside a process that computes on
one of the cores. The float forward is torch's own, all threads on every operator.

python -m bench.busy                          # three small networks, untrained: the time does not depend on weights
python -m bench.busy --whole                  # also all of hs.quantize, to "met" on PTQ
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

import halfstep as hs
from bench import fashion
from bench.wall import Task, task
from halfstep.batches import InPieces
from halfstep.fake_quantize import Mode
from halfstep.fidelity.compare import Reference
from halfstep.ranges import activation_sites


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--networks", nargs="+", default=list(fashion.NETWORKS), choices=list(fashion.NETWORKS)
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--whole", action="store_true", help="also hs.quantize, a round of it")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable()
    torch.set_num_threads(options.threads)
    console = Console(width=150)
    for name in options.networks:
        work = task(name, 2000 if options.whole else 512)
        alone, beside = {}, {}
        for times, busy in ((alone, False), (beside, True)):
            with busy_core(busy):
                times |= interleaved(jobs(work, options.whole), options.rounds)
        table = Table(title=f"{name}: median milliseconds, of the float forward, and what a busy core costs")
        for column in ("", "alone", "of float", "a core busy", "of alone"):
            table.add_column(column, justify="right" if column else "left")
        for job, time_alone in alone.items():
            figures = (
                f"{1e3 * time_alone:.0f}",
                f"{time_alone / alone['float forward']:.2f}",
                f"{1e3 * beside[job]:.0f}",
                f"{beside[job] / time_alone:.2f}",
            )
            table.add_row(job, *figures)
        console.print(table)


def jobs(work: Task, whole: bool) -> dict[str, Callable[[], object]]:
    """What is timed, by name."""
    batches = list(work.calibration.split(64))
    q = hs.prepare(work.model, batches[0])
    hs.observe(q, batches)
    hs.calibrate(q)
    reference, pieces = Reference(q, 512, batches), InPieces(q)
    labelled = list(zip(work.inputs[:500].split(250), work.labels[:500].split(250), strict=True)) * 2
    accuracy = hs.Accuracy(labelled)

    def forward() -> None:
        with torch.no_grad():
            for x in batches:
                work.model(x)

    def observe() -> None:
        for module in activation_sites(q).values():
            module.forget()
        q.sample = []
        hs.observe(q, batches)

    def simulated(job: Callable[[], object]) -> Callable[[], object]:
        def run() -> None:
            with q.using(Mode.QUANTIZE):
                job()

        return run

    found: dict[str, Callable[[], object]] = {
        "float forward": forward,
        "observing": observe,
        "comparing outputs": simulated(lambda: reference.compare(q)),
        "evaluating 1,000": simulated(lambda: accuracy.evaluate(pieces)),
    }
    if whole:
        found["hs.quantize, 2,000"] = lambda: hs.quantize(
            work.model,
            work.inputs[:4],
            batches,
            hs.Accuracy(work.batches(500)),
            max_drop=1.0,
            rungs=("ptq",),
            progress=False,
        )
    return found


def interleaved(jobs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each, in turn; the first round warms up. What takes seconds is done once more only."""
    times: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds + 1):
        for name, job in jobs.items():
            if len(times[name]) > 1 and times[name][-1] > 2:
                continue
            start = time.perf_counter()
            job()
            times[name].append(time.perf_counter() - start)
    return {name: median(some[1:]) for name, some in times.items()}


@contextmanager
def busy_core(busy: bool) -> Iterator[None]:
    """A process that keeps the last of this process's cores busy, at the same priority."""
    if not busy:
        yield
        return
    core = max(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, {{{core}}})\nwhile True: pass"
    process = subprocess.Popen([sys.executable, "-c", code])
    try:
        time.sleep(0.3)
        yield
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
