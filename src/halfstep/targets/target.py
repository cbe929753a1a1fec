"""A deployment target: the table of what a runtime executes in integers, and its rules, as data.

Why kinds of operators stay in float, where the targets say the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from halfstep.formats import Format, Integer
from halfstep.granularity import PerGroup
from halfstep.recipe import TensorSpec


@dataclass(frozen=True)
class Kernel:
    """What one kind of operator needs around it to run on an integer kernel.

    Attributes:
        output: its result must be quantized too (True), or may come out in float (False).
        joins: it is computed at the end of the layer that makes one of its inputs, so that input must not be
            quantized (True), or it is a kernel of its own that reads codes on every input (False).
        partial: worth it as soon as one input comes in codes, since quantizing the others costs no more than
            quantizing what becomes of them.
        affine: what it makes has the target's usual flavour, whatever its sign.
        reads: how many of its arguments, the first, it reads in codes; None: all activations.
    """

    output: bool = False
    joins: bool = False
    partial: bool = False
    affine: bool = False
    reads: int | None = None


@dataclass(frozen=True)
class Lowering:
    """How the runtime wants the file written.

    Attributes:
        integer_bias: biases of convs and of products of matrices are int32 in steps of ``scale_x * scale_w``, which
            the simulation takes too; otherwise float32.
        weight_bits: codes of weights of fewer bits are stored times a power of two, so that they fill so many, and
            the scale divided by it: the same numbers, but finer steps for biases. 0: as they are.
        full_rank_bias: a bias added to a product of matrices is stored with the product's rank.
        added_bias: beside recurrent layers a conv's bias is written as an Add between it and its quantizer.
        turned_floats: the quantizer of attention's keys stands behind the operators that turn them.
        guarded_floats: a float layer between quantizers needs a bias that is no constant, or the runtime quantizes
            its weight by itself.
        saturated_gates: a HardSigmoid between quantizers is written as an Add, whose saturation clips.
        detached_clips: a ReLU or clip behind a product of matrices, where no quantizer takes it in, is written as Max
            and Min, or the product stays float.
    """

    integer_bias: bool = False
    weight_bits: int = 0
    full_rank_bias: bool = False
    added_bias: bool = False
    turned_floats: bool = False
    guarded_floats: bool = False
    saturated_gates: bool = False
    detached_clips: bool = False


@dataclass(frozen=True)
class Target:
    """A runtime, as far as quantization must know it.

    Attributes:
        name: the name that users write.
        activations: the flavour of integer that its kernels take for activations (bits come from the recipe).
        weights: the same for weights.
        signed: the same for activations that may be negative, where kernels are faster on another flavour for those.
        layers: kinds with a weight (or two activations to multiply) that have an integer kernel.
        followers: kinds that have one too but are worth it only between integer neighbours.
        passes: kinds that move codes unchanged: their result shares the input's scale and zero point.
        absorbed: clipping kinds that disappear into the quantization that follows them.
        fused: kinds that are computed in float at the end of the layer before them, which stays integer.
        decomposed: kinds that are split into simpler ones before placement, because the parts have kernels.
        reasons: for kinds without a kernel, why and what follows, in words.
        run_time_ranges: layers with a weight that have an integer kernel for activations whose range is computed at
            run time.
        tables: kinds that only look rows of their weight up; the weight may be stored in few bits.
        packed: the runtime multiplies by weights packed in groups, and unpacks at load what it has no kernel for.
        activation_bits: widths its kernels execute; other widths are simulated on the inputs of layers only.
        simulated_bits: widths that it has no kernels for, but whose codes its files may hold: it computes in float
            between them, so that a file shows what hardware with such kernels would answer.
        misread: kinds whose results it takes wrongly for codes: what reads them, directly or moved, is in float.
        widest: bits of an activation at most, of which one that asks for more gets so many.
        pair_sums: on x86 processors without dot-product instructions (VNNI), its kernels add two products of codes in
            16 bits, and saturate.
        runtime: the one of :mod:`halfstep.runtime` that runs its files here and says what became integer.
        lowering: how it wants the file written.
    """

    name: str
    activations: Integer
    weights: Integer
    layers: Mapping[str, Kernel]
    followers: Mapping[str, Kernel] = field(default_factory=dict)
    passes: frozenset[str] = frozenset()
    absorbed: frozenset[str] = frozenset()
    fused: frozenset[str] = frozenset()
    decomposed: frozenset[str] = frozenset()
    reasons: Mapping[str, str] = field(default_factory=dict)
    run_time_ranges: frozenset[str] = frozenset()
    tables: frozenset[str] = frozenset()
    packed: bool = False
    activation_bits: frozenset[int] = frozenset({8})
    simulated_bits: frozenset[int] = frozenset()
    signed: Integer | None = None
    misread: frozenset[str] = frozenset()
    widest: int = 16
    pair_sums: bool = False
    runtime: str = "onnxruntime"
    lowering: Lowering = Lowering()

    def activation_format(self, spec: TensorSpec, negative: bool = False) -> Format:
        """The format of an activation: the spec's own, or this target's flavour at the spec's bits.

        ``negative`` says whether it may be negative.

        Ranges per row and group are symmetric whatever the target's flavour: kernels that sum group by group have no
        zero point for activations.
        """
        if spec.dynamic and isinstance(spec.granularity, PerGroup):
            return Integer(8)
        flavour = self.signed if negative and self.signed is not None else self.activations
        fmt = _flavour(flavour, spec)
        return replace(fmt, bits=min(fmt.bits, self.widest)) if isinstance(fmt, Integer) else fmt

    def weight_format(self, spec: TensorSpec) -> Format:
        """The format of a weight: the spec's own, or this target's flavour at the spec's bits."""
        return _flavour(self.weights, spec)

    def portable_format(self, weight: Format, activation: Format) -> Format:
        """The weight's format with at most so many bits that two products with activations add up to 16 bits.

        Kernels shift signed activations to unsigned codes first.

        >>> from halfstep.targets import find_target
        >>> int8, codes = Integer(8), Integer(8, signed=False, symmetric=False)
        >>> print(find_target("onnxruntime").portable_format(int8, codes))
        s7 scale
        >>> print(find_target("onnxruntime").portable_format(int8, replace(codes, bits=4)))
        s8 scale
        """
        if not (self.pair_sums and isinstance(weight, Integer) and isinstance(activation, Integer)):
            return weight
        largest = activation.quant_max + (128 if activation.signed else 0)
        while weight.bits > 2 and 2 * largest * max(-weight.quant_min, weight.quant_max) >= 2**15:
            weight = replace(weight, bits=weight.bits - 1)
        return weight

    def stretch(self, weight: Format) -> int:
        """What the codes of a weight are multiplied by in the file, and its scale divided by: a power of two."""
        return 2 ** max(0, self.lowering.weight_bits - weight.bits) if isinstance(weight, Integer) else 1

    def kernel(self, kind: str) -> Kernel:
        """What the kernel of a layer or follower of this kind needs."""
        return self.layers[kind] if kind in self.layers else self.followers[kind]

    def holds(self, bits: int) -> bool:
        """Whether a file for it may hold activations of so many bits, executed as integers or not."""
        return bits in self.activation_bits | self.simulated_bits

    def executes(self, activation: Format) -> bool:
        """Whether integer kernels exist for activations in this format."""
        return (
            isinstance(activation, Integer)
            and activation.bits in self.activation_bits
            and any(
                activation.signed == flavour.signed and (activation.symmetric or not flavour.symmetric)
                for flavour in (self.activations, self.signed)
                if flavour is not None
            )
        )


