"""halfstep sensitivity: which layers lose the accuracy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halfstep.cli.console import out, print_json, progress
from halfstep.cli.options import Json, Source


def sensitivity(
    source: Source,
    method: Annotated[
        str | None,
        typer.Option(
            help="How to measure: kl, sqnr or fisher by the outputs, metric with one group quantized, spared with one "
            "in float; kl by default where outputs can be logits, else sqnr."
        ),
    ] = None,
    measured: Annotated[
        int, typer.Option(min=0, help="Also measure the metric's drop for so many groups.")
    ] = 0,
    plot: Annotated[Path | None, typer.Option(help="Draw the table to this file (needs matplotlib).")] = None,
    as_json: Json = False,
) -> None:
    """Score every group of layers by what quantizing it loses, most sensitive first."""
    from halfstep.calibration.calibrate import calibrate
    from halfstep.cli.job import Job, find_config
    from halfstep.ladder.sensitivity import sensitivity as score

    with progress():
        job = Job.load(find_config(source))
        model = job.observed()
        calibrate(model)
        needs_metric = measured or (method or "").startswith(("metric", "spared"))
        metric = next(iter(job.metrics().values())) if needs_metric else None  # the leading one
        table = score(model, method, metric, measured)
        if plot is not None:
            table.plot(plot)
    if as_json:
        print_json(table.to_dict())
    else:
        out.print(str(table), soft_wrap=True)
