"""Which layers are in which precision, where that is not the recipe's; and the table of precisions.

A precision is a line of :data:`STEPS`, and of :class:`LayerLists`, by which users name it: everything that depends on
which there are reads that table.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from halfstep.errors import ArgumentError
from halfstep.formats import Integer
from halfstep.graph.placement import Layer, Placement, takes_run_time_ranges
from halfstep.recipe import LayerSpec, Recipe, TensorSpec, match_layers
from halfstep.targets import Target

#: Whether a layer that is placed so can be put to a step on a target.
Supports = Callable[[Placement, Target, Layer], bool]


@dataclass(frozen=True)
class Step:
    """Something that a layer can be put to, to lose less.

    Attributes:
        name: what users write.
        words: how sentences call a layer put to it.
        supports: whether a layer that is quantized now can be put to it.
        change: what becomes of a layer's spec; that of a layer left in float stays as it is.
        quantizes: whether something of the layer is still quantized.
        bits: of the layer's weights, where it is a width of theirs; None where it is not.
        caution: what is to be said of files for a target that have layers put to it; empty for nothing.
    """

    name: str
    words: str
    supports: Supports
    change: Callable[[LayerSpec], LayerSpec]
    quantizes: bool = True
    bits: int | None = None
    caution: Callable[[Target], str] = lambda target: ""

    @property
    def attribute(self) -> str:
        """What the model, files and journals call the layers put to it."""
        return f"{self.name}_layers"


def weight_widths(placement: Placement, layer: Layer) -> set[int]:
    """The bits of a layer's integer weights as it is placed; empty if it has none, or a codebook's."""
    weights = (site for site in placement.sites if site.is_weight and site.name in layer.sites)
    return {site.format.bits for site in weights if isinstance(site.format, Integer)}


def _width(bits: int) -> Step:
    """A width of weights: a step towards float for layers whose weights have fewer bits."""

    def widens(placement: Placement, target: Target, layer: Layer) -> bool:
        widths = weight_widths(placement, layer)
        return bool(widths) and max(widths) < bits

    def change(spec: LayerSpec) -> LayerSpec:
        """Weights in float or in a codebook stay so."""
        weights = spec.weights
        if weights is None or not isinstance(weights.format, int | Integer):
            return spec
        format = bits if isinstance(weights.format, int) else replace(weights.format, bits=bits)
        return replace(spec, weights=replace(weights, format=format))

    return Step(f"bits{bits}", f"with {bits}-bit weights", widens, change, bits=bits)


def _has_kernel(placement: Placement, target: Target, layer: Layer) -> bool:
    return takes_run_time_ranges(layer.operator, target)


def _holds_int16(placement: Placement, target: Target, layer: Layer) -> bool:
    codes = [site for site in placement.sites if site.name in layer.sites and not site.is_weight]
    return target.holds(16) and any(not site.dynamic and site.format.bits < 16 for site in codes)


def _int16_activations(spec: LayerSpec) -> LayerSpec:
    """Fixed ranges of activations in 16 bits; activations in float or at run time stay so."""
    if spec.activations is None or spec.activations.dynamic:
        return spec
    return replace(spec, activations=TensorSpec(16, spec.activations.granularity))


def _no_int16_kernels(target: Target) -> str:
    if 16 in target.activation_bits:
        return ""
    return (
        f"{target.name} has no kernels for 16-bit activations: the file holds their codes, and answers as hardware "
        "with such kernels would, but there these layers and those that write for them run in float."
    )


#: Cheapest first. Widths of weights go together with what activations have: a layer may read 16 bits and have weights
#: of 4. Of several of one kind that a layer is put to the dearest holds.
STEPS: dict[str, Step] = {
    step.name: step
    for step in (
        *map(_width, (2, 3, 4, 6, 8)),
        Step("dynamic", "with ranges at run time", _has_kernel, LayerSpec.with_dynamic_activations),
        Step("int16", "with 16-bit activations", _holds_int16, _int16_activations, caution=_no_int16_kernels),
        Step("float", "in float", lambda *_: True, lambda spec: spec, quantizes=False),
    )
}

#: The widths that a layer's weights can have on request, by bits, the narrowest first.
WIDTHS: dict[int, Step] = {step.bits: step for step in STEPS.values() if step.bits is not None}


def find_steps(names: tuple[str, ...]) -> tuple[Step, ...]:
    """The steps called so, cheapest first.

    Raises:
        ArgumentError: for an unknown name, or none.
    """
    unknown = [name for name in names if name not in STEPS]
    if unknown or not names:
        got = repr(unknown[0]) if unknown else "none"
        needed = "some of" if unknown else "at least one of"
        raise ArgumentError(f"steps: got {got}, needed {needed} {', '.join(map(repr, STEPS))}")
    return tuple(step for step in STEPS.values() if step.name in names)


@dataclass(frozen=True)
class LayerPrecision:
    """The layers that are not as the recipe has them, by step.

    Attributes:
        put: pairs of a step's name and the layers put to it, in the order of :data:`STEPS`, none of them empty.

    >>> LayerPrecision.of(float=["fc"], bits4=["a", "b"]).with_layers("bits8", ["a"]).to_dict()
    {'float_layers': ['fc'], 'int16_layers': [], 'dynamic_layers': [], 'bits8_layers': ['a'], 'bits4_layers': ['b']}
    """

    put: tuple[tuple[str, frozenset[str]], ...] = ()

    @classmethod
    def of(cls, **layers: Iterable[str]) -> LayerPrecision:
        """Layers by the names of their steps."""
        found = {name: frozenset(some) for name, some in layers.items()}
        assert found.keys() <= STEPS.keys()
        return cls(tuple((name, found[name]) for name in STEPS if found.get(name)))

    @classmethod
    def of_dict(cls, data: Mapping[str, Iterable[str]]) -> LayerPrecision:
        """What :meth:`to_dict` gave; other keys are passed over."""
        return cls.of(**{step.name: data.get(step.attribute, ()) for step in STEPS.values()})

    def to_dict(self) -> dict[str, list[str]]:
        """The names, sorted, as journals and files keep them; widths only where a layer has one on request."""
        return {
            step.attribute: sorted(self[step.name])
            for step in reversed(STEPS.values())
            if step.bits is None or self[step.name]
        }

    def __getitem__(self, step: str) -> frozenset[str]:
        """The layers put to a step."""
        return dict(self.put).get(step, frozenset())

    def but(self, **layers: Iterable[str]) -> LayerPrecision:
        """The same with exactly these layers at some steps."""
        return LayerPrecision.of(**{**dict(self.put), **layers})

    def with_layers(self, step: str, layers: Iterable[str]) -> LayerPrecision:
        """The same with these layers at a step too; a layer's weights have one width, the one put last."""
        added = frozenset(layers)
        others = WIDTHS.values() if STEPS[step].bits is not None else ()
        found = {**dict(self.put), **{other.name: self[other.name] - added for other in others}}
        return LayerPrecision.of(**{**found, step: self[step] | added})

    def step_of(self, layer: str) -> str | None:
        """The dearest step that a layer is put to; None for one that is as the recipe has it."""
        return next((name for name, layers in reversed(self.put) if layer in layers), None)

    def spec(self, recipe: Recipe, layer: str, end: bool) -> LayerSpec | None:
        """The spec of a layer that is not left in float here; None if it stays so by the recipe.

        Args:
            recipe: what it would be otherwise.
            layer: its name.
            end: whether it is one of the network's first or last layers.
        """
        spec = recipe.spec(layer, end)
        quantizing = [STEPS[name] for name, layers in self.put if layer in layers and STEPS[name].quantizes]
        weights = [step for step in quantizing if step.bits is not None]
        activations = [step for step in quantizing if step.bits is None]
        for step in (*weights[-1:], *activations[-1:]):
            spec = None if spec is None else step.change(spec)
        return spec


