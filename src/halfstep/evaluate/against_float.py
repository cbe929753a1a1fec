"""Goals without labels: how near a quantized network's answers are to the float model's own."""

from __future__ import annotations

import copy
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import torch

from halfstep.errors import DataError, MetricError, named
from halfstep.evaluate.metric import Metric, logits_of
from halfstep.evaluate.score import Answer, DataMetric, answers
from halfstep.evaluate.set_metric import SetMetric
from halfstep.graph.inputs import ModelInputs
from halfstep.identity import Identity

#: From a model's outputs to the tensor (batch, ...) of them that is compared.
Select = Callable[[Any], torch.Tensor]

#: Noise of so small a share of the signal is that of float32 numbers themselves: (2^-24)^2, 144.5 dB.
ROUNDING = 2.0**-48
MOST_DB = -10 * math.log10(ROUNDING)


class AgainstFloat(DataMetric):
    """A metric that compares with the float model's answers, which it has once it knows the model.

    :func:`halfstep.quantize` and all else that takes a metric let it know the float model that they are given, as it
    was handed over. That model answers to all inputs once in a process, before anything is scored, and what is
    compared of its answers is kept in memory; a run that goes on asks it anew.

    Attributes:
        place: of its answers among those of the metrics over the same inputs; None while it has none.
    """

    place: int | None = None

    @property
    def source(self) -> object:
        """The inputs until there are answers to them; then both."""
        return self.labelled.inputs if self.place is None else self.labelled  # type: ignore[union-attr]

    def answer(self, outputs: Any) -> torch.Tensor:
        """What is kept of the float model's outputs, (batch, ...)."""
        raise NotImplementedError

    def against(self, model: Callable[..., Any]) -> Self:
        """This metric with the answers of ``model``, whichever model a search then starts from.

        Args:
            model: called on each batch of inputs; left as it is, in evaluation mode if it should be.
        """
        return answered({"": self}, model)[""]  # type: ignore[return-value]

    def scores(self, answer: Answer) -> Any:
        """As of labels, which the float model's answers are here."""
        if self.place is None:
            name = type(self).__name__
            raise MetricError(
                f"hs.{name} compares with a float model and was given none: hs.{name}(inputs).against(model)"
            )
        return super().scores(answer._replace(labels=answer.labels[self.place]))  # type: ignore[safe-super]


def answered(metrics: Mapping[str, AgainstFloat], model: Callable[..., Any]) -> dict[str, AgainstFloat]:
    """The metrics with the answers of ``model``; those over the same inputs share one pass of it.

    Raises:
        MetricError: if an answer is none that can be compared with.
        DataError: naming the batch, if the model does not take its inputs.
    """
    over: dict[int, list[str]] = {}
    for name, metric in metrics.items():
        over.setdefault(id(metric.source), []).append(name)
    found = {}
    for names in over.values():
        pairs = metrics[names[0]].labelled
        kept, marks = [], []
        for answer in answers(model, pairs):
            with named(f"the float model's answer to batch {answer.batch}"):
                kept.append(tuple(metrics[name].answer(answer.outputs) for name in names))
            if isinstance(pairs, _Streamed):
                marks.append(Identity(answer.inputs).digest)
        pairs = pairs.with_answers(kept, marks)  # type: ignore[union-attr]
        for place, name in enumerate(names):
            found[name] = copy.copy(metrics[name])
            found[name].labelled, found[name].place = pairs, place
    return {name: found[name] for name in metrics}


class Agreement(AgainstFloat, Metric):
    """The share of examples to which a network gives the same class as the float model: top-1 agreement, 0 to 1.

    ``1/n sum [argmax f'(x) = argmax f(x)]``, over the classes: the last axis of outputs with up to three dimensions
    (batch, tokens, classes), the second one of images (batch, classes, height, width). Where there are several places,
    such as tokens, an example counts with the share of them. The float model's own score is 1, so a ``max_drop`` of
    0.01 lets one class in a hundred change. Outputs with a NaN agree with nothing.

    Args:
        inputs: iterable of batches of model inputs without labels, in the same order each time. The float model's
            answers are kept, a number a class.
        select: takes the scores of the classes out of the outputs; by default the first floating-point tensor.
        shuffled: as for :class:`Metric`.

    >>> def network(x):
    ...     return x.clone()
    >>> inputs = [torch.tensor([[1.0, 2.0], [3.0, 0.0]])]
    >>> Agreement(inputs).against(network).evaluate(lambda x: x + torch.tensor([2.0, 0.0])).value
    0.5
    """

    def __init__(
        self, inputs: Iterable[ModelInputs], select: Select = logits_of, shuffled: bool = False
    ) -> None:
        self.select = select
        score = functools.partial(_same_class, select)
        Metric.__init__(self, _unanswered(inputs, "Agreement"), score, bounds=(0.0, 1.0), shuffled=shuffled)

    def answer(self, outputs: Any) -> torch.Tensor:
        """The class of each place, (batch, ...) int64."""
        scores = _kept(self.select, outputs)
        return _classes(scores)


