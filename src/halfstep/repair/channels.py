"""Which tensors' channels can be scaled together without changing what the network computes.

If every weight that writes a channel is divided by a positive factor and every weight that reads it multiplied by it,
the function stays the same, provided that whatever lies between is positively homogeneous: f(s x) = s f(x). A ReLU is,
a ReLU6 or a GELU is not. A residual sum ties all that is added together. Attention weighs values and leaves their
channels what they are, so the layer that makes values and the one behind attention are neighbours.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
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

#: Kinds that weigh values and sum them, and which argument the values are.
_WEIGHING = {"attention": 2, "matmul": 1}

#: What makes pieces along an axis.
_SPLITS = (aten.unbind.int, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)

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
        start: the entry of the axis that the first channel is; more than 0 where a layer writes several classes.
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
    start: int = 0
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
        parts: classes of some of the channels, where all that reads them takes such a part, by first and last + 1.
    """

    size: int
    writers: list[Port] = field(default_factory=list)
    readers: list[Port] = field(default_factory=list)
    values: list[fx.Node] = field(default_factory=list)
    barrier: str = ""
    parts: dict[tuple[int, int], Channels] = field(default_factory=dict)

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
    """A value's place in a class: the axes that count its channels, the last one fastest, and the entries of each."""

    channels: Channels
    axes: tuple[int, ...]
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
            elif node.op != "get_attr" and node.target is not aten.sym_size.int:
                for source in node.all_input_nodes:
                    self._bar(source, f"is read by {node.name!r}, {_WHY}")
        unique = {id(member.channels): member.channels for member in self.members.values()}
        for channels in unique.values():
            _bar_parts(channels)
        return [channels for channels in unique.values() if channels.writers and not channels.parts]

    def _visit(self, op: Operator) -> None:
        if op.weight is not None and self._layer(op):
            return
        if op.kind == "layer_norm":
            self._norm(op)
            return
        if op.node.target in _SPLITS:
            return  # what becomes of its pieces is told by each of them
        member = self._item(op) if op.kind == "item" else self._carried(op)
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
        self.members[node] = _Member(channels, (axis,))

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
            if member.axes != (axis,) or source.meta["val"].dim() != rank:
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
        if op.kind in _WEIGHING:
            return self._weighed(op)
        if op.kind == "mul" and not constant_operands(op.node) and len(op.inputs) == 2:
            return self._gated(op)
        sources = [self.members.get(source) for source in op.inputs]
        if not sources or sources[0] is None or not isinstance(op.node.meta["val"], torch.Tensor):
            return None
        first, shape = sources[0], op.node.meta["val"].shape
        if op.kind == "add" and not constant_operands(op.node):
            return self._sum(op, sources)
        if len(sources) != 1:
            return None
        before = op.inputs[0].meta["val"].shape
        if op.kind in ("reshape", "transpose", "slice"):
            return self._moved(op.node, first)
        scaling = op.kind in ("mul", "div") and constant_operands(op.node) and op.node.args[0] is op.inputs[0]
        clipping = op.kind == "clip" and _only_at_zero(op.node)
        padding = op.kind == "pad" and _pads_zeros(op.node)
        if op.kind not in HOMOGENEOUS and not (scaling or clipping or padding):
            return None
        kept = len(shape) == len(before) and all(shape[axis] == before[axis] for axis in first.axes)
        return first if kept else None

    def _weighed(self, op: Operator) -> _Member | None:
        """The place of sums over values (..., values, channels): attention's, or of a product with weights."""
        args: Any = op.node.args
        result = op.node.meta["val"]
        value = args[_WEIGHING[op.kind]]
        member = self.members.get(value) if isinstance(value, fx.Node) else None
        if member is None or args[:3].count(value) > 1:
            return None
        before, rank = value.meta["val"].shape, result.dim()
        if (
            len(before) != rank
            or rank - 2 in member.axes
            or any(result.shape[a] != before[a] for a in member.axes)
        ):
            return None
        for factor in op.inputs:
            if factor is not value:
                self._bar(factor, f"is a factor of {self._called(op)}")
        return None if member.channels.barrier else member

    def _sum(self, op: Operator, sources: list[_Member | None]) -> _Member | None:
        """A sum ties all of its terms' channels together."""
        shapes = {tuple(map(str, source.meta["val"].shape)) for source in op.inputs}
        places = {(member.axes, member.repeat) for member in sources if member is not None}
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
        if (kept.parts or gone.parts) and not kept.barrier:
            kept.barrier = f"{kept.writers[0].name!r} is added to other channels, and cut into parts"
        gone.barrier = kept.barrier
        _bar_parts(gone)  # nothing finds it again
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

    def _moved(self, node: fx.Node, member: _Member) -> _Member | None:
        """Where the channels lie after a reshape, transpose, slice or select; None if they are torn apart."""
        arguments: list[Any] = list(node.args)
        before, after = arguments[0].meta["val"].shape, node.meta["val"].shape
        axes, rank = member.axes, len(before)
        if node.target is aten.permute.default:
            order = [d % rank for d in arguments[1]]
            return replace(member, axes=tuple(order.index(axis) for axis in axes))
        if node.target in (aten.transpose.int, aten.t.default):
            a, b = (d % rank for d in (arguments[1:3] or (0, 1)))
            return replace(member, axes=tuple({a: b, b: a}.get(axis, axis) for axis in axes))
        if node.target in (aten.slice.Tensor, aten.select.int):
            dim = arguments[1] % rank if len(arguments) > 1 else 0
            if node.target is aten.select.int:
                return self._picked(member, dim, arguments[2], before)
            if dim not in axes:
                return member
            start, stop, step = slice(*arguments[2:]).indices(before[dim])
            return self._cut(member, dim, start, stop, before) if step == 1 else None
        if node.target is aten.unsqueeze.default:
            place = arguments[1] % (rank + 1)
            return replace(member, axes=tuple(axis + (axis >= place) for axis in axes))
        return _reshaped(member, before, after)

    def _item(self, op: Operator) -> _Member | None:
        """The place of one of the pieces that a split makes."""
        split: Any = op.node.args[0]
        index: Any = op.node.args[1]
        if split.target not in _SPLITS or (member := self.members.get(split.args[0])) is None:
            return None
        source, *arguments = split.args
        before, pieces = source.meta["val"].shape, split.meta["val"]
        if split.target is aten.unbind.int:
            dim = arguments[0] if arguments else 0
            member = self._picked(member, dim % len(before), index, before)
        else:
            dim = (arguments[1] if len(arguments) > 1 else 0) % len(before)
            if dim in member.axes:
                sizes = [piece.shape[dim] for piece in pieces]
                start = sum(sizes[:index])
                member = self._cut(member, dim, start, start + sizes[index], before)
        if member is None:
            self._bar(source, f"is torn apart by {self._called(op)}")
        return member

    def _picked(self, member: _Member, dim: int, index: int, shape: Sequence[Any]) -> _Member | None:
        """The place of one entry along an axis, which is gone then."""
        if dim in member.axes:
            index %= shape[dim]
            cut = self._cut(member, dim, index, index + 1, shape)
            if cut is None or len(cut.axes) == 1:
                return None
            member = replace(cut, axes=tuple(axis for axis in cut.axes if axis != dim))
        return replace(member, axes=tuple(axis - (axis > dim) for axis in member.axes))

    def _cut(self, member: _Member, dim: int, start: int, stop: int, shape: Sequence[Any]) -> _Member | None:
        """The place of entries ``start`` to ``stop`` of an axis: all channels, or a part that is a class by itself."""
        if (start, stop) == (0, shape[dim]):
            return member
        if dim != member.axes[0] or member.repeat > 1:  # channels in between go elsewhere
            return None
        whole, inner = member.channels, member.channels.size // shape[dim]
        first, end = start * inner, stop * inner
        part = whole.parts.get((first, end))
        if part is None:
            writers = [replace(port, start=port.start + first) for port in whole.writers]
            part = Channels(end - first, writers, [], [*whole.values], whole.barrier)
            whole.parts[first, end] = part
        return replace(member, channels=part)


