"""Runtimes that are not at hand: files for them are executed as they are written, and judged by their rules.

Rules that a runtime has for files, for runtimes that are not here to judge them themselves.

ONNX Runtime runs every operator in float between its quantizers, which is what QuantizeLinear and DequantizeLinear
mean; its own fusions, which serve its own kernels, are off.

What TensorRT asks of a quantized file.

Source: NVIDIA TensorRT documentation, "Working with Quantized Types" (explicit quantization, ONNX support and the
recommendations on where to put Q/DQ), and the documentation of IQuantizeLayer and IDequantizeLayer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from halfstep.runtime.file_graph import FileGraph, load
from halfstep.runtime.onnxruntime import OnnxRuntimeSession
from halfstep.runtime.runtime import Kernels, Runtime

if TYPE_CHECKING:
    import onnx


@dataclass(frozen=True)
class Rule:
    """One thing that a runtime asks of a file.

    Attributes:
        name: of the rule.
        refused: a file that breaks it cannot be loaded (True), or runs slower than it could (False).
        reason: why the runtime asks it.
        cure: what to do.
        breaches: the names of the places that break it.
    """

    name: str
    refused: bool
    reason: str
    cure: str
    breaches: Callable[[FileGraph], Iterator[str]]


@dataclass(frozen=True)
class Finding:
    """A rule that a file breaks, and where."""

    rule: Rule
    places: tuple[str, ...]

    def __str__(self) -> str:
        shown = ", ".join(self.places[:3]) + (" ..." if len(self.places) > 3 else "")
        verdict = "refused" if self.rule.refused else "slower"
        places = f"{len(self.places)} place{'s' if len(self.places) > 1 else ''}"
        return f"{verdict}, {self.rule.name}, {places} ({shown}): {self.rule.reason}; {self.rule.cure}"


def lint(path: str | Path, rules: Iterable[Rule]) -> tuple[Finding, ...]:
    """Hold a file to rules; one finding for every rule that it breaks.

    Raises:
        ExportError: if it is no ONNX file, or tensors beside it are missing.
    """
    graphs = list(FileGraph.read(path).every())
    found = (
        (rule, dict.fromkeys(place for graph in graphs for place in rule.breaches(graph))) for rule in rules
    )
    return tuple(Finding(rule, tuple(places)) for rule, places in found if places)


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

_CODES = frozenset({"int8", "int4", "float8e4m3fn", "float4e2m1"})


_BLOCKS = frozenset({64, 128})


def _zero_points(graph: FileGraph) -> Iterator[str]:
    for node in graph.quantizers:
        zero = graph.constant(node.input[2]) if len(node.input) > 2 else None
        if zero is not None and np.any(zero.astype(np.float32) != 0):
            yield node.input[0]


def _code_types(graph: FileGraph) -> Iterator[str]:
    for node in graph.quantizers:
        if node.output[0] not in graph.biases and graph.code_type(node) not in _CODES:
            yield f"{node.input[0]}: {graph.code_type(node)}"


def _biases(graph: FileGraph) -> Iterator[str]:
    for node in graph.quantizers:
        if node.output[0] in graph.biases:
            yield node.input[0]


def _scales(graph: FileGraph) -> Iterator[str]:
    for node in graph.quantizers:
        scale = graph.constant(node.input[1])
        if scale is None or not (np.isfinite(scale).all() and (scale > 0).all()):
            yield node.input[1]


def _activations(graph: FileGraph) -> Iterator[str]:
    for node in graph.quantizers:
        scale = graph.constant(node.input[1])
        if graph.weight(node) is None and scale is not None and scale.size > 1:
            yield node.input[0]


def _axes(graph: FileGraph) -> Iterator[str]:
    for node in graph.quantizers:
        scale, weight = graph.constant(node.input[1]), graph.weight(node)
        if weight is None or scale is None or scale.ndim != 1 or scale.size < 2:
            continue
        rank, axis = len(weight.dims), _attribute(node, "axis", 1)
        if any(
            axis % rank != wanted for axis, wanted in _read_along(graph, node.output[0], axis % rank, rank)
        ):
            yield node.input[0]


def _read_along(graph: FileGraph, name: str, axis: int, rank: int) -> Iterator[tuple[int, int]]:
    """For every layer that reads a weight: the axis that its scales lie along, and that of its output channels."""
    for reader in graph.readers(name):
        if reader.op_type == "Transpose":
            given = next((list(a.ints) for a in reader.attribute if a.name == "perm"), [])
            order = given or list(reversed(range(rank)))
            yield from _read_along(graph, reader.output[0], order.index(axis), rank)
        for operand, value in enumerate(reader.input):
            wanted = _output_channels(reader, operand, rank)
            if value == name and wanted is not None:
                yield axis, wanted


def _output_channels(layer: onnx.NodeProto, operand: int, rank: int) -> int | None:
    """The axis of a layer's weight that its output channels lie along; None if it has none, or is no weight."""
    if layer.op_type == "MatMul" and rank > 1:
        return rank - 2 + operand
    if layer.op_type == "Gemm" and operand < 2:
        return operand ^ _attribute(layer, ("transA", "transB")[operand], 0)
    return {"Conv": 0, "ConvTranspose": 1}.get(layer.op_type) if operand == 1 else None


