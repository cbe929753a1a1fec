"""What to quantize, and how: layer-name patterns to specs."""

from __future__ import annotations

import difflib
from collections.abc import Collection
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from halfstep.errors import RecipeError
from halfstep.formats import Format, Integer
from halfstep.granularity import Granularity, PerChannel, PerGroup, PerTensor


@dataclass(frozen=True)
class TensorSpec:
    """The number format of one tensor and how many scales it has.

    Attributes:
        format: a format, or a number of bits. Bits leave the flavour to the deployment target: onnxruntime takes
            unsigned affine activations and signed symmetric weights, tensorrt signed symmetric ones for both.
        granularity: None for the usual one: per tensor for activations, per output channel for weights.
        dynamic: an activation's range is computed from the tensor itself, at run time: for inputs whose range no
            calibration can know. Per tensor, or, with weights in groups, for each row and group of it.
    """

    format: Format | int = 8
    granularity: Granularity | None = None
    dynamic: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.format, int) and not 2 <= self.format <= 16:
            raise RecipeError(f"bits: got {self.format}, needed 2 to 16 (use hs.Recipe.codebook for 1 bit)")
        if self.dynamic:
            _check_dynamic(self)

    @property
    def bits(self) -> int:
        """Bits per stored value."""
        return self.format if isinstance(self.format, int) else self.format.bits


@dataclass(frozen=True)
class LayerSpec:
    """How a layer's weight and the activations it reads are quantized; None leaves that side in float."""

    weights: TensorSpec | None = TensorSpec(8)
    activations: TensorSpec | None = TensorSpec(8)

    def __post_init__(self) -> None:
        if self.weights is not None and self.weights.dynamic:
            raise RecipeError("weights: got dynamic=True, needed False; a weight's range never changes")
        activations = self.activations
        if activations is not None and activations.dynamic and isinstance(activations.granularity, PerGroup):
            _check_groups(self.weights, activations.granularity)

    def with_dynamic_activations(self) -> LayerSpec:
        """The same weights; activations in 8 bits with ranges computed at run time, in groups if the weights are."""
        group = self.weights.granularity if self.weights is not None else None
        granularity = PerGroup(-1, group.size) if isinstance(group, PerGroup) else None
        return replace(self, activations=TensorSpec(8, granularity, dynamic=True))


@dataclass(frozen=True)
class Recipe:
    """Layer-name patterns and the specs they get; the last pattern that matches wins.

    Attributes:
        default: the spec of every layer that no pattern matches.
        overrides: pairs of a layer's name or a shell-style pattern (``"blocks.*.conv1"``) and a spec, None for "always
            float".
        ends: the spec of the first and last layers (those with no other layer before or behind them) where no pattern
            matches; None: the default. A network that has no other layers gets the default throughout.
        portable: whether weights of 8 bits get 7 where integer kernels for processors without dot-product instructions
            would saturate; see :meth:`int8`.

    >>> Recipe.int8().override("fc", None).spec("fc") is None
    True
    """

    default: LayerSpec = LayerSpec()
    overrides: tuple[tuple[str, LayerSpec | None], ...] = ()
    ends: LayerSpec | None = None
    portable: bool | None = None

    @classmethod
    def int8(cls, portable: bool | None = None) -> Recipe:
        """Weights and activations in 8 bits.

        On x86 processors without VNNI, kernels add two products of 8 by 8 bits in 16 bits and saturate: the same file
        then gives other answers, often much worse ones. Weights of 7 bits cannot overflow there; products of two signed
        activations, which OpenVINO's kernels take, stay in float then.

        Args:
            portable: True gives weights 7 bits wherever a sum can saturate, so that the file answers alike on every
                processor. False leaves them 8. None, the default, does what the processor that this runs on needs.
        """
        return cls(portable=portable)

    @classmethod
    def uniform(
        cls,
        weights: int | Format | None = 8,
        activations: int | Format | None = 8,
        weight_granularity: Granularity | None = None,
        ends: int | None = 8,
        portable: bool | None = None,
    ) -> Recipe:
        """Uniform formats: bits or a format for each side, None for float.

        Args:
            weights: bits or a format of the weights.
            activations: the same of what the layers read.
            weight_granularity: None for one scale per output channel.
            ends: bits that the first and last layers get on a side that asks for fewer than :data:`FEW_BITS`, unless
                an override says otherwise: they hold few of the parameters and much of the accuracy. None: no
                exception is made.
            portable: see :meth:`int8`.

        Raises:
            RecipeError: if bits are not 2 to 16, or both sides are None.
        """
        if weights is None and activations is None:
            raise RecipeError("weights and activations are both None: nothing would be quantized")
        default = LayerSpec(
            None if weights is None else TensorSpec(weights, weight_granularity),
            None if activations is None else TensorSpec(activations),
        )
        sides = LayerSpec(_widened(default.weights, ends), _widened(default.activations, ends))
        return cls(default, ends=None if sides == default else sides, portable=portable)

    @classmethod
    def dynamic(cls, weights: int = 8, group: int | None = None, portable: bool | None = None) -> Recipe:
        """Activations in 8 bits with ranges computed at run time, from each tensor itself: nothing to calibrate.

        Args:
            weights: bits.
            group: None for one range per activation tensor and one per output channel of a weight. Otherwise weights
                have a range for each so many neighbours along the input axis, activations for each row and group.
            portable: see :meth:`int8`.

        Raises:
            RecipeError: if the bits are not 2 to 8, or the group is no power of two from 16.
        """
        if not 2 <= weights <= 8:
            raise RecipeError(f"weights: got {weights} bits, needed 2 to 8 beside activations of 8 bits")
        granularity = None if group is None else PerGroup(1, group)
        return cls(LayerSpec(TensorSpec(weights, granularity)).with_dynamic_activations(), portable=portable)

    @classmethod
    def weight_only(cls, bits: int | Format = 4, group: int | None = 128) -> Recipe:
        """Only weights, in groups of ``group`` along the input axis (None: per channel); activations stay float.

        ONNX Runtime takes a last group that has fewer. For other runtimes groups are the next smaller size that divides
        the axis (of 4 bits and fewer an even one), down to a quarter of ``group``; layers without one stay float.
        """
        return cls(LayerSpec(TensorSpec(bits, None if group is None else PerGroup(1, group)), None))

    @classmethod
    def codebook(
        cls,
        weights: Format,
        activations: int | Format | None = None,
        weight_granularity: Granularity | None = None,
        ends: int | None = None,
    ) -> Recipe:
        """Weights in a codebook format, activations in float unless given; all layers, unless ``ends`` has bits.

        >>> book = Codebook(torch.tensor([-1.5, -0.5, 0.5, 1.5]))
        >>> Recipe.codebook(book, 4, ends=8).spec("stem", end=True) == LayerSpec(TensorSpec(8), TensorSpec(8))
        True
        """
        return cls.uniform(weights, activations, weight_granularity, ends)

    def override(self, pattern: str, spec: LayerSpec | None) -> Recipe:
        """The same recipe with one more pattern; None leaves the layers that it matches in float."""
        return replace(self, overrides=(*self.overrides, (pattern, spec)))

    def spec(self, layer: str, end: bool = False) -> LayerSpec | None:
        """The spec of the layer called ``layer``; None if it stays in float.

        Args:
            layer: its name.
            end: whether it is one of the network's first or last layers.
        """
        found: LayerSpec | None = self.ends if end and self.ends is not None else self.default
        for pattern, spec in self.overrides:
            if layer == pattern or fnmatchcase(layer, pattern):
                found = spec
        return found

    def check(self, layers: Collection[str]) -> None:
        """Raise if a pattern matches none of ``layers``.

        Raises:
            RecipeError: naming the pattern and the nearest layer names.
        """
        for pattern, _ in self.overrides:
            match_layers(pattern, layers)


