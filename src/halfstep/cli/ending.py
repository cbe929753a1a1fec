"""How a climb ends on the terminal."""

from __future__ import annotations

from typing import NoReturn

import typer

from halfstep.cli.console import MET, NOT_MET, out, print_json
from halfstep.ladder.outcome import Outcome
from halfstep.report.terminal import layer_table, summary


def finish(outcome: Outcome, as_json: bool = False) -> NoReturn:
    """Print the summary, write the report, and leave with the exit code that says whether the target was met."""
    report = None if outcome.directory is None else outcome.report(outcome.directory / "report.html")
    if as_json:
        print_json(outcome.to_dict())
        raise typer.Exit(MET if outcome.met else NOT_MET)
    proof = outcome.verification
    if proof.float_operators or not all(layer.integer for layer in proof.layers):
        out.print(layer_table(proof))
    out.print(summary(outcome))
    for sentence in outcome.decisions:
        out.print(f"- {sentence}", highlight=False, soft_wrap=True)
    for sentence in outcome.advice:
        out.print(f"> {sentence}", highlight=False, soft_wrap=True)
    if outcome.directory is not None:
        names = sorted(
            file.name for file in outcome.directory.iterdir() if file.is_file() and file.name[0] != "."
        )
        out.print(f"written to {outcome.directory}: {', '.join(names)}", highlight=False, soft_wrap=True)
    if report is not None:
        out.print(f"the report: {report}", highlight=False, soft_wrap=True)
    raise typer.Exit(MET if outcome.met else NOT_MET)
