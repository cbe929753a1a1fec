"""Calibration: what one pass costs beside onnxruntime's methods, and what each calibrator makes of it.

python -m bench.calibration                  # everything
python -m bench.calibration speed memory     # some parts: speed, memory, accuracy, images
python -m bench.calibration few --rounds 25  # few images and small networks, in a plain process

speed, memory and few want a quiet machine; accuracy and images do not time anything.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import halfstep as hs
from bench import fashion, peer_nncf
from bench.networks.resnet import ResNet18, SmallResNet, randomize_batch_norm
from bench.peer_onnxruntime import calibrate_only
from halfstep.calibration.candidates import CALIBRATORS
from halfstep.cli.app import keep_freed_memory
from halfstep.fake_quantize import Mode
from halfstep.model import QuantizedModel
from halfstep.ranges import activation_answers, activation_sites
from halfstep.statistics import Histogram

console = Console()
FLOAT = "float model"  # a row
PEER_METHODS = ("MinMax", "Entropy", "Percentile")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="*", default=WHOLE, help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--test", type=int, default=10_000, help="test images of Fashion-MNIST")
    parser.add_argument(
        "--networks", nargs="+", default=["resnet", "mobilenet"], choices=sorted(fashion.NETWORKS)
    )
    parser.add_argument("--measure-memory", choices=("float", "observe"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # the percentiles of few values, which the tables show as they are
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    if "few" not in options.parts:
        keep_freed_memory()  # else the time of a step or pass depends on what the process freed before
    if options.measure_memory:
        run_512(options.measure_memory)
        return
    for part in options.parts:
        PARTS[part](options)


# speed


def speed(options: argparse.Namespace) -> None:
    """The observing pass over the float forward, beside onnxruntime's calibrators on the same data."""
    resnet = randomize_batch_norm(ResNet18()).eval()
    images = list(torch.randn(256, 3, 224, 224).split(16))
    small = randomize_batch_norm(SmallResNet()).eval()
    clothes = list(fashion.load().train_images[:8192].split(256))
    table = Table(
        title=f"one pass over the data, {options.threads} threads, median of {options.rounds} interleaved rounds"
    )
    for column in (
        "",
        "ResNet-18, 256 images, batch 16",
        "of float",
        "Fashion CNN, 8192 images, batch 256",
        "of float",
    ):
        table.add_column(column, justify="right" if column else "left")
    columns = [
        passes(resnet, images, options.rounds),
        passes(small, clothes, options.rounds),
    ]
    for name in columns[0]:
        cells = []
        for times in columns:
            base = times["onnxruntime, float" if name.startswith("onnxruntime") else FLOAT]
            cells += [f"{times[name]:.3f} s", f"{times[name] / base:.2f}"]
        table.add_row(name, *cells)
    console.print(table)
    answers(resnet, images)


def passes(model: nn.Module, batches: Sequence[torch.Tensor], rounds: int) -> dict[str, float]:
    """Seconds of each way to run over the batches; ours interleaved, onnxruntime's methods once each."""
    q = hs.prepare(model, batches[0])

    def folded() -> None:
        with torch.no_grad(), q.using(Mode.FLOAT):
            for x in batches:
                q(x)

    times = interleaved(
        {
            FLOAT: lambda: run_over(model, batches),
            "float graph, batch norm folded": folded,
            "halfstep, observing for all": lambda: observe_anew(q, batches),
        },
        rounds,
    )
    times["halfstep, with all ranges"] = times["halfstep, observing for all"] + seconds(lambda: every(q))
    with tempfile.TemporaryDirectory() as directory:
        file = hs.export_float(q, Path(directory) / "float.onnx")
        times.update(calibrate_only(file, batches, PEER_METHODS, Path(directory)))
        if peer_nncf.available():
            single = [x for batch in batches for x in batch.split(1)]
            times["nncf.quantize, whole"] = seconds(
                lambda: peer_nncf.quantize(file, single, Path(directory) / "nncf.xml", transformer=False)
            )
    return times


