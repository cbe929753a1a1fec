"""Partial quantization on Fashion-MNIST: what the search costs, what it leaves in float, and what the file is like.

A network whose weights have few bits and one range a tensor misses the target by far. The search by a cheap proxy,
gallop and bisection is counted beside the exhaustive one, which scores every group of layers by the metric on all
examples and then puts groups back one by one. Early verdicts are held to their stated level by simulation.

Every evaluation is kept in ``bench/cache/partial``: the same command again goes on where it was interrupted, and one
that has ended is told again in a minute, with latencies raced anew.

python -m bench.partial                              # everything: a quarter of an hour of one core
python -m bench.partial --searches kl,exhaustive     # by the name of the search
"""

from __future__ import annotations

import argparse
import copy
import math
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import halfstep as hs
from bench import fashion
from halfstep.evaluate import Score, SequentialTest, paired_drop
from halfstep.ladder.evaluation import Evaluation
from halfstep.precision import groups_of
from halfstep.runtime.deployed import DeployedModel
from halfstep.runtime.latency import race

LEVEL = 0.05
RUNS = 200
#: Examples a batch: activations of more no longer fit into the cache, and take twice as long.
BATCH = 40
LAST = torch.channels_last
EXHAUSTIVE = "exhaustive"
SEARCHES = {
    "kl": hs.Partial(method="kl"),
    EXHAUSTIVE: hs.Partial(method="metric", walk="one_by_one", prune=False, early=False),
    "fisher": hs.Partial(method="fisher"),
    "latency": hs.Partial(order="latency"),
}

Found = dict[str, tuple[hs.QuantizedModel, hs.PartialResult]]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="mobilenet", choices=sorted(fashion.NETWORKS))
    parser.add_argument("--weights", type=int, default=4, help="bits")
    parser.add_argument("--max-drop", type=float, default=0.01)
    parser.add_argument("--examples", type=int, default=10_000, help="test images")
    parser.add_argument("--searches", default=",".join(SEARCHES), help="in this order")
    parser.add_argument("--directory", type=Path, default=fashion.CACHE / "partial", help="of the journals")
    options = parser.parse_args()
    console = Console(width=150)
    data = fashion.load()
    # Depthwise convs and what is element by element are a third faster with channels last.
    accuracy = hs.Accuracy(
        [(x.contiguous(memory_format=LAST), y) for x, y in data.test(options.examples, batch=BATCH)]
    )
    recipe = hs.Recipe.uniform(options.weights, 8, hs.PerTensor())
    network = fashion.trained(options.network, data).to(memory_format=LAST)
    model = hs.prepare(network, data.train_images[:4], recipe)
    hs.observe(model, data.calibration(512))
    hs.calibrate(model)
    groups = len(groups_of(model))
    run = f"{options.network}-{options.weights}-{options.max_drop:g}-{options.examples}"

    found: Found = {}
    for name in options.searches.split(","):
        twin = copy.deepcopy(model)
        journal = options.directory / run / name
        found[name] = (
            twin,
            hs.partial(twin, accuracy, options.max_drop, SEARCHES[name], directory=journal),
        )
        console.print(f"{name}: {found[name][1]}\n")

    title = (
        f"{options.network}, W{options.weights}A8, a range a tensor, max calibrator, 512 calibration images; "
        f"{options.examples:,} test images, {groups} groups of layers, allowed drop {options.max_drop:g}"
    )
    console.print(searches(title, found, groups, options.examples))
    first = next(iter(found))
    console.print(verdicts(first, found[first][1].history))
    partly = {name: twin for name, (twin, _) in found.items()}
    console.print(deployed(model, partly, accuracy, data.test_images[:32]))
    console.print(examples_needed(options.max_drop, options.examples))
    console.print(wrong_acceptances(options.max_drop, options.examples))


def searches(title: str, found: Found, groups: int, examples: int) -> Table:
    """What each search found and cost, beside what it may: 2 log2(n) + 8, and a group more than the exhaustive one."""
    table = Table(title=title)
    for column in (
        "search",
        "met",
        "accuracy",
        "drop",
        "float groups",
        "at most",
        "evaluations",
        "with ranking",
        "at most",
        "s",
    ):
        table.add_column(column, justify="right" if column != "search" else "left")
    bound = 2 * math.log2(groups) + 8
    left = {name: groups_in_float(model, result) for name, (model, result) in found.items()}
    for name, (_, result) in found.items():
        assert result.sensitivity is not None
        bounded = name != EXHAUSTIVE and SEARCHES[name].order == "accuracy"
        ranking = result.sensitivity.examples / examples
        seconds = sum(made.seconds for made in result.history) + result.sensitivity.seconds
        table.add_row(
            name,
            str(result.met),
            f"{result.score:.2%}",
            f"{result.drop.value:+.2%} ({result.drop.low:+.2%} to {result.drop.high:+.2%})",
            str(left[name]),
            str(left[EXHAUSTIVE] + 1) if bounded and EXHAUSTIVE in left else "",
            f"{result.full_evaluations:.1f}",
            f"{result.full_evaluations + ranking:.1f}",
            f"{bound:.1f}" if bounded else "",
            f"{seconds:.0f}",
        )
    return table


def groups_in_float(model: hs.QuantizedModel, result: hs.PartialResult) -> int:
    assert result.sensitivity is not None
    return sum(row.layers[0] in model.float_layers for row in result.sensitivity.rows)


