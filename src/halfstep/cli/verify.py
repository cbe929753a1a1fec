"""halfstep verify: does a file answer as its simulation does, in integers?"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from halfstep.cli.console import MET, NOT_MET, out, print_json, progress
from halfstep.cli.options import Json, RunFolder, Threads
from halfstep.errors import DataError


def verify(
    run: RunFolder,
    file: Annotated[Path | None, typer.Option(help="The ONNX file; the run's own by default.")] = None,
    rung: Annotated[
        str | None, typer.Option(help="Compare with the best of this rung instead of the outcome.")
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(
            help="An outcome.json that was recorded elsewhere or with other versions: what ran on integers then and "
            "is in float now, and fewer of the simulation's answers, are failures too."
        ),
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Run the file of RUN beside the simulation it came from: agreement, integer kernels, latency, size.

    The exit code is 3 if the two answer differently, by more than the rounding of ties.
    """
    from halfstep.cli.job import restore
    from halfstep.export.onnx import mismatch
    from halfstep.export.verify import regressions
    from halfstep.export.verify import verify as prove
    from halfstep.report.terminal import layer_table, proof_rows

    recorded = None if baseline is None else _read(baseline)
    path = file or run / "model.onnx"
    with progress():
        model, _, job = restore(run, rung)
        proof = prove(path, model, model.sample, None, threads, classes=job.classifies)
        failures = [found] if (found := mismatch(model, path)) else []
    if recorded is not None:
        failures += regressions(proof, recorded)
    if as_json:
        print_json(
            {
                "parity": asdict(proof.parity),
                "failures": failures,
                "saturable": proof.saturable,
                "kernels": proof.kernels.counts,
                "bytes": proof.size,
                "microseconds": proof.microseconds,
            }
        )
    else:
        out.print(layer_table(proof))
        table = Table(title=str(path), show_header=False)
        for row in proof_rows(proof):
            table.add_row(*row)
        out.print(table)
        for sentence in failures:
            out.print(f"failed: {sentence}", soft_wrap=True)
    raise typer.Exit(NOT_MET if failures else MET)


def _read(baseline: Path) -> Any:
    """What a JSON file holds.

    Raises:
        DataError: if it is not there, or is none.
    """
    try:
        return json.loads(baseline.read_text())
    except (OSError, ValueError) as error:
        raise DataError(
            f"baseline {baseline}: cannot be read: {error}; name the outcome.json of a run"
        ) from None
