"""The sites of an exported file, read from the file alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from halfstep.runtime.file_graph import FileGraph, load


@dataclass(frozen=True)
class FileSite:
    """A DequantizeLinear of an ONNX file.

    Attributes:
        tensor: the name of the tensor that it makes.
        layer: the node that reads it first.
        format: ONNX's type of the codes.
        granularity: per tensor, per channel or per group.
        low, high: what the smallest and largest code stand for.
        constant: whether the codes are in the file (a weight or bias).
    """

    tensor: str
    layer: str
    format: str
    granularity: str
    low: float
    high: float
    constant: bool


def read_sites(path: str | Path) -> tuple[list[FileSite], dict[str, str]]:
    """The sites of the file, and its metadata.

    Raises:
        ExportError: if it is no ONNX file, or scales beside it are missing.
    """
    found = []
    for graph in FileGraph.read(path).every():
        for node in graph.quantizers:
            scale = graph.constant(node.input[1])
            if node.op_type != "DequantizeLinear" or scale is None:
                continue
            scale = scale.astype(np.float64)
            zero = graph.constant(node.input[2]) if len(node.input) > 2 else None
            shift = 0.0 if zero is None else zero.astype(np.float64)
            low, high = _ends(graph.code_type(node))
            source, readers = graph.makers.get(node.input[0]), graph.readers(node.output[0])
            constant = node.input[0] in graph.tensors
            found.append(
                FileSite(
                    tensor=node.input[0] if constant or source is None else source.input[0],
                    layer=readers[0].name if readers else "output",
                    format=graph.code_type(node),
                    granularity=("per tensor", "per channel", "per group")[min(scale.ndim, 2)],
                    low=float(((low - shift) * scale).min()),
                    high=float(((high - shift) * scale).max()),
                    constant=constant,
                )
            )
    return found, read_metadata(path)


def read_metadata(path: str | Path) -> dict[str, str]:
    """What a file says of itself.

    Raises:
        ExportError: if it is no ONNX file.
    """
    return {entry.key: entry.value for entry in load(path, weights=False).metadata_props}


#: The largest number of float types that codes may have.
_LARGEST = {
    "float8e4m3fn": 448.0,
    "float8e4m3fnuz": 240.0,
    "float8e5m2": 57344.0,
    "float8e5m2fnuz": 57344.0,
    "float4e2m1": 6.0,
}


def _ends(name: str) -> tuple[float, float]:
    """The smallest and the largest code of a type, called as ONNX does in small letters."""
    if name in _LARGEST:
        return -_LARGEST[name], _LARGEST[name]
    bits = int(name.lstrip("uint"))
    return (0, 2**bits - 1) if name.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
