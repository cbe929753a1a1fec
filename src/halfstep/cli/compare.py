"""halfstep compare: two runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from halfstep.cli.console import out, print_json
from halfstep.cli.options import Json


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
