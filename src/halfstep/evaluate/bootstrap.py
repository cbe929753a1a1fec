"""Interval for the mean of differences of any distribution: what resampling says of it, and what it cannot know."""

from __future__ import annotations

import math
from statistics import NormalDist

import torch


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
