"""The drop from one model to another on the same examples: how much worse is the other, and how sure it is.

Interval for the mean of differences of any distribution: what resampling says of it, and what it cannot know.

Two models that are right or wrong on the same examples: McNemar's exact test and Tango's interval.

Only the discordant examples count: ``lost`` of n, which the first model gets right and the second wrong, and
``won``, the other way round. The drop is (lost - won) / n.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import NormalDist

import torch

from halfstep.evaluate.resampling import Resampled, resampled_interval, why_no_interval
from halfstep.evaluate.score import Score


def bootstrap_interval(
    differences: torch.Tensor, confidence: float, bounds: tuple[float, float] | None = None
) -> tuple[float, float]:
    """The BCa bootstrap interval of the mean, as wide at least as values that did not occur demand.

    Resampling knows only what occurred: an outlier that one example in 500 has is missing from a third of all samples
    of 500. So with ``bounds`` each end goes out to where unseen values may take the mean. Without them nothing is
    known of such values, and the interval has width 0 where all differences are equal.

    Args:
        differences: (n,), one a pair: drawing pairs is what makes the bootstrap a paired one.
        confidence: 0.95 for a 95% interval; may be as near to 1 as wanted, since nothing is drawn.
        bounds: the smallest and the largest difference that is possible; None if unknown.

    Returns:
        Lower and upper end.

    >>> low, high = bootstrap_interval(torch.zeros(1000), 0.95, bounds=(-1.0, 1.0))
    >>> round(high, 5)  # 1 - 0.025^(1/1000)
    0.00368

    Source: Bahadur and Savage, Annals of Mathematical Statistics 27 (1956): without bounds no interval for a mean
    holds for every distribution.
    """
    values, error = differences.double(), (1 - confidence) / 2
    lowest, highest = (-math.inf, math.inf) if bounds is None else bounds
    return -_upper_end(-values, error, -lowest), _upper_end(values, error, highest)


def _upper_end(values: torch.Tensor, error: float, highest: float) -> float:
    end = tilted_mean(values, error)
    return end if highest == math.inf else max(end, unseen_mean(values, error, highest))


def tilted_mean(values: torch.Tensor, error: float) -> float:
    """The upper end of the BCa bootstrap interval, with the quantile of the resampled means found without resampling.

    The weights of the examples are tilted exponentially until their mean is as improbable, among means of resampled
    examples, as BCa's level: sqrt(2 n divergence) is the normal deviate of that to second order once corrected for
    skewness. For a mean bias and acceleration are both skewness / (6 sqrt(n)). All values equal: the value.

    Args:
        values: (n,) float64.
        error: how often the end may lie below the mean, such as 0.025.

    Source: Efron, Journal of the American Statistical Association 82 (1987), for BCa; Davison and Hinkley, Biometrika
    75 (1988), for the quantile by tilting.
    """
    mean, deviation = float(values.mean()), float(values.std(correction=0))
    if deviation <= 1e-14 * max(1.0, abs(mean)):
        return mean
    scaled, count = (values - mean) / deviation, len(values)
    skewness = float((scaled**3).mean())
    bias = acceleration = skewness / (6 * math.sqrt(count))
    shifted = bias + NormalDist().inv_cdf(1 - error)
    room = 1 - acceleration * shifted
    if room <= 0:
        return float(values.max())
    needed = (shifted / room) ** 2 / (2 * count)

    low, high = 0.0, 1.0
    while _divergence(scaled, high)[0] < needed and high < 2**20:
        high *= 2  # beyond the end: no weights are so improbable, and the mean is the largest value
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _divergence(scaled, middle)[0] < needed else (low, middle)
    return mean + deviation * _divergence(scaled, high)[1]


def _divergence(values: torch.Tensor, tilt: float) -> tuple[float, float]:
    """How far weights exp(tilt values) are from equal ones (Kullback and Leibler's divergence), and their mean."""
    logs = tilt * values
    total = logs.logsumexp(0)
    mean = float(((logs - total).exp() * values).sum())
    return tilt * mean - float(total) + math.log(len(values)), mean


def unseen_mean(values: torch.Tensor, error: float, highest: float) -> float:
    """How large the mean may be if values up to ``highest`` exist that did not occur; -inf where they explain nothing.

    Of all distributions up to ``highest``, the likeliest with a given mean puts on each value what fits, and the rest
    on ``highest``. The end is the mean at which the likelihood falls to ``error`` of its maximum. Where all values are
    0, so that it is highest (1 - error^(1/n)): the exact binomial bound, known as the rule of three at 5%.

    Args:
        values: (n,) float64, at most ``highest``.
        error: how often the end may lie below the mean.
        highest: the largest value possible.

    Source: Honda and Takemura, Machine Learning 85 (2011), for the likelihood of a mean of bounded values; Hanley and
    Lippman-Hand, Journal of the American Medical Association 249 (1983), for the rule of three.
    """
    below = highest - values
    if float(below.min()) <= 0:
        return -math.inf
    end = highest - math.exp(float(below.log().mean()) + math.log(error) / len(values))
    seen = (highest - end) * float((1 / below).mean())  # what is left for the values that did occur
    return end if seen <= 1 else -math.inf


def mcnemar(lost: int, won: int) -> float:
    """How often chance alone would split the discordant examples at least so unevenly: McNemar's exact test.

    Under "both are equally good" a discordant example is lost or won by the toss of a coin. 1 where there is none.

    Args:
        lost: examples that only the first model gets right.
        won: examples that only the second one gets right.

    Returns:
        The two-sided p-value, min(1, 2 P(Binomial(lost + won, 1/2) <= min(lost, won))).

    >>> mcnemar(lost=5, won=0)  # 2 / 2^5
    0.0625

    Source: McNemar, Psychometrika 12 (1947), in its exact binomial form.
    """
    discordant, fewer = lost + won, min(lost, won)
    logs = [
        math.lgamma(discordant + 1)
        - math.lgamma(k + 1)
        - math.lgamma(discordant - k + 1)
        - discordant * math.log(2)
        for k in range(fewer + 1)
    ]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def tango_interval(lost: int, won: int, count: int, confidence: float) -> tuple[float, float]:
    """The drops that the score test does not reject: the interval for a difference of paired proportions.

    At a drop of 0 the test is McNemar's (without continuity correction), so the interval leaves out 0 exactly where
    that test rejects. It holds its level with few discordant examples too, and is never of width 0: with none lost
    and none won of n it is +-z^2 / (n + z^2).

    Args:
        lost: examples that only the first model gets right.
        won: examples that only the second one gets right.
        count: all examples, n.
        confidence: 0.95 for z = 1.96.

    Returns:
        Lower and upper end, within [-1, 1].

    >>> low, high = tango_interval(0, 0, 1000, 0.95)
    >>> round(high, 5)  # 3.8415 / 1003.8415
    0.00383

    Source: Tango, Statistics in Medicine 17 (1998), equations for the score statistic and its constrained maximum
    likelihood estimate.
    """
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    return (
        _root(lambda drop: _score_statistic(lost, won, count, drop) - z),
        _root(lambda drop: _score_statistic(lost, won, count, drop) + z),
    )


def _score_statistic(lost: int, won: int, count: int, drop: float) -> float:
    """(lost - won - n drop) over its standard deviation if ``drop`` were the true one; falls as ``drop`` grows."""
    difference = lost - won - count * drop
    w = -lost - won + (2 * count - lost + won) * drop
    discriminant = w * w + 8 * count * won * drop * (1 - drop)
    won_rate = (math.sqrt(max(discriminant, 0.0)) - w) / (4 * count)  # the most likely one, given ``drop``
    variance = count * (2 * won_rate + drop * (1 - drop))
    if variance <= 0:
        return math.copysign(math.inf, difference) if difference else 0.0
    return difference / math.sqrt(variance)


def _root(falling: Callable[[float], float]) -> float:
    """Where a falling function on [-1, 1] crosses 0, by bisection to float64's end."""
    low, high = -1.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if falling(middle) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


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
        return replace(
            drop, reason="the metric gives no scores of single examples that are the same each time"
        )
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
