"""How many scales a site gets: a spec's granularity on the axes of the tensor at hand."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from halfstep.errors import RecipeError
from halfstep.granularity import Granularity, PerChannel, PerGroup
from halfstep.graph.operators import Operator, input_axis, weight_axis
from halfstep.recipe import ACTIVATIONS, TensorSpec


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


def weight_granularity(spec: TensorSpec, op: Operator) -> Granularity:
    """The spec's granularity on this operator's axes: channels of the output, groups along the input."""
    if spec.granularity is None:
        return PerChannel(weight_axis(op))
    if isinstance(spec.granularity, PerGroup):
        return PerGroup(input_axis(op), spec.granularity.size)
    if isinstance(spec.granularity, PerChannel):
        return PerChannel(weight_axis(op))
    return spec.granularity
