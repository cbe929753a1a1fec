"""halfstep demo: the ladder on handwritten digits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halfstep.cli.console import progress
from halfstep.cli.ending import finish
from halfstep.cli.options import Json, Threads


def demo(
    directory: Annotated[Path, typer.Option(help="Where to write the files.")] = Path("runs/demo"),
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Train a small network on handwritten digits, quantize it, and prove the file."""
    from halfstep.demo import load_digits, train_digits
    from halfstep.evaluate import Accuracy
    from halfstep.ladder.climb import quantize

    with progress():
        digits = load_digits()
        model = train_digits(digits)
        outcome = quantize(
            model,
            digits.train_images[:4],
            calibration=digits.calibration_batches(),
            metric=Accuracy(digits.test_batches()),
            max_drop=0.01,
            directory=directory,
            threads=threads,
            command="halfstep demo",
        )
    finish(outcome, as_json)
