"""How big a file is, with the weights that lie beside it."""

from __future__ import annotations

from pathlib import Path

from halfstep.errors import ExportError
from halfstep.runtime.file_graph import FileGraph


def parts(path: str | Path) -> list[Path]:
    """The file, and the files beside it that it names for its tensors.

    Raises:
        ExportError: if it is no ONNX file.
    """
    path = Path(path)
    places: dict[str, None] = dict.fromkeys(
        entry.value
        for graph in FileGraph.read(path).every()
        for tensor in graph.stored.values()
        for entry in tensor.external_data
        if entry.key == "location"
    )
    return [path, *(path.parent / place for place in places)]


def file_size(path: str | Path) -> int:
    """Bytes of an ONNX file and of the files that it names for its tensors.

    Raises:
        ExportError: if it is no ONNX file, or a file that it names is not there.
    """
    try:
        return sum(part.stat().st_size for part in parts(path))
    except OSError as error:
        raise ExportError(f"{path}: its weights cannot be read: {error}; copy them along with it") from error
