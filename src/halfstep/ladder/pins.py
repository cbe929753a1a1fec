"""Pins: which layers partial quantization may put back, and which it must not touch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from halfstep.errors import RecipeError
from halfstep.ladder.groups import Group, groups_of, matching, names_of
from halfstep.ladder.steps import STEPS
from halfstep.model import QuantizedModel


def pinned(
    model: QuantizedModel, keep_float: Sequence[str], keep_quantized: Sequence[str]
) -> tuple[Mapping[str, frozenset[str]], tuple[Group, ...]]:
    """What the pins leave to decide.

    Args:
        model: as it stands; layers that are put back already stay so.
        keep_float: patterns of layers that stay in float whatever comes.
        keep_quantized: patterns of layers that are never put back.

    Returns:
        The layers that are put back from the start, by the step's attribute, and the groups that may be put back.

    Raises:
        RecipeError: if a pattern matches no layer, or layers are pinned both ways, or all of them in float.
    """
    base = {step.attribute: frozenset(getattr(model, step.attribute)) for step in STEPS.values()}
    up, down = matching(keep_float, model), matching(keep_quantized, model)
    if both := sorted(up & down):
        raise RecipeError(
            f"layer {both[0]!r} is pinned both in float and quantized; take it out of one of the patterns"
        )
    groups = groups_of(model)
    tied = names_of(group for group in groups if up.intersection(group.layers))
    if both := sorted(tied & down):
        raise RecipeError(
            f"layer {both[0]!r} is pinned quantized, but reads the same quantizer as a layer that is pinned in float; "
            "pin both the same way"
        )
    if groups and tied == names_of(groups):
        raise RecipeError(
            f"keep_float: {', '.join(map(repr, keep_float))} pins every quantized layer in float, and nothing would be "
            "quantized; pin fewer"
        )
    base["float_layers"] |= up | tied
    free = [group for group in groups if not (down | base["float_layers"]).intersection(group.layers)]
    return base, tuple(free)
