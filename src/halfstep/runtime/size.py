"""How big a file is, with the weights that lie beside it."""

from __future__ import annotations

from pathlib import Path

from halfstep.runtime.sites import load


def file_size(path: str | Path) -> int:
    """Bytes of an ONNX file and of the files that it names for its tensors.

    Raises:
        ExportError: if it is no ONNX file.
    """
    path = Path(path)
    places: set[str] = {
        entry.value
        for tensor in load(path, weights=False).graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    sizes = [(path.parent / place).stat().st_size for place in places]
    return path.stat().st_size + sum(sizes)
