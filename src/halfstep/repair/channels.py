"""Which tensors' channels can be scaled together without changing what the network computes.

If every weight that writes a channel is divided by a positive factor and every weight that reads it multiplied by it,
the function stays the same, provided that whatever lies between is positively homogeneous: f(s x) = s f(x). A ReLU is,
a ReLU6 or a GELU is not. A residual sum ties all that is added together.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from math import inf, prod
from typing import Any

import torch
from torch import fx

from halfstep.graph.operators import (
    Operator,
    constant_operands,
    describe,
    input_axis,
    readable_names,
    weight_axis,
)

aten = torch.ops.aten

#: Kinds that work on each channel alone and are positively homogeneous.
HOMOGENEOUS = frozenset(
    {
        "relu",
        "leaky_relu",
        "prelu",
        "max_pool",
        "average_pool",
        "global_average_pool",
        "adaptive_average_pool",
        "resize_nearest",
        "resize_linear",
    }
)

_WHY = "which is not positively homogeneous in each channel alone"


@dataclass(frozen=True)
class Port:
    """Where the channels of a class meet a parameter.

    Attributes:
        name: of the layer or norm, in the user's words.
        weight: the parameter's name.
        bias: the name of the bias that is written with it; None where there is none, and for readers.
        axis: the weight's axis that the channels lie on.
        groups: of a grouped conv that reads the channels: group k of its rows meets the k-th part of them.
        repeat: neighbouring entries of the axis that belong to one channel (after a flatten).
        norm: whether it is a layer norm's weight.
        node: the layer or norm itself.
        source: the value that a reader reads; None for writers.
    """

    name: str
    weight: str
    bias: str | None
    axis: int
    groups: int = 1
    repeat: int = 1
    norm: bool = False
    node: fx.Node | None = None
    source: fx.Node | None = None


@dataclass
class Channels:
    """Tensors whose channels share one vector of factors.

    Attributes:
        size: how many channels.
        writers: parameters that make them.
        readers: parameters that multiply them.
        values: the nodes that hold them.
        barrier: why they cannot be scaled; empty if they can.
    """

    size: int
    writers: list[Port] = field(default_factory=list)
    readers: list[Port] = field(default_factory=list)
    values: list[fx.Node] = field(default_factory=list)
    barrier: str = ""

    @property
    def scalable(self) -> bool:
        """Whether the channels may be scaled and something on either side takes it up."""
        return not self.barrier and bool(self.writers) and bool(self.readers)

    def __str__(self) -> str:
        ends = (", ".join(port.name for port in ports) for ports in (self.writers, self.readers))
        return " -> ".join(ends)


def find_channels(graph: fx.Graph) -> list[Channels]:
    """All classes of channels that some layer or norm writes, in the order of the graph."""
    return _Finder(graph).run()


@dataclass(frozen=True)
class _Member:
    """A value's place in a class: the axis of its channels and the entries that belong to each."""

    channels: Channels
    axis: int
    repeat: int = 1


