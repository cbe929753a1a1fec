"""halfstep report: the page of a run, finished or not."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halfstep.cli.console import out
from halfstep.cli.options import RunFolder


def report(
    run: RunFolder,
    output: Annotated[Path | None, typer.Option(help="The file; report.html in the run by default.")] = None,
) -> None:
    """Write the report of RUN as one HTML page, from its journal alone."""
    from halfstep.report.page import write_report
    from halfstep.report.run import Run

    path = write_report(Run.read(run), output or run / "report.html")
    out.print(f"written to {path}", soft_wrap=True)
