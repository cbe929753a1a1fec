"""The steps between an integer layer and a float one, as a table: cheapest first."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from halfstep.errors import ArgumentError
from halfstep.graph.place import takes_run_time_ranges
from halfstep.graph.placement import Choices, Layer
from halfstep.ladder.groups import Group
from halfstep.model import QuantizedModel


@dataclass(frozen=True)
class Step:
    """Something that a layer can be put to, to lose less.

    Attributes:
        name: what users write.
        attribute: the model's property that lists the layers put to it.
        words: how sentences call a layer put to it.
        quantizes: whether something of the layer is still quantized.
        supports: whether a layer that is quantized now can be put to it on the model's target.
    """

    name: str
    attribute: str
    words: str
    quantizes: bool
    supports: Callable[[QuantizedModel, Layer], bool]

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


STEPS: dict[str, Step] = {
    step.name: step
    for step in (
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


#: Which step each group is put to; groups that are not listed stay integer.
Assignment = Mapping[Group, Step]


def choices(base: Mapping[str, frozenset[str]], assignment: Assignment) -> Choices:
    """The groups at their steps, and every other layer where ``base`` (attribute -> layers) has it."""
    put = {step.attribute: set(base.get(step.attribute, ())) for step in STEPS.values()}
    for group, step in assignment.items():
        put[step.attribute].update(group.layers)
    return Choices(**{attribute: frozenset(layers) for attribute, layers in put.items()})
