"""Files for hardware that is not here: executed as they are written, judged by what is written.

ONNX Runtime runs every operator in float between its quantizers, which is what QuantizeLinear and DequantizeLinear
mean; its own fusions, which serve its own kernels, are off.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from halfstep.runtime.onnxruntime import OnnxRuntimeSession
from halfstep.runtime.runtime import Kernels, Runtime
from halfstep.runtime.sites import load

#: Operators that multiply two tensors.
HEAVY = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul", "LSTM", "GRU"})


def inspect(path: Path, threads: int | None) -> Kernels:
    """Take an operator that multiplies as integer if both tensors that it multiplies come from a DequantizeLinear.

    Raises:
        ExportError: if it is no ONNX file.
    """
    graph = load(path, weights=False).graph
    makers = {name: node.op_type for node in graph.node for name in node.output}
    heavy = [node for node in graph.node if node.op_type in HEAVY]
    codes = {
        node.name: all(makers.get(name) == "DequantizeLinear" for name in node.input[:2]) for node in heavy
    }
    return Kernels(
        counts=dict(Counter(node.op_type for node in graph.node).most_common()),
        integer=tuple(name for name, integer in codes.items() if integer),
        floating=tuple(name for name, integer in codes.items() if not integer),
    )


REFERENCE = Runtime("reference", lambda path, threads: OnnxRuntimeSession(path, threads, fuse=False), inspect)
