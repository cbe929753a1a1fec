"""halfstep calibrate: one pass over the data, every calibrator."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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
    from halfstep.cli.job import Job, find_config
    from halfstep.export.onnx import export_onnx
    from halfstep.ladder.best_of import best_of
    from halfstep.ladder.sweep import sweep

    with progress():
        job = Job.load(find_config(source))
        model = job.observed()
        found = sweep(model, best_of(by="kl" if job.classifies else "sqnr"))
        if output is not None:
            export_onnx(model, output)
    rows: list[dict[str, Any]] = [
        {
            "activations": candidate.activations,
            "weights": candidate.weights,
            "kl": candidate.fidelity.kl,
            "sqnr": candidate.fidelity.sqnr,
        }
        for candidate in found.candidates
    ]
    if as_json:
        print_json(rows)
        return
    table = Table(title=f"{len(rows)} calibrations on {found.examples} examples, best first by {found.by}")
    for column in ("activations", "weights", "KL of the outputs", "SQNR, dB"):
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(row["activations"], row["weights"], f"{row['kl']:.3g}", f"{row['sqnr']:.1f}")
    out.print(table)
    if output is not None:
        out.print(f"written to {output}", highlight=False, soft_wrap=True)
