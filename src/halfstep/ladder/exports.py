"""The files of a run: a candidate is exported once, whoever asks for its file."""

from __future__ import annotations

from pathlib import Path

from halfstep.errors import RefusedError
from halfstep.export.onnx import export_onnx
from halfstep.ladder.search import Candidate, Search
from halfstep.progress import steps

#: Names that files are written and handed over by: those that answered as their simulation, and those not held to it.
CHECKED, UNCHECKED = "model.onnx", "refused.onnx"


class Exports:
    """Files of candidates, kept until the run ends.

    Args:
        folder: where they are written; it exists.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._written: dict[str, tuple[Path, bool]] = {}  # by candidate, with whether the file was checked
        self._refused: dict[str, RefusedError] = {}

    def file(self, search: Search, candidate: Candidate, check: bool = True) -> Path:
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
            "score": repr(candidate.score.value),
            "rung": rung_of(search, candidate),
        }
        key = repr((candidate.key, about))
        path, checked = self._written.get(key, (None, False))
        if path is not None and (checked or not check):
            return path
        if check and key in self._refused:
            raise self._refused[key]
        folder = self._folder / f"candidate-{len(self._written)}"
        folder.mkdir(exist_ok=True)
        candidate.snapshot.restore()
        try:
            with steps("exporting"):
                path = export_onnx(search.model, folder / (CHECKED if check else UNCHECKED), about, check)
        except RefusedError as error:
            if check:
                self._refused[key] = error
            raise
        self._written[key] = path, check
        return path


def rung_of(search: Search, candidate: Candidate) -> str:
    """The first rung that ended with this candidate; the one that was climbed last if none did."""
    return next((name for name, reached in search.reached.items() if reached is candidate), search.rung)
