"""Run a graph node by node, and again with other quantizers, recomputing only what they change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from halfstep.bias_shift import BiasShift
from halfstep.fake_quantize import FakeQuantize, Mode
from halfstep.graph.inputs import ModelInputs, call_arguments
from halfstep.model import QuantizedModel

#: What a reader sees of a value: (value, reader) -> the quantizer (or shift of a bias) between them; none means the
#: value itself.
Wiring = Mapping[tuple[fx.Node, fx.Node], nn.Module]

#: The value of each node of a graph.
Values = dict[fx.Node, Any]

FLOAT: Wiring = {}


def wiring(model: QuantizedModel, tied: bool = False) -> Wiring:
    """Where the quantizers sit in ``model`` as it stands (its mode does not matter).

    Args:
        model: any.
        tied: also where codes have only been moved about since they were quantized: what each reader sees, taken by
            itself. In a run of the whole graph that would change nothing.
    """
    found: dict[tuple[fx.Node, fx.Node], nn.Module] = {}
    for site in model.placement.sites:
        for position in site.positions:
            if position.tied and not (tied or site.is_weight):
                continue
            for reader in position.readers:
                found.setdefault((position.value, reader), model.sites[site.name])
    for layer in model.layers:
        if layer.name in model.shifts and layer.operator.bias is not None:
            found[layer.operator.bias, layer.operator.node] = model.shifts[layer.name]
    return found


class Replay:
    """Runs the float graph of ``model`` with any wiring.

    Args:
        model: wirings are used within :func:`quantizing`, which sets their quantizers to quantize.
    """

    def __init__(self, model: QuantizedModel) -> None:
        self.model = model
        self.nodes = list(model.graph.nodes)

    def run(
        self, inputs: ModelInputs, wires: Wiring = FLOAT, tap: Callable[[fx.Node, Any], Any] | None = None
    ) -> Values:
        """Compute every node.

        Args:
            inputs: of the model.
            wires: where the quantizers sit.
            tap: is shown each computed node and its value, and returns the value to go on with.
        """
        args, kwargs = call_arguments(inputs)
        given = iter(self.model.flatten(args, kwargs))
        values: Values = {}
        for node in self.nodes:
            if node.op == "placeholder":
                values[node] = next(given)
            elif node.op == "get_attr":
                values[node] = self.parameter(node)
            else:
                values[node] = self.compute(node, values, wires)
                if tap is not None:
                    values[node] = tap(node, values[node])
        return values

    def change(self, values: Values, before: Wiring, after: Wiring) -> Values:
        """The nodes whose values differ from ``values`` (computed with ``before``) if ``after`` is wired instead."""
        changed: Values = {}
        for node in self.nodes:
            read = node.all_input_nodes
            if any(value in changed for value in read) or any(
                before.get((value, node)) is not after.get((value, node)) for value in read
            ):
                changed[node] = self.compute(
                    node, {value: changed.get(value, values[value]) for value in read}, after
                )
        return changed

    def compute(
        self, node: fx.Node, values: Values, wires: Wiring = FLOAT, device: torch.device | None = None
    ) -> Any:
        """The value of one node from those that it reads.

        Args:
            node: no placeholder and no parameter.
            values: of the nodes that it reads.
            wires: where the quantizers sit.
            device: where the values are, if that is not where the network was captured.
        """

        def see(value: fx.Node) -> Any:
            quantizer = wires.get((value, node))
            return values[value] if quantizer is None else quantizer(values[value])

        args, kwargs = fx.node.map_arg((node.args, node.kwargs), see)
        if node.op == "output":
            return args[0]
        assert node.op == "call_function" and callable(node.target)
        if device is not None and isinstance(kwargs.get("device"), torch.device):  # of what is made anew
            kwargs = {**kwargs, "device": device}
        return node.target(*args, **kwargs)

    def outputs(self, values: Values) -> Any:
        """What the model returns, from the output node's value."""
        return self.model.captured.out_spec.restore(values[self.nodes[-1]])

    def parameters(self) -> Values:
        """The values of the nodes that read parameters; what is computed from them asks for no gradients of theirs."""
        return {node: self.parameter(node) for node in self.nodes if node.op == "get_attr"}

    def parameter(self, node: fx.Node) -> Any:
        """What a node reads of the module; of a parameter without its gradients."""
        found: Any = self.model.captured.module
        for name in str(node.target).split("."):
            found = getattr(found, name)
        return found.detach() if isinstance(found, torch.Tensor) else found


@contextmanager
def quantizing(wirings: Iterable[Wiring]) -> Iterator[None]:
    """Every quantizer of the wirings quantizes within the block, and biases are shifted; no gradients are kept."""
    modules = {id(module): module for wires in wirings for module in wires.values()}.values()
    quantizers = [module for module in modules if isinstance(module, FakeQuantize)]
    shifts = [module for module in modules if isinstance(module, BiasShift)]
    modes, active = [module.mode for module in quantizers], [module.active for module in shifts]
    for module in quantizers:
        module.mode = Mode.QUANTIZE
    for shift in shifts:
        shift.active = True
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in zip(quantizers, modes, strict=True):
            module.mode = mode
        for shift, was in zip(shifts, active, strict=True):
            shift.active = was