def _attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((a.i for a in node.attribute if a.name == name), default)


def _four_bits(graph: FileGraph) -> Iterator[str]:
    for node in graph.quantizers:
        if graph.code_type(node) != "int4":
            continue
        block = _attribute(node, "block_size", 0)
        if graph.weight(node) is None or block not in _BLOCKS:
            yield node.input[0]


def _operators(graph: FileGraph) -> Iterator[str]:
    for node in graph.nodes:
        foreign = node.domain not in ("", "ai.onnx")
        fused = node.op_type.startswith("QLinear") or node.op_type in (
            "ConvInteger",
            "MatMulInteger",
            "DynamicQuantizeLinear",
        )
        if foreign or fused:
            yield f"{node.name or node.output[0]}: {node.op_type}"


def _opset(graph: FileGraph) -> Iterator[str]:
    for node in graph.quantizers:
        scale = graph.constant(node.input[1])
        if scale is not None and scale.size > 1 and graph.opset < 13:
            yield f"{node.input[0]}: opset {graph.opset}"


def _branches(graph: FileGraph) -> Iterator[str]:
    for node in graph.nodes:
        if node.op_type != "Add":
            continue
        sources = [_quantized_source(graph, name) for name in node.input]
        makers = [graph.makers.get(name) if name is not None else None for name in sources]
        conv = any(
            maker is not None
            and maker.op_type in ("Conv", "ConvTranspose")
            and len(graph.readers(maker.output[0])) == 1
            for maker in makers
        )
        if conv and all(name is not None for name in sources):
            yield node.name or node.output[0]


def _quantized_source(graph: FileGraph, name: str) -> str | None:
    """The tensor that was quantized and dequantized into ``name``; None if it comes as it was computed."""
    for kind in ("DequantizeLinear", "QuantizeLinear"):
        maker = graph.makers.get(name)
        if maker is None or maker.op_type != kind:
            return None
        name = maker.input[0]
    return name


_SIGNED = "export with target='tensorrt', which quantizes symmetrically into signed codes"

RULES = (
    Rule(
        "zero points",
        True,
        "TensorRT quantizes symmetrically and takes no zero point but 0",
        _SIGNED,
        _zero_points,
    ),
    Rule(
        "code types",
        True,
        "TensorRT stores codes as int8, int4, fp8 or fp4; it has no unsigned, 16-bit or 32-bit ones",
        _SIGNED,
        _code_types,
    ),
    Rule(
        "biases",
        True,
        "TensorRT dequantizes no int32, and adds biases in float",
        "store the bias as float32, without a DequantizeLinear",
        _biases,
    ),
    Rule(
        "scales",
        True,
        "TensorRT builds scales into its engine, so they must be stored in the file, finite and above 0",
        "write them as initializers",
        _scales,
    ),
    Rule(
        "activations per tensor",
        True,
        "TensorRT has one scale for an activation; only weights may have one a channel",
        "calibrate activations per tensor",
        _activations,
    ),
    Rule(
        "axis of weights",
        True,
        "TensorRT takes a scale for each output channel only: axis 0 of a conv's weight, axis 1 of a transposed "
        "conv's, that of a matrix which no sum runs along",
        "quantize the weight along that axis",
        _axes,
    ),
    Rule(
        "four bits",
        True,
        "TensorRT takes int4 for weights only, with a scale for each block of 64 or 128 along the input axis",
        "use Recipe.weight_only(4, group=128), or 8 bits",
        _four_bits,
    ),
    Rule(
        "operators",
        True,
        "TensorRT reads QuantizeLinear and DequantizeLinear, not another runtime's fused or dynamic integer operators",
        "export with target='tensorrt', not a file that was optimised for another runtime",
        _operators,
    ),
    Rule("opset", True, "scales per channel came with opset 13", "export with opset 13 or later", _opset),
    Rule(
        "residual adds",
        False,
        "a conv takes the add after it in only if its own result reaches the add unquantized",
        "quantize the other branch (the skip) only",
        _branches,
    ),
)
