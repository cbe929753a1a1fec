"""halfstep export: the network of a run as a file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halfstep.cli.console import out, progress
from halfstep.cli.options import RunFolder


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
        metadata = {"score": repr(step["score"]), "rung": step["rung"]}
        export_onnx(model, output, metadata)
    out.print(f"written to {output}: {step['what']}, score {step['score']:.4f}", soft_wrap=True)
