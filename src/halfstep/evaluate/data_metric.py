"""What metrics over labelled data have in common: one pass, batch by batch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from halfstep.errors import MetricError, named
from halfstep.evaluate.score import Score
from halfstep.graph.inputs import ModelInputs, call_arguments

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

        Args:
            model: called on each batch of inputs.
            labelled: batches to score instead of the metric's own.

        Raises:
            MetricError: as :meth:`evaluate`.
        """
        for answer in answers(model, self.labelled if labelled is None else labelled):
            yield self.scores(answer)

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
        if not (isinstance(item, (tuple, list)) and len(item) == 2):
            raise MetricError(
                f"metric: batch {index} is a {type(item).__name__}, needed a pair (inputs, labels)"
            )
        inputs, labels = item
        args, kwargs = call_arguments(inputs)
        with named(f"metric: batch {index}"), torch.no_grad():
            outputs = model(*args, **kwargs)
        yield Answer(inputs, outputs, labels, index)


def some(batches: Sequence[Any]) -> Sequence[Any]:
    """The batches, if there are any.

    Raises:
        MetricError: if there is none.
    """
    if not batches:
        raise MetricError("metric: the labelled data are empty; give at least one (inputs, labels) batch")
    return batches