def _flavour(template: Integer, spec: TensorSpec) -> Format:
    if isinstance(spec.format, int):
        return replace(template, bits=spec.format)
    return spec.format


def no_kernel(target: str, then: str) -> str:
    """The reason of a kind that the target's runtime has no integer kernel for, and what follows."""
    return f"has no integer kernel on {target} and runs in float; {then}"


def shared(target: str) -> dict[str, str]:
    """Return the reasons that hold for every target so far."""
    consequences = {
        "layer_norm": "the linear layers after it stay integer",
        "sub": "the layers around it stay integer",
        "div": "fold a constant divisor into the layer before, if it matters",
        "resize_linear": "nearest-neighbour resizing would be free",
        "mean": "a mean over all of the spatial axes would be an integer global pool",
        "adaptive_average_pool": "an output size of 1 would be an integer global pool",
    }
    return {
        **{kind: no_kernel(target, then) for kind, then in consequences.items()},
        "batch_norm": "does not follow a conv or linear directly, so it was not folded; it runs in float",
        **dict.fromkeys(
            ("topk", "sort", "argsort", "nms"), "orders values, and codes would make ties of them"
        ),
        "grid_sampler": no_kernel(target, "its grid holds places, for which 8 bits are too few"),
        "quantized": "is taken with the quantizers that the file had already",
        "embedding": "a table look-up: nothing is multiplied",
    }
