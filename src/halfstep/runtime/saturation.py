"""Sums that saturate: the same file, and other answers on other processors.

On x86 processors without VNNI, integer kernels multiply unsigned activations by signed weights with an instruction
(``vpmaddubsw``) that adds two neighbouring products in 16 bits and saturates: 2 * 255 * 127 is far above 32,767. With
VNNI (AVX512-VNNI, AVX-VNNI), AMX and on ARM, products are added in 32 bits. ONNX Runtime and OpenVINO do alike, and
neither says so.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from halfstep.runtime.file_graph import FileGraph, layer_name
from halfstep.runtime.onnxruntime import open_session

if TYPE_CHECKING:
    import onnx

LARGEST = 2**15 - 1  # of 16 bits

#: Operators that multiply what DequantizeLinears make of an activation and a weight.
_DEQUANTIZED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
#: Operators that multiply codes, and the place of the weight among their inputs.
_INTEGER = {
    **dict.fromkeys(("ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul"), 1),
    **dict.fromkeys(("QLinearConv", "QLinearMatMul", "QGemm"), 3),
}

#: Operators that hand on codes, or entries of a table of them.
_HANDED_ON = frozenset({"Cast", "Gather", "Reshape", "Transpose"})


@cache
def saturates_here() -> bool:
    """Whether kernels on this processor saturate: asked of ONNX Runtime, with a sum that does if one can."""
    from onnx import TensorProto, helper

    codes = helper.make_tensor_value_info("codes", TensorProto.UINT8, [1, 64])
    sums = helper.make_tensor_value_info("sums", TensorProto.INT32, [1, 16])
    weight = helper.make_tensor(
        "weight", TensorProto.INT8, [64, 16], np.full((64, 16), 127, np.int8).tobytes(), True
    )
    node = helper.make_node("MatMulInteger", ["codes", "weight"], ["sums"])
    graph = helper.make_graph([node], "saturation", [codes], [sums], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "saturation.onnx"
        file.write_bytes(model.SerializeToString())
        (found,) = open_session(file, threads=1).run(None, {"codes": np.full((1, 64), 255, np.uint8)})
    return bool((found != 64 * 255 * 127).any())


def saturable_layers(path: str | Path) -> tuple[str, ...]:
    """The layers of a file that give other answers where sums of two products saturate, in the file's order.

    A layer is one if some input could make it so: two codes of one output channel's weight, the largest of one sign,
    with the largest code that the activation can have. Which two are neighbours is the kernel's secret. Depthwise convs
    are none: their kernels add every product in 32 bits.

    Args:
        path: an ONNX file with integer weights, of any tool.

    Returns:
        The names of the modules in files of ours, else of the nodes.

    Raises:
        ExportError: if it is no ONNX file, or tensors beside it are missing.
    """
    found: dict[str, None] = {}
    for graph in FileGraph.read(path).every():
        for node in graph.nodes:
            if _may_saturate(graph, node):
                found[layer_name(node, graph.producer)] = None
    return tuple(found)


def holds_on(saturable: Sequence[str]) -> str:
    """On which processors a file answers as it was proven to, given its :func:`saturable_layers`."""
    if not saturable:
        return "every processor"
    return f"processors with VNNI or the like; elsewhere {len(saturable)} layers may saturate"


def _may_saturate(graph: FileGraph, node: onnx.NodeProto) -> bool:
    if node.op_type in _INTEGER:
        return 255 * _largest_pair(graph, node, node.input[_INTEGER[node.op_type]]) > LARGEST
    if node.op_type not in _DEQUANTIZED:
        return False
    activation, weight = (_dequantizer(graph, name) for name in node.input[:2])
    if activation is None or weight is None or graph.code_type(weight) != "int8":
        return False
    return _largest_code(graph, activation) * _largest_pair(graph, node, weight.input[0]) > LARGEST


def _dequantizer(graph: FileGraph, name: str) -> onnx.NodeProto | None:
    maker = graph.makers.get(name)
    if maker is not None and maker.op_type == "Mul":  # attention's scale
        maker = graph.makers.get(maker.input[0])
    return maker if maker is not None and maker.op_type == "DequantizeLinear" else None


def _largest_code(graph: FileGraph, node: onnx.NodeProto) -> int:
    """The largest unsigned code that a DequantizeLinear reads, signed ones being shifted; 0 if they have not 8 bits.

    A Clip before the QuantizeLinear says that fewer codes are in use.
    """
    shift = {"uint8": 0, "int8": 128}.get(graph.code_type(node))
    if shift is None:
        return 0
    quantize = graph.makers.get(node.input[0])
    clip = graph.makers.get(quantize.input[0]) if quantize is not None else None
    if quantize is None or clip is None or clip.op_type != "Clip" or len(clip.input) < 3:
        return 255
    known = [graph.constant(name) for name in (clip.input[2], *quantize.input[1:3])]
    if any(value is None or value.size != 1 for value in known) or len(known) < 3:
        return 255
    high, scale, zero = (float(value) for value in known if value is not None)
    return min(255, round(high / scale + zero) + shift)


def _largest_pair(graph: FileGraph, node: onnx.NodeProto, weight: str) -> int:
    """The largest sum of two codes of one sign that are multiplied for one output channel."""
    codes = graph.constant(weight)
    if codes is None:
        return 2 * _largest_magnitude(graph, weight)
    attributes = {attribute.name: attribute.i for attribute in node.attribute}
    groups = attributes.get("group", 1)
    axis = -1
    if node.op_type == "ConvTranspose":
        axis = 1
    elif "Conv" in node.op_type or attributes.get("transB"):
        axis = 0
    if node.op_type != "ConvTranspose" and codes.ndim > 2 and codes.shape[:2] == (groups, 1):
        return 0  # depthwise
    rows = np.moveaxis(codes.astype(np.int64), axis, 0).reshape(codes.shape[axis], -1)
    rows = np.pad(rows, ((0, 0), (1, 1)))  # a single product is no pair, and zeros are of either sign
    rows.sort(axis=1)
    return int(max((rows[:, -1] + rows[:, -2]).max(initial=0), -(rows[:, 0] + rows[:, 1]).min(initial=0)))


def _largest_magnitude(graph: FileGraph, name: str) -> int:
    """A bound of codes that are unpacked when the file is loaded."""
    codes, maker = graph.constant(name), graph.makers.get(name)
    if codes is not None:
        return int(np.abs(codes.astype(np.int64)).max(initial=0))
    if maker is not None and maker.op_type in _HANDED_ON:
        return _largest_magnitude(graph, maker.input[0])
    return 128
