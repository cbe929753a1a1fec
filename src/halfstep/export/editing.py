"""The few edits of an ONNX graph that every pass is made of."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

#: ONNX Runtime's own operators.
MICROSOFT = "com.microsoft"

#: Bytes from which equal tensors are stored once.
WORTH_SHARING = 256


def add(
    graph: ir.Graph,
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    name: str,
    shape: Sequence[int] | ir.Shape | None = None,
    dtype: ir.DataType | None = None,
    domain: str = "",
    **attributes: int | float | str | Sequence[int],
) -> ir.Value:
    """The result of a new node, put in front of ``before``; both carry the name."""
    node = ir.node(op_type, inputs, attributes, domain=domain, name=name)
    result = node.outputs[0]
    result.name, result.shape = name, None if shape is None else ir.Shape(shape)
    if dtype is not None:
        result.dtype = dtype
    graph.insert_before(before, node)
    return result


def existing(graph: ir.Graph, name: str) -> ir.Value | None:
    """The result called ``name`` of a node that is there already."""
    return next((value for node in graph for value in node.outputs if value.name == name), None)


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The value of an initializer, else None."""
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """The initializer called ``name``, made when first asked for.

    It gets another name where a parameter of the user's is called so.
    """
    while (found := constant(graph.initializers.get(name))) is not None and not _equal(found, array):
        name = f"{name}:2"
    if name not in graph.initializers:
        tensor = ir.tensor(np.array(array, order="C"), name=name)
        graph.register_initializer(
            ir.Value(
                name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
            )
        )
    return graph.initializers[name]


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def unique_names(graph: ir.Graph) -> None:
    """Give every tensor a name of its own; inputs and outputs, which users ask for, keep theirs."""
    kept = (*graph.inputs, *graph.outputs)
    taken, known = {value.name for value in kept}, {id(value) for value in kept}
    for value in [*graph.initializers.values(), *(value for node in graph for value in node.outputs)]:
        if id(value) in known:
            continue
        name, count = value.name, 1
        while name in taken or (count > 1 and name in graph.initializers):
            count += 1
            name = f"{value.name}:{count}"
        if count > 1:
            value.name = name
        taken.add(name)


def replace(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Let every reader of ``old``, the graph's outputs included, read ``new``."""
    if old in graph.outputs:  # the output keeps its name
        name, old.name = old.name, f"{old.name}_float"
        new.name = name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that makes ``value``, if it is of that type."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def scale_of(value: ir.Value | None) -> np.ndarray | None:
    """The scale of the DequantizeLinear that makes ``value``; None if none does."""
    node = producer(value, "DequantizeLinear")
    return None if node is None else constant(node.inputs[1])


def is_constant(value: ir.Value | None) -> bool:
    """Whether ``value`` depends on initializers only, so that a runtime can compute it at load."""
    if value is None or value.is_initializer():
        return True
    node = value.producer()
    return node is not None and all(map(is_constant, node.inputs))


def drop_unused(graph: ir.Graph) -> None:
    """Remove initializers that nothing reads any more (float weights, above all)."""
    outputs = {id(value) for value in graph.outputs}
    for node in reversed(list(graph)):
        if all(not value.uses() and id(value) not in outputs for value in node.outputs):
            graph.remove(node, safe=True)
    for name, value in list(graph.initializers.items()):
        if not value.uses() and id(value) not in outputs:
            del graph.initializers[name]


def share_equal(graph: ir.Graph) -> None:
    """Store tensors of equal content once, under the first one's name.

    Small ones are left alone: a scale that happens to equal another keeps its site's name.
    """
    seen: dict[tuple[object, ...], ir.Value] = {}
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is None or tensor.nbytes < WORTH_SHARING:
            continue
        key = (tensor.dtype, tuple(tensor.shape), hashlib.sha256(tensor.tobytes()).digest())
        first = seen.setdefault(key, value)
        if first is not value:
            ir.convenience.replace_all_uses_with(value, first)
            del graph.initializers[name]