def _bar_parts(whole: Channels) -> None:
    """Bar the parts of channels that something reads as a whole too, or that lie in two parts."""
    ranges = sorted(whole.parts)
    overlapping = any(a[1] > b[0] for a, b in pairwise(ranges))
    name = whole.writers[0].name
    why = whole.barrier or (
        f"{name!r} is read in parts and as a whole" if whole.readers or overlapping else ""
    )
    for part in whole.parts.values():
        part.barrier = part.barrier or why
        _bar_parts(part)


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


def _reshaped(member: _Member, before: Sequence[Any], after: Sequence[Any]) -> _Member | None:
    """Where channels lie in another shape: each run of neighbouring axes is one again, or flattened at the end."""
    runs: list[list[int]] = []
    for axis in member.axes:
        if runs and axis == runs[-1][-1] + 1:
            runs[-1].append(axis)
        else:
            runs.append([axis])
    axes: list[int] = []
    repeat = member.repeat
    for run in runs:
        count, behind = _count(before[run[0] : run[-1] + 1]), _count(before[run[-1] + 1 :])
        if count is None or behind is None:
            return None
        if found := _run(after, count, behind):
            axes += found
        elif run is runs[-1] and (found := _run(after, count * behind, 1)) and len(found) == 1:
            axes, repeat = [*axes, *found], repeat * behind
        else:
            return None
    return replace(member, axes=tuple(axes), repeat=repeat)


def _run(shape: Sequence[Any], count: int, behind: int) -> list[int]:
    """The neighbouring axes that have so many entries together, and so many behind them; none if there are no such."""
    for last in reversed(range(len(shape))):
        if _count(shape[last + 1 :]) == behind:
            for first in range(last, -1, -1):
                if _count(shape[first : last + 1]) == count:
                    return [axis for axis in range(first, last + 1) if shape[axis] != 1] or [last]
    return []


def _count(sizes: Sequence[Any]) -> int | None:
    """Entries of a shape; None where a size is not fixed."""
    return prod(sizes) if all(isinstance(size, int) for size in sizes) else None
