"""Activations split into the parts that a runtime has integer kernels for."""

from __future__ import annotations

from collections.abc import Collection

import torch

from halfstep.graph.capture import Captured, unchanged
from halfstep.graph.operators import describe

aten = torch.ops.aten

#: Kinds that are their input times a gate of it, with the gate.
GATES = {"silu": aten.sigmoid.default, "hardswish": aten.hardsigmoid.default}


def decompose(captured: Captured, kinds: Collection[str]) -> Captured:
    """Write ``x * sigmoid(x)`` for SiLU and ``x * hardsigmoid(x)`` for HardSwish.

    The graph is changed in place and returned; its outputs stay equal up to float rounding.

    Args:
        captured: a captured, folded graph.
        kinds: which of :data:`GATES` to split; others are left alone.
    """
    graph = captured.graph
    found = [(node, op) for node in graph.nodes if (op := describe(node)) is not None]
    split = [(node, op) for node, op in found if op.kind in kinds and op.kind in GATES]
    if not split:
        return captured
    with unchanged(captured, "splitting activations"):
        for node, op in split:
            source = op.inputs[0]
            with graph.inserting_before(node):
                gate = graph.call_function(GATES[op.kind], (source,))
                product = graph.call_function(aten.mul.Tensor, (source, gate))
            # Two nodes of one module: each is named after its kind in it.
            stack = {key: (path, "halfstep.Gate") for key, (path, _) in node.meta["nn_module_stack"].items()}
            gate.meta = product.meta = {**node.meta, "nn_module_stack": stack}
            product.meta = dict(gate.meta)
            node.replace_all_uses_with(product)
            graph.erase_node(node)
        graph.lint()
    return captured
