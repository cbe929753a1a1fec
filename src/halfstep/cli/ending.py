"""How a climb ends on the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

import typer

from halfstep.cli.console import MET, NOT_MET, err, out, print_json
from halfstep.ladder.outcome import Outcome
from halfstep.report.terminal import layer_table, summary


def finish(outcome: Outcome, as_json: bool = False) -> NoReturn:
    """Print the summary, write the report, and leave with the exit code that says whether the target was met.

    A report that cannot be written takes nothing away from the run: that is said, and the exit code stays.
    """
    if as_json:
        print_json(outcome.to_dict())
    else:
        _show(outcome)
    if outcome.directory is not None:
        report = _report(outcome, outcome.directory / "report.html")
        if not as_json:
            names = sorted(
                file.name for file in outcome.directory.iterdir() if file.is_file() and file.name[0] != "."
            )
            out.print(f"written to {outcome.directory}: {', '.join(names)}", soft_wrap=True)
        if not as_json and report is not None:
            out.print(f"the report: {report}", soft_wrap=True)
    raise typer.Exit(MET if outcome.met else NOT_MET)


def _show(outcome: Outcome) -> None:
    proof = outcome.verification
    if proof.float_operators or not all(layer.integer for layer in proof.layers):
        out.print(layer_table(proof))
    out.print(summary(outcome))
    for sentence in outcome.decisions:
        out.print(f"- {sentence}", soft_wrap=True)
    for sentence in outcome.advice:
        out.print(f"> {sentence}", soft_wrap=True)


def _report(outcome: Outcome, path: Path) -> Path | None:
    """The report's file; None if it could not be written, whatever the reason."""
    try:
        return outcome.report(path)
    except Exception as error:  # a defect of ours, too, must not look like a failed run
        reason = f"{type(error).__name__}: {error}".rstrip(": ")
        again = f"halfstep report {outcome.directory}"
        err.print(
            f"error: the report was not written: {reason}; once that is cured: {again}",
            style="red",
            soft_wrap=True,
        )
        return None
