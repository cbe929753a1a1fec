"""Options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

import typer

from halfstep.errors import ArgumentError

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
