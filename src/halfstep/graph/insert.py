"""Put one node on every edge that a placement names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from halfstep.graph.placement import Placement, Position, Site

#: Adds a node for a site, given the graph (with its insertion point set) and the value to quantize.
Maker = Callable[[fx.Graph, fx.Node, Site, Position], fx.Node]


@dataclass(frozen=True)
class Inserted:
    """A copy of a graph with quantizers in it, and where each node of the original went."""

    graph: fx.Graph
    copies: dict[fx.Node, fx.Node]


def insert(graph: fx.Graph, placement: Placement, make: Maker, tied: bool) -> Inserted:
    """Copy ``graph`` and let the readers of every position see ``make``'s node instead of the value.

    Args:
        graph: the float graph that ``placement`` speaks of; left as it is.
        placement: the sites.
        make: adds the node, for instance a call of a fake quantizer.
        tied: whether tied positions get a node too. They change nothing in a simulation, but an exported file
            needs them around operators that move codes.
    """
    result = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = result.graph_copy(graph, copies)
    result.output(output)
    end = next(iter(reversed(result.nodes)))
    for node in graph.nodes:
        if node.op == "output":
            copies[node] = end
    for site in placement.sites:
        for position in site.positions:
            if position.tied and not (tied or site.is_weight):
                continue
            value = copies[position.value]
            with result.inserting_after(value):
                quantized = make(result, value, site, position)
            for reader in position.readers:
                copies[reader].replace_input_with(value, quantized)
    result.lint()
    return Inserted(result, copies)
