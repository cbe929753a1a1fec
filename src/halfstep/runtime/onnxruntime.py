"""ONNX Runtime on the CPU: its sessions, and the graph that it really executes."""

from __future__ import annotations

import json
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from halfstep.cores import available_cores
from halfstep.errors import RefusedError
from halfstep.runtime.file_graph import FileGraph
from halfstep.runtime.latency import PROFILED, per_run
from halfstep.runtime.runtime import Kernels, Runtime

if TYPE_CHECKING:
    import onnx

#: Operators that compute on integers.
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

#: Operators that read weights of few bits. They compute in float, but for MatMulNBits at this accuracy level.
PACKED = frozenset({"MatMulNBits", "MatMulBnb4", "GatherBlockQuantized"})
INTEGER_SUMS = 4

#: What the runtime's profile appends to the name of a node that was executed.
KERNEL = "_kernel_time"

#: Operators that multiply: where the time goes, and what ought to be integer.
HEAVY = frozenset(
    {"Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "LSTM", "GRU"}
)


def open_session(
    path: str | Path,
    threads: int | None = None,
    optimized: str | Path | None = None,
    fuse: bool = True,
    profile: str | Path | None = None,
) -> Any:
    """An ONNX Runtime session on the CPU.

    Args:
        path: an ONNX file.
        threads: for one operator; None for all cores that this process may use.
        optimized: where to write the graph that the runtime really executes, None for nowhere.
        fuse: let the runtime replace operators between quantizers by integer kernels.
        profile: the first part of the path where times are written, None for nowhere.

    Raises:
        RefusedError: if the runtime cannot load the file, with its words.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or available_cores()
    options.inter_op_num_threads = 1
    # Idle threads that spin would take the cores from the next session in this process, and from torch.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not fuse:
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.log_severity_level = (
        3  # the runtime warns that an optimised graph is for this machine: it is meant to be
    )
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise RefusedError(f"onnxruntime cannot load {path}: {error}") from error


class OnnxRuntimeSession:
    """A file loaded on ONNX Runtime."""

    def __init__(self, path: Path, threads: int | None, fuse: bool = True) -> None:
        self.session = open_session(path, threads, fuse=fuse)
        self.inputs: list[str] = [value.name for value in self.session.get_inputs()]
        self.types = [_numpy_type(value.type) for value in self.session.get_inputs()]

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The outputs for one array an input."""
        feed = dict(zip(self.inputs, arrays, strict=True))
        return [np.asarray(array) for array in self.session.run(None, feed)]


def _numpy_type(name: str) -> np.dtype:
    """The type of an input by the runtime's name of it.

    >>> _numpy_type("tensor(float)"), _numpy_type("tensor(int64)")
    (dtype('float32'), dtype('int64'))
    """
    inner = name.removeprefix("tensor(").removesuffix(")")
    return np.dtype({"float": "float32", "double": "float64"}.get(inner, inner))


def inspect(path: Path, threads: int | None) -> Kernels:
    """Load the file and read the graph that the runtime made of it.

    Raises:
        RefusedError: if the runtime cannot load the file.
    """
    import onnx

    with tempfile.TemporaryDirectory() as directory:
        optimized = Path(directory) / "optimized.onnx"
        open_session(path, threads, optimized)
        graph = onnx.load(optimized, load_external_data=False).graph
    return Kernels(
        counts=dict(Counter(node.op_type for node in graph.node).most_common()),
        integer=tuple(_original(node.name) for node in graph.node if _on_integers(node)),
        floating=tuple(_original(node.name) for node in graph.node if node.op_type in HEAVY),
        packed=tuple(
            _original(node.name) for node in graph.node if node.op_type in PACKED and not _on_integers(node)
        ),
    )


def profile(path: Path, threads: int | None, arrays: Sequence[np.ndarray]) -> dict[str, float]:
    """Microseconds of each node in a run, by its name in the file; what the runtime added has names of its own.

    Raises:
        RefusedError: if the runtime cannot load the file.
    """
    times: dict[str, list[int]] = {}
    graph = FileGraph.read(path)
    with tempfile.TemporaryDirectory() as directory:
        session = open_session(path, threads, profile=Path(directory) / "profile")
        feed = dict(zip([value.name for value in session.get_inputs()], arrays, strict=True))
        for _ in range(PROFILED):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text(), object_hook=_read)
    for node, operator, microseconds in filter(None, events):
        name = _original(node.removesuffix(KERNEL))
        if operator in HEAVY:
            name = _multiplier(graph, name)
        times.setdefault(name, []).append(microseconds)
    return per_run(times, PROFILED)


def _read(part: dict[str, Any]) -> Any:
    """What is read of a profile, while it is parsed: whole, it is very many objects."""
    if "args" not in part:
        return part.get("op_name")  # the arguments themselves
    executed = part["cat"] == "Node" and part["name"].endswith(KERNEL)
    return (part["name"], part["args"], part["dur"]) if executed else None


def _multiplier(graph: FileGraph, name: str) -> str:
    """The conv or product of a node that multiplies, which the runtime may call by the activation fused into it."""
    node = next((node for node in graph.nodes if node.name == name), None)
    while node is not None and node.op_type not in HEAVY:
        node = graph.makers.get(node.input[0])
    return name if node is None else str(node.name)


def _on_integers(node: onnx.NodeProto) -> bool:
    """Whether a node of the optimised graph multiplies, adds or moves integers."""
    levels = [attribute.i for attribute in node.attribute if attribute.name == "accuracy_level"]
    return node.op_type in INTEGER or (node.op_type == "MatMulNBits" and levels == [INTEGER_SUMS])


def _original(name: str) -> str:
    """A node's name without what the runtime's passes append to it."""
    return re.sub(r"(_token_\d+|/MatMulScaleFusion/|_nchwc)$", "", name)


ONNXRUNTIME = Runtime("onnxruntime", OnnxRuntimeSession, inspect, profile)
