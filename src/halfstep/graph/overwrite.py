"""ReLUs that overwrite what they read: no second tensor is written for a value that nobody else sees."""

from __future__ import annotations

import torch
from torch import fx

from halfstep.graph.operators import describe

aten = torch.ops.aten

#: Kinds that make a tensor of their own and whose gradients do not need it.
MAKERS = frozenset({"conv", "conv_transpose", "linear", "add"})


def overwrite(graph: fx.Graph) -> fx.Graph:
    """Let every ReLU work in place that alone reads the result of one of :data:`MAKERS`.

    The graph is changed in place and returned. It computes the same, forwards and backwards.
    """
    for node in graph.nodes:
        if node.target is aten.relu.default and _made_for(node, node.args[0]):
            node.target = aten.relu_.default
    return graph


def _made_for(reader: fx.Node, value: fx.Node) -> bool:
    op = describe(value)
    return op is not None and op.kind in MAKERS and set(value.users) == {reader}
