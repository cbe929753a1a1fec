"""halfstep demo: the whole ladder on handwritten digits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halfstep.cli.console import Fresh, Json, Threads, finish, out, progress

#: A case that takes every rung, on any processor: a small network with so few bits in every layer that calibration and
#: repairs on few images lose 0.05 to 0.13 of the accuracy, and training 0.002 to 0.015 (seeds 0 to 4, with and without
#: AVX-512). No layer may stay in float.
WEIGHT_BITS, ACTIVATION_BITS, WIDTH, IMAGES = 2, 8, 12, 32
MAX_DROP, MAX_FLOAT = 0.03, 0.0


def demo(
    directory: Annotated[Path, typer.Option(help="Where to write the files.")] = Path("runs/demo"),
    threads: Threads = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Train a small network on handwritten digits and climb the whole ladder, to weights of 2 bits.

    Takes a minute at most; what is found is said as it is found, and the report shows all of it.
    """
    from torch import nn

    from halfstep.demo import load_digits, train_digits
    from halfstep.evaluate import Accuracy
    from halfstep.granularity import PerTensor
    from halfstep.ladder.quantize import quantize
    from halfstep.recipe import Recipe
    from halfstep.training.options import Training

    with progress():
        digits = load_digits()
        model = train_digits(digits, width=WIDTH)
        outcome = quantize(
            model,
            digits.train_images[:4],
            calibration=digits.calibration_batches(IMAGES, IMAGES),
            metric=Accuracy(digits.test_batches()),
            max_drop=MAX_DROP,
            training=Training(
                digits.training_batches(),
                nn.functional.cross_entropy,
                epochs=8,
                learning_rate=3e-3,
                evaluate_every=4,
            ),
            recipe=Recipe.uniform(WEIGHT_BITS, ACTIVATION_BITS, PerTensor(), ends=None),
            max_float=MAX_FLOAT,
            directory=directory,
            threads=threads,
            command="halfstep demo",
            fresh=fresh,
        )
    if not as_json:
        out.print(
            f"weights of {WEIGHT_BITS} bits in all layers, one scale a tensor; activations of {ACTIVATION_BITS} bits, "
            f"calibrated on {IMAGES} images"
        )
    finish(outcome, as_json)
