"""Rules that a runtime has for files, for runtimes that are not here to judge them themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from halfstep.runtime.file_graph import FileGraph


@dataclass(frozen=True)
class Rule:
    """One thing that a runtime asks of a file.

    Attributes:
        name: of the rule.
        refused: a file that breaks it cannot be loaded (True), or runs slower than it could (False).
        reason: why the runtime asks it.
        cure: what to do.
        breaches: the names of the places that break it.
    """

    name: str
    refused: bool
    reason: str
    cure: str
    breaches: Callable[[FileGraph], Iterator[str]]


@dataclass(frozen=True)
class Finding:
    """A rule that a file breaks, and where."""

    rule: Rule
    places: tuple[str, ...]

    def __str__(self) -> str:
        shown = ", ".join(self.places[:3]) + (" ..." if len(self.places) > 3 else "")
        verdict = "refused" if self.rule.refused else "slower"
        places = f"{len(self.places)} place{'s' if len(self.places) > 1 else ''}"
        return f"{verdict}, {self.rule.name}, {places} ({shown}): {self.rule.reason}; {self.rule.cure}"


def lint(path: str | Path, rules: Iterable[Rule]) -> tuple[Finding, ...]:
    """Hold a file to rules; one finding for every rule that it breaks.

    Raises:
        ExportError: if it is no ONNX file, or tensors beside it are missing.
    """
    graphs = list(FileGraph.read(path).every())
    found = (
        (rule, dict.fromkeys(place for graph in graphs for place in rule.breaches(graph))) for rule in rules
    )
    return tuple(Finding(rule, tuple(places)) for rule, places in found if places)
