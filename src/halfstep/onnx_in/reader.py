"""From an ONNX file to its nodes in order, with what is stored in it: checked, inlined, in operators of one kind."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes

from halfstep.errors import CaptureError
from halfstep.graph.tracing import plain
from halfstep.onnx_in.table import TABLE, Node

#: Versions of ONNX's own operators between which the table is the same. Older files are brought to the first of them.
OLDEST, NEWEST = 13, onnx.defs.onnx_opset_version()
#: What older files become: axes are inputs, statistics of training are gone.
CONVERTED = 21


#: Where an inlined node says which node of the file has called for it.
CALL = "halfstep.call"

#: What layers become in files that a quantizer has been through, beside all that begin with ``QLinear``.
_QUANTIZED = frozenset(
    ["QGemm", "QAttention", "ConvInteger", "MatMulInteger", "DynamicQuantizeMatMul", "MatMulIntegerToFloat"]
)


@dataclass(frozen=True)
class Tensor:
    """An input or output as the file declares it.

    Attributes:
        name: in the file.
        dtype: ONNX's number of its element type.
        shape: a number for each dimension, or the name of a dynamic one (None without a name); None if not said.
    """

    name: str
    dtype: int
    shape: tuple[int | str | None, ...] | None


@dataclass(frozen=True)
class OnnxGraph:
    """What a file says.

    Attributes:
        path: of the file.
        inputs: those that are no stored tensors.
        outputs: in order.
        nodes: in the order of execution.
        stored: tensors by name, read from the disk when they are asked for.
        opset: of ONNX's own operators in the file, before anything was converted.
        message: the file's, converted where it is older than the table; without the tensors beside it.
        given: the same before it was converted, which ONNX Runtime is asked about.
        notes: what is to be said of how it was taken, one sentence each.
        types: that it has in the file, where it is read in float32.
    """

    path: Path
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    nodes: tuple[Node, ...]
    stored: dict[str, ir.TensorProtocol]
    opset: int
    message: onnx.ModelProto
    given: onnx.ModelProto
    notes: tuple[str, ...] = ()
    types: tuple[torch.dtype, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> OnnxGraph:
        """Itself: nothing in it changes."""
        return self


def read(path: str | Path) -> OnnxGraph:
    """The graph of a file.

    Functions of the file are inlined. Files of a version before :data:`OLDEST` are brought to :data:`CONVERTED` by
    onnx's version converter.

    Raises:
        CaptureError: if there is no such file, it is damaged or breaks ONNX's rules, tensors beside it are missing or
            lie outside its folder, it is of a version that onnx does not know, for training, or computes in integers.
    """
    path = Path(path)
    model = load(path)
    version(model, path)
    _check_tensors(model, path)
    if model.training_info:
        raise CaptureError(f"{path}: holds a graph for training; export the network for inference")
    _check(model, path)
    _check_float(model, path)
    return understood(model, path)


def understood(given: onnx.ModelProto, path: Path, notes: tuple[str, ...] = ()) -> OnnxGraph:
    """What a message that was found sound says.

    Args:
        given: the file's.
        path: of the file, beside which tensors lie.
        notes: what was done to it.

    Raises:
        CaptureError: if it cannot be converted or has a cycle.
    """
    opset = version(given, path)
    model = given if opset >= OLDEST else convert(given, path, opset)
    try:
        graph = graph_of(model, path)
        nodes = tuple(_nodes(graph))
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise CaptureError(f"{path}: cannot be read: {_line(error)}") from error
    stored = {str(name): value.const_value for name, value in graph.graph.initializers.items()}
    return OnnxGraph(
        path,
        tuple(_declared(value) for value in graph.graph.inputs if not value.is_initializer()),
        tuple(_declared(value) for value in graph.graph.outputs),
        nodes,
        {name: value for name, value in stored.items() if value is not None},
        opset,
        model,
        given,
        notes,
    )


def graph_of(message: onnx.ModelProto, path: Path) -> ir.Model:
    """A graph of its own of a file's message, functions inlined, in the order of execution.

    Nodes that come from a function carry the number of its call, see :data:`CALL`.

    Raises:
        RuntimeError, ValueError, TypeError, KeyError: if it has a cycle, or cannot be read.
    """
    model = ir.from_proto(message)
    ir.external_data.set_base_dir(model.graph, path.parent)
    for index, node in enumerate(model.graph):
        if node.op_identifier() in model.functions:
            node.metadata_props[CALL] = str(index)
    passes.InlinePass()(model)
    passes.RemoveInitializersFromInputsPass()(model)
    passes.TopologicalSortPass()(model)  # raises for a cycle
    return model


def load(path: Path) -> onnx.ModelProto:
    """The file as a message, without the tensors that lie beside it.

    Raises:
        CaptureError: if it is none.
    """
    if not path.is_file():
        raise CaptureError(f"{path}: no such file; give the path of an ONNX file")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's own errors share no base
        raise CaptureError(
            f"{path}: is no ONNX file, or a damaged one ({_line(error)}); export or download it again"
        ) from error
    if not model.HasField("graph") or not (model.graph.node or model.graph.output):
        raise CaptureError(f"{path}: is no ONNX file, or a damaged one (it has no graph)")
    return model


def version(model: onnx.ModelProto, path: Path) -> int:
    """The version of ONNX's own operators that a file asks for.

    Raises:
        CaptureError: if onnx, as it is installed here, does not know it.
    """
    found = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    opset = max(found, default=1)
    if not 1 <= opset <= NEWEST:
        raise CaptureError(
            f"{path}: is of operator set {opset}, needed 1 to {NEWEST}, which the installed onnx {onnx.__version__} "
            "knows; export it with an older one, or install a newer onnx"
        )
    return opset


def _check_tensors(model: onnx.ModelProto, path: Path) -> None:
    """See that tensors have as many values as their shapes, and that those beside the file are there, in its folder."""
    folder = path.parent.resolve()
    for tensor in tensors(model):
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            try:
                onnx.numpy_helper.to_array(tensor)  # what the file holds is looked at, not copied
            except Exception as error:  # by the type of the values, each in another way
                raise CaptureError(
                    f"{path}: tensor {tensor.name!r} is damaged ({_line(error)}); export or download the file again"
                ) from error
            continue
        location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "")
        place = Path(os.path.normpath(folder / location))
        real = place.resolve()
        if not location or Path(location).is_absolute() or not real.is_relative_to(folder):
            raise CaptureError(
                f"{path}: tensor {tensor.name!r} is said to lie at {location!r}, outside the file's folder, which is "
                "not read; put it beside the file"
            )
        if not place.is_file():
            raise CaptureError(
                f"{path}: tensor {tensor.name!r} lies in {location!r} beside the file, which is not there; copy it "
                "along"
            )
        numbers = {e.key: int(e.value) for e in tensor.external_data if e.key in ("offset", "length")}
        if min(numbers.values(), default=0) < 0 or sum(numbers.values()) > real.stat().st_size:
            raise CaptureError(
                f"{path}: tensor {tensor.name!r} is said to end behind the end of {location!r}; copy that file again"
            )
        size = -(-math.prod(tensor.dims) * ir.DataType(tensor.data_type).bitwidth // 8)
        if numbers.get("length", size) != size:
            raise CaptureError(
                f"{path}: tensor {tensor.name!r} is damaged: {numbers['length']:,} bytes lie in {location!r}, its "
                f"shape needs {size:,}; export or download the file again"
            )


def tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """Every stored tensor of a file, in its nodes and their bodies too."""

    def of(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
        yield from graph.initializer
        yield from of_nodes(graph.node)

    def of_nodes(nodes: Any) -> Iterator[onnx.TensorProto]:
        for node in nodes:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors
                for body in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
                    yield from of(body)

    yield from of(model.graph)
    for function in model.functions:
        yield from of_nodes(function.node)


def _check(model: onnx.ModelProto, path: Path) -> None:
    """See that every tensor is made once, and every output at all; the rest the runtime says when it loads the file."""
    made: set[str] = set()
    declared = (*model.graph.input, *model.graph.output, *model.graph.initializer)
    for node in model.graph.node:
        words = (node.name, node.op_type, node.domain, *node.input, *node.output)
        if any(isinstance(word, bytes) for word in (*words, *(value.name for value in declared))):
            raise CaptureError(f"{path}: is damaged: a name in it is no text; export or download it again")
        for name in filter(None, node.output):
            if name in made:
                raise CaptureError(f"{path}: two nodes make a tensor called {name!r}, which must be one")
            made.add(name)
    known = {*made, *(v.name for v in model.graph.input), *(t.name for t in model.graph.initializer), ""}
    known |= {t.values.name for t in model.graph.sparse_initializer}
    for output in model.graph.output:
        if output.name not in known:
            raise CaptureError(f"{path}: its output {output.name!r} is made by no node")


def _check_float(model: onnx.ModelProto, path: Path) -> None:
    """See that no layer computes in integers, whose float weights are gone."""
    for node in model.graph.node:
        if node.op_type.startswith("QLinear") or node.op_type in _QUANTIZED:
            name = node.name or next(filter(None, node.output), "")
            raise CaptureError(
                f"{path}: is quantized already ({node.op_type} at node {name!r}); give the float file that it was made "
                "from"
            )


def convert(model: onnx.ModelProto, path: Path, opset: int) -> onnx.ModelProto:
    """The message of a file in version :data:`CONVERTED`, functions written out; what is noted in it stays.

    Raises:
        CaptureError: in the converter's words, if it has no way there.
    """
    if model.functions:  # which the converter drops
        model = ir.to_proto(graph_of(model, path))
    try:
        converted = onnx.version_converter.convert_version(model, CONVERTED)
    except (RuntimeError, onnx.version_converter.ConvertError) as error:
        raise CaptureError(
            f"{path}: cannot be brought from operator set {opset} to {CONVERTED}: {_line(error)}; export it "
            f"with operator set {OLDEST} or newer"
        ) from error
    nodes = {name: node for node in converted.graph.node for name in node.output if name}
    values = {value.name: value for value in (*converted.graph.input, *converted.graph.output)}
    pairs = [(model.graph, converted.graph)]
    pairs += [(v, values[v.name]) for v in (*model.graph.input, *model.graph.output) if v.name in values]
    pairs += [(n, nodes[n.output[0]]) for n in model.graph.node if n.output and n.output[0] in nodes]
    for before, after in pairs:  # the converter keeps no notes but the file's own
        if not after.metadata_props:
            after.metadata_props.extend(before.metadata_props)
    return converted


def _declared(value: ir.Value) -> Tensor:
    sizes = None
    if value.shape is not None:
        sizes = tuple(size if isinstance(size, int) else size.value for size in value.shape)
    return Tensor(str(value.name), 0 if value.dtype is None else int(value.dtype), sizes)


def _nodes(model: ir.Model) -> Iterator[Node]:
    stored = set(model.graph.initializers)
    taken: set[str] = set()
    given = {node.name for node in model.graph}
    for index, node in enumerate(model.graph):
        domain = "" if node.domain == "ai.onnx" else node.domain
        known = (domain, node.op_type) in TABLE
        read = [*node.inputs, *(() if known else _from_outside(node))]
        inputs = tuple("" if value is None else str(value.name) for value in read)
        name = (
            node.name or next((str(v.name) for v in node.outputs if v.name), "") or f"{node.op_type}_{index}"
        )
        name = first = plain(name)
        count = 1
        while name in taken or (not node.name and name in given):
            count += 1
            name = f"{first}:{count}"
        taken.add(name)
        wanted = {id(value) for value in model.graph.outputs}
        outputs = tuple(
            str(value.name) if value.name and (value.uses() or id(value) in wanted) else ""
            for value in node.outputs
        )
        yield Node(
            name,
            node.op_type,
            domain,
            model.opset_imports.get(domain, model.opset_imports.get("", 1) if not domain else 1),
            {key: _value(attribute) for key, attribute in node.attributes.items()},
            inputs,
            outputs,
            frozenset(i for i, value in enumerate(inputs) if value in stored),
            message=b"" if known else ir.to_proto(node).SerializeToString(),
        )


def _from_outside(node: ir.Node) -> Iterator[ir.Value]:
    """What the bodies of a node read of the graphs around them."""
    seen = set(map(id, node.inputs))

    def within(graph: ir.Graph, own: set[int]) -> Iterator[ir.Value]:
        own = own | {id(value) for value in (*graph.inputs, *graph.initializers.values())}
        own |= {id(value) for inner in graph for value in inner.outputs}
        read = [*(value for inner in graph for value in inner.inputs), *graph.outputs]
        for value in read:
            if value is not None and id(value) not in own | seen:
                seen.add(id(value))
                yield value
        for inner in graph:
            yield from (value for body in bodies(inner) for value in within(body, own))

    for body in bodies(node):
        yield from within(body, set())


def bodies(node: ir.Node) -> list[ir.Graph]:
    """The graphs in a node: the branches of an If, the body of a Loop."""
    found: list[ir.Graph] = []
    for attribute in node.attributes.values():
        if attribute.type is ir.AttributeType.GRAPH:
            found.append(attribute.value)
        elif attribute.type is ir.AttributeType.GRAPHS:
            found.extend(attribute.value)
    return found


def _value(attribute: ir.Attr) -> Any:
    """An attribute as Python has it; graphs as they are."""
    value = attribute.value
    if attribute.type is ir.AttributeType.TENSOR:
        return value.numpy()
    if isinstance(value, tuple):
        return list(value)
    return value


def array(tensor: ir.TensorProtocol) -> np.ndarray:
    """The values of a stored tensor; mapped into memory where they lie beside the file."""
    return np.asarray(tensor.numpy())


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else type(error).__name__