def _widened(spec: TensorSpec | None, bits: int | None) -> TensorSpec | None:
    """The spec at ``bits`` where it asks for few."""
    if spec is None or bits is None or spec.bits >= FEW_BITS:
        return spec
    return TensorSpec(bits, spec.granularity)


def _check_dynamic(spec: TensorSpec) -> None:
    """Raise unless runtimes can compute the range: 8 bits, one range per tensor or per row and group."""
    if spec.bits != 8 or not isinstance(spec.format, int | Integer):
        raise RecipeError(
            f"dynamic activations: got {spec.format}, needed 8 bits; runtimes compute no other ranges at run time"
        )
    size = spec.granularity.size if isinstance(spec.granularity, PerGroup) else 16
    if isinstance(spec.granularity, PerChannel) or size < 16 or size & (size - 1):
        raise RecipeError(
            f"dynamic activations: got ranges {spec.granularity}, needed one per tensor, or groups of 16, 32, 64 ..."
        )


def _check_groups(weights: TensorSpec | None, groups: PerGroup) -> None:
    """Raise unless the weights have the groups of the activations: the kernel sums group by group."""
    own = weights.granularity if weights is not None else None
    if weights is None or not isinstance(own, PerGroup) or own.size != groups.size:
        got = "float" if weights is None else str(own or "per channel")
        raise RecipeError(
            f"dynamic activations {groups}: got weights {got}, needed weights in the same groups; "
            f"hs.Recipe.dynamic(4, group={groups.size}) makes both"
        )
    if weights.bits > 8 or not isinstance(weights.format, int | Integer):
        raise RecipeError(
            f"dynamic activations {groups}: got weights in {weights.format}, needed integers of 2 to 8 bits"
        )


def match_layers(pattern: str, layers: Collection[str]) -> list[str]:
    """The names that a shell-style pattern matches; a name matches itself alone, whatever it means as a pattern.

    Raises:
        RecipeError: if it matches none, with the nearest names.

    >>> match_layers("a[0]", ["a[0]", "a0"]), match_layers("a?", ["a[0]", "a0"])
    (['a[0]'], ['a0'])
    """
    if pattern in layers:
        return [pattern]
    names = list(layers)
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.3) or names[:3]
        raise RecipeError(
            f"pattern {pattern!r} matches no layer; the nearest names are {', '.join(map(repr, near))}"
        )
    return found


#: Below so many bits the first and last layers get more of them by default.
FEW_BITS = 6

#: The usual granularities.
ACTIVATIONS: Granularity = PerTensor()
WEIGHTS: Granularity = PerChannel(0)
