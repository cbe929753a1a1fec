"""What an exported file says of itself: its sites, its size, and what its nodes run in on its target.

What a file's nodes run in on its target, with the reason and the cure, from the file alone.

The sites of an exported file, read from the file alone.

How big a file is, with the weights that lie beside it; what the files of its modules are called.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from halfstep.errors import ExportError
from halfstep.runtime.file_graph import FileGraph, layer_name, load
from halfstep.runtime.runtime import Kernels
from halfstep.targets import Target

if TYPE_CHECKING:
    import onnx

#: ONNX's operators in the words of the deployment tables.
KINDS: dict[str, str] = {
    "Conv": "conv",
    "ConvTranspose": "conv_transpose",
    "Gemm": "linear",
    "MatMul": "matmul",
    "Add": "add",
    "Mul": "mul",
    "Sub": "sub",
    "Div": "div",
    "Concat": "concat",
    "Sigmoid": "sigmoid",
    "HardSigmoid": "hardsigmoid",
    "HardSwish": "hardswish",
    "LeakyRelu": "leaky_relu",
    "Gelu": "gelu",
    "Tanh": "tanh",
    "Softmax": "softmax",
    "LayerNormalization": "layer_norm",
    "BatchNormalization": "batch_norm",
    "AveragePool": "average_pool",
    "GlobalAveragePool": "global_average_pool",
    "ReduceMean": "mean",
    "Resize": "resize_linear",
    "LSTM": "lstm",
    "GRU": "gru",
}

_MARKS = frozenset({"QuantizeLinear", "DequantizeLinear"})


@dataclass(frozen=True)
class FloatNode:
    """A node that computes in float.

    Attributes:
        name: the module that it comes from in files of ours, else the node's name.
        operator: ONNX's word for it.
        reason: why it is in float, and what would help.
    """

    name: str
    operator: str
    reason: str

    def __str__(self) -> str:
        return f"{self.name}: {self.operator} {self.reason}"


def float_nodes(path: str | Path, kernels: Kernels, target: Target) -> tuple[FloatNode, ...]:
    """The nodes that compute in float, in the file's order.

    Adds of a constant (biases), operators that no deployment table names and what is computed at load are left out.

    Args:
        path: an ONNX file.
        kernels: what its runtime made of it.
        target: whose table has the reasons.

    Raises:
        ExportError: if it is no ONNX file.
    """
    model = load(path, weights=False)
    graph = model.graph
    makers = {name: node for node in graph.node for name in node.output}
    computed = {value.name for value in graph.input}  # what depends on them; the rest is known at load
    found = []
    for node in graph.node:
        # What a quantizer hands on was computed before it.
        sources = [_before_marks(name, makers) for name in node.input]
        count = sum(name in computed for name in sources)
        if count and node.op_type not in _MARKS:
            computed |= set(node.output)
        kind = KINDS.get(node.op_type)
        if kind is None or not count or node.name in kernels.integer:
            continue
        if kind in ("add", "mul", "sub", "div") and count < 2:
            continue
        name = layer_name(node, model.producer_name)
        found.append(FloatNode(name, node.op_type, _reason(kind, node.input[0], makers, target)))
    return tuple(found)


def _reason(kind: str, source: str, makers: dict[str, onnx.NodeProto], target: Target) -> str:
    if kind in target.layers:
        maker = makers.get(source)
        if maker is None or maker.op_type != "DequantizeLinear":
            return "was left in float: no quantizer stands before it"
        return f"stays float on {target.name} as it stands between its quantizers"
    if kind in target.followers:
        return "is not between integer operators: quantizing for it alone would cost time"
    return target.reasons.get(kind, f"is not in the table of {target.name}; it runs in float")


def _before_marks(name: str, makers: dict[str, onnx.NodeProto]) -> str:
    while name in makers and makers[name].op_type in _MARKS:
        name = makers[name].input[0]
    return name


@dataclass(frozen=True)
class FileSite:
    """A DequantizeLinear of an ONNX file.

    Attributes:
        tensor: the name of the tensor that it makes.
        layer: the node that reads it first, one without a name by what it makes.
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
                    layer=readers[0].name or readers[0].output[0] if readers else "output",
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


def module_file(path: Path, module: str) -> Path:
    """What the file of one module is called that belongs to the file of a dict of modules.

    >>> module_file(Path("model.onnx"), "encoder").name
    'model.encoder.onnx'
    """
    return path.with_name(f"{path.stem}.{module}{path.suffix}")
