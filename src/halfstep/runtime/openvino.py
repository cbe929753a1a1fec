"""OpenVINO on the CPU: its sessions, and the precision in which it really executes each node."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from halfstep.cores import available_cores
from halfstep.errors import ExportError, RefusedError
from halfstep.runtime.file_graph import load
from halfstep.runtime.latency import PROFILED, per_run
from halfstep.runtime.runtime import Kernels, Runtime

#: Precisions of integer kernels, by the runtime's names.
INTEGER = frozenset({"i8", "u8", "i4", "u4"})

#: Layer types that multiply.
HEAVY = frozenset({"Convolution", "Deconvolution", "FullyConnected", "MatMul", "RNNSeq", "RNNCell"})

#: Layer types that compute; the others move data about.
COMPUTING = HEAVY | {
    "Eltwise",
    "Pooling",
    "Reduce",
    "Concatenation",
    "ScaledDotProductAttention",
    "Subgraph",
}

#: Operators of the file that only mark a number format.
MARKS = frozenset({"QuantizeLinear", "DequantizeLinear"})


def compile_model(path: Path, threads: int | None, profile: bool = False) -> Any:
    """The file compiled for the CPU.

    Floats are computed in float32: on processors with bfloat16 units OpenVINO would choose that by itself, and the
    file would not answer as the simulation does.

    Raises:
        ExportError: if OpenVINO is not installed.
        RefusedError: if it cannot load the file.
    """
    try:
        import openvino
    except ImportError as error:
        raise ExportError(
            "target 'openvino': its runtime is not installed; pip install 'halfstep[openvino]'"
        ) from error

    settings = {
        "INFERENCE_NUM_THREADS": threads or available_cores(),
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        "PERF_COUNT": profile,
    }
    try:
        return openvino.Core().compile_model(str(path), "CPU", settings)
    except Exception as error:
        raise RefusedError(f"openvino cannot load {path}: {error}") from error


class OpenVinoSession:
    """A file loaded on OpenVINO."""

    def __init__(self, path: Path, threads: int | None) -> None:
        compiled = compile_model(path, threads)
        self.inputs: list[str] = [value.get_any_name() for value in compiled.inputs]
        self.types = [np.dtype(value.get_element_type().to_dtype()) for value in compiled.inputs]
        self.outputs = len(compiled.outputs)
        self.request = compiled.create_infer_request()

    def run(self, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        """The outputs for one array an input."""
        self.request.infer(list(arrays), share_inputs=True)
        return [self.request.get_output_tensor(i).data.copy() for i in range(self.outputs)]


def inspect(path: Path, threads: int | None) -> Kernels:
    """Compile the file and read the runtime model: layer types with the precision that they run in.

    Raises:
        RefusedError: if the runtime cannot load the file.
    """
    graph = load(path, weights=False).graph
    nodes = {node.name: node.op_type for node in graph.node}
    shares = {value for node in graph.node if node.op_type == "Softmax" for value in node.output}
    coded = {node.name for node in graph.node if node.op_type == "MatMul" and node.input[0] not in shares}
    counts: Counter[str] = Counter()
    integer: dict[str, None] = {}
    floating: dict[str, None] = {}
    for operation in compile_model(path, threads).get_runtime_model().get_ordered_ops():
        info = operation.get_rt_info()
        kind, precision = (info[key].astype(str) for key in ("layerType", "runtimePrecision"))
        if kind in ("Const", "Input", "Output"):
            continue
        counts[f"{kind} {precision}"] += 1
        if kind not in COMPUTING:
            continue
        names = dict.fromkeys(_known(info["originalLayersNames"].astype(str), nodes))
        if kind == "Subgraph":  # attention: its precision is that of the first product
            names = {name: None for name in names if name in coded}
        # It forgets the name of some; the weight keeps its layer's.
        if not names and kind == "FullyConnected":
            names = dict.fromkeys(_known(operation.input_value(1).get_node().get_friendly_name(), nodes))
        if precision in INTEGER:
            integer.update(names)
        elif kind in HEAVY:
            floating.update(names or {kind: None})  # of recurrent layers it forgets the names
    return Kernels(dict(counts.most_common()), tuple(integer), tuple(floating))


def profile(path: Path, threads: int | None, arrays: Sequence[np.ndarray]) -> dict[str, float]:
    """Microseconds of each node in a run, by its name in the file.

    Raises:
        ExportError: if OpenVINO is not installed.
        RefusedError: if it cannot load the file.
    """
    nodes = {node.name: node.op_type for node in load(path, weights=False).graph.node}
    request = compile_model(path, threads, profile=True).create_infer_request()
    times: dict[str, list[float]] = {}
    for _ in range(PROFILED):
        request.infer(list(arrays), share_inputs=True)
        for node in request.get_profiling_info():
            for name in list(_known(node.node_name, nodes))[:1]:
                times.setdefault(name, []).append(node.real_time.total_seconds() * 1e6)
    return per_run(times, PROFILED)


def _known(originals: str, nodes: dict[str, str]) -> Iterator[str]:
    """The file's computing nodes in a list of OpenVINO's, which appends to their names what it made of them."""
    for original in originals.split(","):
        name = original
        while name and name not in nodes:
            name = name.rpartition("/")[0]
        if name and nodes[name] not in MARKS:
            yield name


OPENVINO = Runtime("openvino", OpenVinoSession, inspect, profile)