class _Finder:
    def __init__(self, graph: fx.Graph) -> None:
        self.graph, self.names = graph, readable_names(graph)
        self.members: dict[fx.Node, _Member] = {}
        self.reads = Counter(
            str(node.target) for node in graph.nodes if node.op == "get_attr" for _ in node.users
        )

    def run(self) -> list[Channels]:
        for node in self.graph.nodes:
            if node.op == "output":
                for source in node.all_input_nodes:
                    self._bar(source, "is an output of the network")
                continue
            op = describe(node)
            if op is not None:
                self._visit(op)
            elif node.op != "get_attr":
                for source in node.all_input_nodes:
                    if node.target is not aten.sym_size.int:
                        self._bar(source, f"is read by {node.name!r}, {_WHY}")
        unique = {id(member.channels): member.channels for member in self.members.values()}
        return [channels for channels in unique.values() if channels.writers]

    def _visit(self, op: Operator) -> None:
        if op.weight is not None and self._layer(op):
            return
        if op.kind == "layer_norm":
            self._norm(op)
            return
        member = self._carried(op)
        if member is not None:
            self.members[op.node] = member
            member.channels.values.append(op.node)
            return
        why = "beside something that cannot be scaled along" if op.kind in ("add", "mul") else _WHY
        for source in op.inputs:
            self._bar(source, f"is read by {self._called(op)}, {why}")

    def _called(self, op: Operator) -> str:
        return f"{op.kind} {self.names[op.node]!r}"

    def _bar(self, value: fx.Node, why: str) -> None:
        member = self.members.get(value)
        if member is not None and not member.channels.barrier:
            member.channels.barrier = f"{self.names.get(value, value.name)!r} {why}"

    def _new(self, node: fx.Node, axis: int, writer: Port) -> None:
        size = node.meta["val"].shape[axis]
        channels = Channels(size, [writer], [], [node])
        if self.reads[writer.weight] > 1 or (writer.bias is not None and self.reads[writer.bias] > 1):
            channels.barrier = f"{writer.name!r} shares its weight or bias with another layer"
        self.members[node] = _Member(channels, axis)

    def _layer(self, op: Operator) -> bool:
        """A layer reads one class and writes another; False if its channels cannot be told."""
        assert op.weight is not None
        groups = _groups(op)
        if len(op.inputs) != 1 or (op.kind == "conv_transpose" and groups != 1):  # an embedding reads none
            return False
        (source,), node, name = op.inputs, op.node, self.names[op.node]
        if op.kind == "matmul" and op.weight.meta["val"].dim() != 2:
            return False
        spatial = op.kind in ("conv", "conv_transpose")
        rank = node.meta["val"].dim()
        axis = 1 if spatial else rank - 1
        dims = op.weight.meta["val"].dim()
        weight, bias = str(op.weight.target), None if op.bias is None else str(op.bias.target)
        member = self.members.get(source)
        if member is not None:
            if member.axis != axis or source.meta["val"].dim() != rank:
                self._bar(source, f"is read by {self._called(op)} along another axis")
            elif self.reads[weight] > 1:
                self._bar(source, f"is read by {self._called(op)}, which shares its weight")
            else:
                reader = Port(
                    name, weight, None, input_axis(op) % dims, groups, member.repeat, node=node, source=source
                )
                member.channels.readers.append(reader)
        self._new(node, axis, Port(name, weight, bias, weight_axis(op) % dims, node=node))
        return True

    def _norm(self, op: Operator) -> None:
        """A layer norm bars what it reads; over the last axis and with a weight, it writes a class."""
        for source in op.inputs:
            self._bar(source, f"is read by {self._called(op)}, which normalises it")
        sizes, weight, bias = [*op.node.args, None, None][1:4]
        if isinstance(sizes, (list, tuple)) and len(sizes) == 1 and isinstance(weight, fx.Node):
            named = str(bias.target) if isinstance(bias, fx.Node) else None
            writer = Port(self.names[op.node], str(weight.target), named, 0, norm=True, node=op.node)
            self._new(op.node, op.node.meta["val"].dim() - 1, writer)

    def _carried(self, op: Operator) -> _Member | None:
        """The place of an operator's result, if it carries its input's channels on; None if it does not."""
        sources = [self.members.get(source) for source in op.inputs]
        if not sources or sources[0] is None or not isinstance(op.node.meta["val"], torch.Tensor):
            return None
        first, shape = sources[0], op.node.meta["val"].shape
        if op.kind == "add" and not constant_operands(op.node):
            return self._sum(op, sources)
        if op.kind == "mul" and not constant_operands(op.node) and len(sources) == 2:
            return self._gated(op)
        if len(sources) != 1:
            return None
        before = op.inputs[0].meta["val"].shape
        if op.kind in ("reshape", "transpose", "slice"):
            return _moved(op.node, first)
        scaling = op.kind in ("mul", "div") and constant_operands(op.node) and op.node.args[0] is op.inputs[0]
        clipping = op.kind == "clip" and _only_at_zero(op.node)
        padding = op.kind == "pad" and _pads_zeros(op.node)
        if op.kind not in HOMOGENEOUS and not (scaling or clipping or padding):
            return None
        kept = len(shape) == len(before) and shape[first.axis] == before[first.axis]
        return first if kept else None

    def _sum(self, op: Operator, sources: list[_Member | None]) -> _Member | None:
        """A sum ties all of its terms' channels together."""
        shapes = {tuple(map(str, source.meta["val"].shape)) for source in op.inputs}
        places = {(member.axis, member.repeat) for member in sources if member is not None}
        known = [member for member in sources if member is not None]
        if len(known) < len(sources) or len(shapes) > 1 or len(places) > 1:
            return None
        first, *others = known
        for other in others:
            self._merge(first.channels, other.channels)
        return self.members[op.inputs[0]]

    def _merge(self, kept: Channels, gone: Channels) -> None:
        if kept is gone:
            return
        for ours, theirs in ((kept.writers, gone.writers), (kept.readers, gone.readers)):
            ours.extend(theirs)
        kept.values.extend(gone.values)
        kept.barrier = kept.barrier or gone.barrier
        for value, member in self.members.items():
            if member.channels is gone:
                self.members[value] = replace(member, channels=kept)

    def _gated(self, op: Operator) -> _Member | None:
        """A product carries the factor of full size on; the gate itself must stay as it is."""
        shape = op.node.meta["val"].shape
        for value, gate in (op.inputs, reversed(op.inputs)):
            member = self.members.get(value)
            whole = tuple(map(str, value.meta["val"].shape)) == tuple(map(str, shape))
            if member is not None and whole and not member.channels.barrier:
                self._bar(gate, f"is a factor of {self._called(op)}")
                return None if member.channels.barrier else member
        return None


