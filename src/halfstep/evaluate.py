"""Metrics: from a model to a score, with the score of every example where there is one."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from halfstep.errors import HalfstepError, MetricError
from halfstep.graph.inputs import ModelInputs, call_arguments

Labelled = Iterable[tuple[ModelInputs, Any]]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class Score:
    """What a metric said of a model.

    Attributes:
        value: the metric, in its own unit.
        per_example: float64 scores of the single examples whose mean ``value`` is; None where the metric is not a
            mean over examples.
    """

    value: float
    per_example: torch.Tensor | None = None

    @property
    def count(self) -> int | None:
        """How many examples were scored, where that is known."""
        return None if self.per_example is None else len(self.per_example)

    def __float__(self) -> float:
        return self.value


@runtime_checkable
class Scorer(Protocol):
    """Anything that scores a model."""

    higher_is_better: bool

    def evaluate(self, model: Callable[..., Any]) -> Score:
        """Score ``model``, which is called as the user's model is."""
        ...


class Metric:
    """The mean of a score over labelled examples.

    Args:
        labelled: iterable of ``(inputs, labels)`` batches. Iterated once for every evaluation, so a generator (which
            can be iterated only once) is kept as a list.
        score: ``score(outputs, labels)`` -> a tensor of shape (batch,), one number an example.
        higher_is_better: False for errors and losses.
    """

    def __init__(
        self,
        labelled: Labelled,
        score: Callable[[Any, Any], torch.Tensor],
        higher_is_better: bool = True,
    ) -> None:
        self.labelled = list(labelled) if isinstance(labelled, Iterator) else labelled
        self.score = score
        self.higher_is_better = higher_is_better

    def evaluate(self, model: Callable[..., Any], progress: Progress | None = None) -> Score:
        """Score ``model`` on all examples.

        Args:
            model: called on each batch of inputs.
            progress: called with the number of examples after each batch.

        Raises:
            MetricError: if there is no example, or the score raises, has a wrong shape, or is not finite.
        """
        scores = list(self._batches(model, progress))
        if not scores:
            raise MetricError("metric: the labelled data are empty; give at least one (inputs, labels) batch")
        per_example = torch.cat(scores)
        return Score(float(per_example.mean()), per_example)

    def _batches(self, model: Callable[..., Any], progress: Progress | None) -> Iterator[torch.Tensor]:
        for index, item in enumerate(self.labelled):
            if not (isinstance(item, (tuple, list)) and len(item) == 2):
                raise MetricError(
                    f"metric: batch {index} is a {type(item).__name__}, needed a pair (inputs, labels)"
                )
            inputs, labels = item
            args, kwargs = call_arguments(inputs)
            with torch.no_grad():
                outputs = model(*args, **kwargs)
            try:
                scores = self.score(outputs, labels)
            except HalfstepError:
                raise
            except Exception as error:
                raise MetricError(
                    f"metric: score(outputs, labels) raised {type(error).__name__}: {error} (batch {index})"
                ) from error
            yield self._check(scores, index)
            if progress is not None:
                progress(len(scores))

    @staticmethod
    def _check(scores: Any, index: int) -> torch.Tensor:
        if not isinstance(scores, torch.Tensor) or scores.dim() != 1:
            got = (
                f"shape {tuple(scores.shape)}" if isinstance(scores, torch.Tensor) else type(scores).__name__
            )
            raise MetricError(
                f"metric: score(outputs, labels) gave {got}, needed a tensor of shape (batch,): one number an example"
            )
        if not torch.isfinite(scores.double()).all():
            raise MetricError(
                f"metric: score(outputs, labels) gave NaN or inf in batch {index}; look at the model's outputs there"
            )
        return scores.detach().double().cpu()


class Accuracy(Metric):
    """The share of examples whose largest logit is the label's: the usual top-1 accuracy, 0 to 1.

    Args:
        labelled: iterable of ``(inputs, labels)``; labels are class indices of shape (batch,). Outputs are logits
            (batch, classes), or a tuple or record whose first tensor they are.
        top: count an example as right if its label is among the ``top`` largest.
    """

    def __init__(self, labelled: Labelled, top: int = 1) -> None:
        if top < 1:
            raise MetricError(f"Accuracy: top is {top}, needed at least 1")
        self.top = top
        super().__init__(labelled, self._hits)

    def _hits(self, outputs: Any, labels: Any) -> torch.Tensor:
        logits = logits_of(outputs)
        labels = torch.as_tensor(labels, device=logits.device)
        if logits.dim() != 2 or labels.shape != logits.shape[:1]:
            raise MetricError(
                f"Accuracy: got outputs of shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)}, "
                "needed (batch, classes) and (batch,); use hs.Metric with a score of your own for anything else"
            )
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
            raise MetricError(
                f"Accuracy: labels go from {int(labels.min())} to {int(labels.max())}, but the model has "
                f"{logits.shape[1]} classes (0 to {logits.shape[1] - 1})"
            )
        best = logits.topk(self.top, dim=1).indices
        hits: torch.Tensor = (best == labels[:, None]).any(dim=1)
        return hits


class CallableMetric:
    """Any function from a model to a number.

    Args:
        function: called with a module that is called as the user's model is.
        higher_is_better: False for errors and losses.
    """

    def __init__(self, function: Callable[[Any], float], higher_is_better: bool = True) -> None:
        self.function, self.higher_is_better = function, higher_is_better

    def evaluate(self, model: Callable[..., Any], progress: Progress | None = None) -> Score:
        """Score ``model`` by calling the function.

        Raises:
            MetricError: if it raises, or returns something that is no finite number.
        """
        try:
            with torch.no_grad():
                value = float(self.function(model))
        except HalfstepError:
            raise
        except Exception as error:
            raise MetricError(f"metric: the function raised {type(error).__name__}: {error}") from error
        if not math.isfinite(value):
            raise MetricError(f"metric: the function returned {value}, needed a finite number")
        return Score(value)


def as_scorer(metric: Any) -> Scorer:
    """``metric`` as a scorer: a Metric as it is, any other callable wrapped.

    Raises:
        MetricError: for anything else.
    """
    if isinstance(metric, Scorer):
        return metric
    if callable(metric):
        return CallableMetric(metric)
    raise MetricError(
        f"metric: got {type(metric).__name__}, needed hs.Accuracy(labelled), hs.Metric(labelled, score), or a function "
        "from a model to a float"
    )


def logits_of(outputs: Any) -> torch.Tensor:
    """The first floating-point tensor in a model's outputs.

    Raises:
        MetricError: if there is none.
    """
    from torch.utils import _pytree as pytree

    for leaf in pytree.tree_leaves(outputs):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            return leaf
    raise MetricError(f"the model's outputs ({type(outputs).__name__}) hold no floating-point tensor")