class Chosen:
    """The layers put to a step as an attribute of a model: read names, assign names or patterns."""

    def __set_name__(self, owner: type, name: str) -> None:
        self.step = next(step.name for step in STEPS.values() if step.attribute == name)

    def __get__(self, model: Any, owner: type | None = None) -> frozenset[str]:
        layers: frozenset[str] = model.precision[self.step]
        return layers

    def __set__(self, model: Any, patterns: Collection[str]) -> None:
        layers = dict.fromkeys(model.layer_names)  # a dict: looked up by name, and in order for messages
        names = {name for pattern in patterns for name in match_layers(pattern, layers)}
        model.choose(model.precision.but(**{self.step: names}))
        model.fit_anew()


class LayerLists:
    """What a model has for each step: the layers put to it on request, whatever the recipe says."""

    float_layers = Chosen()
    #: Which read activations in 16 bits, on targets whose files may hold such codes (see ``target.simulated_bits``).
    int16_layers = Chosen()
    #: Whose activations get their range at run time. A layer of a kind that the target has no such kernel for (see
    #: ``target.run_time_ranges``) is left in float, and says so.
    dynamic_layers = Chosen()
    #: Whose integer weights have so many bits. Each width has ranges of its own, the weight's nearest by squared error
    #: when it is first asked for in a calibrated model.
    bits8_layers = Chosen()
    bits6_layers = Chosen()
    bits4_layers = Chosen()
    bits3_layers = Chosen()
    bits2_layers = Chosen()
