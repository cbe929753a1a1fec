"""Files of candidates, each exported once, and how fast the one that is handed back must be.

The files of a run: a candidate is exported once, whoever asks for its file.

Speed as a goal beside accuracy: how much faster than float files must be, and how fast candidates' files are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from halfstep.errors import ArgumentError, RefusedError
from halfstep.export.onnx import export_onnx
from halfstep.ladder.costs import file_speed
from halfstep.ladder.search import Evaluated, Search
from halfstep.progress import steps
from halfstep.targets import Target

#: Names that files are written and handed over by: those that answered as their simulation, and those not held to it.
CHECKED, UNCHECKED, FLOAT = "model.onnx", "refused.onnx", "float.onnx"


class Exports:
    """Files of candidates, kept until the run ends.

    Args:
        folder: where they are written; it exists.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._written: dict[str, tuple[Path, bool]] = {}  # by candidate, with whether the file was checked
        self._refused: dict[str, RefusedError] = {}

    def file(self, search: Search, candidate: Evaluated, check: bool = True) -> Path:
        """The candidate's file; the search's model is the candidate where it has to be written.

        Args:
            search: whose candidate it is.
            candidate: one that was evaluated.
            check: whether the file must answer as the simulation.

        Raises:
            ExportError: if the file cannot be written.
            RefusedError: if its runtime does not take it, or, with ``check``, it answers otherwise than the simulation;
                asked again, the same is raised without another try.
        """
        about = {
            "float_score": repr(search.asked.float_score.value),
            "rung": rung_of(search, candidate),
        }
        path, checked = self._written.get(candidate.key, (None, False))
        if path is not None and (checked or not check):
            return path
        if check and candidate.key in self._refused:
            raise self._refused[candidate.key]
        folder = self._folder / f"candidate-{len(self._written)}"
        folder.mkdir(exist_ok=True)
        candidate.snapshot.restore()
        try:
            with steps("exporting"):
                path = export_onnx(search.model, folder / (CHECKED if check else UNCHECKED), about, check)
        except RefusedError as error:
            if check:
                self._refused[candidate.key] = error
            raise
        self._written[candidate.key] = path, check
        return path


def rung_of(search: Search, candidate: Evaluated) -> str:
    """The first rung that ended with this candidate; the one that was climbed last if none did."""
    found = (name for name, reached in search.reached.items() if reached.key == candidate.key)
    return next(found, search.rung)


def check_latency(latency: float | None, target: Target) -> None:
    """Raise unless a file for ``target`` can be asked to be so many times as fast as float.

    Raises:
        ArgumentError: if it is no number above 0, or the target's hardware is not what files run on here.
    """
    if latency is None:
        return
    if isinstance(latency, bool) or not isinstance(latency, (int, float)) or not 0 < latency < math.inf:
        raise ArgumentError(
            f"latency: got {latency!r}, needed a number above 0, such as 2.0: how many times as fast as float the file "
            "must be"
        )
    if target.runtime != target.name:
        raise ArgumentError(
            f"latency: files for {target.name} are not timed on its hardware here, so no goal can be held to; leave it "
            "out"
        )


@dataclass(frozen=True)
class Pace:
    """How fast files must be.

    Attributes:
        least: times as fast as float, on the target's runtime and the first batch that calibration kept.
        exports: the files of candidates.
        float_file: what they race against.
        threads: of the runtime.
    """

    least: float
    exports: Exports
    float_file: Path
    threads: int | None

    def speed(self, search: Search, candidate: Evaluated) -> float:
        """How many times as fast as float a candidate's file is; raced once, and the model is the candidate then."""
        candidate.snapshot.restore()

        def file() -> Path:
            try:
                return self.exports.file(search, candidate)
            except RefusedError:  # as fast as it is wrong; the end of the climb deals with that
                return self.exports.file(search, candidate, check=False)

        return file_speed(search, file, self.float_file, self.threads)

    def enough(self, search: Search, candidate: Evaluated) -> bool:
        """Whether a candidate's file is fast enough."""
        return self.speed(search, candidate) >= self.least

    def spare(self, search: Search, candidate: Evaluated) -> str:
        """Why a candidate is only kept in case nothing better comes: layers in float, and too slow; empty if not."""
        share = len(candidate.snapshot.precision["float"]) / max(1, len(search.model.layers))
        return (
            f"{share:.0%} of the layers in float, and is too slow so"
            if share and not self.enough(search, candidate)
            else ""
        )

    def choose(self, search: Search, first: Evaluated, others: Iterable[Evaluated]) -> Evaluated:
        """``first`` if it is fast enough; else the most accurate of the others that are; ``first`` if none is.

        A decision says how fast each of them is, where there was a choice.
        """
        if self.enough(search, first):
            return first
        pool = list({id(each): each for each in (first, *others)}.values())
        speeds = {id(each): self.speed(search, each) for each in pool}
        listed = "; ".join(
            f"{each.what}: {speeds[id(each)]:.2f}x, {search.goal.words(each.score)}" for each in pool
        )
        fast = [each for each in pool if speeds[id(each)] >= self.least]
        best = min(fast, key=lambda each: search.goal.loss(each.score), default=first)
        chosen = f"{best.what} is the most accurate that is fast enough" if fast else "none is fast enough"
        search.decide(f"{self.least:g} times as fast as float is asked for: {listed}. So {chosen}")
        best.snapshot.restore()
        return best

    def missed(self, speed: float) -> str:
        """What is to be said of a file of that speed; empty if it is fast enough."""
        if speed >= self.least:
            return ""
        return (
            f"The file is {speed:.2f} times as fast as float, and {self.least:g} were asked for: fewer layers in float "
            "(a larger max_drop, or training=), or another target may be faster"
        )
