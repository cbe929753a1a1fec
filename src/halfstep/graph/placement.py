"""The result of placement, as frozen data over a graph's nodes, and what it is made from.

How many scales a site gets: a spec's granularity on the axes of the tensor at hand.

Put one node on every edge that a placement names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import fx, nn

from halfstep.errors import RecipeError
from halfstep.formats import Format
from halfstep.granularity import Granularity, PerChannel, PerGroup
from halfstep.graph.operators import Operator, input_axis, weight_axis
from halfstep.recipe import ACTIVATIONS, TensorSpec
from halfstep.targets import Target

_TAKEN = frozenset(dir(nn.ModuleDict()))

#: Ends the name of a site of 16 bits on request, to set it apart from the usual one on the same tensor.
INT16 = ":int16"

#: Ends the key of a weight in a width on request, after a colon and the bits.
WIDTH = "bits"


def wide_name(name: str) -> str:
    """What a site on a tensor called so is called where it has 16 bits on request."""
    return name + INT16


@dataclass(frozen=True)
class Position:
    """One tensor edge: ``readers`` of ``value`` see it quantized.

    ``tied`` positions follow from an earlier one of the same site by moving codes about (reshape, max pool):
    quantizing again changes nothing, but an exported file must say so.
    """

    value: fx.Node
    readers: tuple[fx.Node, ...]
    tied: bool = False


@dataclass(frozen=True)
class Site:
    """A tensor that carries a quantizer, with its number format.

    Attributes:
        name: the parameter's name for a weight, the readable name of the node that makes it for an activation.
        format: the number format.
        granularity: how many scales.
        positions: the edges, the first untied.
        is_weight: whether the tensor is a parameter.
        dynamic: whether the range is computed from each tensor at run time.
        wide: whether it has 16 bits on request, where the recipe says less; its name then ends in ``:int16``.
        usual: what a weight's format would be by the recipe, where it has another width on request; else None.
    """

    name: str
    format: Format
    granularity: Granularity
    positions: tuple[Position, ...]
    is_weight: bool
    dynamic: bool = False
    wide: bool = False
    usual: Format | None = None

    @property
    def key(self) -> str:
        """The site's name as a name among modules: without dots, and none of the attributes that modules have.

        A weight has a quantizer for each width, and so a key.
        """
        key = self.name.replace(".", "/")
        if self.usual is not None:
            return f"{key}:{self.format.bits}{WIDTH}"
        return f"{key}/" if key in _TAKEN else key

    @property
    def usual_width(self) -> Site:
        """The same site as it is by the recipe."""
        return replace(self, name=self.name.removesuffix(INT16), wide=False, usual=None)

    def moved(self, name: str) -> Site:
        """The same site on another tensor, called so, that has the same values."""
        return replace(self, name=wide_name(name) if self.wide else name)


@dataclass(frozen=True)
class Layer:
    """A weighted operator (or a product of two activations) with the sites it reads.

    Attributes:
        name: module path in the user's model.
        operator: what it is.
        sites: names of the sites it reads, its weight's included; empty if it stays in float.
        reason: why it is in float; empty if it is quantized.
    """

    name: str
    operator: Operator
    sites: tuple[str, ...]
    reason: str = ""


@dataclass(frozen=True)
class FloatOperator:
    """An operator that is no layer and runs in float, and why."""

    name: str
    operator: Operator
    reason: str


@dataclass(frozen=True)
class Follower:
    """An operator that is no layer and was placed between quantizers, to run on an integer kernel."""

    name: str
    operator: Operator


@dataclass(frozen=True)
class StoredBias:
    """A bias that the file stores as int32, in steps of ``scale_x * scale_w / stretch``.

    Attributes:
        layer: whose it is.
        activation: the site of what the layer reads.
        weight: the site of its weight.
        stretch: what the file multiplies the weight's codes by.
    """

    layer: str
    activation: str
    weight: str
    stretch: int


@dataclass(frozen=True)
class Placement:
    """Where the quantizers go. Every name is unique; the order is the graph's."""

    sites: tuple[Site, ...]
    layers: tuple[Layer, ...]
    float_operators: tuple[FloatOperator, ...]
    followers: tuple[Follower, ...] = ()
    biases: tuple[StoredBias, ...] = ()


