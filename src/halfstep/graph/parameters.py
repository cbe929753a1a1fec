"""Reading and replacing the parameters that a graph's ``get_attr`` nodes name."""

from __future__ import annotations

import torch
from torch import fx, nn

from halfstep.graph.capture import Captured


def parameter(module: nn.Module, node: fx.Node) -> torch.Tensor:
    """The tensor that a ``get_attr`` node reads, detached."""
    owner, _, name = str(node.target).rpartition(".")
    tensor = getattr(module.get_submodule(owner), name)
    assert isinstance(tensor, torch.Tensor)
    return tensor.detach()


def trainable(module: nn.Module, node: fx.Node) -> bool:
    """Whether the tensor that a ``get_attr`` node reads is a parameter that the user lets train."""
    owner, _, name = str(node.target).rpartition(".")
    return bool(getattr(module.get_submodule(owner), name).requires_grad)


def store(
    captured: Captured, wanted: str, value: torch.Tensor, old: fx.Node | None, requires_grad: bool = True
) -> fx.Node:
    """Store ``value`` under ``wanted`` and return a new ``get_attr`` node for it, at the graph's insertion point.

    Where ``wanted`` is read by any node but ``old`` with its one user, a number is appended instead: what another
    layer reads is never overwritten.
    """
    graph, module = captured.graph, captured.module
    readers: list[fx.Node] = [n for n in graph.nodes if n.op == "get_attr" and n.target == wanted]
    taken = any(node is not old or len(node.users) > 1 for node in readers)
    name, count = wanted, 1
    while taken or (name != wanted and _exists(module, name)):
        taken, count = False, count + 1
        name = f"{wanted}_{count}"
    owner_name, _, leaf = name.rpartition(".")
    owner = module.get_submodule(owner_name)
    for table in (owner._parameters, owner._buffers):
        table.pop(leaf, None)
    if hasattr(owner, leaf):  # a plain attribute, such as ``bias = None``
        delattr(owner, leaf)
    owner.register_parameter(leaf, nn.Parameter(value.contiguous(), requires_grad=requires_grad))
    node = graph.get_attr(name)
    node.meta["val"] = value
    return node


def _exists(module: nn.Module, name: str) -> bool:
    owner, _, leaf = name.rpartition(".")
    return hasattr(module.get_submodule(owner), leaf)
