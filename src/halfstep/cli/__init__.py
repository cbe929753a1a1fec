"""The command line: the only place that prints and parses arguments; one command a file."""

from halfstep.cli.app import app, main

__all__ = ["app", "main"]
