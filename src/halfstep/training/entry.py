"""Another way into the network: the same layers and quantizers, reached as the model is trained, not as it answers."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, fx, nn

from halfstep.errors import CaptureError, TrainingError
from halfstep.graph.capture import capture, copied
from halfstep.graph.captured import Captured
from halfstep.graph.fold import decompose, fold, overwrite
from halfstep.graph.inputs import ModelInputs, call_arguments, move
from halfstep.graph.operators import Operator, describe, readable_names
from halfstep.graph.placement import Layer, Placement, Position, Site
from halfstep.graph.shapes import input_names
from halfstep.graph.tracing import bind
from halfstep.graph.unfold import tensors
from halfstep.identity import Identity
from halfstep.model import QuantizedModel, run

#: The name of a method of the user's model, or a function of the model and its inputs.
Forward = str | Callable[..., Any]


def entered(model: QuantizedModel, forward: Forward | None) -> Callable[[ModelInputs], Any]:
    """``model`` as a function of inputs that answers what ``forward`` does, through the sites as they are placed now.

    Parameters, ranges and modes are the model's own: what is trained this way is what it answers with.

    Args:
        model: on which ``forward`` is traced once, with the example inputs.
        forward: None for the way that the model answers.

    Raises:
        TrainingError: if there is no such method, or it cannot be traced, or it reads layers or parameters that the
            model does not answer with (named).
    """
    if forward is None:
        return lambda inputs: run(model, inputs)
    known = model.captured.entries
    if id(forward) not in known:
        known[id(forward)] = forward, _traced(model, forward)  # keeps what the id stands for
    entry = _Entry(model, known[id(forward)][1])
    call, out_spec = entry.bound(), entry.captured.out_spec
    return lambda inputs: out_spec.restore(call(*model.flatten(*call_arguments(inputs))))


def _traced(model: QuantizedModel, forward: Forward) -> Captured:
    """The other way through the user's module as a graph over tensors of its own, folded as the model's is."""
    source, words = model.captured.source, repr(forward) if isinstance(forward, str) else "the function"
    if source is None:
        raise TrainingError(
            "Training: forward needs the module that the model was made from; use hs.prepare(module, ...)"
        )
    twin = copied(source).eval()
    if isinstance(forward, str):
        method = getattr(twin, forward, None)
        if not callable(method):
            methods = [name for name in vars(type(twin)) if callable(getattr(twin, name)) and name[:1] != "_"]
            raise TrainingError(
                f"Training: forward is {forward!r}, needed a method of {type(twin).__name__} "
                f"({', '.join(map(repr, methods))}), or a function of the model and its inputs"
            )
        twin.forward = method
    else:
        twin.forward = types.MethodType(forward, twin)
    args, kwargs = model.captured.example_inputs
    try:
        names = input_names(twin, args, kwargs)
        dynamic = {name: given for name, given in zip(names, model.captured.given, strict=True) if given}
        captured = capture(twin, kwargs or args, dynamic or None)
    except CaptureError as error:
        raise TrainingError(f"Training: forward: {words}: {error}") from error
    return decompose(fold(captured), model.target.decomposed)


@dataclass(frozen=True)
class _Entry:
    """A traced way in beside the model's own.

    Nodes of both graphs correspond if they compute the same from the same; and so do a layer and the model's layer with
    its weight, whatever it reads, and what is computed from it.
    """

    model: QuantizedModel
    captured: Captured

    def bound(self) -> Callable[..., Any]:
        """The graph with the model's quantizers, as a function of the values of its placeholders."""
        shared = self._shared()
        self._check(shared)
        simulation = self.model.simulation(self.captured.graph, self._placement(shared))
        own: dict[str, Any] = {}
        for node in simulation.graph.nodes:
            if node.op == "get_attr" and str(node.target) not in shared:
                value = functools.reduce(getattr, str(node.target).split("."), self.captured.module)
                node.target = f"halfstep_own_{len(own)}"
                own[node.target] = move(value, self.model.device)
        root: Any = _Root(self.model.captured.module, own)
        return bind(overwrite(simulation.graph), root)

    # what is shared

    def _shared(self) -> set[str]:
        """The tensors that are the model's: parameters, and what the user's state dict has."""
        ours, users = tensors(self.model.captured.module), set(self.captured.names.values())
        found = tensors(self.captured.module).items()
        return {name for name, x in found if name in ours and (name in users or isinstance(x, nn.Parameter))}

    def _check(self, shared: set[str]) -> None:
        """Raise if a layer, or a parameter, is none of the model's."""
        found = tensors(self.captured.module)
        strange = {name for name, x in found.items() if isinstance(x, nn.Parameter)} - shared
        names = readable_names(self.captured.graph)
        for node in self.captured.graph.nodes:
            read = [str(source.target) for source in node.all_input_nodes if source.op == "get_attr"]
            if lost := sorted(strange.intersection(read)):
                raise TrainingError(
                    f"Training: forward: layer {names.get(node, node.name)!r} reads {lost[0]!r}, which the model does "
                    "not answer with: it is not in the quantized network, and would not be trained in it; leave it out "
                    "of what forward computes"
                )
        ours, theirs = (
            {norm.weight: (norm.shift, norm.mean) for norm in each.folded}
            for each in (self.model.captured, self.captured)
        )
        for name in sorted(shared):
            if ours.get(name) != theirs.get(name):
                raise TrainingError(
                    f"Training: forward: the batch norm behind the layer of {name!r} is folded into it on one way and "
                    "not on the other; let both ways read what stands behind the batch norm alone"
                )

    # what corresponds

    def _correspondence(self, shared: set[str]) -> dict[fx.Node, fx.Node]:
        """From nodes of this graph to nodes of the model's."""
        table: dict[str, int] = {}
        ours = _numbered(self.model.captured, shared, table)
        by_number = {number: node for node, number in reversed(ours.items())}
        theirs = _numbered(self.captured, shared, table, _Layers(self.model, ours))
        return {node: by_number[number] for node, number in theirs.items() if number in by_number}

    def _placement(self, shared: set[str]) -> Placement:
        """The model's sites and layers, on this graph."""
        placement, ours = self.model.placement, self._correspondence(shared)
        back: dict[fx.Node, list[fx.Node]] = {}
        for node, own in ours.items():
            back.setdefault(own, []).append(node)
        sites = [
            replace(
                site, positions=tuple(p for each in site.positions for p in _moved(site, each, ours, back))
            )
            for site in placement.sites
        ]
        layers = [
            replace(layer, operator=operator)
            for layer in placement.layers
            for node in back.get(layer.operator.node, ())
            if (operator := describe(node)) is not None
        ]
        return Placement(tuple(sites), tuple(layers), ())


