"""Observing a network stage by stage: the parameters of one layer or block at a time, all batches through it.

A pass batch by batch reads every parameter for every batch, from wherever they are. Here each is read once: what
stages hand on waits in the host's memory, so that a network whose parameters have no room on the accelerator, or in
memory beside the files that they are mapped from, is observed all the same. Sites see the same values, and what they
count adds up exactly: the statistics are those of the pass batch by batch, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from halfstep.calibration.diagnostics import BATCH
from halfstep.errors import ArgumentError, named
from halfstep.fake_quantize import FakeQuantize
from halfstep.fidelity.replay import Replay, Values
from halfstep.graph.inputs import ModelInputs, call_arguments, move
from halfstep.model import QuantizedModel
from halfstep.progress import steps
from halfstep.repair.blocks import Block, find_blocks, in_order


@dataclass(frozen=True)
class Stage:
    """Neighbours in the order of execution, of which at most one layer or block reads parameters.

    Attributes:
        nodes: in that order.
        constants: what is computed from parameters alone and read here, in the order of the graph.
        parameters: the nodes whose parameters these and those read.
    """

    nodes: tuple[fx.Node, ...]
    constants: tuple[fx.Node, ...]
    parameters: tuple[fx.Node, ...]


def stages(model: QuantizedModel) -> list[Stage]:
    """The network in stages: a block (see :func:`.find_blocks`) or a layer each, with what is computed between them."""
    constant: set[fx.Node] = set()
    for node in model.graph.nodes:
        sources = node.all_input_nodes
        if (
            node.op == "call_function"
            and sources
            and all(s.op == "get_attr" or s in constant for s in sources)
        ):
            constant.add(node)
    order = {node: index for index, node in enumerate(model.graph.nodes)}
    found: list[Stage] = []
    for item in in_order(model.graph, find_blocks(model)):
        nodes = item.nodes if isinstance(item, Block) else (item,)
        nodes = tuple(node for node in nodes if node not in constant)
        read: set[fx.Node] = set()
        waiting = list(nodes)
        while waiting:
            sources = {s for s in waiting.pop().all_input_nodes if s.op == "get_attr" or s in constant}
            waiting += sources - read
            read |= sources
        if found and nodes and not (read and found[-1].parameters):
            before = found.pop()
            nodes = before.nodes + nodes
            read |= {*before.constants, *before.parameters}
        if nodes:
            ordered = sorted(read, key=order.__getitem__)
            constants = tuple(node for node in ordered if node in constant)
            found.append(Stage(nodes, constants, tuple(node for node in ordered if node.op == "get_attr")))
    return found


def usable(device: torch.device | str) -> torch.device:
    """A device by its name.

    Raises:
        ArgumentError: if it cannot hold a tensor here.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ArgumentError(
            f"device: {str(device)!r} cannot be used here: {reason}; needed one that holds tensors, such as 'cuda'"
        ) from error


@torch.no_grad()
def observe_in_stages(
    model: QuantizedModel, batches: Iterable[tuple[int, ModelInputs]], device: torch.device
) -> None:
    """Run the float network once over batches, stage by stage; every activation's site fills its histogram.

    Args:
        model: observing.
        batches: inputs with their numbers; all are held, and of each what later stages read.
        device: where stages run, with their parameters; what they hand on waits where the model is.

    Raises:
        DataError: naming the batch and the site, if it makes NaN.
    """
    run = _Run(model, device)
    waiting = [run.fed(index, inputs) for index, inputs in batches]
    with steps("observing, stage by stage", len(run.plan)) as advance:
        for number, stage in enumerate(run.plan):
            run.stage(number, stage, waiting)
            advance(1)


@dataclass
class _Waiting:
    """A batch between two stages.

    Attributes:
        index: its number.
        flat: the values of the placeholders.
        values: what is read later, by the node that made it.
    """

    index: int
    flat: list[Any]
    values: Values


