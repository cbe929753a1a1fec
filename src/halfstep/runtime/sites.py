"""The sites of an exported file, read from the file alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from halfstep.errors import ExportError

if TYPE_CHECKING:
    import onnx


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
        ExportError: if it is no ONNX file.
    """
    import onnx
    from onnx import numpy_helper

    model = load(path, weights=True)
    arrays = {tensor.name: tensor for tensor in model.graph.initializer}
    reader = {name: node.name for node in reversed(model.graph.node) for name in node.input}
    producer = {name: node for node in model.graph.node for name in node.output}
    sites = []
    for node in model.graph.node:
        if node.op_type != "DequantizeLinear" or node.input[1] not in arrays:
            continue
        scale = numpy_helper.to_array(arrays[node.input[1]]).astype(np.float64)
        zero: Any = 0
        dtype = arrays[node.input[0]].data_type if node.input[0] in arrays else onnx.TensorProto.UINT8
        if len(node.input) > 2 and node.input[2] in arrays:
            zero = numpy_helper.to_array(arrays[node.input[2]]).astype(np.int64)
            dtype = arrays[node.input[2]].data_type
        low, high = _ends(onnx.TensorProto.DataType.Name(dtype))
        source = producer.get(node.input[0])
        sites.append(
            FileSite(
                tensor=source.input[0] if source is not None else node.input[0],
                layer=reader.get(node.output[0], "output"),
                format=onnx.TensorProto.DataType.Name(dtype).lower(),
                granularity=("per tensor", "per channel", "per group")[min(scale.ndim, 2)],
                low=float(((low - zero) * scale).min()),
                high=float(((high - zero) * scale).max()),
                constant=node.input[0] in arrays,
            )
        )
    return sites, {entry.key: entry.value for entry in model.metadata_props}


def read_metadata(path: str | Path) -> dict[str, str]:
    """What a file says of itself.

    Raises:
        ExportError: if it is no ONNX file.
    """
    return {entry.key: entry.value for entry in load(path, weights=False).metadata_props}


def load(path: str | Path, weights: bool) -> onnx.ModelProto:
    """The file, with or without weights that lie beside it.

    Raises:
        ExportError: if it is no ONNX file.
    """
    import onnx

    try:
        return onnx.load(str(path), load_external_data=weights)
    except Exception as error:  # protobuf's own errors share no base with OSError
        raise ExportError(f"{path}: cannot be read as ONNX: {error}") from error


def _ends(name: str) -> tuple[int, int]:
    bits = int("".join(c for c in name if c.isdigit()) or 8)
    return (0, 2**bits - 1) if name.startswith("U") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
