"""The result of placement: sites, layers, and what stays in float, as frozen data over a graph's nodes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx, nn

from halfstep.formats import Format
from halfstep.granularity import Granularity
from halfstep.graph.operators import Operator

_TAKEN = frozenset(dir(nn.ModuleDict()))

#: Ends the name of a site of 16 bits on request, to set it apart from the usual one on the same tensor.
INT16 = ":int16"


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
    """

    name: str
    format: Format
    granularity: Granularity
    positions: tuple[Position, ...]
    is_weight: bool
    dynamic: bool = False
    wide: bool = False

    @property
    def key(self) -> str:
        """The site's name as a name among modules: without dots, and none of the attributes that modules have."""
        key = self.name.replace(".", "/")
        return f"{key}/" if key in _TAKEN else key


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