class _Run:
    def __init__(self, model: QuantizedModel, device: torch.device) -> None:
        self.model, self.device, self.replay = model, device, Replay(model)
        self.plan = stages(model)
        self.home = model.device
        self.seen: list[FakeQuantize] = []  # by a batch in a stage
        self.read = [{s for node in stage.nodes for s in node.all_input_nodes} for stage in self.plan]
        self.ends = _last_readers(node for stage in self.plan for node in stage.nodes)
        # What is fixed is seen once for each batch, where it is read first.
        fixed: dict[fx.Node, int] = {}
        for number, stage in enumerate(self.plan):
            for node in (*stage.parameters, *stage.constants):
                fixed.setdefault(node, number)
        self.fixed = [[node for node, first in fixed.items() if first == n] for n in range(len(self.plan))]
        #: Who sees a value: a quantizer for each place where one stands, as in the model's own pass.
        self.seen_by: dict[fx.Node, list[FakeQuantize]] = {}
        for site in model.placement.sites:
            for position in site.positions:
                if not (site.is_weight or position.tied):
                    self.seen_by.setdefault(position.value, []).append(model.sites[site.name])

    def fed(self, index: int, inputs: ModelInputs) -> _Waiting:
        """A batch in front of the first stage; the inputs are seen."""
        with named(f"calibration batch {index}"):
            flat = self.model.flatten(*call_arguments(inputs))
        batch = _Waiting(index, flat, {})
        placeholders = (node for node in self.model.graph.nodes if node.op == "placeholder")
        there = dict(zip(placeholders, flat, strict=True))
        batch.values = {
            node: value for node, value in there.items() if any(node in read for read in self.read)
        }
        self._at(batch, lambda: self._see(move(there, self.device)))
        return batch

    def stage(self, number: int, stage: Stage, batches: Sequence[_Waiting]) -> None:
        """All batches through a stage; its parameters are on the device for as long."""
        parameters = {node: move(self.replay.parameter(node), self.device) for node in stage.parameters}
        for batch in batches:
            self._at(batch, lambda batch=batch: self._through(number, stage, parameters, batch))  # type: ignore[misc]
        for quantizer in (q for node in stage.nodes for q in self.seen_by.get(node, ())):
            for histogram in quantizer.histogram.parts:
                histogram.settle()  # what a device has counted lies in its memory until then

    def _through(self, number: int, stage: Stage, parameters: Values, batch: _Waiting) -> None:
        read = self.read[number]
        values = {node: move(value, self.device) for node, value in batch.values.items() if node in read}
        values |= parameters
        for node in stage.constants:
            values[node] = self.replay.compute(node, values, device=self.device)
        self._see({node: values[node] for node in self.fixed[number]})
        for node in stage.nodes:
            values[node] = self.replay.compute(node, values, device=self.device)
            self._see({node: values[node]})
            for gone in self.ends.get(node, ()):
                values.pop(gone, None)
                batch.values.pop(gone, None)
        made = {node: values[node] for node in stage.nodes if node in values}
        batch.values |= move(made, self.home)

    def _see(self, values: Values) -> None:
        for node, value in values.items():
            for quantizer in self.seen_by.get(node, ()):
                quantizer(value)
                self.seen.append(quantizer)

    def _at(self, batch: _Waiting, work: Callable[[], None]) -> None:
        """Work on a batch, as the model's own pass would be in the midst of it."""
        BATCH.set(batch.index)
        with named(f"calibration batch {batch.index}"), self.model.observing(batch.flat, self.device):
            work()
            FakeQuantize.check_observed(self.seen)
        self.seen.clear()


def _last_readers(nodes: Iterable[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """For each node the values that nobody reads behind it, in this order; its own among them if nobody does at all."""
    last: dict[fx.Node, fx.Node] = {}
    for node in nodes:
        last[node] = node
        last.update(dict.fromkeys(node.all_input_nodes, node))
    ends: dict[fx.Node, list[fx.Node]] = {}
    for value, reader in last.items():
        ends.setdefault(reader, []).append(value)
    return ends
