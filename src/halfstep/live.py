"""What a call is doing, shown as it does it: bars on a terminal and in notebooks, the log elsewhere."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from halfstep.progress import heard, listening

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

LOGGER = logging.getLogger("halfstep")


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


class Log:
    """A progress listener that logs what is found out (INFO) and every loop that starts (DEBUG)."""

    def start(self, what: str, total: int | None) -> None:
        """A line at DEBUG."""
        LOGGER.debug("%s%s", what, "" if total is None else f" ({total:,} steps)")

    def advance(self, task: None, steps: int) -> None:
        """Nothing: a log has no bars."""

    def end(self, task: None) -> None:
        """Nothing."""

    def say(self, sentence: str) -> None:
        """A line at INFO."""
        LOGGER.info("%s", sentence)


@contextmanager
def bars(console: Console) -> Iterator[None]:
    """Draw the loops of the block as bars, gone when it ends."""
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        SpinnerColumn,
        TextColumn,
        TimeElapsedColumn,
    )

    progress = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
        transient=True,
    )
    with progress, listening(Bars(progress)):
        yield


@contextmanager
def shown(wanted: bool = True) -> Iterator[None]:
    """Show what the block does: bars where the error stream is a terminal or a notebook's, else lines in the log.

    The log is that of ``logging.getLogger("halfstep")``, which prints nothing below a warning unless it is asked to.

    Args:
        wanted: False for nothing; nothing is shown either where somebody listens already, such as the command line.
    """
    if not wanted or heard():
        yield
        return
    console = error_stream()
    with bars(console) if console.is_terminal or console.is_jupyter else listening(Log()):
        yield


def error_stream() -> Console:
    """The user's names and words, on the error stream: square brackets and colons in them are no markup."""
    from rich.console import Console  # loaded where something is shown

    return Console(stderr=True, markup=False, emoji=False, highlight=False)