def _groups(op: Operator) -> int:
    """Groups of a conv, from (input, weight, bias, stride, padding, [output_padding,] dilation/groups ...)."""
    if op.kind not in ("conv", "conv_transpose"):
        return 1
    groups = op.node.args[6] if len(op.node.args) > 6 else op.node.kwargs.get("groups", 1)
    assert isinstance(groups, int)
    return groups


def _only_at_zero(node: fx.Node) -> bool:
    """Whether a clip's bounds are 0 or infinite: scaling its input scales its output."""
    if node.target not in (aten.clamp.default, aten.clamp_min.default):
        return False
    bounds = [*node.args[1:], *node.kwargs.values()]
    return all(
        bound is None or (isinstance(bound, (int, float)) and bound in (0, inf, -inf)) for bound in bounds
    )


def _pads_zeros(node: fx.Node) -> bool:
    """Whether what a pad adds scales along: zeros, or copies of what is there."""
    value = node.args[-1] if len(node.args) > 2 else 0
    return value is None or isinstance(value, str) or (isinstance(value, (int, float)) and value == 0)


def _moved(node: fx.Node, member: _Member) -> _Member | None:
    """Where the channels lie after a reshape, transpose, slice or select; None if they are torn apart."""
    arguments: list[Any] = list(node.args)
    before, after = arguments[0].meta["val"].shape, node.meta["val"].shape
    axis, rank = member.axis, len(before)
    if node.target is aten.permute.default:
        return replace(member, axis=[d % rank for d in arguments[1]].index(axis))
    if node.target in (aten.transpose.int, aten.t.default):
        a, b = (d % rank for d in (arguments[1:3] or (0, 1)))
        return replace(member, axis={a: b, b: a}.get(axis, axis))
    if node.target in (aten.slice.Tensor, aten.select.int):
        cut = arguments[1] % rank if len(arguments) > 1 else 0
        if cut == axis:
            return None
        return replace(member, axis=axis - (node.target is aten.select.int and cut < axis))
    inner = before[axis + 1 :]
    if not all(isinstance(size, int) for size in inner):
        return None
    behind = prod(inner)
    for place in range(len(after) - 1, -1, -1):
        rest = after[place + 1 :]
        if not all(isinstance(size, int) for size in rest):
            return None
        if not isinstance(after[place], int):
            return None
        if after[place] == before[axis] and prod(rest) == behind:
            return replace(member, axis=place)
        if after[place] == before[axis] * behind and prod(rest) == 1:
            return replace(member, axis=place, repeat=member.repeat * behind)
    return None