def few(options: argparse.Namespace) -> None:
    """Observing 512 small images over the user's float pass, and what of it is counting."""
    data = fashion.load()
    batches = list(data.train_images[:512].split(64))
    table = Table(
        title=f"512 images of 28x28 in batches of 64, of the float pass, {options.threads} threads, medians of "
        f"{options.rounds} interleaved rounds"
    )
    columns = {
        name: _counting(fashion.trained(name, data), batches, options.rounds) for name in fashion.NETWORKS
    }
    table.add_column("")
    for name in columns:
        table.add_column(name, justify="right")
    for row in next(iter(columns.values())):
        table.add_row(row, *(f"{times[row] / times[FLOAT]:.2f}" for times in columns.values()))
    console.print(table)


def _counting(model: nn.Module, batches: Sequence[torch.Tensor], rounds: int) -> dict[str, float]:
    """Seconds of the float pass, and of observing with less and less left out."""
    q = hs.prepare(model, batches[0])
    whole = Histogram.update

    def extremes(histogram: Histogram, x: torch.Tensor) -> int:
        torch.aminmax(x)
        return 0

    def sampled(histogram: Histogram, x: torch.Tensor) -> int:
        torch.aminmax(x)
        return whole(histogram, x.reshape(64, -1)[::16].contiguous())  # also (batch * heads, ...)

    def observing(update: Callable[[Histogram, torch.Tensor], int]) -> Callable[[], None]:
        def observe() -> None:
            with patch.object(Histogram, "update", update):
                observe_anew(q, batches)

        return observe

    return interleaved(
        {
            FLOAT: lambda: run_over(model, batches),
            "observing, nothing counted": observing(lambda histogram, x: 0),
            "extremes alone, by torch.aminmax": observing(extremes),
            "extremes, and one image in 16 counted": observing(sampled),
            "observing": observing(whole),
        },
        rounds,
    )


def run_over(model: nn.Module, batches: Sequence[torch.Tensor]) -> None:
    with torch.no_grad():
        for x in batches:
            model(x)


def observe_anew(q: QuantizedModel, batches: Sequence[torch.Tensor]) -> None:
    """Observe as if for the first time."""
    for module in activation_sites(q).values():
        module.histogram = Histogram()
    q.sample = []
    hs.observe(q, batches)