class Cosine(AgainstFloat, Metric):
    """The cosine of the angle between a network's outputs and the float model's, -1 to 1, as a mean over examples.

    ``1/n sum f'(x) . f(x) / (|f'(x)| |f(x)|)``, an example's outputs flattened: for embeddings, whose directions are
    compared later. The float model's own score is 1. Two outputs that are 0 have a cosine of 1, one a cosine of 0;
    outputs that are not finite have -1.

    Args:
        inputs: iterable of batches of model inputs without labels, in the same order each time. The float model's
            outputs are kept.
        select: takes what is compared out of the outputs; by default the first floating-point tensor.
        shuffled: as for :class:`Metric`.

    >>> inputs = [torch.tensor([[3.0, 4.0]])]
    >>> Cosine(inputs).against(lambda x: x).evaluate(lambda x: x.flip(1)).value  # (3 * 4 + 4 * 3) / (5 * 5)
    0.96
    """

    def __init__(
        self, inputs: Iterable[ModelInputs], select: Select = logits_of, shuffled: bool = False
    ) -> None:
        self.select = select
        score = functools.partial(_cosine, select)
        Metric.__init__(self, _unanswered(inputs, "Cosine"), score, bounds=(-1.0, 1.0), shuffled=shuffled)

    def answer(self, outputs: Any) -> torch.Tensor:
        """The outputs, (batch, ...)."""
        return _kept(self.select, outputs)


class SQNR(AgainstFloat, SetMetric):
    """The power of the float model's outputs over that of a network's differences from them, in dB.

    ``10 log10(S / max(N, 2^-48 S))`` with ``S = sum f(x)^2`` and ``N = sum (f'(x) - f(x))^2``, over all examples: no
    mean of the examples' own dB, which the quietest would rule. 6.02 dB are one bit. The float model itself would have
    infinitely many; noise counts from float32's own rounding on, (2^-24)^2 of the signal, so it has 144.5 dB, the most
    that there is (and -144.5 the least, which outputs that are not finite have). A drop from there says nothing: the
    target is a ``floor``, the fewest dB allowed, such as ``floor=30``.

    Args:
        inputs: iterable of batches of model inputs without labels, in the same order each time. The float model's
            outputs are kept.
        select: takes what is compared out of the outputs; by default the first floating-point tensor.

    >>> inputs = [torch.tensor([[10.0], [10.0]])]
    >>> round(SQNR(inputs).against(lambda x: x).evaluate(lambda x: x + 1).value, 6)  # 10 log10(200 / 2)
    20.0
    """

    def __init__(self, inputs: Iterable[ModelInputs], select: Select = logits_of) -> None:
        self.select = select
        SetMetric.__init__(self, _unanswered(inputs, "SQNR"), functools.partial(_powers, select), _decibels)

    def answer(self, outputs: Any) -> torch.Tensor:
        """The outputs, (batch, ...)."""
        return _kept(self.select, outputs)


def _kept(select: Select, outputs: Any) -> torch.Tensor:
    """A copy of what is selected, which must be finite."""
    chosen = select(outputs)
    if not (isinstance(chosen, torch.Tensor) and chosen.dim() and chosen.is_floating_point()):
        got = f"{chosen.dtype} of shape {tuple(chosen.shape)}" if isinstance(chosen, torch.Tensor) else chosen
        raise MetricError(f"got {got!r}, needed floating-point outputs (batch, ...); select=... chooses them")
    if not chosen.isfinite().all():
        raise MetricError("it holds NaN or inf, needed finite numbers to compare with")
    return chosen.detach().cpu().clone()


