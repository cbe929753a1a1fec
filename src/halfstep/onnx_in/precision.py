"""Files in half precision: read, and written, in float32, in which ranges are taken and integer kernels answer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import torch

from halfstep.errors import CaptureError
from halfstep.graph.capture import relative_error
from halfstep.onnx_in.gate import run_message
from halfstep.onnx_in.reader import OnnxGraph, tensors, understood
from halfstep.onnx_in.table import DTYPES
from halfstep.runtime.file_graph import LARGEST_MESSAGE

#: ONNX's numbers of the types that give way to float32.
HALF = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
#: Attributes that name the type of what a node makes.
_TYPES = frozenset({"to", "dtype", "output_dtype", "output_datatype"})


def in_full_precision(source: OnnxGraph) -> OnnxGraph:
    """The same network in float32; the very one where it already is.

    Tensors, declared types and casts change their type; no node is added, taken away or renamed.

    Raises:
        CaptureError: if it would not fit into a message.
    """
    types = {DTYPES[kind] for kind in _found(source.given)}
    if not types:
        return source
    message = onnx.ModelProto()
    message.CopyFrom(source.given)
    stored = list(tensors(message))
    size = sum(int(np.prod(tensor.dims)) * 4 for tensor in stored if tensor.data_type in HALF)
    if size > LARGEST_MESSAGE:
        raise CaptureError(
            f"{source.path}: holds {size / 4e9:.1f} billion values in half precision, which are more than 2 GB in "
            "float32, in which they are computed: save the file in float32 with tensors beside it"
        )
    for tensor in stored:
        if tensor.data_type in HALF:
            array = onnx.numpy_helper.to_array(tensor, str(source.path.parent)).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    for declared in _declared(message):
        _widen(declared)
    for node in _every_node(message):
        for attribute in node.attribute:
            if attribute.name in _TYPES and attribute.i in HALF:
                attribute.i = onnx.TensorProto.FLOAT
    return replace(understood(message, source.path, source.notes), types=tuple(sorted(types, key=str)))


def said(source: OnnxGraph, half: OnnxGraph, inputs: Mapping[str, torch.Tensor]) -> OnnxGraph:
    """The network in float32 with a note on how far that takes its outputs from those of the file."""
    kinds = " and ".join(map(str, source.types))
    note = f"The file is in {kinds}; it is read, and written, in torch.float32, which the new file takes and returns"
    try:
        declared = {value.name: DTYPES.get(value.dtype) for value in half.inputs}
        given = {name: x.to(declared[name]) for name, x in inputs.items()}
        before = run_message(half.given, half.path, given)
        after = run_message(source.given, source.path, inputs)
    except Exception:
        # The runtime lacks half precision for some operators, which says nothing of the network.
        return replace(source, notes=(*source.notes, f"{note}; onnxruntime cannot run it in {kinds}"))
    away = [
        relative_error(torch.from_numpy(after[name]), torch.from_numpy(before[name].astype(np.float32)))
        for name in after
        if after[name].dtype == np.float32
    ]
    figure = (
        f"; its outputs on the example are {max(away):.1e} (relative) from those of the file" if away else ""
    )
    return replace(source, notes=(*source.notes, note + figure))


def _found(message: onnx.ModelProto) -> set[int]:
    """The half precisions that a message has tensors or inputs of."""
    kinds = {tensor.data_type for tensor in tensors(message)}
    kinds |= {value.type.tensor_type.elem_type for value in message.graph.input}
    return kinds & set(HALF)


def _declared(message: onnx.ModelProto) -> Iterator[onnx.TypeProto]:
    for graph in _graphs(message):
        for value in (*graph.input, *graph.output, *graph.value_info):
            yield value.type
    for function in message.functions:
        yield from (value.type for value in function.value_info)


def _widen(kind: onnx.TypeProto) -> None:
    if kind.HasField("tensor_type") and kind.tensor_type.elem_type in HALF:
        kind.tensor_type.elem_type = onnx.TensorProto.FLOAT
    elif kind.HasField("sequence_type"):
        _widen(kind.sequence_type.elem_type)
    elif kind.HasField("optional_type"):
        _widen(kind.optional_type.elem_type)


def _every_node(message: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for graph in _graphs(message):
        yield from graph.node
    for function in message.functions:
        yield from function.node


def _graphs(message: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    """The graph of a message, and those in its nodes."""
    todo = [message.graph, *(body for function in message.functions for body in _bodies(function.node))]
    while todo:
        graph = todo.pop()
        yield graph
        todo += _bodies(graph.node)


def _bodies(nodes: Any) -> list[onnx.GraphProto]:
    return [
        body
        for node in nodes
        for attribute in node.attribute
        for body in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]
    ]