def verdicts(search: str, history: tuple[Evaluation, ...]) -> Table:
    """Every evaluation of a search, with the share of the examples that it took."""
    table = Table(title=f"{search}, evaluation by evaluation")
    for column in ("candidate", "score on the examples seen", "examples", "share"):
        table.add_column(column, justify="right" if column != "candidate" else "left")
    for made in history:
        table.add_row(made.what, f"{made.score:.2%}", f"{made.examples:,}", f"{made.share:.1%}")
    return table


def deployed(
    quantized: hs.QuantizedModel,
    partly: dict[str, hs.QuantizedModel],
    accuracy: hs.Accuracy,
    images: torch.Tensor,
) -> Table:
    """Accuracy and latency of the float, the fully and the partly quantized files."""
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        files = {
            "float": hs.export_float(quantized, folder / "float.onnx"),
            "float again (null)": folder / "float.onnx",
            "fully quantized": hs.export_onnx(quantized, folder / "quantized.onnx"),
        }
        for index, (name, model) in enumerate(partly.items()):
            files[name] = hs.export_onnx(model, folder / f"{index}.onnx")
        scores = {name: accuracy.evaluate(DeployedModel(file)).value for name, file in files.items()}
        times = {}
        for batch in (1, len(images)):
            sessions = {name: DeployedModel(file) for name, file in files.items()}
            times[batch] = race(
                {name: lambda s=session, b=batch: s(images[:b]) for name, session in sessions.items()},
                rounds=41,
            )
        table = Table(title="the files on ONNX Runtime, interleaved runs, all cores")
        for column in ("file", "accuracy", "KiB", *(f"batch {b}, ms | x float" for b in times)):
            table.add_column(column, justify="right" if column != "file" else "left")
        for name, file in files.items():
            cells = [f"{raced[name].median:.3f} | {raced[name].speedup:.2f}" for raced in times.values()]
            table.add_row(name, f"{scores[name]:.2%}", f"{file.stat().st_size / 1024:.0f}", *cells)
    return table


def simulated(lost: int, won: int, count: int, max_drop: float, generator: torch.Generator) -> SequentialTest:
    """An early verdict on ``count`` examples in random order, looked at after every 250."""
    values = torch.cat([torch.ones(lost), -torch.ones(won), torch.zeros(count - lost - won)])
    test = SequentialTest(max_drop, -1.0, 1.0, LEVEL, total=count)
    for part in values[torch.randperm(count, generator=generator)].split(250):
        if test.update(part):
            break
    return test


def examples_needed(max_drop: float, count: int) -> Table:
    """The share of the examples that a verdict takes, by how clear the case is."""
    generator = torch.Generator().manual_seed(1)
    table = Table(
        title=f"examples that an early verdict takes, {RUNS} simulated runs, allowed drop {max_drop:g}"
    )
    for column in ("drop", "lost", "won", "median share", "95% of runs", "right"):
        table.add_column(column, justify="right")
    cases = (
        (0.11, 0.01),
        (0.06, 0.01),
        (0.04, 0.01),
        (0.02, 0.005),
        (0.01, 0.005),
        (0.005, 0.005),
        (0.002, 0.002),
    )
    for lost, won in cases:
        tests = [
            simulated(round(lost * count), round(won * count), count, max_drop, generator)
            for _ in range(RUNS)
        ]
        shares = torch.tensor([test.seen / count for test in tests])
        truth = "above" if lost - won > max_drop + 1e-9 else "below"
        right = sum(test.answer == truth for test in tests) / RUNS
        table.add_row(
            f"{lost - won:+.1%}",
            f"{lost:.1%}",
            f"{won:.1%}",
            f"{float(shares.median()):.1%}",
            f"{float(shares.quantile(0.95)):.1%}",
            f"{right:.1%}",
        )
    return table


def wrong_acceptances(max_drop: float, count: int) -> Table:
    """How often a candidate that must not be accepted is, at drops equal to the target."""
    generator = torch.Generator().manual_seed(0)
    early = strict = seen = 0
    for _ in range(RUNS):
        # A full evaluation would show one example more than the target allows; early verdicts must not say "below".
        lost, won = round(count * (max_drop + 0.02)) + 1, round(count * 0.02)
        test = simulated(lost, won, count, max_drop, generator)
        early += test.answer == "below"
        seen += test.seen
        # Another sample of a population whose drop is the target: the interval must not lie within it.
        draws = torch.rand(count, generator=generator)
        candidate = 1 - (draws < max_drop + 0.02).double()
        reference = 1 - (draws > 0.98).double()
        drop = paired_drop(Score.mean(reference), Score.mean(candidate), confidence=1 - LEVEL)
        strict += drop.high is not None and drop.high <= max_drop
    table = Table(title=f"{RUNS} simulated runs at a drop equal to the target, {count:,} examples, seed 0")
    for column in ("rule", "wrong acceptances", "stated level"):
        table.add_column(column)
    table.add_row(
        "an early verdict, one example above the target", f"{early} = {early / RUNS:.1%}", f"{LEVEL:.0%}"
    )
    table.add_row(
        "a strict goal, on all examples", f"{strict} = {strict / RUNS:.1%}", f"{LEVEL / 2:.1%} (one side)"
    )
    table.caption = (
        f"the early test looked at {seen / RUNS / count:.0%} of the examples on average: no clear case"
    )
    return table


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
