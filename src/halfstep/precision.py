"""Which layers are in which precision: groups that go together, the steps to float, and what a user pins.

Groups: the layers that partial quantization turns off together.

The steps between an integer layer and a float one, as a table: cheapest first.

Pins: which layers partial quantization may put back, and which it must not touch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from halfstep.errors import ArgumentError, RecipeError
from halfstep.formats import Integer
from halfstep.graph.place import takes_run_time_ranges
from halfstep.graph.placement import Choices, Layer
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


@dataclass(frozen=True)
class Step:
    """Something that a layer can be put to, to lose less.

    Attributes:
        name: what users write.
        attribute: the model's property that lists the layers put to it.
        words: how sentences call a layer put to it.
        quantizes: whether something of the layer is still quantized.
        supports: whether a layer that is quantized now can be put to it on the model's target.
        bits: of the layer's weights, where it is a width of theirs; None where it is not.
    """

    name: str
    attribute: str
    words: str
    quantizes: bool
    supports: Callable[[QuantizedModel, Layer], bool]
    bits: int | None = None

    def fits(self, model: QuantizedModel, group: Group) -> bool:
        """Whether every layer of ``group`` can be put to it."""
        return all(self.supports(model, layer) for layer in model.layers if layer.name in group.layers)


def _has_kernel(model: QuantizedModel, layer: Layer) -> bool:
    return takes_run_time_ranges(layer.operator, model.target)


def _holds_int16(model: QuantizedModel, layer: Layer) -> bool:
    codes = [site for site in model.placement.sites if site.name in layer.sites and not site.is_weight]
    return model.target.holds(16) and any(not site.dynamic and site.format.bits < 16 for site in codes)


def _always(model: QuantizedModel, layer: Layer) -> bool:
    return True


def weight_widths(model: QuantizedModel, layer: Layer) -> set[int]:
    """The bits of a layer's integer weights as they stand; empty if it has none, or a codebook's."""
    weights = (site for site in model.placement.sites if site.is_weight and site.name in layer.sites)
    return {site.format.bits for site in weights if isinstance(site.format, Integer)}


def _width(bits: int) -> Step:
    """A width of weights: a step towards float for layers whose weights have fewer bits."""

    def widens(model: QuantizedModel, layer: Layer) -> bool:
        widths = weight_widths(model, layer)
        return bool(widths) and max(widths) < bits

    return Step(f"bits{bits}", f"bits{bits}_layers", f"with {bits}-bit weights", True, widens, bits)


STEPS: dict[str, Step] = {
    step.name: step
    for step in (
        *(_width(bits) for bits in reversed(Choices().widths)),
        Step("dynamic", "dynamic_layers", "with ranges at run time", True, _has_kernel),
        Step("int16", "int16_layers", "with 16-bit activations", True, _holds_int16),
        Step("float", "float_layers", "in float", False, _always),
    )
}


def find_steps(names: tuple[str, ...]) -> tuple[Step, ...]:
    """The steps called so, cheapest first.

    Raises:
        ArgumentError: for an unknown name, or none.
    """
    unknown = [name for name in names if name not in STEPS]
    if unknown or not names:
        raise ArgumentError(
            f"steps: got {unknown[0]!r}, needed some of {', '.join(map(repr, STEPS))}"
            if unknown
            else f"steps: got none, needed at least one of {', '.join(map(repr, STEPS))}"
        )
    return tuple(step for step in STEPS.values() if step.name in names)


#: The widths that a layer's weights can have on request, by bits, the narrowest first.
WIDTHS: dict[int, Step] = {step.bits: step for step in STEPS.values() if step.bits is not None}


def bits_on_request(model: QuantizedModel) -> int:
    """How many bits more than by the recipe the weights take that have a width on request; below 0 for fewer."""
    return sum(
        (site.format.bits - site.usual.bits) * model.weight(site.name).numel()
        for site in model.placement.sites
        if site.usual is not None
    )


#: Which step each group is put to; groups that are not listed stay integer.
Assignment = Mapping[Group, Step]


def choices(base: Mapping[str, frozenset[str]], assignment: Assignment) -> Choices:
    """The groups at their steps, and every other layer where ``base`` (attribute -> layers) has it."""
    put = {step.attribute: set(base.get(step.attribute, ())) for step in STEPS.values()}
    for group, step in assignment.items():
        if step.bits is not None:  # a layer's weights have one width
            for other in WIDTHS.values():
                put[other.attribute].difference_update(group.layers)
        put[step.attribute].update(group.layers)
    return Choices(**{attribute: frozenset(layers) for attribute, layers in put.items()})


def pinned_layers(
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
