"""The drop from one model to another on the same examples: how much worse is the other, and how sure it is."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from halfstep.evaluate.bootstrap import bootstrap_interval
from halfstep.evaluate.discordant import mcnemar, tango_interval
from halfstep.evaluate.resampling import Resampled, resampled_interval, why_no_interval
from halfstep.evaluate.score import Score

#: Why there is no interval where next to all examples differ alike.
UNKNOWN = (
    "of {:,} examples too few differ to say what a rare one may lose, and the metric's bounds are not known: "
    "hs.Metric(..., bounds=(lowest, highest)) says them"
)
#: So many examples must lose something else than the rest (by this share of the scores' range) before what occurred
#: says how much examples lose.
FEW, ALIKE = 10, 1e-6


def share_of_error(error: float, number: int) -> float:
    """How often the ``number``-th of a row of statements may be wrong, for all together to be so at most ``error``.

    The first has a half: as an end of an interval it is that of the usual two-sided one. The others have 1 / (2 k (k +
    1)), which add up to a quarter however long the row becomes, so its length need not be known beforehand. The last
    quarter is nobody's: statements about what was made from the luckiest before it err more often than by themselves.

    >>> [round(share_of_error(0.05, number), 5) for number in (1, 2, 10)]  # a half, a twelfth, 1 / 220
    [0.025, 0.00417, 0.00023]

    Source: Bonferroni's inequality with unequal shares; Lan and DeMets, Biometrika 70 (1983), for spending an error.
    """
    return error / 2 if number == 1 else error / (2 * number * (number + 1))


@dataclass(frozen=True)
class Drop:
    """How much worse a candidate is than its reference, in the metric's unit.

    Attributes:
        value: positive where the candidate is worse.
        low: lower end of the confidence interval; None where there is none.
        high: its upper end.
        confidence: with which the upper ends of all candidates examined hold together, and so the lower ends; where
            only one was examined, with which the interval holds.
        count: the pairs it rests on.
        unit: what was paired, ``"examples"``, or ``"batches"`` where examples could not be told apart.
        method: how the interval was found.
        p_value: how often chance would make a difference at least as large between two equally good models; only of
            scores of two values, and of this one comparison, whatever else was looked at.
        examined: candidates that had been looked at on the same examples, this one included.
        reason: why there is no interval, in words; empty where there is one.
    """

    value: float
    low: float | None = None
    high: float | None = None
    confidence: float = 0.95
    count: int | None = None
    method: str = ""
    p_value: float | None = None
    examined: int = 1
    reason: str = ""
    unit: str = "examples"

    @property
    def correction(self) -> str:
        """What the interval is corrected for, in words; empty where there was no other candidate.

        >>> Drop(0.0, -0.01, 0.01, examined=7).correction
        'corrected for 7 candidates examined'
        """
        return "" if self.examined == 1 else f"corrected for {self.examined} candidates examined"

    def __str__(self) -> str:
        """The drop with its interval, where it has one."""
        if self.low is None or self.high is None:
            return f"{self.value:+.4f}"
        ends = f"{percent(self.confidence)} interval {self.low:+.4f} to {self.high:+.4f}"
        return f"{self.value:+.4f} ({', '.join(filter(None, (ends, self.correction)))})"


def paired_drop(
    reference: Score,
    candidate: Score,
    higher_is_better: bool = True,
    confidence: float = 0.95,
    bounds: tuple[float, float] | None = None,
) -> Drop:
    """The drop from ``reference`` to ``candidate`` with its interval, from the differences on the same examples.

    Much narrower than the two scores' own intervals, because examples that are hard for one are hard for the other.
    Scores of two values, such as hits and misses, get Tango's interval and McNemar's exact test, others the paired
    bootstrap. Numbers of a whole set get it too, from what they are on sets drawn from it. There is no interval without
    either, or with other examples, nor where the bounds are unknown and next to all examples differ alike: what a rare
    one could lose is then anyone's guess.

    The ends of the k-th candidate examined err with a share of what ``confidence`` leaves that falls with k, see
    :func:`share_of_error`: of many candidates on the same examples some look better than they are, and those are kept.

    Args:
        reference: usually the float model's.
        candidate: on the same examples in the same order; its ``examined`` is k.
        higher_is_better: which way a drop goes.
        confidence: of the interval, between 0 and 1.
        bounds: the smallest and the largest score that an example can have, which are the two values if no other score
            occurs. None if unknown; then 0 and 1 are, or any two scores if each occurs :data:`FEW` times.

    >>> both = [Score.mean(torch.tensor(hits)) for hits in ([1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0])]
    >>> paired_drop(*both).value
    0.25
    """
    sign = 1 if higher_is_better else -1
    drop = Drop(
        sign * (reference.value - candidate.value), confidence=confidence, examined=candidate.examined
    )
    alone = 1 - 2 * share_of_error(1 - confidence, candidate.examined)
    if reference.resampled is not None and candidate.resampled is not None:
        return _of_sets(drop, reference.resampled, candidate.resampled, sign, alone)
    first, second = reference.per_example, candidate.per_example
    if first is None or second is None:
        return replace(drop, reason="the metric gives no scores of single examples")
    if len(first) != len(second):
        return replace(
            drop, reason=f"there are {len(first)} scores of one model and {len(second)} of the other"
        )
    differences = sign * (first - second)
    drop = replace(drop, count=len(differences))
    if (values := _two_values(first, second, bounds)) is not None:
        lost, won = int((differences > 0).sum()), int((differences < 0).sum())
        width = values[1] - values[0]
        low, high = (width * end for end in tango_interval(lost, won, len(differences), alone))
        return replace(drop, low=low, high=high, method="Tango", p_value=mcnemar(lost, won))
    widest = None if bounds is None else (bounds[0] - bounds[1], bounds[1] - bounds[0])
    if widest is None and _differing(first, second) < FEW:
        return replace(drop, reason=UNKNOWN.format(len(differences)))
    low, high = bootstrap_interval(differences, alone, widest)
    return replace(drop, low=low, high=high, method="bootstrap")


def _of_sets(drop: Drop, reference: Resampled, candidate: Resampled, sign: int, confidence: float) -> Drop:
    """The drop of a number of a whole set, with its interval."""
    drop = replace(drop, count=reference.count, unit=reference.unit)
    if reason := why_no_interval(reference, candidate):
        return replace(drop, reason=reason)
    ends = resampled_interval(reference, candidate, sign * drop.value, (1 - confidence) / 2)
    low, high = sorted(sign * end for end in ends)
    return replace(drop, low=low, high=high, method=f"bootstrap over {drop.unit}")


def _two_values(
    first: torch.Tensor, second: torch.Tensor, bounds: tuple[float, float] | None
) -> tuple[float, float] | None:
    """The two scores that an example can have, where that can be told."""
    scores = torch.cat([first, second])
    if bounds is not None:
        return bounds if bool(((scores == bounds[0]) | (scores == bounds[1])).all()) else None
    values, counts = scores.unique(return_counts=True)
    low, high = (float(values[0]), float(values[-1])) if len(values) == 2 else (0.0, 0.0)
    hits = (low, high) == (0, 1)
    return (low, high) if len(values) == 2 and (hits or int(counts.min()) >= FEW) else None


def _differing(first: torch.Tensor, second: torch.Tensor) -> int:
    """How many examples lose something else than most do."""
    differences, scores = first - second, torch.cat([first, second])
    away = (differences - differences.median()).abs()
    return int((away > ALIKE * (scores.max() - scores.min())).sum())


def percent(share: float) -> str:
    """A share in percent, with no more digits than it has.

    >>> percent(0.95), percent(0.999)
    ('95%', '99.9%')
    """
    return f"{100 * share:.10g}%"
