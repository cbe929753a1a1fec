"""What a file's nodes run in on its target, with the reason and the cure, from the file alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from halfstep.runtime.file_graph import layer_name, load
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