def interleaved(functions: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median seconds of each, run in turn; the first round warms up and does not count."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            times[name].append(seconds(function))
    return {name: median(some[1:]) for name, some in times.items()}


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def every(q: QuantizedModel) -> None:
    for calibrator in CALIBRATORS:
        activation_answers(q, calibrator)


def answers(model: nn.Module, batches: Sequence[torch.Tensor]) -> None:
    """What each calibrator takes for all sites."""
    q = hs.prepare(model, batches[0])
    hs.observe(q, batches)
    times = {str(c): seconds(lambda c=c: activation_answers(q, c)) for c in CALIBRATORS}
    table = Table(
        title=f"ranges of all {len(activation_sites(q))} activation sites of ResNet-18 from the statistics"
    )
    table.add_column("calibrator")
    table.add_column("seconds", justify="right")
    for name, taken in {**times, "all": sum(times.values())}.items():
        table.add_row(name, f"{taken:.3f}")
    console.print(table)


# memory


def memory(_: argparse.Namespace) -> None:
    """Peak memory of a process that runs 512 images at 224x224, without and with observing."""
    peaks = {}
    for mode in ("float", "observe"):
        done = subprocess.run(
            [sys.executable, "-m", "bench.calibration", "--measure-memory", mode],
            capture_output=True,
            text=True,
            check=True,
        )
        peaks[mode] = float(done.stdout)
    extra = peaks["observe"] - peaks["float"]
    console.print(
        f"peak memory, ResNet-18, 512 images of 224x224 in batches of 8: float {peaks['float']:.0f} MB, observing "
        f"{peaks['observe']:.0f} MB: {extra:+.0f} MB"
    )


def run_512(mode: str) -> None:
    q = hs.prepare(randomize_batch_norm(ResNet18()).eval(), torch.randn(2, 3, 224, 224))
    batches = (torch.randn(8, 3, 224, 224) for _ in range(64))
    if mode == "observe":
        hs.observe(q, batches)
    else:
        with torch.no_grad():
            for x in batches:
                q(x)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(int(status["VmHWM"].split()[0]) / 1000)  # not getrusage: its peak begins with the parent's


# accuracy


def networks(names: Sequence[str], data: fashion.Fashion) -> Iterator[tuple[str, nn.Module]]:
    for name in names:
        if (fashion.CACHE / f"{name}-0.safetensors").exists():
            yield name, fashion.trained(name, data)
        else:
            console.print(f"{name} is not trained yet (python -m bench.fashion); left out")


def accuracy(options: argparse.Namespace) -> None:
    """Every calibrator by hand, and what best_of makes of them."""
    data = fashion.load()
    recipes = {
        "W8A8": hs.Recipe.uniform(8, 8),
        "W4A8": hs.Recipe.uniform(4, 8),
        "W4A4": hs.Recipe.uniform(4, 4),
    }
    for name, model in networks(options.networks, data):
        test = hs.Accuracy(data.test(options.test))
        floating = test.evaluate(model).value
        table = Table(
            title=f"Fashion-MNIST, {name}: accuracy of the simulation, {options.test:,} test images, 512 calibration "
            f"images, float {floating:.2%}, seed 0"
        )
        for column in ("activations", "weights", *recipes):
            table.add_column(column, justify="left" if column in ("activations", "weights") else "right")
        columns = [by_hand(model, data, recipe, test) for recipe in recipes.values()]
        for key in columns[0]:
            table.add_row(*key, *(f"{column[key]:.2%}" for column in columns))
        console.print(table)
        for recipe_name, recipe in recipes.items():
            q = observed(model, data.calibration(512), recipe)
            found = hs.calibrate(q, hs.best_of())
            console.print(
                f"{name}, {recipe_name}, hs.best_of(): {test.evaluate(q).value:.2%}", highlight=False
            )
            console.print(str(found), highlight=False)


def by_hand(
    model: nn.Module, data: fashion.Fashion, recipe: hs.Recipe, test: hs.Accuracy
) -> dict[tuple[str, str], float]:
    q = observed(model, data.calibration(512), recipe)
    found = {}
    for weights in (hs.Max(), hs.MSE()):
        for calibrator in CALIBRATORS:
            hs.calibrate(q, calibrator, weights)
            found[str(calibrator), str(weights)] = test.evaluate(q).value
    return found


def observed(model: nn.Module, batches: Sequence[torch.Tensor], recipe: hs.Recipe) -> QuantizedModel:
    q = hs.prepare(model, batches[0][:4], recipe=recipe)
    hs.observe(q, batches)
    return q


# images


def images(options: argparse.Namespace) -> None:
    """How many calibration images it takes, and what images of another kind do."""
    data = fashion.load()
    like = data.train_images
    kinds = {f"{count} images": like[:count] for count in (8, 32, 128, 512, 2048)}
    white = like.max()
    kinds["512 inverted"] = like.min() + white - like[:512]
    kinds["512 brightened by half the range"] = (like[:512] + (white - like.min()) / 2).clamp(max=white)
    for name, model in networks(options.networks, data):
        test = hs.Accuracy(data.test(options.test))
        table = Table(
            title=f"Fashion-MNIST, {name}, W8A8: calibration images, {options.test:,} test images, float "
            f"{test.evaluate(model).value:.2%}"
        )
        for column in (
            "calibrated on",
            "max",
            "mse",
            "best_of",
            "sites unlike the test's",
            "distance at the first",
        ):
            table.add_column(column, justify="left" if column == "calibrated on" else "right")
        for kind, some in kinds.items():
            table.add_row(kind, *effect(model, data, some, test))
        console.print(table)


def effect(model: nn.Module, data: fashion.Fashion, some: torch.Tensor, test: hs.Accuracy) -> list[str]:
    q = observed(model, list(some.split(64)), hs.Recipe.int8())
    cells = []
    for calibrator in (hs.Max(), hs.MSE(), hs.best_of()):
        hs.calibrate(q, calibrator)
        cells.append(f"{test.evaluate(q).value:.2%}")
    unlike = [
        c for c in hs.concerns(q, evaluation=data.test_images[:2048].split(256)) if c.concern.kind == "unlike"
    ]
    first = str(unlike[0].concern).partition("distance ")[2].partition(";")[0] if unlike else "-"
    return [*cells, f"{len(unlike)} of {len(activation_sites(q))}", first]


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "speed": speed,
    "few": few,
    "memory": memory,
    "accuracy": accuracy,
    "images": images,
}


WHOLE = [part for part in PARTS if part != "few"]  # which wants a process as it is


if __name__ == "__main__":
    main()
