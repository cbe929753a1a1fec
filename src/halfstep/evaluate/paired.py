"""Two models on the same examples: the drop from one to the other, and how sure it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from halfstep.evaluate.bootstrap import bootstrap_interval
from halfstep.evaluate.discordant import mcnemar, tango_interval
from halfstep.evaluate.score import Score


@dataclass(frozen=True)
class Drop:
    """How much worse a candidate is than its reference, in the metric's unit.

    Attributes:
        value: positive where the candidate is worse.
        low: lower end of the confidence interval; None where the metric is not a mean over examples.
        high: its upper end.
        confidence: of the interval.
        count: the pairs it rests on.
        method: how the interval was found.
        p_value: how often chance would make a difference at least as large between equally good models; only of
            scores that are 0 or 1.
    """

    value: float
    low: float | None = None
    high: float | None = None
    confidence: float = 0.95
    count: int | None = None
    method: str = ""
    p_value: float | None = None

    def __str__(self) -> str:
        """The drop with its interval, where it has one."""
        if self.low is None or self.high is None:
            return f"{self.value:+.4f}"
        return f"{self.value:+.4f} ({self.confidence:.0%} interval {self.low:+.4f} to {self.high:+.4f})"


def paired_drop(
    reference: Score, candidate: Score, higher_is_better: bool = True, confidence: float = 0.95
) -> Drop:
    """The drop from ``reference`` to ``candidate`` with its interval, from the differences on the same examples.

    Much narrower than the two scores' own intervals, because examples that are hard for one are hard for the other.
    Scores that are all 0 or 1 get Tango's interval and McNemar's exact test, others the paired bootstrap. Without
    scores of single examples, or with other examples, there is no interval.

    Args:
        reference: usually the float model's.
        candidate: on the same examples in the same order.
        higher_is_better: which way a drop goes.
        confidence: of the interval, between 0 and 1.

    >>> both = [Score.mean(torch.tensor(hits)) for hits in ([1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0])]
    >>> paired_drop(*both).value
    0.25
    """
    sign = 1 if higher_is_better else -1
    value = sign * (reference.value - candidate.value)
    first, second = reference.per_example, candidate.per_example
    if first is None or second is None or len(first) != len(second):
        return Drop(value, confidence=confidence)
    differences = sign * (first - second)
    if _binary(first) and _binary(second):
        lost, won = int((differences > 0).sum()), int((differences < 0).sum())
        low, high = tango_interval(lost, won, len(differences), confidence)
        return Drop(value, low, high, confidence, len(differences), "Tango", mcnemar(lost, won))
    low, high = bootstrap_interval(differences, confidence)
    return Drop(value, low, high, confidence, len(differences), "bootstrap")


def _binary(scores: torch.Tensor) -> bool:
    return bool(((scores == 0) | (scores == 1)).all())
