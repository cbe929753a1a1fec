"""What a layer computes from: the quantizers in it and before it, as a digest."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from torch import fx

from halfstep.graph.placement import Placement


def lineages(graph: fx.Graph, placement: Placement) -> Mapping[str, str]:
    """A digest for every layer of what is quantized in it and on the way to it, and in which formats.

    Two placements on one graph give a layer the same digest if what it reads is made in the same way in both: its own
    weight and inputs, and those of all that they are computed from. What comes behind it makes no difference.

    Args:
        graph: the float graph.
        placement: on it.

    Returns:
        16 hexadecimal digits by the layer's name, for layers in float too.
    """
    seen: dict[tuple[fx.Node, fx.Node], str] = {}
    for site in placement.sites:
        kind = f"{site.format!r} {site.granularity!r} {site.dynamic}"
        for position in site.positions:
            seen.update({(position.value, reader): kind for reader in position.readers})
    digests: dict[fx.Node, str] = {}
    for node in graph.nodes:
        read = [(digests[value], seen.get((value, node), "")) for value in node.all_input_nodes]
        digests[node] = hashlib.blake2b(repr((node.name, read)).encode(), digest_size=8).hexdigest()
    return {layer.name: digests[layer.operator.node] for layer in placement.layers}
