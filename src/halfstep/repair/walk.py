"""Running the float and the quantized network side by side, one layer or one block at a time.

A pass that repairs layer by layer needs each layer's inputs as the quantized layers before it make them, repaired ones
included, and as the float network makes them. Each node runs once in either network, whatever the number of layers.
Values are dropped after their last reader; weights are read, and quantized, when they are used: a repair changes them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from halfstep.batches import example_bytes
from halfstep.fake_quantize import Mode
from halfstep.fidelity.replay import FLOAT, Replay, Values, Wiring, wiring
from halfstep.graph.inputs import ModelInputs, call_arguments, move
from halfstep.graph.placement import Layer
from halfstep.model import QuantizedModel
from halfstep.progress import Interrupted, steps
from halfstep.repair.blocks import Block, in_order
from halfstep.repair.record import TIME_UP, Repair, Treated

#: Bytes of values that may be alive at once; where a network needs more, fewer examples are used.
MEMORY = 2**30


@dataclass(frozen=True)
class LayerRun:
    """A layer that is about to run.

    Attributes:
        layer: the layer.
        float_inputs: what it reads in the float network, a tensor for each batch.
        inputs: the same in the quantized network, quantized as the layer sees it.
        run: runs the layer as it now is on a quantized input.
        run_float: runs the float layer on a float input.
    """

    layer: Layer
    float_inputs: list[Tensor]
    inputs: list[Tensor]
    run: Callable[[Tensor], Tensor]
    run_float: Callable[[Tensor], Tensor]


@torch.no_grad()
def walk(model: QuantizedModel, batches: Sequence[ModelInputs], what: str) -> Iterator[LayerRun]:
    """Stop before every quantized layer with a weight, in the order of execution.

    What the caller changes on the layer (its rounding, its range, the shift of its bias) holds from its own run on.
    Where the values alive at once would take more than :data:`MEMORY`, only as many batches as fit are used.

    Args:
        model: calibrated.
        batches: inputs.
        what: for the progress bar.
    """
    layers = [_alone(each) for each in model.layers if not each.reason and each.operator.weight is not None]
    fitting = [move(inputs, model.device) for inputs in batches_that_fit(model, batches)]
    with model.using(Mode.QUANTIZE), steps(what, len(layers)) as advance:
        both = _BothNetworks(model, fitting, layers, at_once=True)
        for stop in both.stops:
            if stop.block is not None:
                yield both.layer_run(stop.block)
                advance(1)
            both.run_float(stop)
            both.run_quantized(stop)


def _while_time_lasts(walked: Iterator[LayerRun], notes: list[str]) -> Iterator[LayerRun]:
    """The steps of a walk up to where time is up; a note says so.

    For passes whose layers do not depend on what later layers become: what was done is worth as much without the rest.
    """
    last = ""
    try:
        for step in walked:
            yield step
            last = step.layer.name
    except Interrupted:
        if not last:  # nothing was done
            raise
        notes.append(f"{TIME_UP} {last}: the layers behind it are as they were")


#: Repairs a layer that is about to run, given the notes that it may add to: what it minimises, before and after; or why
#: the layer is left alone, empty where that need not be said.
Treat = Callable[[LayerRun, list[str]], tuple[float, float] | str]


def layer_by_layer(
    model: QuantizedModel, batches: Sequence[ModelInputs], name: str, measure: str, treat: Treat
) -> Repair:
    """Treat every quantized layer with a weight, each on what the layers before it make, until time is up.

    Args:
        model: calibrated.
        batches: inputs.
        name: of the repair.
        measure: what it minimises.
        treat: changes a layer.
    """
    start = time.perf_counter()
    treated, skipped, notes = [], [], list[str]()
    for step in _while_time_lasts(walk(model, batches, name), notes):
        clock = time.perf_counter()
        done = treat(step, notes)
        if not isinstance(done, str):
            treated.append(Treated(step.layer.name, *done, time.perf_counter() - clock))
        elif done:
            skipped.append((step.layer.name, done))
    took = time.perf_counter() - start
    return Repair(name, measure, tuple(treated), tuple(skipped), tuple(notes), took)


@dataclass(frozen=True)
class BlockRun:
    """A block that is about to run; every list has an element for each batch.

    Attributes:
        block: the block.
        float_inputs: what it reads in the float network, by the node that makes it.
        inputs: the same in the quantized network, not quantized yet.
        targets: what the float block makes of its float inputs, by its outputs.
    """

    block: Block
    float_inputs: list[Values]
    inputs: list[Values]
    targets: list[Values]


@torch.no_grad()
def walk_blocks(
    model: QuantizedModel, batches: Sequence[ModelInputs], blocks: Sequence[Block]
) -> Generator[BlockRun, None, None]:
    """Stop before every block, in the order of execution; between two, only what later ones read is held.

    What the caller changes in the block (roundings, ranges, shifts of biases) holds from its own run on.

    Args:
        model: calibrated.
        batches: inputs, where the model is.
        blocks: of :func:`.find_blocks`.
    """
    with model.using(Mode.QUANTIZE):
        both = _BothNetworks(model, batches, blocks)
        for stop in both.stops:
            if stop.block is None:
                both.run_float(stop)
            else:
                yield both.block_run(stop)
            both.run_quantized(stop)


def batches_that_fit(model: QuantizedModel, batches: Sequence[ModelInputs]) -> list[ModelInputs]:
    """The first batches whose values, in both networks, stay below :data:`MEMORY`; at least one."""
    each = 2 * _peak(model, ())
    kept: list[ModelInputs] = []
    used = 0
    for batch in batches:
        used += each * model.captured.batch_size(batch)
        if kept and used > MEMORY:
            break
        kept.append(batch)
    return kept


def examples_that_fit(model: QuantizedModel, blocks: Sequence[Block]) -> int:
    """How many examples' values between blocks :data:`MEMORY` has room for; at least one.

    Of each value there is the float one, the quantized one, and what a block's repair makes of both.
    """
    return max(1, MEMORY // max(4 * _peak(model, blocks), 1))


def _peak(model: QuantizedModel, blocks: Sequence[Block]) -> int:
    """Bytes of values alive at once between the blocks of one network, for one example."""
    axes = model.captured.axes
    alive = {node: example_bytes(node, axes) for node in model.graph.nodes if node.op == "placeholder"}
    peak = 0
    for stop in _stops(model.graph, blocks):
        for node in stop.nodes if stop.block is None else stop.block.outputs:
            alive[node] = example_bytes(node, axes)
        peak = max(peak, sum(alive.values()))
        for node in stop.read_last:
            alive.pop(node, None)
    return peak


@dataclass(frozen=True)
class _Stop:
    """A block, or a call that is in none.

    Attributes:
        block: the block; None for a call.
        nodes: what is to be run.
        read_last: the values that nothing behind it reads.
    """

    block: Block | None
    nodes: tuple[fx.Node, ...]
    read_last: list[fx.Node]


def _stops(graph: fx.Graph, blocks: Sequence[Block]) -> list[_Stop]:
    stops, last = list[_Stop](), dict[fx.Node, _Stop]()
    for item in in_order(graph, blocks):
        block = item if isinstance(item, Block) else None
        nodes = (item,) if isinstance(item, fx.Node) else item.nodes
        stops.append(_Stop(block, nodes, []))
        read = (value for node in nodes for value in (node, *node.all_input_nodes))
        last.update(dict.fromkeys((*read, *(block.entries if block else ())), stops[-1]))
    for node, stop in last.items():
        if node.op != "get_attr" and not any(user.op == "output" for user in node.users):
            stop.read_last.append(node)
    return stops


class _BothNetworks:
    """The float and the quantized network, their values for each batch, and how to run them from stop to stop.

    Args:
        model: calibrated, and set to quantize.
        batches: inputs.
        blocks: where to stop.
        at_once: quantize a value where it is made, if all that read it see it through one quantizer. So that runs
            once, and the value itself need not be held; but a range that is changed later comes too late.
    """

    def __init__(
        self,
        model: QuantizedModel,
        batches: Sequence[ModelInputs],
        blocks: Sequence[Block],
        at_once: bool = False,
    ) -> None:
        self.stops, self.replay, self.wires = _stops(model.graph, blocks), Replay(model), wiring(model)
        self.at_once = _of_all_readers(model.graph, self.wires) if at_once else {}
        self.wires = {edge: module for edge, module in self.wires.items() if edge[0] not in self.at_once}
        self.parameters = self.replay.parameters()
        self.float: list[Values] = [dict(self.parameters) for _ in batches]
        self.quantized: list[Values] = [dict(self.parameters) for _ in batches]
        placeholders = [node for node in model.graph.nodes if node.op == "placeholder"]
        for inputs, floats, quantized in zip(batches, self.float, self.quantized, strict=True):
            for node, value in zip(placeholders, model.flatten(*call_arguments(inputs)), strict=True):
                floats[node], quantized[node] = value, self._seen(node, value)

    def run_float(self, stop: _Stop) -> None:
        """Run what the stop is before in the float network."""
        for values in self.float:
            for node in stop.nodes:
                values[node] = self.replay.compute(node, values, FLOAT)
            _drop(values, stop)

    def run_quantized(self, stop: _Stop) -> None:
        """Run it in the quantized network, as that now is."""
        for values in self.quantized:
            for node in stop.nodes:
                values[node] = self._seen(node, self.replay.compute(node, values, self.wires))
            _drop(values, stop)

    def layer_run(self, block: Block) -> LayerRun:
        """The layer that the block is."""
        (layer,), (node,), (source,) = block.layers, block.nodes, block.entries
        parameters = {
            value: self.parameters[value] for value in node.all_input_nodes if value in self.parameters
        }
        quantizer = self.wires.get((source, node))
        inside = {edge: module for edge, module in self.wires.items() if edge != (source, node)}

        def run(wires: Wiring) -> Callable[[Tensor], Tensor]:
            def once(x: Tensor) -> Tensor:
                with torch.no_grad():
                    result: Tensor = self.replay.compute(node, {**parameters, source: x}, wires)
                return result

            return once

        inputs = [values[source] for values in self.quantized]
        if quantizer is not None:
            inputs = [quantizer(x) for x in inputs]
        return LayerRun(layer, [values[source] for values in self.float], inputs, run(inside), run(FLOAT))

    def block_run(self, stop: _Stop) -> BlockRun:
        """The block, after it was run in the float network."""
        assert stop.block is not None
        block, entries = stop.block, stop.block.entries
        floats, inputs = (
            [{node: values[node] for node in entries} for values in side]
            for side in (self.float, self.quantized)
        )
        self.run_float(stop)
        targets = [{node: values[node] for node in block.outputs} for values in self.float]
        return BlockRun(block, floats, inputs, targets)

    def _seen(self, node: fx.Node, value: Any) -> Any:
        return self.at_once[node](value) if node in self.at_once else value


def _drop(values: Values, stop: _Stop) -> None:
    for node in stop.read_last:
        values.pop(node, None)


def _alone(layer: Layer) -> Block:
    """A layer as a block, which reads what it multiplies with its weight."""
    node = layer.operator.node
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return Block(layer.name, (node,), (layer,), (source,), (), (node,))


def _of_all_readers(graph: fx.Graph, wires: Wiring) -> dict[fx.Node, nn.Module]:
    """The values that all readers see through one quantizer, and that; weights left out."""
    found: dict[fx.Node, nn.Module] = {}
    for node in graph.nodes:
        modules = {wires.get((node, reader)) for reader in node.users} if node.op != "get_attr" else set()
        if len(modules) == 1 and (module := modules.pop()) is not None:
            found[node] = module
    return found
