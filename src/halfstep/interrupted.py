"""Ctrl-C while a command is still importing what it needs.

Importing the package loads torch, which takes seconds, before any code of the command line can catch what happens.
This is imported before all else, and so imports next to nothing.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from types import TracebackType

#: How a process ends that was interrupted: 128 and the number of SIGINT.
INTERRUPTED = 130
#: What ``python -m`` runs the command line by.
_MODULES = frozenset({"halfstep", "halfstep.cli", "halfstep.__main__", "halfstep.cli.__main__"})


def is_command(argv: Sequence[str], original: Sequence[str]) -> bool:
    """Whether a process was begun as the command line, and is no program that imports the package.

    Args:
        argv: of the process, as it is while the package is imported: the script, or ``-m`` where a module is to be run.
        original: all that the interpreter was called with.

    >>> is_command(["/usr/bin/halfstep", "demo"], ["python", "/usr/bin/halfstep", "demo"])
    True
    >>> is_command(["train.py"], ["python", "train.py", "-m", "halfstep"])
    False
    """
    if argv[:1] == ["-m"]:
        return any(flag == "-m" and name in _MODULES for flag, name in itertools.pairwise(original))
    return bool(argv) and argv[0].replace("\\", "/").rpartition("/")[2] in ("halfstep", "halfstep.exe")


def end_in_one_line() -> None:
    """Let the command line end with one line and :data:`INTERRUPTED` where nothing catches Ctrl-C; else do nothing."""
    if not is_command(getattr(sys, "argv", []), sys.orig_argv):
        return
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            print("interrupted", file=sys.stderr)
            sys.exit(INTERRUPTED)
        before(kind, error, trace)

    sys.excepthook = hook
