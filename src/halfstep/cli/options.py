"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Threads = Annotated[int | None, typer.Option(help="Threads of the runtime; all cores by default.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, for machines.")]
RunFolder = Annotated[Path, typer.Argument(help="The directory of a run.")]
