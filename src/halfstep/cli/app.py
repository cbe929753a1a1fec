"""The commands together, and how they end."""

from __future__ import annotations

import ctypes
import os
import sys
import traceback
import warnings

import typer

from halfstep.cli.commands import calibrate, compare, export, init, report, sensitivity, verify
from halfstep.cli.console import BAD_INPUT, DEFECT, TRACEBACK, err
from halfstep.cli.demo import demo
from halfstep.cli.inspect import inspect
from halfstep.cli.quantize import quantize
from halfstep.errors import HalfstepError
from halfstep.interrupted import INTERRUPTED

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


_THRESHOLD = 1 << 30  # bytes


def keep_freed_memory() -> None:
    """Let glibc reuse the memory of freed tensors, for the rest of the process, where it would give it back.

    Large tensors come and go at every layer. By default much of what they free goes back to the system, which clears
    every page again at its next use: up to a third of the time of a small network's pass. The price is that the
    process stays as large as it was at its largest, which is why no library should decide it for its user.

    Does nothing where there is no glibc.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, _THRESHOLD)


app = typer.Typer(
    help="Quantize a trained PyTorch network to an accuracy target, proven on the runtime it is deployed to.",
    epilog="Exit codes: 0 target met, 3 target not met, 2 bad input, 130 interrupted, 1 an unexpected error.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


for command in (demo, init, quantize, sensitivity, calibrate, export, verify, inspect, report, compare):
    app.command()(command)


def main() -> None:
    """Run the command line; a mistake of the user's ends in one line, not in a traceback."""
    keep_freed_memory()
    warnings.showwarning = lambda message, category, *_: err.print(f"warning: {message}", style="yellow")
    try:
        app()
    except HalfstepError as error:
        err.print(f"error: {error}", style="red", soft_wrap=True)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        err.print("interrupted", style="red")
        sys.exit(INTERRUPTED)
    except Exception as error:
        if os.environ.get(TRACEBACK):
            raise
        err.print(f"error: {_unexpected(error)}", style="red", soft_wrap=True)
        sys.exit(DEFECT)


def _unexpected(error: Exception) -> str:
    """What to say of an error that nobody foresaw: a defect of ours, or of the user's code that we called."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    words = " ".join(str(error).split())
    what = f"{type(error).__name__}: {words}" if words else type(error).__name__
    return (
        f"unexpected {what}, at {last.filename}:{last.lineno} in {last.name}; if that is no code of yours, please "
        f"report it with all of the traceback, which {TRACEBACK}=1 before the command shows"
    )