def _pair(select: Select, outputs: Any, answer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """What is compared, (batch, n) float64 both, on the CPU."""
    chosen = select(outputs).detach().cpu()
    if chosen.shape != answer.shape:
        raise MetricError(
            f"metric: got outputs of shape {tuple(chosen.shape)}, and the float model answered {tuple(answer.shape)}"
        )
    return chosen.double().reshape(len(chosen), -1), answer.double().reshape(len(answer), -1)


def _classes(scores: torch.Tensor) -> torch.Tensor:
    """The class with the largest score at each place, the first of equal ones, (batch, ...); -1 where one is NaN.

    Raises:
        MetricError: if there are no two classes.
    """
    axis = class_axis(scores.shape)
    if axis is None:
        raise MetricError(
            f"got outputs of shape {tuple(scores.shape)}, needed two classes at least: (batch, classes), (batch, "
            "tokens, classes), or (batch, classes, height, width); hs.Cosine and hs.SQNR compare any outputs"
        )
    return torch.where(scores.isnan().any(axis), -1, scores.argmax(axis))


def _same_class(select: Select, outputs: Any, answer: torch.Tensor) -> torch.Tensor:
    classes = _classes(select(outputs).detach().cpu())
    if classes.shape != answer.shape:
        raise MetricError(
            f"metric: got classes of shape {tuple(classes.shape)}, and the float model answered {tuple(answer.shape)}"
        )
    return (classes == answer).double().reshape(len(classes), -1).mean(1)


def _cosine(select: Select, outputs: Any, answer: torch.Tensor) -> torch.Tensor:
    got, wanted = _pair(select, outputs, answer)
    product, powers = (got * wanted).sum(1), (got * got).sum(1) * (wanted * wanted).sum(1)
    cosine = (product / powers.sqrt()).clamp(-1, 1)
    silent = (got == 0).all(1), (wanted == 0).all(1)
    cosine = torch.where(silent[0] | silent[1], (silent[0] & silent[1]).double(), cosine)
    return torch.where(got.isfinite().all(1), cosine, -1.0)


def _powers(select: Select, outputs: Any, answer: torch.Tensor) -> torch.Tensor:
    """Signal and noise of each example, (batch, 2)."""
    got, wanted = _pair(select, outputs, answer)
    noise = (got - wanted).square().sum(1)
    noise = torch.where(got.isfinite().all(1), noise, math.inf)
    return torch.stack([wanted.square().sum(1), noise], 1)


def _decibels(powers: torch.Tensor) -> float:
    signal, noise = powers.sum(0).tolist()
    noise = max(noise, ROUNDING * signal)
    if noise == 0:  # of nothing, nothing is lost
        return MOST_DB
    share = signal / noise
    return max(-MOST_DB, 10 * math.log10(share)) if share > 0 else -MOST_DB


def class_axis(shape: Sequence[int]) -> int | None:
    """The axis of the classes that scores of this shape are of; None where there are no two classes.

    >>> class_axis((8, 10)), class_axis((8, 21, 64, 64)), class_axis((8, 1))
    (1, 1, None)
    """
    axis = len(shape) - 1 if len(shape) < 4 else 1
    return axis if axis >= 1 and shape[axis] > 1 else None


class _Listed(list[tuple[ModelInputs, Any]]):
    """A list of inputs, each batch with the answer to it, None while there is none."""

    def __init__(self, inputs: Sequence[ModelInputs], kept: Sequence[Any] | None = None) -> None:
        super().__init__(zip(inputs, [None] * len(inputs) if kept is None else kept, strict=True))
        self.inputs = inputs

    def with_answers(self, kept: Sequence[Any], marks: Sequence[str]) -> _Listed:
        return _Listed(self.inputs, kept)


class _Streamed:
    """The same of inputs that are iterated anew each time, and must come in the same order."""

    def __init__(
        self, inputs: Iterable[ModelInputs], kept: Sequence[Any] | None = None, marks: Sequence[str] = ()
    ) -> None:
        self.inputs, self._kept, self._marks = inputs, kept, marks

    def with_answers(self, kept: Sequence[Any], marks: Sequence[str]) -> _Streamed:
        return _Streamed(self.inputs, kept, marks)

    def __iter__(self) -> Iterator[tuple[ModelInputs, Any]]:
        """The batches with their answers.

        Raises:
            DataError: if a batch is another than the one that the float model answered to.
        """
        index = -1
        for index, batch in enumerate(self.inputs):
            if self._kept is None:
                yield batch, None
                continue
            if index >= len(self._kept) or Identity(batch).digest != self._marks[index]:
                raise DataError(
                    f"metric: batch {index} is not what it was when the float model answered to it; give the same "
                    "inputs in the same order each time (a loader with shuffle=False, no augmentation), or a list"
                )
            yield batch, self._kept[index]
        if self._kept is not None and index + 1 < len(self._kept):
            raise DataError(
                f"metric: got {index + 1} batches, and the float model answered to {len(self._kept)}; give the same "
                "inputs each time, or a list"
            )


def _unanswered(inputs: Iterable[ModelInputs], name: str) -> Any:
    """Inputs as labelled data without labels.

    Raises:
        MetricError: if they are a single batch, or nothing that can be iterated.
    """
    if isinstance(inputs, (torch.Tensor, Mapping)) or not isinstance(inputs, Iterable):
        raise MetricError(
            f"{name}: got {type(inputs).__name__}, needed an iterable of batches of model inputs, such as [inputs]"
        )
    if isinstance(inputs, Iterator):
        inputs = list(inputs)
    return _Listed(inputs) if isinstance(inputs, (list, tuple)) else _Streamed(inputs)
