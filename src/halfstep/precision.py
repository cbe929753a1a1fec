"""Which layers change their precision together, and which a user pins.

Groups: the layers that partial quantization turns off together.

Pins: which layers partial quantization may put back, and which it must not touch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from halfstep.errors import RecipeError
from halfstep.graph.layer_precision import LayerPrecision, Step
from halfstep.model import QuantizedModel
from halfstep.recipe import match_layers


@dataclass(frozen=True)
class Group:
    """Layers that read a common quantizer: the same activation (query, key and value), or the same weight.

    Leaving only some of them in float would keep the quantizer, and most of its cost.

    Attributes:
        layers: their names, in the order of execution.
        kinds: what they are.
    """

    layers: tuple[str, ...]
    kinds: tuple[str, ...]

    @property
    def name(self) -> str:
        """The first layer's name, and how many more there are."""
        more = len(self.layers) - 1
        return self.layers[0] + (f" and {more} more" if more else "")


def groups_of(model: QuantizedModel) -> tuple[Group, ...]:
    """The groups of layers that are quantized in ``model`` as it stands, in the order of execution."""
    chosen = [layer for layer in model.layers if not layer.reason]
    owner: dict[str, int] = {}  # site -> the group that reads it
    members: list[list[int]] = []
    for index, layer in enumerate(chosen):
        found = sorted({owner[site] for site in layer.sites if site in owner})
        home = found[0] if found else len(members)
        if not found:
            members.append([])
        for other in found[1:]:  # the layer ties groups that were apart
            members[home] += members[other]
            members[other] = []
        members[home].append(index)
        owner.update({site: home for i in members[home] for site in chosen[i].sites})
    return tuple(
        Group(tuple(chosen[i].name for i in sorted(m)), tuple(chosen[i].operator.kind for i in sorted(m)))
        for m in sorted(filter(None, members), key=min)
    )


def matching(patterns: Iterable[str], model: QuantizedModel) -> frozenset[str]:
    """The layers that shell-style patterns match.

    Raises:
        RecipeError: if one matches none, with the nearest names.
    """
    names = model.layer_names
    return frozenset(name for pattern in patterns for name in match_layers(pattern, names))


def fits(step: Step, model: QuantizedModel, group: Group) -> bool:
    """Whether every layer of ``group``, quantized now, can be put to a step."""
    layers = (layer for layer in model.layers if layer.name in group.layers)
    return all(step.supports(model.placement, model.target, layer) for layer in layers)


def names_of(groups: Iterable[Group]) -> frozenset[str]:
    """The names of all layers in ``groups``."""
    return frozenset(name for group in groups for name in group.layers)


def bits_on_request(model: QuantizedModel) -> int:
    """How many bits more than by the recipe the weights take that have a width on request; below 0 for fewer."""
    return sum(
        (site.format.bits - site.usual.bits) * model.weight(site.name).numel()
        for site in model.placement.sites
        if site.usual is not None
    )


#: Which step each group is put to; groups that are not listed stay integer.
Assignment = Mapping[Group, Step]


def assigned(base: LayerPrecision, assignment: Assignment) -> LayerPrecision:
    """The groups at their steps, and every other layer where ``base`` has it."""
    for group, step in assignment.items():
        base = base.with_layers(step.name, group.layers)
    return base


def pinned_layers(
    model: QuantizedModel, keep_float: Sequence[str], keep_quantized: Sequence[str]
) -> tuple[LayerPrecision, tuple[Group, ...]]:
    """What the pins leave to decide.

    Args:
        model: as it stands; layers that are put back already stay so.
        keep_float: patterns of layers that stay in float whatever comes.
        keep_quantized: patterns of layers that are never put back.

    Returns:
        The layers that are put back from the start, and the groups that may be put back.

    Raises:
        RecipeError: if a pattern matches no layer, or layers are pinned both ways, or all of them in float.
    """
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
    base = model.precision.with_layers("float", up | tied)
    free = [group for group in groups if not (down | base["float"]).intersection(group.layers)]
    return base, tuple(free)
