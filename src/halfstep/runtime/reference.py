"""Files for hardware that is not here: executed as they are written, judged by what is written.

ONNX Runtime runs every operator in float between its quantizers, which is what QuantizeLinear and DequantizeLinear
mean; its own fusions, which serve its own kernels, are off.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from halfstep.runtime.file_graph import load
from halfstep.runtime.onnxruntime import OnnxRuntimeSession
from halfstep.runtime.runtime import Kernels, Runtime

#: Operators that multiply two tensors.
HEAVY = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU"})

#: Operators that runtimes have kernels on codes for, beside those.
FOLLOWING = frozenset({"Add", "AveragePool", "GlobalAveragePool"})


def inspect(path: Path, threads: int | None) -> Kernels:
    """Take an operator as integer if it reads codes.

    One that multiplies must read both of its factors from a DequantizeLinear, an add or pool one of its inputs.

    Raises:
        ExportError: if it is no ONNX file.
    """
    graph = load(path, weights=False).graph
    makers = {name: node.op_type for node in graph.node for name in node.output}
    heavy, integer = list[str](), list[str]()
    for node in graph.node:
        codes = [makers.get(name) == "DequantizeLinear" for name in node.input[:2]]
        if node.op_type in HEAVY:
            (integer if all(codes) else heavy).append(node.name)
        elif node.op_type in FOLLOWING and any(codes):
            integer.append(node.name)
    return Kernels(
        counts=dict(Counter(node.op_type for node in graph.node).most_common()),
        integer=tuple(integer),
        floating=tuple(heavy),
    )


REFERENCE = Runtime("reference", lambda path, threads: OnnxRuntimeSession(path, threads, fuse=False), inspect)
