"""The first and the last of a network's layers."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx


def ends(graph: fx.Graph, layers: Collection[fx.Node]) -> set[fx.Node]:
    """The layers that no other layer stands before, and those that none stands behind.

    A network with several inputs or heads has several of them.

    Args:
        graph: topologically ordered, as fx graphs are.
        layers: its weighted operators.
    """
    behind: set[fx.Node] = set()  # nodes that some layer stands before
    for node in graph.nodes:
        if any(source in behind or source in layers for source in node.all_input_nodes):
            behind.add(node)
    before: set[fx.Node] = set()  # nodes that some layer stands behind
    for node in reversed(graph.nodes):
        if any(user in before or user in layers for user in node.users):
            before.add(node)
    return {node for node in layers if node not in behind or node not in before}
