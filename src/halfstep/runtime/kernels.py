"""The proof that a file is integer: what the runtime's optimised graph really holds."""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from halfstep.runtime.deployed import open_session

#: Operators that compute on integers, by ONNX Runtime's names.
INTEGER = frozenset(
    {
        "QLinearConv",
        "ConvInteger",
        "QGemm",
        "QLinearMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "DynamicQuantizeMatMul",
        "DynamicQuantizeLSTM",
        "MatMulNBits",
        "MatMulBnb4",
        "GatherBlockQuantized",
        "QLinearAdd",
        "QLinearMul",
        "QLinearConcat",
        "QLinearSigmoid",
        "QLinearLeakyRelu",
        "QLinearSoftmax",
        "QLinearAveragePool",
        "QLinearGlobalAveragePool",
    }
)

#: Operators that multiply: where the time goes, and what ought to be integer.
HEAVY = frozenset(
    {"Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "LSTM", "GRU"}
)


@dataclass(frozen=True)
class Kernels:
    """What a file became on the runtime.

    Attributes:
        counts: operator types of the optimised graph, with how often each occurs.
        integer: names of the nodes on integer kernels.
        floating: names of the multiplying nodes that stayed in float.
    """

    counts: dict[str, int]
    integer: tuple[str, ...]
    floating: tuple[str, ...]


def inspect_kernels(path: str | Path, threads: int | None = None) -> Kernels:
    """Load ``path`` on ONNX Runtime and read the graph that it executes.

    Raises:
        ExportError: if the runtime cannot load the file.
    """
    import onnx

    with tempfile.TemporaryDirectory() as directory:
        optimized = Path(directory) / "optimized.onnx"
        open_session(path, threads, optimized)
        graph = onnx.load(optimized, load_external_data=False).graph
    return Kernels(
        counts=dict(Counter(node.op_type for node in graph.node).most_common()),
        integer=tuple(node.name for node in graph.node if node.op_type in INTEGER),
        floating=tuple(node.name for node in graph.node if node.op_type in HEAVY),
    )
