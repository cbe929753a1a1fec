"""Groups of layers that cost the same time: those with the same surroundings, as in a block that a network repeats.

A file is timed to learn what a group costs in float: its own kernels, and the conversions at its borders. Both follow
from the operators around it, their shapes, and where codes are read there.

Source of the labels: Weisfeiler and Leman, The reduction of a graph to canonical form (1968).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from halfstep.model import QuantizedModel
from halfstep.precision import Group

#: How many operators far the surroundings reach: over an activation and a sum to the layer behind, say.
REACH = 3


def labels_of(model: QuantizedModel, groups: Sequence[Group]) -> list[str]:
    """A label for each group; groups that have the same one cost the same time.

    Args:
        model: as it stands; layers in float are other surroundings than quantized ones.
        groups: of its layers.
    """
    reads = {
        (position.value, reader): f"{site.format} {site.granularity} {site.dynamic}"
        for site in model.placement.sites
        for position in site.positions
        for reader in position.readers
    }
    nodes = list(model.graph.nodes)
    labels = {node: _own(node) for node in nodes}
    for _ in range(REACH):
        labels = {
            node: _digest(
                labels[node],
                [(labels[value], reads.get((value, node))) for value in node.all_input_nodes],
                # Who else reads a parameter costs it nothing.
                sorted((labels[user], str(reads.get((node, user)))) for user in node.users)
                if node.op != "get_attr"
                else [],
            )
            for node in nodes
        }
    operators = {layer.name: layer.operator.node for layer in model.layers}
    return [_digest([labels[operators[name]] for name in group.layers]) for group in groups]


def _own(node: fx.Node) -> str:
    """What a node does by itself, and the sizes of what it makes."""
    made = [tuple(map(str, x.shape)) if isinstance(x, torch.Tensor) else str(x) for x in _values(node)]
    given = [str(x) for x in pytree.tree_leaves((node.args, node.kwargs)) if not isinstance(x, fx.Node)]
    return _digest(node.op, str(node.target) if node.op == "call_function" else "", made, given)


def _values(node: fx.Node) -> list[Any]:
    return pytree.tree_leaves(node.meta.get("val"))


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
