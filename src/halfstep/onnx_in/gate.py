"""The gate: what each node makes is compared with what ONNX Runtime makes of the same inputs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch

from halfstep.errors import CaptureError
from halfstep.onnx_in.network import SMALL, OnnxNetwork, computed
from halfstep.onnx_in.reader import graph_of
from halfstep.onnx_in.table import host, tensor

#: What a node makes may differ by so much, relative in the L2 norm: sums of float32 in another order.
TOLERANCE = 1e-4
#: The same of the outputs, to which all nodes before contribute.
OUTPUTS = 1e-3


def check_nodes(network: OnnxNetwork, inputs: Mapping[str, torch.Tensor]) -> None:
    """Raise unless each node makes of ONNX Runtime's values what ONNX Runtime makes of them.

    Nodes are given the runtime's own values, so that none has to answer for what another one rounds.

    Raises:
        CaptureError: naming the first node that parts, with both values where they are furthest from each other; or
            in the runtime's words, if it cannot run the file.
    """
    theirs = run_all(network, inputs)
    for node in network.nodes:
        given = tuple(None if not name else _value(network, theirs, name) for name in node.inputs)
        made = computed(node, given)
        for name, ours in zip(node.outputs, made, strict=False):
            if name and name in theirs and (found := parting(ours, theirs[name])):
                raise CaptureError(
                    f"node {node.name!r} ({node.kind}), output {name!r}: {found}. The file is not taken, since what is "
                    "quantized would be another network; please report the operator with its attributes"
                )
    with torch.no_grad():
        outputs = network.compute(inputs)
    for name in network.output_names:
        ours = network.stored(name) if network.is_stored(name) else outputs[name]
        if found := parting(ours, theirs[name], OUTPUTS):
            raise CaptureError(
                f"output {name!r}: {found}, although each node by itself agrees: rounding grows on the way; look for "
                "differences of nearly equal numbers, and for sorting"
            )


def run_all(network: OnnxNetwork, inputs: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """All that ONNX Runtime computes for inputs, the inputs included, by the names of the file."""
    source = network.source
    try:
        message = source.given
        if message.functions:  # whose nodes are compared like all others
            message = ir.to_proto(graph_of(message, source.path))
        found = run_message(message, source.path, inputs, every=True)
    except Exception as error:  # the runtime's own errors share no base
        raise CaptureError(
            f"{source.path}: onnxruntime cannot run it on these inputs: {str(error).strip()[:300]}"
        ) from error
    return {**{name: x.detach().cpu().numpy() for name, x in inputs.items()}, **found}


def run_message(
    message: onnx.ModelProto, path: Path, inputs: Mapping[str, torch.Tensor], every: bool = False
) -> dict[str, np.ndarray]:
    """What ONNX Runtime makes of inputs with its optimizations off: the outputs by name.

    Args:
        message: of a file.
        path: of the file, beside which tensors lie.
        inputs: by name.
        every: whether what each node makes is an output too.

    Raises:
        Exception: the runtime's own, of many kinds.
    """
    import onnxruntime

    if every:
        whole, message = message, onnx.ModelProto()
        message.CopyFrom(whole)
        known = {value.name for value in message.graph.output}
        names = [name for node in message.graph.node for name in node.output if name and name not in known]
        message.graph.output.extend(map(onnx.helper.make_empty_tensor_value_info, names))
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path.parent.resolve())
    )
    session = onnxruntime.InferenceSession(
        message.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    wanted = [value.name for value in session.get_outputs()]
    arrays = session.run(wanted, {name: x.detach().cpu().numpy() for name, x in inputs.items()})
    return {name: value for name, value in zip(wanted, arrays, strict=True) if isinstance(value, np.ndarray)}


def _value(network: OnnxNetwork, theirs: Mapping[str, np.ndarray], name: str) -> Any:
    if network.is_stored(name):
        return network.stored(name)
    value = np.array(theirs[name], order="C")
    shapes = value.dtype.kind in "iu" and value.ndim <= 1 and value.size <= SMALL
    return value if shapes else torch.from_numpy(value)  # as where it is computed from shapes


def parting(ours: Any, theirs: np.ndarray, tolerance: float = TOLERANCE) -> str:
    """How two values differ where they do by more than they may; else empty."""
    mine = (
        np.asarray(ours, np.int64) if host(ours) and ours.dtype == object else tensor(ours).detach().numpy()
    )
    if mine.shape != theirs.shape:
        return f"got shape {mine.shape}, onnxruntime has {theirs.shape}"
    if mine.dtype != theirs.dtype and not host(ours):
        return f"got {mine.dtype}, onnxruntime has {theirs.dtype}"
    if not mine.size or np.array_equal(mine, theirs, equal_nan=mine.dtype.kind == "f"):
        return ""
    a, b = mine.astype(np.float64), theirs.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        difference = np.where(same, 0.0, np.abs(a - b))
    scale = np.linalg.norm(np.where(np.isfinite(b), b, 0.0).reshape(-1))
    if mine.dtype.kind == "f" and np.linalg.norm(difference.reshape(-1)) <= tolerance * scale:
        return ""
    furthest = np.unravel_index(int(np.argmax(np.nan_to_num(difference, nan=np.inf))), a.shape)
    place = f" at {tuple(map(int, furthest))}" if a.ndim else ""
    return f"got {mine[furthest]!s}, onnxruntime has {theirs[furthest]!s}{place}"
