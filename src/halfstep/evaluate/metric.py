"""Metrics: from a model to a score, with the score of every example where there is one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree

from halfstep.distributed import together
from halfstep.errors import HalfstepError, MetricError
from halfstep.evaluate.score import Answer, DataMetric, Labelled, Score, Scorer, some
from halfstep.evaluate.set_metric import accumulates


class Metric(DataMetric):
    """The mean of a score over labelled examples.

    Args:
        labelled: iterable of ``(inputs, labels)`` batches, in the same order each time. Iterated once for every
            evaluation, so a generator (which can be iterated only once) is kept as a list.
        score: ``score(outputs, labels)`` -> a tensor of shape (batch,), one number an example.
        higher_is_better: False for errors and losses.
        bounds: the smallest and the largest score that an example can have. Evaluations can stop early only where
            they are known.
        shuffled: whether the order of the examples carries no information. Evaluations can stop early only then,
            or where ``labelled`` is a list of batches of tensors, which are drawn in an order of our own.

    Raises:
        MetricError: if the bounds are not two ascending numbers.
    """

    def __init__(
        self,
        labelled: Labelled,
        score: Callable[[Any, Any], torch.Tensor],
        higher_is_better: bool = True,
        bounds: tuple[float, float] | None = None,
        shuffled: bool = False,
    ) -> None:
        if bounds is not None and not (
            len(bounds) == 2 and all(map(math.isfinite, bounds)) and bounds[0] < bounds[1]
        ):
            raise MetricError(f"metric: bounds are {bounds}, needed two finite numbers, the smaller first")
        super().__init__(labelled, higher_is_better)
        self.score = score
        self.bounds, self.shuffled = bounds, shuffled

    def joined(self, batches: Sequence[torch.Tensor]) -> Score:
        """The mean over the examples of all batches.

        Raises:
            MetricError: if there is none.
        """
        return Score.mean(torch.cat(list(some(batches))))

    def scores(self, answer: Answer) -> torch.Tensor:
        """The scores of a batch's examples, (batch,) float64.

        Raises:
            MetricError: if the score raises, has a wrong shape, is not finite, or lies outside the bounds.
        """
        try:
            scores = self.score(answer.outputs, answer.labels)
        except HalfstepError:
            raise
        except Exception as error:
            raise MetricError(
                f"metric: score(outputs, labels) raised {type(error).__name__}: {error} (batch {answer.batch})"
            ) from error
        return self._check(scores, answer.batch)

    def _check(self, scores: Any, index: int) -> torch.Tensor:
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
        checked: torch.Tensor = scores.detach().double().cpu()
        if self.bounds is not None and not ((checked >= self.bounds[0]) & (checked <= self.bounds[1])).all():
            raise MetricError(
                f"metric: batch {index} has scores from {float(checked.min()):g} to {float(checked.max()):g}, outside "
                f"the bounds {self.bounds}; give the bounds that score(outputs, labels) really has, or none"
            )
        return checked


class Accuracy(Metric):
    """The share of examples whose largest logit is the label's: the usual top-1 accuracy, 0 to 1.

    Of equal logits the first counts as the larger one, as for ``argmax``. Logits with a NaN predict nothing: a miss.

    Args:
        labelled: iterable of ``(inputs, labels)``; labels are class indices of shape (batch,). Outputs are logits
            (batch, classes), or a tuple or record whose first tensor they are.
        top: count an example as right if its label is among the ``top`` largest.
        shuffled: as for :class:`Metric`.
    """

    def __init__(self, labelled: Labelled, top: int = 1, shuffled: bool = False) -> None:
        if top < 1:
            raise MetricError(f"Accuracy: top is {top}, needed at least 1")
        self.top = top
        super().__init__(labelled, self._hits, bounds=(0.0, 1.0), shuffled=shuffled)

    def of_one_answer(self) -> tuple[float, int]:
        """What a model scores that gives every example the same answer, the best there is; and of how many examples.

        That is the share of the most frequent label, or of the ``top`` most frequent ones. One pass over the data,
        without a model.
        """
        counts: Counter[int] = Counter()
        for _, labels in self.labelled:
            counts.update(torch.as_tensor(labels).tolist())
        return sum(count for _, count in counts.most_common(self.top)) / counts.total(), counts.total()

    def _hits(self, outputs: Any, labels: Any) -> torch.Tensor:
        logits = logits_of(outputs)
        labels = torch.as_tensor(labels, device=logits.device)
        if logits.dim() != 2 or labels.shape != logits.shape[:1]:
            raise MetricError(
                f"Accuracy: got outputs of shape {tuple(logits.shape)} and labels of shape {tuple(labels.shape)}, "
                "needed (batch, classes) and (batch,); use hs.Metric with a score of your own for anything else"
            )
        places = labels.long()[:, None]
        if not torch.equal(places[:, 0].to(labels.dtype), labels):
            raise MetricError(
                f"Accuracy: got labels of {labels.dtype} with fractions or NaN, needed class indices"
            )
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < logits.shape[1]:
            raise MetricError(
                f"Accuracy: labels go from {int(labels.min())} to {int(labels.max())}, but the model has "
                f"{logits.shape[1]} classes (0 to {logits.shape[1] - 1})"
            )
        if self.top > logits.shape[1]:
            raise MetricError(f"Accuracy: top is {self.top}, but the model has {logits.shape[1]} classes")
        right = logits.gather(1, places)  # (batch, 1)
        before = torch.arange(logits.shape[1], device=logits.device) < places
        ahead = (logits > right) | ((logits == right) & before)
        hits: torch.Tensor = (ahead.sum(dim=1) < self.top) & ~logits.isnan().any(dim=1)
        return hits


class CallableMetric:
    """Any function from a model to a number: ``hs.CallableMetric(error_rate, higher_is_better=False)``.

    A plain function given as a metric is one whose numbers are better the higher they are. Without scores of single
    examples there are no confidence intervals and no early stopping; :class:`Metric` has both, and
    :class:`SetMetric` has intervals.

    Args:
        function: called with a module that is called as the user's model is.
        higher_is_better: False for errors and losses.
    """

    #: On several ranks each has its own.
    known_by_name = True

    def __init__(self, function: Callable[[Any], float], higher_is_better: bool = True) -> None:
        self.function, self.higher_is_better = function, higher_is_better

    def evaluate(self, model: Callable[..., Any]) -> Score:
        """Score ``model`` by calling the function; on several ranks of a run all of them call it, and rank 0's counts.

        Raises:
            MetricError: if it raises, or returns something that is no finite number.
        """
        return together(CallableMetric._evaluate, self, model)

    def _evaluate(self, model: Callable[..., Any]) -> Score:
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
    if accumulates(metric):
        raise MetricError(
            f"metric: got {type(metric).__name__}, which is to be updated with outputs and labels; needed its data "
            "too: hs.SetMetric(labelled, it)"
        )
    if callable(metric):
        return CallableMetric(metric)
    raise MetricError(
        f"metric: got {type(metric).__name__}, needed hs.Accuracy(labelled), hs.Metric(labelled, score), "
        "hs.SetMetric(labelled, update, compute), or a function from a model to a float"
    )


def logits_of(outputs: Any) -> torch.Tensor:
    """The first floating-point tensor in a model's outputs.

    Raises:
        MetricError: if there is none.
    """
    for leaf in pytree.tree_leaves(outputs):
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            return leaf
    raise MetricError(f"the model's outputs ({type(outputs).__name__}) hold no floating-point tensor")
