"""A deployment target: the table of what a runtime executes in integers, and its rules, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from halfstep.formats import Format, Integer
from halfstep.recipe import TensorSpec


@dataclass(frozen=True)
class Kernel:
    """What one kind of operator needs around it to run on an integer kernel.

    Attributes:
        output: its result must be quantized too (True), or may come out in float (False).
    """

    output: bool = False


@dataclass(frozen=True)
class Target:
    """A runtime, as far as quantization must know it.

    Attributes:
        name: the name that users write.
        activations: the flavour of integer that its kernels take for activations (bits come from the recipe).
        weights: the same for weights.
        layers: kinds with a weight (or two activations to multiply) that have an integer kernel.
        followers: kinds that have one too but are worth it only between integer neighbours.
        passes: kinds that move codes unchanged: their result shares the input's scale and zero point.
        absorbed: clipping kinds that disappear into the quantization that follows them.
        decomposed: kinds that are split into simpler ones before placement, because the parts have kernels.
        reasons: for kinds without a kernel, why and what follows, in words.
        activation_bits: widths its kernels execute; other widths are simulated on the inputs of layers only.
    """

    name: str
    activations: Integer
    weights: Integer
    layers: Mapping[str, Kernel]
    followers: Mapping[str, Kernel] = field(default_factory=dict)
    passes: frozenset[str] = frozenset()
    absorbed: frozenset[str] = frozenset()
    decomposed: frozenset[str] = frozenset()
    reasons: Mapping[str, str] = field(default_factory=dict)
    activation_bits: frozenset[int] = frozenset({8})

    def activation_format(self, spec: TensorSpec) -> Format:
        """The format of an activation: the spec's own, or this target's flavour at the spec's bits."""
        return _flavour(self.activations, spec)

    def weight_format(self, spec: TensorSpec) -> Format:
        """The format of a weight: the spec's own, or this target's flavour at the spec's bits."""
        return _flavour(self.weights, spec)

    def kernel(self, kind: str) -> Kernel:
        """What the kernel of a layer or follower of this kind needs."""
        return self.layers[kind] if kind in self.layers else self.followers[kind]

    def executes(self, activation: Format) -> bool:
        """Whether integer kernels exist for activations in this format."""
        return (
            isinstance(activation, Integer)
            and activation.bits in self.activation_bits
            and activation.signed == self.activations.signed
            and (activation.symmetric or not self.activations.symmetric)
        )


def _flavour(template: Integer, spec: TensorSpec) -> Format:
    if isinstance(spec.format, int):
        return Integer(bits=spec.format, signed=template.signed, symmetric=template.symmetric)
    return spec.format
