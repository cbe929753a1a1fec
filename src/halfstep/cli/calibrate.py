"""halfstep calibrate: one pass over the data, every calibrator."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from halfstep.cli.console import out, print_json, progress
from halfstep.cli.options import Json, Source


def calibrate(
    source: Source,
    output: Annotated[Path | None, typer.Option(help="Write the best candidate to this ONNX file.")] = None,
    as_json: Json = False,
) -> None:
    """Compare every calibrator on the calibration data, without labels, and show what each does to the outputs."""
    from halfstep.calibration.candidates import best_of
    from halfstep.calibration.sweep import sweep
    from halfstep.cli.job import Job, find_config
    from halfstep.export.onnx import export_onnx

    with progress():
        job = Job.load(find_config(source))
        model = job.observed()
        found = sweep(model, best_of(by="kl" if job.classifies else "sqnr"))
        if output is not None:
            export_onnx(model, output)
    if as_json:
        print_json(
            [
                {
                    "activations": c.activations,
                    "weights": c.weights,
                    "kl": c.fidelity.kl,
                    "sqnr": c.fidelity.sqnr,
                }
                for c in found.candidates
            ]
        )
        return
    table = Table(
        title=f"{len(found.candidates)} calibrations on {found.examples} examples, best first by {found.by}"
    )
    for column in ("activations", "weights", "KL of the outputs", "SQNR, dB"):
        table.add_column(column, overflow="fold")
    for candidate in found.candidates:
        table.add_row(candidate.activations, candidate.weights, *candidate.fidelity.figures())
    out.print(table)
    if output is not None:
        out.print(f"written to {output}", soft_wrap=True)
