"""How near a quantized network's outputs are to the float network's: no labels needed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from halfstep.batches import abreast
from halfstep.errors import ArgumentError, MetricError, NotObservedError
from halfstep.fake_quantize import Mode
from halfstep.graph.inputs import ModelInputs
from halfstep.model import QuantizedModel, run
from halfstep.progress import track
from halfstep.runtime.parity import compared, decibels, error_power, power

Measure = Literal["kl", "sqnr"]


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
        passes: forward passes made over them, the float one included.

    Raises:
        NotObservedError: nothing was kept, since nothing was observed.
    """

    def __init__(
        self, model: QuantizedModel, examples: int = 256, batches: Sequence[ModelInputs] | None = None
    ) -> None:
        if examples < 1:
            raise ArgumentError(f"examples: got {examples}, needed at least 1")
        batches = model.sample if batches is None else batches
        if not batches:
            raise NotObservedError("no example was kept to compare outputs on; run observe() first")
        self.batches = list(_first(model, batches, examples))
        self.examples = sum(map(model.captured.batch_size, self.batches))
        with model.using(Mode.FLOAT), torch.no_grad():
            found = abreast(model, lambda _, batch: run(model, batch), track(self.batches, "float outputs"))
            outputs = list(found)
        self._outputs = [compared(output) for output in outputs]
        self._signal = sum(map(power, self._outputs))
        if not self._outputs[0]:
            raise MetricError(f"the model's outputs ({type(outputs[0]).__name__}) hold no tensor to compare")
        self._decisions = sum(math.prod(wanted[0].shape[:-1]) for wanted in self._outputs)
        self.passes = 1

    def compare(self, model: QuantizedModel, what: str = "comparing") -> Fidelity:
        """Run ``model`` as it stands over the examples, and compare."""

        def work(index: int, batch: ModelInputs) -> tuple[float, float]:
            wanted, got = self._outputs[index], compared(run(model, batch))
            divergence = float(divergences(wanted[0], got[0]).sum()) if self.has_classes else math.nan
            return divergence, error_power(wanted, got)

        with torch.no_grad():
            found = list(abreast(model, work, track(self.batches, what)))
        self.passes += 1
        divergence, noise = (sum(column) for column in zip(*found, strict=True))
        return Fidelity(divergence / self._decisions, decibels(self._signal, noise))

    @property
    def has_classes(self) -> bool:
        """Whether the first float output can be logits: (..., classes), two or more of them."""
        first = self._outputs[0][0]
        return first.is_floating_point() and first.dim() >= 2 and first.shape[-1] >= 2

    @property
    def by(self) -> Measure:
        """The measure that suits the outputs: the divergence if they can be logits."""
        return "kl" if self.has_classes else "sqnr"

    def check(self, by: Measure) -> None:
        """Raise unless the outputs can be measured so.

        Raises:
            ArgumentError: an unknown measure, or ``"kl"`` of outputs that are no logits.
        """
        if by not in ("kl", "sqnr"):
            raise ArgumentError(f"by: got {by!r}, needed 'kl' (logits of classes) or 'sqnr' (any outputs)")
        if by == "kl" and not self.has_classes:
            raise ArgumentError(
                f"by: got 'kl' for outputs of shape {tuple(self._outputs[0][0].shape)}, needed logits (..., classes); "
                "choose by='sqnr'"
            )


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
