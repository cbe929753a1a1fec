"""How near one model's outputs are to another's: signal to noise, divergence, agreement.

Does the deployed file answer as the simulation does?

How near a quantized network's outputs are to the float network's: no labels needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from halfstep.batches import abreast
from halfstep.distributed import keep, share, together
from halfstep.errors import ArgumentError, DataError, MetricError, NotObservedError
from halfstep.evaluate import class_axis
from halfstep.fake_quantize import Mode
from halfstep.graph.captured import Captured
from halfstep.graph.inputs import ModelInputs, call_arguments
from halfstep.model import QuantizedModel, run
from halfstep.progress import track

#: What models that return integers alone, such as classes, must reach, where rounding may tip a few: the share that is
#: equal.
MINIMUM_EQUAL = 0.5


@dataclass(frozen=True)
class Parity:
    """How far two models agree.

    Attributes:
        top1: share of the same answers: the same largest of the first float output's classes, which are its last axis
            (in maps of four dimensions and more its second one); of a model that returns integers alone, the same
            integer in its first output. None where there is no such answer: a single class, or outputs that are no
            classes.
        sqnr: signal to noise of the outputs in dB, 10 log10(sum y^2 / sum (y - y')^2), over all float outputs; inf if
            they are equal, NaN if one of them is NaN. None of a model that returns integers alone.
        examples: how many answers ``top1`` is the share of; 0 where it is None.
        equal: whether all outputs are equal to the last bit.
    """

    top1: float | None
    sqnr: float | None
    examples: int
    equal: bool = False

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Self:
        """From plain data, where infinity and NaN have become None."""
        return cls(data["top1"], data["sqnr"], data["examples"], data.get("equal", False))

    def reaches(self, least: float) -> bool:
        """Whether they agree to so many dB, which NaN never does; of integers alone, to :data:`MINIMUM_EQUAL`."""
        if self.sqnr is None:
            return self.top1 is None or self.top1 >= MINIMUM_EQUAL
        return self.sqnr >= least

    def rows(self) -> list[tuple[str, str]]:
        """What there is to show of it, name and figure."""
        rows = []
        if self.top1 is not None:
            rows.append(("same answer as the simulation", f"{self.top1:.2%} of {self.examples:,}"))
        if self.equal or self.sqnr is not None:
            noise = "equal to the last bit" if self.equal else f"{self.sqnr:.1f} dB"
            rows.append(("outputs against the simulation's", noise))
        return rows


def compare(
    reference: Callable[..., Any],
    other: Callable[..., Any],
    batches: Iterable[ModelInputs],
    classes: bool = True,
) -> Parity:
    """Run both models on every batch and compare their outputs; where shapes differ, nothing agrees.

    Args:
        reference: gives the signal.
        other: gives the noise.
        batches: of model inputs.
        classes: whether the first float output may be taken for scores of classes, the largest being the answer.

    Raises:
        DataError: if there is no batch, or a model returns no tensor.
    """
    signal = noise = 0.0
    same = decisions = floats = 0
    equal = True
    for inputs in batches:
        args, kwargs = call_arguments(inputs)
        with torch.no_grad():
            wanted, got = (
                [tensor.cpu() for tensor in tensors_in(model(*args, **kwargs))]
                for model in (reference, other)
            )
        if not wanted:
            raise DataError("parity: the model returns no tensor, so there is nothing to compare")
        equal &= all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))
        scores, others = float_tensors(wanted), float_tensors(got)
        floats += len(scores)
        signal, noise = signal + power(scores), noise + error_power(scores, others)
        axis = class_axis(scores[0].shape) if scores else None
        if axis is not None and classes:
            mine, theirs = (each[0].argmax(axis) for each in (scores, others))
        elif not scores:
            mine, theirs = wanted[0], got[0]
        else:
            continue
        decisions += mine.numel()
        same += int((mine == theirs).sum()) if mine.shape == theirs.shape else 0
    if not (floats or decisions):
        raise DataError("parity: no batches to compare on; give at least one")
    return Parity(
        same / decisions if decisions else None, decibels(signal, noise) if floats else None, decisions, equal
    )


def signal_to_noise(wanted: torch.Tensor, got: torch.Tensor) -> float:
    """``10 log10(sum y^2 / sum (y - y')^2)`` in dB; infinite where both are equal, NaN where one of them is."""
    return decibels(float((wanted * wanted).sum()), float(((wanted - got) ** 2).sum()))


def overall_noise(wanted: Sequence[torch.Tensor], got: Sequence[torch.Tensor]) -> float:
    """:func:`signal_to_noise` of all outputs together."""
    return decibels(power(wanted), error_power(wanted, got))


def decibels(signal: float, noise: float) -> float:
    """Return 10 log10(signal / noise); inf without noise, -inf with infinite noise or noise alone, NaN if the noise is.

    >>> decibels(100.0, 1.0)
    20.0
    """
    if math.isnan(noise):
        return math.nan
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if 0 < signal < math.inf > noise else -math.inf


def compared(outputs: Any) -> list[torch.Tensor]:
    """What is compared of a model's outputs: the float tensors, or where there are none, all others."""
    return float_tensors(outputs) or tensors_in(outputs)


def power(wanted: Iterable[torch.Tensor]) -> float:
    """The signal in outputs: the sum of squares, of integers how many there are."""
    return sum(
        float(a.detach().double().square().sum()) if a.is_floating_point() else a.numel() for a in wanted
    )


def balanced(captured: Captured, outputs: Sequence[Any]) -> Callable[[Any], list[torch.Tensor]]:
    """How outputs are compared: as :func:`compared`, but those of several modules scaled to the same signal in each.

    Else the module with the largest outputs would speak for all.

    Args:
        captured: the network.
        outputs: what it returns for the examples in float.
    """
    if not captured.parts:
        return compared
    signals = {
        name: sum(power(float_tensors(output[name])) for output in outputs) or 1.0 for name in captured.parts
    }

    def scaled(output: Any) -> list[torch.Tensor]:
        found = [
            tensor.double() / math.sqrt(signal)
            for name, signal in signals.items()
            for tensor in float_tensors(output[name])
        ]
        return found or compared(output)

    return scaled


def error_power(wanted: Iterable[torch.Tensor], got: Iterable[torch.Tensor]) -> float:
    """The noise in outputs: the sum of squared differences, of integers how many differ; inf where shapes do."""

    def error(a: torch.Tensor, b: torch.Tensor) -> float:
        if a.shape != b.shape:
            return math.inf
        if a.is_floating_point():
            return float((a.double() - b.double()).detach().square().sum())
        return float((a != b).sum())

    return sum(error(a, b) for a, b in zip(wanted, got, strict=True))


def float_tensors(outputs: Any) -> list[torch.Tensor]:
    """Every floating-point tensor in a model's outputs."""
    return [tensor for tensor in tensors_in(outputs) if tensor.is_floating_point()]


def tensors_in(outputs: Any) -> list[torch.Tensor]:
    """Every tensor in a model's outputs."""
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)]


Measure = Literal["kl", "sqnr"]


def default_measure(outputs: Sequence[Tensor], several: bool) -> Measure:
    """Which measure suits outputs where nobody says: the divergence of one module's (batch, classes), else the noise.

    With more dimensions the last axis may be features as well as classes, and a softmax over features means nothing.

    Args:
        outputs: the float tensors that a model returned.
        several: whether several modules returned them.
    """
    first = next(iter(outputs), None)
    logits = first is not None and first.is_floating_point() and first.dim() == 2 and first.shape[-1] >= 2
    return "kl" if logits and not several else "sqnr"


@dataclass(frozen=True)
class Fidelity:
    """What quantization did to the outputs.

    Attributes:
        kl: mean Kullback-Leibler divergence, in nats, of the softmax over the last axis of the first float output
            from the float network's; NaN where that axis has one entry, or there is no float output. 0 is equal.
        sqnr: signal to noise over all float outputs in dB, 10 log10(sum y^2 / sum (y - y')^2); inf is equal. Of a model
            that returns integers alone, 10 log10(values / values that differ).
    """

    kl: float
    sqnr: float

    def __str__(self) -> str:
        return self.noise() if math.isnan(self.kl) else f"KL {self.kl:.3g}, {self.noise()}"

    def noise(self) -> str:
        """The dB in words."""
        return "equal outputs" if self.sqnr == math.inf else f"{self.sqnr:.1f} dB"

    def figures(self) -> tuple[str, str]:
        """Divergence and dB for the columns of a table; a dash where there is none."""
        kl = "–" if math.isnan(self.kl) else f"{self.kl:.3g}"
        return kl, "equal" if self.sqnr == math.inf else f"{self.sqnr:.1f}"

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Fidelity:
        """The one whose fields are ``data``, as numbers or text."""
        return cls(float(data["kl"]), float(data["sqnr"]))

    def loss(self, by: Measure) -> float:
        """The measure as a number of which less is better; a network that answers NaN is the worst."""
        value = self.kl if by == "kl" else -self.sqnr
        return math.inf if math.isnan(value) else value


class Reference:
    """The float network's outputs on the examples that :func:`~halfstep.observe` kept, computed once.

    Args:
        model: observed.
        examples: at most so many of them.
        batches: compare on these instead of the kept ones.

    Attributes:
        examples: how many there are.
        compared: what is compared of outputs, see :func:`balanced`.
        passes: forward passes made over them, the float one included.

    Raises:
        NotObservedError: nothing was kept, since nothing was observed.
    """

    #: Every rank of a run makes its own of the same examples, see :func:`.keep`.
    known_by_name = True

    def __init__(
        self, model: QuantizedModel, examples: int = 256, batches: Sequence[ModelInputs] | None = None
    ) -> None:
        if examples < 1:
            raise ArgumentError(f"examples: got {examples}, needed at least 1")
        keep(self, model, examples, batches)
        batches = model.sample if batches is None else batches
        if not batches:
            raise NotObservedError("no example was kept to compare outputs on; run observe() first")
        self.batches = list(_first(model, batches, examples))
        self.examples = sum(map(model.captured.batch_size, self.batches))
        with model.using(Mode.FLOAT), torch.no_grad():
            found = abreast(model, lambda _, batch: run(model, batch), track(self.batches, "float outputs"))
            outputs = list(found)
        self.compared = balanced(model.captured, outputs)
        self._outputs = [self.compared(output) for output in outputs]
        self._several = bool(model.captured.parts)
        self._signal = sum(map(power, self._outputs))
        if not self._outputs[0]:
            raise MetricError(f"the model's outputs ({type(outputs[0]).__name__}) hold no tensor to compare")
        self._decisions = sum(math.prod(wanted[0].shape[:-1]) for wanted in self._outputs)
        self.passes = 1

    def compare(self, model: QuantizedModel, what: str = "comparing") -> Fidelity:
        """Run ``model`` as it stands over the examples, and compare; the ranks of a run share the batches."""
        self.passes += 1
        found = together(Reference.compared_batches, self, model, what)
        divergence, noise = (sum(column) for column in zip(*found, strict=True))
        return Fidelity(divergence / self._decisions, decibels(self._signal, noise))

    def compared_batches(self, model: QuantizedModel, what: str) -> list[tuple[float, float]]:
        """Divergence and noise of each batch, where they are this rank's share or it is rank 0."""
        mine = share()

        def work(index: int, batch: ModelInputs) -> tuple[float, float] | None:
            if not mine.has(index):
                return None
            wanted, got = self._outputs[index], self.compared(run(model, batch))
            divergence = float(divergences(wanted[0], got[0]).sum()) if self.has_classes else math.nan
            return divergence, error_power(wanted, got)

        with torch.no_grad():
            found = list(abreast(model, work, track(self.batches, what)))
        parts = mine.gather(found, "outputs compared")
        return [parts[mine.owner(index)][index] for index in range(len(found))] if mine.leads else []

    @property
    def has_classes(self) -> bool:
        """Whether the first float output can be logits: (..., classes), two or more of them; of one module alone."""
        first = self._outputs[0][0]
        return not self._several and first.is_floating_point() and first.dim() >= 2 and first.shape[-1] >= 2

    @property
    def by(self) -> Measure:
        """The :func:`default_measure` of the outputs."""
        return default_measure(self._outputs[0], self._several)

    def check(self, by: Measure) -> None:
        """Raise unless the outputs can be measured so.

        Raises:
            ArgumentError: an unknown measure, or ``"kl"`` of outputs that are no logits.
        """
        if by not in ("kl", "sqnr"):
            raise ArgumentError(f"by: got {by!r}, needed 'kl' (logits of classes) or 'sqnr' (any outputs)")
        if by == "kl" and not self.has_classes:
            shape = tuple(self._outputs[0][0].shape)
            got = "several modules" if self._several else f"outputs of shape {shape}"
            raise ArgumentError(f"by: got 'kl' for {got}, needed logits (..., classes); choose by='sqnr'")


def halves(
    model: QuantizedModel, batches: Sequence[ModelInputs]
) -> tuple[list[ModelInputs], list[ModelInputs]]:
    """The first and the second half of every batch; a single example is in both.

    The odd one of a batch goes to the half that has fewer: of batches of one every second.
    """
    first, second, ahead = [], [], 0  # by how many the second has more
    for batch in batches:
        size = model.captured.batch_size(batch)
        middle = (size + ahead) // 2
        ahead += size - 2 * middle
        if middle:
            first.append(model.captured.examples(batch, 0, middle))
        if middle < size:
            second.append(model.captured.examples(batch, middle, size))
    return first or second, second


def _first(model: QuantizedModel, batches: Sequence[ModelInputs], examples: int) -> Iterator[ModelInputs]:
    """Batches of examples, up to a number of them."""
    for batch in batches:
        size = min(model.captured.batch_size(batch), examples)
        if size:
            yield model.captured.examples(batch, 0, size)
        examples -= size


def divergences(wanted: Tensor, got: Tensor) -> Tensor:
    """Return KL(softmax(wanted) || softmax(got)) over the last axis, float64, in nats.

    >>> divergences(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0]]))  # ln((1 + e) / 2) - 1/2
    tensor([0.1201], dtype=torch.float64)
    """
    p, q = wanted.double().log_softmax(-1), got.double().log_softmax(-1)
    return torch.where(p == -math.inf, 0.0, p.exp() * (p - q)).sum(-1)
