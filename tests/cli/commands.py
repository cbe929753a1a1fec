"""The command line as tests run it."""

import contextlib
import io
import sys
import warnings
from types import SimpleNamespace
from unittest import mock

from halfstep.cli import main


def halfstep(folder, *arguments):
    """The command line in this process: a new one for each test would load torch each time."""
    out, err = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(folder),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        mock.patch.object(sys, "argv", ["halfstep", *map(str, arguments)]),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("default")
        try:
            main()
        except SystemExit as end:
            code = end.code
    return SimpleNamespace(returncode=code or 0, stdout=out.getvalue(), stderr=err.getvalue())


def words_of(done):
    """The error stream without the line breaks that the terminal's width makes."""
    return " ".join(done.stderr.split())
