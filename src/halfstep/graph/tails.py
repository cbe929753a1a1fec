"""Tails: what a network does behind its last layers of weight, such as decoding boxes, which stays in float.

What eight bits lose there no layer behind makes up for, and there is no time to be won: a tail has few operators.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

from torch import fx

from halfstep.errors import ArgumentError
from halfstep.graph.captured import Captured
from halfstep.graph.operators import Operator, describe, readable_names
from halfstep.identity import Identity

#: In a node's ``meta``: why it stays in float, whatever the recipe says.
TAIL = "tail"

#: Kinds that hand the values of one tensor on in another order or shape.
_MOVES = frozenset({"reshape", "transpose", "slice", "expand", "split", "item"})


def mark_tails(captured: Captured, float_from: str | Sequence[str] | None = None) -> None:
    """Note in the graph which operators stay in float: those behind what the user names, and those of a rule.

    The rule is the expectation of a softmax, ``softmax(x) @ values`` with constants (a distribution focal loss's boxes
    and soft argmax): the layer that computes it and what is computed from that up to the next layers. Operators that
    pick, sort or sample (top-k, NMS, grid sampling) are in no target's table and are float by that; what leads from
    them to the next layer is, too.

    Args:
        captured: a folded graph; its nodes' meta and its content are changed.
        float_from: names of modules, or of single operators (as in ``print(q)`` and reports). Their operators stay in
            float with everything that is computed from them, layers too.

    Raises:
        ArgumentError: if nothing in the graph is called so, with the nearest names.
    """
    names = (float_from,) if isinstance(float_from, str) else tuple(float_from or ())
    for node in captured.graph.nodes:
        if (op := describe(node)) is not None and _is_expectation(op):
            _mark([node], "computes the expectation of a softmax, as boxes are decoded: left in float", True)
    for name in names:
        _mark(_called(captured.graph, name), f"is behind {name!r}, from where on all is left in float", False)
    if names:
        captured.content = Identity(captured.content, "float from", names).digest


def _mark(first: Iterable[fx.Node], reason: str, to_layers: bool) -> None:
    """Mark nodes and what is computed from them, layers excluded if ``to_layers``."""
    waiting = list(first)
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        node.meta[TAIL] = reason
        for user in node.users:
            op = describe(user)
            if user not in seen and not (to_layers and op is not None and op.weight is not None):
                seen.add(user)
                waiting.append(user)


def _is_expectation(op: Operator) -> bool:
    """Whether a layer sums the results of a softmax times constants to one number each."""
    if op.kind not in ("conv", "linear", "matmul") or op.weight is None or len(op.inputs) != 1:
        return False
    shape = op.weight.meta["val"].shape
    sums = 1 if len(shape) == 1 else shape[-1] if op.kind == "matmul" else shape[0]
    made = describe(op.inputs[0])
    while made is not None and made.kind in _MOVES and len(made.inputs) == 1:
        made = describe(made.inputs[0])
    return bool(sums == 1) and made is not None and made.kind == "softmax"


def _called(graph: fx.Graph, name: str) -> list[fx.Node]:
    """The operators of the module called ``name``, or the one operator that is."""
    paths = {node: _path(node) for node in graph.nodes if node.op == "call_function"}
    found = [node for node, path in paths.items() if path == name or path.startswith(f"{name}.")]
    if found:
        return found
    operators = {called: node for node, called in readable_names(graph).items() if node.op == "call_function"}
    if name in operators:
        return [operators[name]]
    parts = {".".join(p.split(".")[:n]) for p in paths.values() for n in range(1, p.count(".") + 2)} - {""}
    near = (
        difflib.get_close_matches(name, sorted(parts | set(operators)), n=3, cutoff=0.3) or sorted(parts)[:3]
    )
    raise ArgumentError(
        f"float_from: got {name!r}, needed a module or an operator of the network; the nearest names are "
        f"{', '.join(map(repr, near))}"
    )


def _path(node: fx.Node) -> str:
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return str(stack[-1][0]).split("@")[0] if stack else ""
