"""Two models that are right or wrong on the same examples: McNemar's exact test and Tango's interval.

Only the discordant examples count: ``lost`` of n, which the first model gets right and the second wrong, and
``won``, the other way round. The drop is (lost - won) / n.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist


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
