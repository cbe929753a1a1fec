"""halfstep verify: does a file answer as its simulation does, in integers?"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from halfstep.cli.console import MET, NOT_MET, out, print_json, progress
from halfstep.cli.options import Json, RunFolder, Threads


def verify(
    run: RunFolder,
    file: Annotated[Path | None, typer.Option(help="The ONNX file; the run's own by default.")] = None,
    rung: Annotated[
        str | None, typer.Option(help="Compare with the best of this rung instead of the outcome.")
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Run the file of RUN beside the simulation it came from: agreement, integer kernels, latency, size.

    The exit code is 3 if the two answer differently.
    """
    from halfstep.cli.job import restore
    from halfstep.export.verify import verify as prove
    from halfstep.report.terminal import layer_table, proof_rows

    with progress():
        model, _, job = restore(run, rung)
        proof = prove(file or run / "model.onnx", model, model.sample, None, threads, classes=job.classifies)
    if as_json:
        figures = {"kernels": proof.kernels.counts, "bytes": proof.size, "microseconds": proof.microseconds}
        print_json({"parity": asdict(proof.parity), **figures})
    else:
        out.print(layer_table(proof))
        table = Table(title=str(file or run / "model.onnx"), show_header=False)
        for row in proof_rows(proof):
            table.add_row(*row)
        out.print(table)
    raise typer.Exit(MET if proof.parity.reaches() else NOT_MET)
