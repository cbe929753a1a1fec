"""Running the float and the quantized network side by side, one layer or one block at a time.

A pass that repairs layer by layer needs each layer's inputs as the quantized layers before it make them, repaired ones
included, and as the float network makes them. Each node runs once in either network, whatever the number of layers.
Values are dropped after their last reader.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from halfstep.batches import example_bytes
from halfstep.fake_quantize import Mode
from halfstep.fidelity.replay import FLOAT, Replay, Values, Wiring, wiring
from halfstep.graph.inputs import ModelInputs, call_arguments, move
from halfstep.graph.placement import Layer
from halfstep.model import QuantizedModel
from halfstep.progress import Interrupted, steps
from halfstep.repair.blocks import Block, in_order
from halfstep.repair.record import TIME_UP

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


def walk(model: QuantizedModel, batches: Sequence[ModelInputs], what: str) -> Iterator[LayerRun]:
    """Stop before every quantized layer with a weight, in the order of execution.

    What the caller changes on the layer (its rounding, its range, the shift of its bias) holds from its own run on.
    Where the values alive at once would take more than :data:`MEMORY`, only as many batches as fit are used.

    Args:
        model: calibrated.
        batches: inputs.
        what: for the progress bar.
    """
    return _Walk(model, batches).steps(what)


def while_time_lasts(walked: Iterator[LayerRun], notes: list[str]) -> Iterator[LayerRun]:
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


def batches_that_fit(model: QuantizedModel, batches: Sequence[ModelInputs]) -> list[ModelInputs]:
    """The first batches whose values, in both networks, stay below :data:`MEMORY`; at least one."""
    each = _peak(model.graph) * 2
    kept: list[ModelInputs] = []
    used = 0
    for batch in batches:
        used += each * model.captured.batch_size(batch)
        if kept and used > MEMORY:
            break
        kept.append(batch)
    return kept


def _peak(graph: fx.Graph) -> int:
    """Bytes of values alive at once, for one example."""
    last = _last_readers(graph)
    alive = peak = 0
    sizes: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op in ("placeholder", "call_function"):
            tensors = [v for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, torch.Tensor)]
            sizes[node] = sum(
                prod(size for size in t.shape[1:] if isinstance(size, int)) * t.element_size()
                for t in tensors
            )
            alive += sizes[node]
        peak = max(peak, alive)
        alive -= sum(sizes.get(gone, 0) for gone in last.get(node, ()))
    return peak


def _last_readers(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For each node, the values that nobody reads after it."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for source in node.all_input_nodes:
            last[source] = node
    gone: dict[fx.Node, list[fx.Node]] = {}
    for value, reader in last.items():
        gone.setdefault(reader, []).append(value)
    return gone


class _Walk:
    def __init__(self, model: QuantizedModel, batches: Sequence[ModelInputs]) -> None:
        self.model = model
        inserted = model.simulation()
        self.graph, self.copies = inserted.graph, inserted.copies
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.inputs = [move(inputs, device) for inputs in batches_that_fit(model, batches)]
        #: For each batch, the values of the float and of the quantized network.
        self.values: list[tuple[dict[fx.Node, Any], dict[fx.Node, Any]]] = [({}, {}) for _ in self.inputs]

    @torch.no_grad()
    def steps(self, what: str) -> Iterator[LayerRun]:
        layers = {
            self.copies[layer.operator.node]: layer
            for layer in self.model.layers
            if not layer.reason and layer.operator.weight is not None
        }
        last = _last_readers(self.graph)
        self._feed()
        with self.model.using(Mode.QUANTIZE), steps(what, len(layers)) as advance:
            for node in self.graph.nodes:
                if node.op in ("placeholder", "output") or self._is_constant(node):
                    continue
                if node in layers:
                    yield self._step(node, layers[node])
                    advance(1)
                for values in self.values:
                    for quantized, env in enumerate(values):
                        env[node] = self._run(node, env, bool(quantized))
                        for gone in last.get(node, ()):
                            env.pop(gone, None)

    def _feed(self) -> None:
        placeholders = [node for node in self.graph.nodes if node.op == "placeholder"]
        for inputs, values in zip(self.inputs, self.values, strict=True):
            flat = self.model.flatten(*call_arguments(inputs))
            for env in values:
                env.update(zip(placeholders, flat, strict=True))

    def _step(self, node: fx.Node, layer: Layer) -> LayerRun:
        source = node.args[0]
        assert isinstance(source, fx.Node)

        def run(quantized: bool) -> Callable[[Tensor], Tensor]:
            def once(x: Tensor) -> Tensor:
                with torch.no_grad():
                    result: Tensor = self._run(node, {source: x}, quantized)
                return result

            return once

        floats = [self._value(source, values[0], False) for values in self.values]
        return LayerRun(
            layer,
            floats,
            [self._value(source, values[1], True) for values in self.values],
            run(True),
            run(False),
        )

    def _is_constant(self, node: fx.Node) -> bool:
        """Parameters, and what quantizers make of them, are computed when read: a repair may change them."""
        if node.op == "get_attr":
            return True
        return node.op == "call_module" and all(source.op == "get_attr" for source in node.all_input_nodes)

    def _value(self, node: fx.Node, env: dict[fx.Node, Any], quantized: bool) -> Any:
        return env[node] if node in env else self._run(node, env, quantized)

    def _run(self, node: fx.Node, env: dict[fx.Node, Any], quantized: bool) -> Any:
        if node.op == "get_attr":
            return self.model.weight(str(node.target)).detach()
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self._value(n, env, quantized))
        if node.op == "call_module":
            return self.model.get_submodule(str(node.target))(*args) if quantized else args[0]
        assert node.op == "call_function" and callable(node.target)
        return node.target(*args, **kwargs)


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
    replay, wires = Replay(model), wiring(model)
    plan = list(in_order(model.graph, blocks))
    gone = _read_last(plan)
    floats: list[Values] = [replay.parameters() for _ in batches]
    quantized: list[Values] = [replay.parameters() for _ in batches]
    for inputs, *sides in zip(batches, floats, quantized, strict=True):
        flat = model.flatten(*call_arguments(inputs))
        placeholders = (node for node in model.graph.nodes if node.op == "placeholder")
        for node, value in zip(placeholders, flat, strict=True):
            for each in sides:
                each[node] = value

    def run(nodes: Sequence[fx.Node], values: list[Values], wires: Wiring) -> None:
        for each in values:
            for node in nodes:
                each[node] = replay.compute(node, each, wires)

    with model.using(Mode.QUANTIZE):
        for item, read in zip(plan, gone, strict=True):
            nodes = item.nodes if isinstance(item, Block) else (item,)
            run(nodes, floats, FLOAT)
            if isinstance(item, Block):
                yield BlockRun(
                    item,
                    [{node: each[node] for node in item.entries} for each in floats],
                    [{node: each[node] for node in item.entries} for each in quantized],
                    [{node: each[node] for node in item.outputs} for each in floats],
                )
            run(nodes, quantized, wires)
            for each in (*floats, *quantized):
                for node in read:
                    each.pop(node, None)


def _read_last(plan: Sequence[Block | fx.Node]) -> list[list[fx.Node]]:
    """For each step of a plan, the values that nothing behind it reads."""
    last: dict[fx.Node, int] = {}
    for index, item in enumerate(plan):
        nodes, entries = (item.nodes, item.entries) if isinstance(item, Block) else ((item,), ())
        for node in nodes:
            last[node] = index
            last.update(dict.fromkeys(node.all_input_nodes, index))
        last.update(dict.fromkeys(entries, index))
    read: list[list[fx.Node]] = [[] for _ in plan]
    for node, index in last.items():
        if node.op != "get_attr" and not any(user.op == "output" for user in node.users):
            read[index].append(node)
    return read


def examples_that_fit(model: QuantizedModel, blocks: Sequence[Block]) -> int:
    """How many examples' values between blocks :data:`MEMORY` has room for; at least one.

    Of each value there is the float one, the quantized one, and what a block's repair makes of both.
    """
    plan = list(in_order(model.graph, blocks))
    alive: dict[fx.Node, int] = {}
    peak = 0
    for item, read in zip(plan, _read_last(plan), strict=True):
        for node in item.outputs if isinstance(item, Block) else (item,):
            alive[node] = example_bytes(node, model.captured.axes)
        peak = max(peak, sum(alive.values()))
        for node in read:
            alive.pop(node, None)
    return max(1, MEMORY // max(4 * peak, 1))
