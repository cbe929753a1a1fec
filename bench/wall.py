"""How long a user waits: `hs.quantize` until PTQ meets the target, in evaluations of the float network.

The unit is one evaluation of the float network on the same examples, at the batch size that is fastest for it, in the
same process, a new one for each network; so the figures compare between machines, and a busy one disturbs both sides.
The fixed cost is what the same call takes on two small linear layers, most of it the import of what captures and
translates; at most 2.5 seconds of it are asked for, and what is beyond these is counted. Where the time goes is told by
the loops that `hs.quantize` reports. Beside it, where it is installed, NNCF on the same float file: its plain
quantization on OpenVINO, which judges nothing, and its accuracy control on ONNX with the same examples and drop.

python -m bench.wall                         # three networks trained on Fashion-MNIST, all 10,000 test images
python -m bench.wall --random 2000           # untrained networks on so many random images, labelled by themselves
python -m bench.wall --weights 7             # for processors whose 8-bit kernels saturate
python -m bench.wall start                   # what a process pays first: imports, and the first observation
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import halfstep as hs
from bench import fashion, peer_nncf
from halfstep.progress import listening

FIXED = 2.5  # seconds that a first call may take whatever the network
SIZES = (32, 64, 128, 500)  # of batches that the float network is timed at
#: Stages by the first words of the loops that belong to them, the first that fits.
STAGES = {
    "capture": ("capturing",),
    "float evaluation": ("evaluating float", "float"),
    "evaluation's data": ("looking at", "observing evaluation"),
    "observing": ("observing",),
    "comparing calibrators": ("comparing", "influence", "float outputs"),
    "candidates' evaluation": ("evaluating PTQ", "judging"),
    "export": ("exporting",),
    "file's evaluation": ("evaluating the deployed",),
    "verification": ("verifying",),
}
FIRST_OBSERVATION = """
import time, torch, halfstep as hs
torch.set_num_threads(2)
x = torch.randn(64, 1, 28, 28)
q = hs.prepare(torch.nn.Sequential(torch.nn.Conv2d(1, 16, 3), torch.nn.ReLU(), torch.nn.Flatten()), x[:2])
for _ in range(2):
    start = time.perf_counter()
    hs.observe(q, [x])
    print(time.perf_counter() - start)
"""
IMPORTS = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import halfstep
print(middle - start)
print(time.perf_counter() - middle)
"""


