"""What is printed where, live progress, and the exit codes."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager
from typing import Any

from rich.console import Console

from halfstep.journal import finite
from halfstep.live import bars, error_stream

MET, DEFECT, BAD_INPUT, NOT_MET, INTERRUPTED = 0, 1, 2, 3, 130
#: The variable of the environment that lets an unexpected error end in its traceback.
TRACEBACK = "HALFSTEP_TRACEBACK"

#: What is printed is the user's names and words: square brackets and colons in them are no markup.
out = Console(markup=False, emoji=False, highlight=False)
err = error_stream()


def progress() -> AbstractContextManager[None]:
    """Live progress on the error stream, gone when done; the output stream stays clean for ``--json``."""
    return bars(err)


def print_json(value: Any) -> None:
    """One JSON document on the output stream, whatever the width of the terminal; NaN and infinity become null."""
    print(json.dumps(finite(value), indent=2, allow_nan=False))
