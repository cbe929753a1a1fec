"""Networks one level below a root of our own, where none of their names can be one of torch's.

``fx.GraphModule`` keeps ``graph``, ``code``, ``recompile`` ... beside a network's own parameters and layers, which may
be called so too. What torch is handed therefore has one child, the network; what we keep has its names as they are.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

CHILD = "model"
PREFIX = f"{CHILD}."


class Rooted(nn.Module):
    """A module whose one child is ``model``, with the signature of ``model``."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.add_module(CHILD, model)

        @functools.wraps(model.forward)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return model(*args, **kwargs)

        self.forward = forward


def unrooted(module: fx.GraphModule) -> tuple[fx.Graph, nn.Module, dict[int, Any]]:
    """What was traced from a :class:`Rooted`, with names of tensors and module paths that are the network's own.

    Returns:
        The graph, which returns only what it computes; the tensors that it reads, in plain modules; and what the
        network returns beside, by its place among the outputs.
    """
    graph, root = fx.Graph(), nn.Module()
    fixed: dict[int, Any] = {}
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op == "output":
            fixed = {place: x for place, x in enumerate(node.args[0]) if not isinstance(x, fx.Node)}
            graph.output(tuple(copies[x] for x in node.args[0] if isinstance(x, fx.Node)))
        elif node.op == "get_attr":
            target = str(node.target)
            name = target.removeprefix(PREFIX)  # constants of the code lie beside the network
            _place(root, name, functools.reduce(getattr, target.split("."), module))
            copies[node] = graph.get_attr(name)
            copies[node].meta = dict(node.meta)
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            stack = copies[node].meta.get("nn_module_stack")
            if stack is not None:
                copies[node].meta["nn_module_stack"] = _own_stack(stack)
    return graph, root, fixed


def _own_stack(stack: dict[str, tuple[str, Any]]) -> dict[str, tuple[str, Any]]:
    """Without the root, and with paths from the network on."""
    return {key: (path[len(PREFIX) :], owner) for key, (path, owner) in stack.items() if path}


def rooted(graph: fx.Graph, module: nn.Module) -> fx.GraphModule:
    """What torch can be handed: ``graph`` over the tensors of ``module``, all below a root.

    Args:
        graph: reads tensors of ``module`` by their names; changed so that it reads them below the root.
        module: left as it is.
    """
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            node.target = PREFIX + str(node.target)
        elif node.op == "placeholder":
            node.target = (
                node.name
            )  # names that mean something else to the code that fx writes are numbered there
    root = nn.Module()
    root.add_module(CHILD, module)
    return fx.GraphModule(root, graph)


def _place(root: nn.Module, name: str, value: torch.Tensor | nn.Module) -> None:
    """Keep a tensor (or the body of a branch) under its dotted name, in modules made for it; any name will do."""
    *path, leaf = name.split(".")
    for part in path:
        root = root._modules.setdefault(part, nn.Module())  # type: ignore[assignment]
    put(root, leaf, value)


def put(owner: nn.Module, leaf: str, value: torch.Tensor | nn.Module) -> None:
    """Keep a tensor or a module in ``owner`` under a name, which torch's own attributes may have too."""
    if isinstance(value, nn.Module):
        owner._modules[leaf] = value
    elif isinstance(value, nn.Parameter):
        owner._parameters[leaf] = value
    else:
        owner._buffers[leaf] = value


def bind(graph: fx.Graph, module: nn.Module) -> Callable[..., Any]:
    """``graph`` as a function of the values of its placeholders, in order, over the tensors of ``module``."""
    targets = {node: node.target for node in graph.nodes if node.op == "placeholder"}
    try:
        for (
            node
        ) in targets:  # an argument may be called ``torch`` or ``getattr``, which the code needs itself
            node.target = node.name
        code = graph.python_code("self")
    finally:
        for node, target in targets.items():
            node.target = target
    namespace = dict(code.globals)
    exec(compile(code.src, "<halfstep graph>", "exec"), namespace)
    return types.MethodType(namespace["forward"], module)
