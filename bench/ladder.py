"""The whole ladder by one command: Fashion-MNIST, a MobileNet-like network, 4-bit weights, one point to lose.

Every rung is climbed where the one before falls short; the deployed file is judged on all 10,000 test images, and the
report lies beside it. The same command again goes on where it was killed.

python -m bench.ladder                     # weights in 4 bits, one scale a tensor, activations in 8 bits
python -m bench.ladder --weights 2         # so few that repairs fall short: every rung is climbed
python -m bench.ladder --per-channel       # one scale a channel: an easier task, PTQ comes nearer
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import nn

import halfstep as hs
from bench import fashion
from halfstep.progress import listening


class Sentences:
    """Prints what is found out, as it is found out."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def start(self, what: str, total: int | None) -> None: ...

    def advance(self, task: None, steps: int) -> None: ...

    def end(self, task: None) -> None: ...

    def say(self, sentence: str) -> None:
        self.console.print(f"- {sentence}", highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", default="mobilenet", choices=sorted(fashion.NETWORKS))
    parser.add_argument("--weights", type=int, default=4, help="bits")
    parser.add_argument("--activations", type=int, default=8, help="bits")
    parser.add_argument("--per-channel", action="store_true", help="one weight scale a channel, not a tensor")
    parser.add_argument("--max-drop", type=float, default=0.01)
    parser.add_argument(
        "--max-float", type=float, default=0.2, help="share of layers that may stay in float before QAT"
    )
    parser.add_argument("--epochs", type=float, default=1.0, help="of training")
    parser.add_argument("--examples", type=int, default=10_000, help="test images")
    parser.add_argument("--directory", type=Path, default=Path("runs/fashion"))
    options = parser.parse_args()
    console, data = Console(width=120), fashion.load()
    granularity = None if options.per_channel else hs.PerTensor()
    with listening(Sentences(console)):
        outcome = hs.quantize(
            fashion.trained(options.network, data),
            data.train_images[:4],
            calibration=data.calibration(512),
            metric=hs.Accuracy(data.test(options.examples)),
            max_drop=options.max_drop,
            recipe=hs.Recipe.uniform(options.weights, options.activations, granularity),
            training=hs.Training(
                data.train(), nn.functional.cross_entropy, epochs=options.epochs, evaluate_every=0.25
            ),
            max_float=options.max_float,
            directory=options.directory,
            command=shlex.join(["python", "-m", "bench.ladder", *sys.argv[1:]]),
        )
    table = Table(
        title=f"{options.network}, W{options.weights}A{options.activations}, target {options.max_drop:g}, seed 0"
    )
    for column in ("rung", "score", "drop", "layers in float", "full evaluations", "met"):
        table.add_column(column, justify="right")
    for step in outcome.path:
        row = (step.rung, f"{step.score:.2%}", f"{step.drop:+.2%}", str(len(step.float_layers)))
        table.add_row(*row, f"{step.cost:.2f}", "yes" if step.met else "no")
    table.add_section()
    drop = outcome.float_score - outcome.deployed_score
    row = ("deployed file", f"{outcome.deployed_score:.2%}", f"{drop:+.2%}", str(len(outcome.float_layers)))
    table.add_row(*row, "", "yes" if outcome.met else "no")
    console.print(table)
    console.print(f"report: {outcome.report(options.directory / 'report.html')}")


if __name__ == "__main__":
    main()