def takes_run_time_ranges(op: Operator, target: Target) -> bool:
    """Whether ``target`` has a kernel for this layer whose activations get their range at run time."""
    matrix = op.weight is not None and op.weight.meta["val"].dim() == 2
    return matrix and op.kind in target.run_time_ranges


def activation_granularity(spec: TensorSpec, name: str, values: Sequence[fx.Node]) -> Granularity:
    """The spec's granularity for a site.

    A fixed scale cannot belong to an example, so it must leave the batch alone; and all the values that share its
    scales must have the same channels.

    Args:
        spec: of the activation.
        name: the site's.
        values: what shares its scales.

    Raises:
        RecipeError: naming the site, if they do not.
    """
    granularity = spec.granularity or ACTIVATIONS
    value = values[0]
    if isinstance(granularity, PerGroup) or (
        isinstance(granularity, PerChannel) and granularity.axis % value.meta["val"].dim() == 0
    ):
        raise RecipeError(
            f"site {name!r}: got activations {granularity}, needed one scale per tensor, or per channel of an axis "
            "that is not the batch's (axis 0)"
        )
    if isinstance(granularity, PerChannel):
        counts = [value.meta["val"].shape[granularity.axis] for value in values]
        if len(set(counts)) > 1:
            raise RecipeError(
                f"site {name!r}: got activations {granularity}, but the tensors that share its codes have {counts} "
                "channels there, being reshaped; needed one scale per tensor for the layers that read them"
            )
    return granularity


#: A group that must divide the axis is not made smaller than this part of what was asked for.
SMALLEST_GROUP = 1 / 4


def group_size(spec: TensorSpec, op: Operator, ragged: bool) -> int:
    """Elements in a group of an operator's weight; 0 where the axis cannot be cut into groups.

    Args:
        spec: of the weight, in groups.
        op: which reads it.
        ragged: whether the last group may have fewer; else the size is the next smaller one that divides the axis, of
            codes that share bytes one of whole bytes.
    """
    assert isinstance(spec.granularity, PerGroup) and op.weight is not None
    size, length = spec.granularity.size, int(op.weight.meta["val"].shape[input_axis(op)])
    if ragged:
        return size
    sizes = range(min(size, length), max(0, math.ceil(SMALLEST_GROUP * size) - 1), -1)
    return next((s for s in sizes if length % s == 0 and (spec.bits > 4 or s % 2 == 0)), 0)


def weight_granularity(spec: TensorSpec, op: Operator, ragged: bool = True) -> Granularity:
    """The spec's granularity on this operator's axes: channels of the output, groups along the input."""
    if isinstance(spec.granularity, PerGroup):
        return PerGroup(input_axis(op), group_size(spec, op, ragged))
    if spec.granularity is None or isinstance(spec.granularity, PerChannel):
        return PerChannel(weight_axis(op))
    return spec.granularity


#: Adds a node for a site, given the graph (with its insertion point set) and the value to quantize.
Maker = Callable[[fx.Graph, fx.Node, Site, Position], fx.Node]


@dataclass(frozen=True)
class Inserted:
    """A copy of a graph with quantizers in it, and where each node of the original went."""

    graph: fx.Graph
    copies: dict[fx.Node, fx.Node]


def copied(graph: fx.Graph) -> Inserted:
    """A copy of ``graph`` with nothing in it yet."""
    result = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    output = result.graph_copy(graph, copies)
    result.output(output)
    end = next(iter(reversed(result.nodes)))
    for node in graph.nodes:
        if node.op == "output":
            copies[node] = end
    return Inserted(result, copies)


def insert(graph: fx.Graph, placement: Placement, make: Maker) -> Inserted:
    """Copy ``graph`` and let the readers of every position see ``make``'s node instead of the value.

    Tied positions of activations get none: quantizing again changes nothing in a simulation.

    Args:
        graph: the float graph that ``placement`` speaks of; left as it is.
        placement: the sites.
        make: adds the node, for instance a call of a fake quantizer.
    """
    inserted = copied(graph)
    result, copies = inserted.graph, inserted.copies
    for site in placement.sites:
        for position in site.positions:
            if position.tied and not site.is_weight:
                continue
            value = copies[position.value]
            with result.inserting_after(value):
                quantized = make(result, value, site, position)
            for reader in position.readers:
                copies[reader].replace_input_with(value, quantized)
    result.lint()
    return inserted