class _Layers:
    """The numbers of the model's layers, by their weights."""

    def __init__(self, model: QuantizedModel, numbers: Mapping[fx.Node, int]) -> None:
        self._found: dict[str, list[tuple[Layer, int]]] = {}
        for layer in model.layers:
            if layer.operator.weight is not None:
                weight = str(layer.operator.weight.target)
                self._found.setdefault(weight, []).append((layer, numbers[layer.operator.node]))

    def number(self, op: Operator, name: str) -> int | None:
        """That of the layer with the weight that ``op`` has, the one of its name before others; None for other weights.

        Raises:
            TrainingError: if the model uses the weight in another way.
        """
        known = self._found.get("" if op.weight is None else str(op.weight.target), [])
        same = [(layer.name != name, number) for layer, number in known if _alike(layer.operator, op)]
        if known and not same:
            raise TrainingError(
                f"Training: forward: layer {name!r} is a {op.kind} that the model, where it answers, has with other "
                "strides, groups or inputs: let both ways call the same layers"
            )
        return min(same)[1] if same else None


def _alike(one: Operator, other: Operator) -> bool:
    """Whether two operators differ in the values that they read at most."""

    def options(op: Operator) -> str:
        return repr([op.node.target, *op.node.args[3:], len(op.inputs), op.bias and op.bias.target])

    return options(one) == options(other)


def _numbered(
    captured: Captured, shared: set[str], table: dict[str, int], layers: _Layers | None = None
) -> dict[fx.Node, int]:
    """Nodes by what they compute: equal numbers for equal operators of equal inputs.

    Args:
        captured: the graph.
        shared: tensors that are known by their names; others are by their content.
        table: numbers so far, filled.
        layers: what a layer that is in no table is looked up in.
    """
    found: dict[fx.Node, int] = {}
    names = readable_names(captured.graph)
    for index, node in enumerate(captured.graph.nodes):
        if node.op == "output":
            continue
        if node.op == "placeholder":
            key = f"input {index}"
        elif node.op == "get_attr" and str(node.target) in shared:
            key = f"parameter {node.target}"
        elif node.op == "get_attr":
            value = functools.reduce(getattr, str(node.target).split("."), captured.module)
            key = f"constant {Identity(value).digest}" if isinstance(value, Tensor) else f"body {id(value)}"
        else:
            numbers = fx.node.map_arg((node.args, node.kwargs), lambda source: f"#{found[source]}")
            key = f"{node.target} {numbers!r}"
        op = describe(node) if layers is not None and key not in table else None
        number = None if op is None or layers is None else layers.number(op, names[node])
        found[node] = table.setdefault(key, len(table)) if number is None else number
    return found


def _moved(
    site: Site, position: Position, ours: Mapping[fx.Node, fx.Node], back: Mapping[fx.Node, list[fx.Node]]
) -> list[Position]:
    """The edges of a way in that a position of the model's stands for."""
    readers, value = set(position.readers), position.value
    everyone = readers >= set(value.users)  # then so is who reads it on this way alone
    found = [
        Position(node, tuple(u for u in node.users if everyone or ours.get(u) in readers), position.tied)
        for node in back.get(value, ())
    ]
    for reader in () if site.is_weight else position.readers:
        for node in back.get(reader, ()):
            there, here = describe(reader), describe(node)
            if there is None or here is None or here.weight is None:
                continue
            for own, other in zip(there.inputs, here.inputs, strict=True):
                # A layer that reads something else on this way.
                if own is value and ours.get(other) is not value:
                    found.append(Position(other, (node,)))
    return found


class _Root:
    """What a graph reads: values of its own, and the model's under all other names."""

    def __init__(self, model: nn.Module, own: Mapping[str, Any]) -> None:
        self._model = model
        vars(self).update(own)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
