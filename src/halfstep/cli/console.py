"""What is printed where, live progress, and the exit codes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from halfstep.ladder.journal import finite
from halfstep.progress import listening

MET, DEFECT, BAD_INPUT, NOT_MET, INTERRUPTED = 0, 1, 2, 3, 130
#: The variable of the environment that lets an unexpected error end in its traceback.
TRACEBACK = "HALFSTEP_TRACEBACK"

#: What is printed is the user's names and words: square brackets and colons in them are no markup.
out = Console(markup=False, emoji=False, highlight=False)
err = Console(stderr=True, markup=False, emoji=False, highlight=False)


class Bars:
    """A progress listener that draws bars on the terminal, and prints what is found out above them."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self._said: set[str] = set()

    def start(self, what: str, total: int | None) -> Any:
        """A new bar."""
        return self.progress.add_task(what, total=total)

    def advance(self, task: Any, steps: int) -> None:
        """Move it."""
        self.progress.advance(task, steps)

    def end(self, task: Any) -> None:
        """Take it away: what is done is said in the tables."""
        self.progress.remove_task(task)

    def say(self, sentence: str) -> None:
        """Above the bars, unless it was said before."""
        if sentence in self._said:
            return
        self._said.add(sentence)
        self.progress.console.print(sentence, style="dim")


@contextmanager
def progress() -> Iterator[None]:
    """Live progress on the error stream, gone when done; the output stream stays clean for ``--json``."""
    bars = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=err,
        transient=True,
    )
    with bars, listening(Bars(bars)):
        yield


def print_json(value: Any) -> None:
    """One JSON document on the output stream, whatever the width of the terminal; NaN and infinity become null."""
    print(json.dumps(finite(value), indent=2, allow_nan=False))
