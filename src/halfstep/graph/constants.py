"""Weights that the model computes from its parameters, and operators that it computes twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn

from halfstep.graph.capture import Captured
from halfstep.graph.operators import WEIGHTED, describe
from halfstep.graph.parameters import parameter, store


def fold_weights(captured: Captured) -> None:
    """A weight or bias that is computed from parameters alone (weight norm, say) becomes a parameter of its own.

    It is called after the layer that reads it: ``conv.weight`` for the conv at ``conv``.
    """
    for node in list(captured.graph.nodes):
        op = describe(node)
        if op is None or op.kind not in WEIGHTED:
            continue
        for index, leaf in ((WEIGHTED[op.kind], "weight"), (2, "bias")):
            source = node.args[index] if index < len(node.args) else None
            if not isinstance(source, fx.Node) or source.op != "call_function" or not _constant(source):
                continue
            stack = list(node.meta.get("nn_module_stack", {}).values())
            path = stack[-1][0].split("@")[0] if stack else ""
            with torch.no_grad(), captured.graph.inserting_before(node):
                value = _value(captured.module, source)
                assert isinstance(value, torch.Tensor)
                folded = store(captured, f"{path}.{leaf}" if path else leaf, value, None)
            node.args = (*node.args[:index], folded, *node.args[index + 1 :])


def _constant(node: fx.Node) -> bool:
    inputs = node.all_input_nodes
    return node.op == "get_attr" or (
        node.op == "call_function" and bool(inputs) and all(map(_constant, inputs))
    )


def _value(module: nn.Module, node: fx.Node) -> Any:
    if node.op == "get_attr":
        return parameter(module, node)
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda source: _value(module, source))
    operation: Any = node.target
    return operation(*args, **kwargs)


def merge_repeated(graph: fx.Graph) -> None:
    """An operator applied twice to the same values is computed once.

    Runtimes merge such operators by themselves, and then find two quantizers behind one result.
    """
    seen: dict[tuple[object, ...], fx.Node] = {}
    for node in list(graph.nodes):
        if node.op != "get_attr" and (node.op != "call_function" or describe(node) is None):
            continue
        key = (node.op, node.target, repr(node.args), repr(node.kwargs))  # a node's repr is its unique name
        if key in seen:
            node.replace_all_uses_with(seen[key])
            graph.erase_node(node)
        else:
            seen[key] = node
