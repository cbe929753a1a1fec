"""halfstep demo: the whole ladder on handwritten digits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halfstep.cli.console import out, progress
from halfstep.cli.ending import finish
from halfstep.cli.options import Json, Threads

#: So few, with one scale a tensor, that calibration and repairs fall short of a drop that is all but none; with no
#: layer allowed in float every rung is climbed.
WEIGHT_BITS, ACTIVATION_BITS = 2, 8
MAX_DROP = 0.001


def demo(
    directory: Annotated[Path, typer.Option(help="Where to write the files.")] = Path("runs/demo"),
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Train a small network on handwritten digits and climb the whole ladder with weights of 2 bits.

    Takes a minute at most; what is found is said as it is found, and the report shows all of it.
    """
    from torch import nn

    from halfstep.demo import load_digits, train_digits
    from halfstep.evaluate import Accuracy
    from halfstep.granularity import PerTensor
    from halfstep.ladder.climb import quantize
    from halfstep.recipe import Recipe
    from halfstep.training.options import Training

    with progress():
        digits = load_digits()
        model = train_digits(digits)
        outcome = quantize(
            model,
            digits.train_images[:4],
            calibration=digits.calibration_batches(),
            metric=Accuracy(digits.test_batches()),
            max_drop=MAX_DROP,
            training=Training(
                digits.training_batches(), nn.functional.cross_entropy, epochs=8, learning_rate=3e-3
            ),
            recipe=Recipe.uniform(WEIGHT_BITS, ACTIVATION_BITS, PerTensor()),
            max_float=0.0,
            directory=directory,
            threads=threads,
            command="halfstep demo",
        )
    if not as_json:
        out.print(
            f"weights of {WEIGHT_BITS} bits with one scale a tensor, first and last layer of 8 bits, activations of "
            f"{ACTIVATION_BITS} bits"
        )
    finish(outcome, as_json)
