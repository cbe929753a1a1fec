"""The short commands.

halfstep calibrate: one pass over the data, every calibrator.

halfstep compare: two runs side by side.

halfstep export: the network of a run as a file.

halfstep init: a configuration file with every key explained.

halfstep report: the page of a run, finished or not.

halfstep sensitivity: which layers lose the accuracy.

halfstep verify: does a file answer as its simulation does, in integers?
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from halfstep.cli.console import MET, NOT_MET, Json, RunFolder, Source, Threads, out, print_json, progress
from halfstep.errors import DataError


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


def compare(
    first: Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a run.")],
    second: Annotated[Path, typer.Argument(metavar="RUN", help="The directory of another run.")],
    as_json: Json = False,
) -> None:
    """Show what two runs asked for, and what came of it; what differs is marked."""
    from halfstep.report.run import Run, comparison

    runs = Run.read(first), Run.read(second)
    rows = comparison(*runs)
    if as_json:
        print_json([{"what": what, "first": a, "second": b} for what, a, b in rows])
        return
    table = Table(title=f"{first} and {second}")
    for column in ("", str(first), str(second), ""):
        table.add_column(column, overflow="fold")
    for what, a, b in rows:
        table.add_row(what, a, b, "" if a == b else "differs")
    out.print(table)


def export(
    run: RunFolder,
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help="The ONNX file to write.")],
    rung: Annotated[
        str | None,
        typer.Option(help="Write the best of this rung (ptq, partial or qat) instead of the outcome."),
    ] = None,
) -> None:
    """Write the outcome of RUN to OUTPUT again, from its checkpoint; of an unfinished run the last rung's best."""
    from halfstep.cli.job import restore
    from halfstep.export.onnx import export_onnx

    with progress():
        model, step, _ = restore(run, rung)
        export_onnx(model, output, {"rung": step["rung"]})
    out.print(f"written to {output}: {step['what']}, score {step['score']:.4f}", soft_wrap=True)


def init(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|FILE.onnx",
            help="package.module:callable that returns a torch.nn.Module; or an ONNX file.",
        ),
    ],
    output: Annotated[Path, typer.Option(help="The file to write.")] = Path("halfstep.yaml"),
    labelled: Annotated[
        str, typer.Option(help="Data to judge on: .npz with inputs and labels, or a callable.")
    ] = "test.npz",
    calibration: Annotated[
        str, typer.Option(help="Data to calibrate on: .npz with inputs, or a callable.")
    ] = "train.npz",
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a commented configuration for MODEL, which is loaded to list its layers."""
    from torch import nn

    from halfstep.cli.config import commented
    from halfstep.cli.sources import ONNX, load_model
    from halfstep.errors import ArgumentError
    from halfstep.files import write_whole
    from halfstep.onnx_in.from_file import layers_of

    if output.exists() and not force:
        raise ArgumentError(f"{output} exists; choose another --output, or give --force to replace it")
    if model.endswith(ONNX):
        weighted = layers_of(model)
    else:
        weighted = [
            name
            for name, child in load_model(model).named_modules()
            if isinstance(getattr(child, "weight", None), nn.Parameter)
        ]
    write_whole(output, commented(model, labelled, calibration, weighted).encode())
    out.print(
        f"written to {output}; fill in labelled and calibration, then: halfstep quantize {output}",
        soft_wrap=True,
    )


def report(
    run: RunFolder,
    output: Annotated[Path | None, typer.Option(help="The file; report.html in the run by default.")] = None,
) -> None:
    """Write the report of RUN as one HTML page, from its journal alone."""
    from halfstep.report.page import write_report
    from halfstep.report.run import Run

    path = write_report(Run.read(run), output or run / "report.html")
    out.print(f"written to {path}", soft_wrap=True)


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
    from halfstep.cli.console import fact_table, layer_table
    from halfstep.cli.job import restore
    from halfstep.export.onnx import mismatch
    from halfstep.export.verify import file_facts, regressions
    from halfstep.export.verify import verify as prove

    recorded = None if baseline is None else _read(baseline)
    path = file or run / "model.onnx"
    with progress():
        model, _, job = restore(run, rung)
        proof = prove(path, model, model.sample, None, threads, classes=job.classifies)
        failures = [found] if (found := mismatch(model, path)) else []
    if recorded is not None:
        failures += regressions(proof, recorded)
    if as_json:
        print_json(proof.to_dict() | {"failures": failures})
    else:
        out.print(layer_table(proof))
        out.print(fact_table(str(path), file_facts(proof.to_dict())))
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