@dataclass
class Task:
    """A network with data: inputs (n, ...) to calibrate on, and to judge on with labels (n,)."""

    model: nn.Module
    calibration: torch.Tensor
    inputs: torch.Tensor
    labels: torch.Tensor

    def batches(self, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(zip(self.inputs.split(size), self.labels.split(size), strict=True))


class Stages:
    """A listener that adds up the seconds of outermost loops."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[tuple[str, float]] = []

    def start(self, what: str, total: int | None) -> None:
        self._open.append((what, time.perf_counter()))

    def advance(self, task: None, steps: int) -> None: ...

    def end(self, task: None) -> None:
        what, started = self._open.pop()
        if not self._open:
            stage = next((name for name, starts in STAGES.items() if what.startswith(starts)), what)
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - started

    def say(self, sentence: str) -> None: ...


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", nargs="?", default="wall", choices=("wall", "start"))
    parser.add_argument(
        "--networks", nargs="+", default=list(fashion.NETWORKS), choices=list(fashion.NETWORKS)
    )
    parser.add_argument("--random", type=int, default=0, metavar="IMAGES", help="no data, no training")
    parser.add_argument("--batch", type=int, default=500, help="of the labelled data, as a user gives them")
    parser.add_argument("--weights", type=int, default=8, help="bits")
    parser.add_argument(
        "--max-drop", type=float, default=0.01, help="more where random networks answer closely"
    )
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    if options.part == "start":
        start()
    else:
        wall(options)


def wall(options: argparse.Namespace) -> None:
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        fixed = min(pool.submit(fixed_cost, options).result() for _ in range(2))  # the first reads from disk
        columns = [pool.submit(measured, name, options).result() for name in options.networks]
    table = Table(
        title=f"hs.quantize, W{options.weights}A8, in float evaluations; below, the stages; fixed cost {fixed:.2f} s"
    )
    for name in ("", *options.networks):
        table.add_column(name, justify="right" if name else "left")
    for row in dict.fromkeys(key for column in columns for key in column):
        table.add_row(row, *(column.get(row, "") for column in columns))
    Console(width=150).print(table)


def quietly(options: argparse.Namespace) -> None:
    warnings.simplefilter("ignore")
    logging.disable()
    torch.set_num_threads(options.threads)


def fixed_cost(options: argparse.Namespace) -> float:
    """Seconds of a process's first call, where the network and the data take none."""
    quietly(options)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    inputs = torch.randn(256, 8)
    labelled = [(inputs, model(inputs).argmax(1))]
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        hs.quantize(
            model, inputs[:4], [inputs], hs.Accuracy(labelled), max_drop=0.1, rungs="ptq", directory=folder
        )
        return time.perf_counter() - begin


def measured(name: str, options: argparse.Namespace) -> dict[str, str]:
    """The rows of one network."""
    quietly(options)
    work, stages = task(name, options.random), Stages()
    work.model(work.inputs[: options.batch])  # what is loaded with the first convolution is nobody's
    unit, size = fastest(work)
    with tempfile.TemporaryDirectory() as folder, listening(stages):
        begin = time.perf_counter()
        outcome = hs.quantize(
            work.model,
            work.inputs[:4],
            calibration=list(work.calibration.split(64)),
            metric=hs.Accuracy(work.batches(options.batch)),
            max_drop=options.max_drop,
            recipe=hs.Recipe.uniform(options.weights, 8),
            rungs=("ptq",),
            directory=folder,
        )
        whole = time.perf_counter() - begin
        stages.seconds["rest"] = whole - sum(stages.seconds.values())
        rows = {
            "target": "met" if outcome.met else "missed",
            "float evaluation": f"{unit:.2f} s at {size}",
            "in all": f"{whole / unit:.1f}",
            f"beyond {FIXED:g} s": f"{(whole - FIXED) / unit:.1f}",
        }
        shares = sorted(stages.seconds.items(), key=lambda item: -item[1])
        rows |= {f"  {stage}": f"{seconds / unit:.2f}" for stage, seconds in shares}
        if peer_nncf.available():
            begin = time.perf_counter()
            parts, transformer = list(work.calibration.split(64)), name == "vit"
            peer_nncf.quantize(Path(folder) / "float.onnx", parts, Path(folder) / "nncf.xml", transformer)
            middle = time.perf_counter()
            rows["NNCF, without an evaluation"] = f"{(middle - begin) / unit:.1f}"
            try:
                share = peer_nncf.quantize_to_target(
                    Path(folder) / "float.onnx",
                    parts,
                    work.batches(options.batch),
                    options.max_drop,
                    transformer,
                )
                its, passed = f"{share:.4f}", f"{(time.perf_counter() - middle) / unit:.1f}"
            except Exception as error:  # a peer that fails on a network is part of what is shown
                its, passed = "none", type(error).__name__
            rows["NNCF, with accuracy control"] = passed
            rows["accuracy: float, ours, NNCF's"] = (
                f"{outcome.float_score:.4f}, {outcome.deployed_score:.4f}, {its}"
            )
    return rows


def task(name: str, images: int) -> Task:
    """Trained on Fashion-MNIST, or untrained on random images that the network itself labels."""
    if not images:
        data = fashion.load()
        return Task(fashion.trained(name, data), data.train_images[:512], data.test_images, data.test_labels)
    torch.manual_seed(0)
    model = fashion.NETWORKS[name]().eval()
    inputs = torch.randn(images, 1, 28, 28)
    with torch.no_grad():
        labels = torch.cat([model(part).argmax(1) for part in inputs.split(64)])
    return Task(model, torch.randn(512, 1, 28, 28), inputs, labels)


@torch.no_grad()
def fastest(work: Task) -> tuple[float, int]:
    """Seconds of a float evaluation at the best batch size, the better of two, and that size."""

    def evaluate(size: int) -> float:
        begin = time.perf_counter()
        for inputs, labels in work.batches(size):
            (work.model(inputs).argmax(1) == labels).sum()
        return time.perf_counter() - begin

    return min((evaluate(size), size) for _ in range(2) for size in SIZES)


def start() -> None:
    """What a process pays before it does anything, as ratios within it."""
    table = Table(title="what a process pays first")
    for column in ("", "seconds", "of"):
        table.add_column(column)
    torch_alone, ours = seconds_of(IMPORTS, {})
    table.add_row("import halfstep after torch", f"{ours:.2f}", f"{ours / torch_alone:.2f} of import torch")
    with tempfile.TemporaryDirectory() as folder:
        place = {"NUMBA_CACHE_DIR": folder}
        (cold, again), (warm, _) = (seconds_of(FIRST_OBSERVATION, place) for _ in range(2))
    table.add_row("first observation, cold cache", f"{cold:.2f}", f"{cold / again:.0f} of the second one")
    table.add_row("the same in a second process", f"{warm:.2f}", f"{warm / cold:.3f} of the cold one")
    Console(width=120).print(table)


def seconds_of(code: str, environment: dict[str, str]) -> list[float]:
    run: Callable[..., subprocess.CompletedProcess[str]] = subprocess.run
    done = run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return [float(line) for line in done.stdout.split()]


if __name__ == "__main__":
    main()
