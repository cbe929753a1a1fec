"""Labelled batches, checked, in the same order again for a run that goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from halfstep.errors import DataError, named
from halfstep.graph.inputs import ModelInputs
from halfstep.training.options import Training
from halfstep.training.randomness import seed_everything


class Batches:
    """The batches of a training, epoch by epoch.

    Args:
        training: whose ``labelled`` to iterate. Without a length its batches are counted by iterating once.

    Raises:
        DataError: if there are none, or ``labelled`` cannot be iterated.
    """

    def __init__(self, training: Training) -> None:
        self.training = training
        check_iterable(training.labelled)
        self.count = _count(training.labelled)
        if not self.count:
            raise DataError("training data: got no batch, needed at least one (inputs, labels) pair")

    def epoch(
        self, epoch: int, skip: int = 0, resume: Callable[[Any], None] = lambda last: None
    ) -> Iterator[tuple[int, ModelInputs, Any]]:
        """Index, inputs and labels of every batch of an epoch after the first ``skip``.

        The seed is set first, so that shuffling and augmentation by torch, numpy or Python repeat themselves.

        Args:
            epoch: its number, from 0.
            skip: batches that an earlier run has used; they are fetched again and dropped.
            resume: called with the last dropped batch before the first used one.

        Raises:
            DataError: naming the batch, if it is no pair, its labels are missing, or the data have run dry.
        """
        seed_everything(self.training.seed + epoch)
        items = iter(self.training.labelled)
        index, last = -1, None
        for index, last in enumerate(islice(items, skip)):  # noqa: B007 - what is left of the loop is used
            pass
        if skip:
            resume(last)
        for index, item in enumerate(items, start=skip):
            with named(f"training batch {index}"):
                inputs, labels = pair(item, self.training)
            yield index, inputs, labels
        if index + 1 < self.count:
            raise DataError(
                f"training data: got {index + 1} batches in epoch {epoch + 1}, needed {self.count}; give data that can "
                "be iterated again, such as a list or a DataLoader"
            )


def check_iterable(labelled: Any) -> None:
    """Raise unless data can be iterated.

    Raises:
        DataError: saying what they are.
    """
    if not (isinstance(labelled, Iterable) or hasattr(labelled, "__getitem__")):
        raise DataError(
            f"training data: got {type(labelled).__name__}, needed an iterable of (inputs, labels) pairs, such as a "
            "list or a DataLoader"
        )


def pair(item: Any, training: Training) -> tuple[ModelInputs, Any]:
    """The inputs and labels that a batch is.

    Raises:
        DataError: if it is no pair, or its labels are missing.
    """
    if not (isinstance(item, (tuple, list)) and len(item) == 2):
        raise DataError(
            f"got {type(item).__name__}, needed a pair (inputs, labels); to train without labels give (inputs, None) "
            "and loss=None"
        )
    inputs, labels = item
    if labels is None and training.loss is not None:
        raise DataError(
            "its labels are None, but the loss needs them; give labels, or loss=None to train on distillation alone"
        )
    return inputs, labels


def _count(data: Iterable[Any]) -> int:
    """How many batches there are; counted where the data do not know, as a DataLoader of an IterableDataset."""
    try:
        return len(data)  # type: ignore[arg-type]
    except TypeError:
        return sum(1 for _ in data)
