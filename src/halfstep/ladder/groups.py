"""Groups: the layers that partial quantization turns off together."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

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


def groups_of(model: QuantizedModel, layers: Collection[str] | None = None) -> tuple[Group, ...]:
    """The groups of layers that are quantized in ``model`` as it stands, in the order of execution.

    Args:
        model: any mode.
        layers: consider only these; None for all.
    """
    chosen = [
        layer for layer in model.layers if not layer.reason and (layers is None or layer.name in layers)
    ]
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


def names_of(groups: Iterable[Group]) -> frozenset[str]:
    """The names of all layers in ``groups``."""
    return frozenset(name for group in groups for name in group.layers)
