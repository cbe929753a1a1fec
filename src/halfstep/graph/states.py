"""States: outputs that are given back as inputs, such as a recurrent network's or a decoder's cache."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from halfstep.errors import ArgumentError
from halfstep.graph.captured import Captured
from halfstep.identity import Identity

#: In a placeholder's ``meta``: the place, among the values that the graph returns, of the one that is given back here.
STATE = "state"

#: Inputs to outputs by name, ``{"h_in": "h_out"}``; or True, to find them by their names.
States = Mapping[str, str] | bool | None

#: How the name of an input becomes that of the output that is given back there: ends, then beginnings.
_ENDS = (("_in", "_out"), ("", "_out"), ("", "_next"), ("", "_new"))
_BEGINNINGS = (("past_", "present_"), ("prev_", "next_"), ("", "output_"), ("", "new_"), ("", "next_"))


def mark_states(captured: Captured, states: States) -> None:
    """Note in the graph which inputs are outputs of the call before; placement gives both one quantizer.

    Args:
        captured: its placeholders' meta and its content are changed.
        states: outputs by input, as the file calls both; True finds the pairs whose names differ as ``h_in`` and
            ``h_out``, ``past_k`` and ``present_k``, or ``h`` and ``output_h`` (a key ``"h"`` of both) do.

    Raises:
        ArgumentError: naming the input or output that is not there, or a pair of two shapes or of integers.
    """
    if not states:
        return
    inputs = {str(node.target): node for node in captured.graph.nodes if node.op == "placeholder"}
    names = captured.out_spec.names(inputs)
    (end,) = (node for node in captured.graph.nodes if node.op == "output")
    outputs = dict(zip(names, end.args[0], strict=True))
    pairs = _by_name(inputs, outputs) if isinstance(states, bool) else dict(states)
    if not pairs:
        raise ArgumentError(
            f"states: no output of {', '.join(map(repr, outputs))} is called after an input of "
            f"{', '.join(map(repr, inputs))}; name them: states={{'h_in': 'h_out'}}"
        )
    for name, other in pairs.items():
        if name not in inputs:
            raise ArgumentError(f"states: got input {name!r}, needed one of {', '.join(map(repr, inputs))}")
        if other not in outputs:
            raise ArgumentError(
                f"states, input {name!r}: got output {other!r}, needed one of {', '.join(map(repr, outputs))}"
            )
        shapes = [_shape(captured, node) for node in (inputs[name], outputs[other])]
        if shapes[0] != shapes[1]:
            raise ArgumentError(
                f"states: input {name!r} is {shapes[0]} and output {other!r} is {shapes[1]}, needed one shape of floats"
            )
        inputs[name].meta[STATE] = names.index(other)
    captured.content = Identity(captured.content, "states", sorted(pairs.items())).digest


def states_in(graph: fx.Graph) -> list[tuple[fx.Node, fx.Node]]:
    """The states of a graph: the input, and the value that is given back there."""
    (end,) = (node for node in graph.nodes if node.op == "output")
    returned = end.args[0]
    assert isinstance(returned, (tuple, list))
    return [
        (node, value)
        for node in graph.nodes
        if node.op == "placeholder" and STATE in node.meta
        if isinstance(value := returned[node.meta[STATE]], fx.Node) and value is not node
    ]


def _by_name(inputs: Mapping[str, fx.Node], outputs: Mapping[str, fx.Node]) -> dict[str, str]:
    found: dict[str, str] = {}
    for name in inputs:
        renamed = [name.removesuffix(a) + b for a, b in _ENDS if name.endswith(a)]
        renamed += [b + name.removeprefix(a) for a, b in _BEGINNINGS if name.startswith(a)]
        if (other := next((each for each in renamed if each in outputs), None)) is not None:
            found[name] = other
    return found


def _shape(captured: Captured, node: fx.Node) -> str:
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return "no tensor"
    return f"{captured.axes.shape(value.shape)} of {value.dtype}"
