"""Which biases are stored as integers, in steps of what a layer's codes multiply to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from halfstep.formats import Integer
from halfstep.granularity import PerChannel, PerTensor
from halfstep.graph.operators import Operator, weight_axis
from halfstep.graph.placement import Layer, Site, StoredBias
from halfstep.targets import Target


def stored_biases(layers: Iterable[Layer], sites: Iterable[Site], target: Target) -> Iterator[StoredBias]:
    """The layers whose kernels on ``target`` add an int32 bias to their sums of codes.

    Sums of codes have one scale for each output at most: an activation has one, fixed beforehand, and a weight one for
    each output channel. All other biases stay float.
    """
    if not target.lowering.integer_bias:
        return
    by_name = {site.name: site for site in sites}
    for layer in layers:
        op = layer.operator
        if op.bias is None or op.weight is None or len(layer.sites) != 2 or not _adds_to_sums(op):
            continue
        activation, weight = (by_name[name] for name in layer.sites)
        channels = PerChannel(weight_axis(op) % op.weight.meta["val"].dim())
        integers = all(
            isinstance(site.format, Integer) and not site.format.half for site in (activation, weight)
        )
        fixed = not activation.dynamic and activation.granularity == PerTensor()
        if integers and fixed and _on_axis(weight, op) in (PerTensor(), channels):
            yield StoredBias(layer.name, activation.name, weight.name, target.stretch(weight.format))


def _adds_to_sums(op: Operator) -> bool:
    """Whether the bias is an operand of the product itself: of a conv, and of a linear layer on vectors.

    A linear layer on more axes is written as a MatMul with an Add of floats behind it.
    """
    return op.kind == "conv" or (op.kind == "linear" and op.inputs[0].meta["val"].dim() == 2)


def _on_axis(weight: Site, op: Operator) -> object:
    """The weight's granularity, its axis counted from the front."""
    granularity = weight.granularity
    if isinstance(granularity, PerChannel):
        assert op.weight is not None
        return PerChannel(granularity.axis % op.weight.meta["val"].dim())
    return granularity
