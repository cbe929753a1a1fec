"""Score: what a metric says of a model; Scorer: anything that says it, over labelled data in one pass.

What metrics over labelled data have in common: one pass, batch by batch.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch

from halfstep.distributed import in_turns
from halfstep.errors import MetricError, named
from halfstep.evaluate.resampling import Resampled
from halfstep.graph.inputs import ModelInputs, call_arguments


@dataclass(frozen=True)
class Score:
    """What a metric said of a model.

    Attributes:
        value: the metric, in its own unit.
        per_example: float64 scores of the single examples whose mean ``value`` is; None where the metric is not a
            mean over examples.
        others: of several metrics, the scores of those after the first, by name.
        examined: how many candidates of a search had been looked at on the same examples by then, this one included;
            1 for a model by itself. What is said of its drop is corrected for them.
        resampled: where ``value`` is no mean but a number of the whole set, what it is on sets drawn from it; else
            None.
        simulated: of a file that was scored in its simulation's place, on how many examples the simulation was; None
            for every other score.
    """

    value: float
    per_example: torch.Tensor | None = None
    others: Mapping[str, Score] = field(default_factory=dict)
    examined: int = 1
    resampled: Resampled | None = None
    simulated: int | None = None

    @classmethod
    def mean(cls, per_example: torch.Tensor) -> Score:
        """The score whose value is the mean of ``per_example``, (n,)."""
        return cls(float(per_example.mean()), per_example)

    def numbered(self, examined: int) -> Score:
        """The same score, as that of the ``examined``-th candidate of a search."""
        others = {name: part.numbered(examined) for name, part in self.others.items()}
        return replace(self, examined=examined, others=others)

    @property
    def count(self) -> int | None:
        """How many examples were scored, where that is known."""
        if self.per_example is not None:
            return len(self.per_example)
        examples = self.resampled is not None and self.resampled.unit == "examples"
        return self.resampled.count if self.resampled is not None and examples else None

    @property
    def paired(self) -> bool:
        """Whether it can be compared with another one on the same examples."""
        return self.per_example is not None or self.resampled is not None

    def unpaired(self) -> Score:
        """The value alone."""
        return replace(self, per_example=None, resampled=None)

    def repeats(self, other: Score) -> bool:
        """Whether ``other`` says the same, example by example or resample by resample."""
        if self.per_example is not None and other.per_example is not None:
            return torch.equal(self.per_example, other.per_example)
        if self.resampled is not None and other.resampled is not None:
            return self.resampled.repeats(other.resampled)
        return False

    def __float__(self) -> float:
        return self.value


@runtime_checkable
class Scorer(Protocol):
    """Anything that scores a model."""

    higher_is_better: bool

    def evaluate(self, model: Callable[..., Any]) -> Score:
        """Score ``model``, which is called as the user's model is."""
        ...


Labelled = Iterable[tuple[ModelInputs, Any]]


class Answer(NamedTuple):
    """What a model answered to a batch.

    Attributes:
        inputs: the batch's.
        outputs: the model's.
        labels: the batch's.
        batch: which one it is, from 0.
    """

    inputs: ModelInputs
    outputs: Any
    labels: Any
    batch: int


class DataMetric(ABC):
    """A metric that takes a model's answers to labelled data, batch by batch, and sees nothing else of the model.

    Args:
        labelled: iterable of ``(inputs, labels)`` batches, in the same order each time. Iterated once for every
            evaluation, so a generator (which can be iterated only once) is kept as a list.
        higher_is_better: False for errors and losses.
    """

    #: On several ranks each has its own: metrics and their data are not sent.
    known_by_name = True

    def __init__(self, labelled: Labelled, higher_is_better: bool = True) -> None:
        self.labelled = list(labelled) if isinstance(labelled, Iterator) else labelled
        self.higher_is_better = higher_is_better

    @property
    def source(self) -> object:
        """What the data come from: the same object for two metrics over the same data."""
        return self.labelled

    @property
    def plain(self) -> bool:
        """Whether it goes through its data as :class:`DataMetric` does, and in no way of its own."""
        kind = type(self)
        return kind.evaluate is DataMetric.evaluate and kind.stream is DataMetric.stream

    def evaluate(self, model: Callable[..., Any]) -> Score:
        """Score ``model`` on all examples.

        Args:
            model: called on each batch of inputs.

        Raises:
            MetricError: if there is no example, or what the user gave raises or returns something unfit.
        """
        return self.joined(list(self.stream(model)))

    def stream(self, model: Callable[..., Any], labelled: Labelled | None = None) -> Iterator[Any]:
        """What :meth:`scores` makes of each batch, one by one, so that one can stop in between.

        On several ranks of a run each takes every so many-th batch.

        Args:
            model: called on each batch of inputs.
            labelled: batches to score instead of the metric's own.

        Raises:
            MetricError: as :meth:`evaluate`.
        """
        batches = self.labelled if labelled is None else labelled
        yield from in_turns(functools.partial(_scored, self, model), batches)

    @abstractmethod
    def scores(self, answer: Answer) -> Any:
        """What the metric keeps of a batch."""

    @abstractmethod
    def joined(self, batches: Sequence[Any]) -> Score:
        """The score over all batches, of what :meth:`scores` kept of each.

        Raises:
            MetricError: if there is none.
        """


def answers(model: Callable[..., Any], labelled: Labelled) -> Iterator[Answer]:
    """The model's answers, batch by batch, without gradients.

    Raises:
        MetricError: if a batch is no pair (inputs, labels).
        DataError: naming the batch, if its inputs are not what the model takes.
    """
    for index, item in enumerate(labelled):
        yield answer_to(model, index, item)


def answer_to(model: Callable[..., Any], index: int, item: Any) -> Answer:
    """The model's answer to one batch, without gradients.

    Raises:
        MetricError: if the batch is no pair (inputs, labels).
        DataError: naming the batch, if its inputs are not what the model takes.
    """
    if not (isinstance(item, (tuple, list)) and len(item) == 2):
        raise MetricError(f"metric: batch {index} is a {type(item).__name__}, needed a pair (inputs, labels)")
    inputs, labels = item
    args, kwargs = call_arguments(inputs)
    with named(f"metric: batch {index}"), torch.no_grad():
        outputs = model(*args, **kwargs)
    return Answer(inputs, outputs, labels, index)


def _scored(metric: DataMetric, model: Callable[..., Any], index: int, item: Any) -> Any:
    return metric.scores(answer_to(model, index, item))


def some(batches: Sequence[Any]) -> Sequence[Any]:
    """The batches, if there are any.

    Raises:
        MetricError: if there is none.
    """
    if not batches:
        raise MetricError("metric: the labelled data are empty; give at least one (inputs, labels) batch")
    return batches
