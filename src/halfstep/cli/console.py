"""What is printed where: live progress, exit codes, shared options, how a climb ends.

Options that several commands share.

How a climb ends on the terminal.

An outcome as the terminal shows it.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from rich.console import Console
from rich.table import Table

from halfstep.errors import ArgumentError
from halfstep.export.verify import Fact, Verification
from halfstep.journal import finite
from halfstep.ladder.outcome import Outcome
from halfstep.live import bars, error_stream

MET, DEFECT, BAD_INPUT, NOT_MET = 0, 1, 2, 3


#: The variable of the environment that lets an unexpected error end in its traceback.
TRACEBACK = "HALFSTEP_TRACEBACK"

#: What is printed is the user's names and words: square brackets and colons in them are no markup.
out = Console(markup=False, emoji=False, highlight=False)


err = error_stream()


def progress() -> AbstractContextManager[None]:
    """Live progress on the error stream, gone when done; the output stream stays clean for ``--json``."""
    return bars(err)


@contextmanager
def silence() -> Iterator[None]:
    """Neither progress nor warnings: another process shows them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def print_json(value: Any) -> None:
    """One JSON document on the output stream, whatever the width of the terminal; NaN and infinity become null."""
    print(json.dumps(finite(value), indent=2, allow_nan=False))


T = TypeVar("T")

Threads = Annotated[int | None, typer.Option(min=1, help="Threads of the runtime; all cores by default.")]


Json = Annotated[bool, typer.Option("--json", help="Print one JSON document, for machines.")]


Source = Annotated[
    Path, typer.Argument(metavar="CONFIG.yaml|RUN", help="A configuration, or a run's directory.")
]


FRESH = "--fresh"


Fresh = Annotated[
    bool,
    typer.Option(
        FRESH, help="Begin anew: what an earlier run left in the directory is moved to a folder in it."
    ),
]


RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="The directory of a run.")]


def by_name(flag: str, given: Sequence[str] | None, convert: Callable[[str], T]) -> T | dict[str, T] | None:
    """The value of a flag that may be given once, or as NAME=VALUE for each of several metrics.

    Raises:
        ArgumentError: if it is given several times without names, or a value is none.

    >>> by_name("--max-drop", ["accuracy=0.01", "night=0.05"], float)
    {'accuracy': 0.01, 'night': 0.05}
    """
    if not given:
        return None
    pairs = [text.rpartition("=") for text in given]
    try:
        values = {name: convert(value) for name, _, value in pairs}
    except ValueError as error:
        raise ArgumentError(f"{flag}: got {', '.join(given)}, needed a number, or NAME=NUMBER") from error
    if len(pairs) == 1 and not pairs[0][1]:
        return values[""]
    if len(values) < len(pairs) or "" in values:
        raise ArgumentError(f"{flag}: got {', '.join(given)}, needed NAME=VALUE for each of several metrics")
    return values


def by_input(given: Sequence[str] | None) -> dict[str, str] | None:
    """The states that ``--state`` names, outputs by input.

    Raises:
        ArgumentError: for what is no INPUT=OUTPUT.

    >>> by_input(["h_in=h_out"])
    {'h_in': 'h_out'}
    """
    found: dict[str, str] = {}
    for text in given or ():
        name, _, output = text.partition("=")
        if not (name and output):
            raise ArgumentError(f"--state: got {text!r}, needed INPUT=OUTPUT, such as h_in=h_out")
        found[name] = output
    return found or None


def by_dimension(given: Sequence[str] | None) -> dict[str, dict[int, str]] | None:
    """The sizes that ``--dynamic`` lets vary, by input and dimension.

    Raises:
        ArgumentError: for what is no INPUT:DIMENSION=NAME.

    >>> by_dimension(["ids:1=tokens", "mask:1=tokens"])
    {'ids': {1: 'tokens'}, 'mask': {1: 'tokens'}}
    """
    found: dict[str, dict[int, str]] = {}
    for text in given or ():
        place = re.fullmatch(r"(\w+):(\d+)=(\w+)", text)
        if place is None:
            raise ArgumentError(f"--dynamic: got {text!r}, needed INPUT:DIMENSION=NAME, such as ids:1=tokens")
        found.setdefault(place[1], {})[int(place[2])] = place[3]
    return found or None


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


def summary(outcome: Outcome) -> Table:
    """The figures that matter, one a line."""
    return fact_table("met" if outcome.met else "NOT met", outcome.facts())


def fact_table(title: str, facts: Iterable[Fact]) -> Table:
    """Facts, one a line."""
    table = Table(title=title, show_header=False, title_style="bold")
    table.add_column("what")
    table.add_column("figure", justify="right")
    for fact in facts:
        table.add_row(fact.name, fact.words)
    return table


def layer_table(proof: Verification) -> Table:
    """What is integer and what is not, with the reason."""
    table = Table(title="layers")
    for column in ("layer", "kind", "runs in", "µs", "reason"):
        table.add_column(column, justify="right" if column == "µs" else "left")
    times = {name: f"{time:.0f}" for name, time in proof.microseconds.items()}
    for layer in proof.layers:
        runs_in = "integers" if layer.integer else "float"
        table.add_row(layer.name, layer.kind, runs_in, times.get(layer.name, ""), layer.reason)
    for name, kind, reason in proof.float_operators:
        table.add_row(name, kind, "float", times.get(name, ""), reason)
    return table
