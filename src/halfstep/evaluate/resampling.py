"""Interval for a number of a whole set, such as an F1: what it is on sets that were drawn from the set, with repeats.

A set of n examples is drawn from n examples again and again, each time with the same draws for every model. So what is
kept of a model is its number on each of these sets, (draws,): two models are compared set by set, which pairs them, and
no model runs again.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import NormalDist

import torch

#: Draws that an interval takes at least, and the examples to draw from that it takes at least.
LEAST_DRAWS, LEAST_COUNT = 200, 20
#: The set without each of so many parts says how the number's spread depends on the number.
PARTS = 100
#: Draws beyond a quantile that make it known; farther out the normal distribution goes on from there.
BEYOND = 10
#: The largest share of draws that give no number.
MOST = 0.01
#: About so many parts must make the difference between two models before draws say how much examples lose: many draws
#: miss all of a few.
FEW = 10

_NORMAL = NormalDist()


@dataclass(frozen=True, eq=False)
class Resampled:
    """A number of a whole set, on sets drawn from it.

    Attributes:
        values: on each set drawn, (draws,) float64; NaN where it is no number there.
        left_out: on the set without each of its parts, (parts,) float64.
        count: what was drawn from: so many examples or batches.
        unit: what these are, ``"examples"`` or ``"batches"``.
        reason: why there are no draws, in words; empty where there are.
    """

    values: torch.Tensor
    left_out: torch.Tensor
    count: int
    unit: str = "examples"
    reason: str = ""

    def repeats(self, other: Resampled) -> bool:
        """Whether the draws of both, as far as both have them, give the same numbers."""
        both = min(len(self.values), len(other.values))
        return torch.equal(self.values[:both].nan_to_num(), other.values[:both].nan_to_num())


def resample(
    value: Callable[[torch.Tensor], float],
    count: int,
    draws: int = 1000,
    seconds: float = 10.0,
    unit: str = "examples",
) -> Resampled:
    """The numbers that an interval rests on.

    Args:
        value: the number of the set that is made of the examples in these places, (n,) int64; may be NaN.
        count: how many examples there are.
        draws: sets to draw.
        seconds: to stop after, if ``draws`` are not done by then. Where :data:`LEAST_DRAWS` do not fit in, nothing is
            drawn beyond what it takes to see that.
        unit: what is drawn, for words.
    """
    nothing = torch.empty(0, dtype=torch.float64)
    if count < LEAST_COUNT:
        return Resampled(
            nothing, nothing, count, unit, f"{count} {unit} are too few to draw from, needed {LEAST_COUNT}"
        )
    start, parts = time.perf_counter(), torch.arange(count) % PARTS
    left_out: list[float] = []
    for part in range(min(PARTS, count)):
        left_out.append(value((parts != part).nonzero().flatten()))
        each = (time.perf_counter() - start) / (part + 1)
        if part >= 2 and each * (len(parts.unique()) + LEAST_DRAWS) > seconds:
            why = f"the {LEAST_DRAWS} draws that it takes at least, of {each:.2g} s each, take more than {seconds:g} s"
            return Resampled(nothing, nothing, count, unit, f"{why}; hs.SetMetric(..., seconds=) allows more")
    values: list[float] = []
    for places in drawn(count, draws):
        if len(values) >= LEAST_DRAWS and time.perf_counter() - start > seconds:
            break
        values.append(value(places))
    return Resampled(
        torch.tensor(values, dtype=torch.float64), torch.tensor(left_out, dtype=torch.float64), count, unit
    )


def drawn(count: int, draws: int) -> Iterator[torch.Tensor]:
    """The places of the examples in each set drawn, (count,) int64: the same in every call."""
    random = torch.Generator().manual_seed(0)
    for _ in range(draws):
        yield torch.randint(count, (count,), generator=random)


def why_no_interval(reference: Resampled, candidate: Resampled) -> str:
    """Why the difference of two models has no interval, in words; empty where it has one."""
    if reference.reason or candidate.reason:
        return reference.reason or candidate.reason
    if (reference.count, reference.unit) != (candidate.count, candidate.unit):
        both = [f"{each.count:,} {each.unit}" for each in (reference, candidate)]
        return f"one model was scored on {both[0]}, the other on {both[1]}"
    differences = _differences(reference.values, candidate.values)
    numbers = differences[differences.isfinite()]
    if len(differences) - len(numbers) > MOST * len(differences):
        return (
            f"on {len(differences) - len(numbers)} of {len(differences):,} sets drawn the metric is no number"
        )
    if _making_it(_pulls(reference, candidate)) < FEW:
        return f"too few of {reference.count:,} {reference.unit} make any difference to say what a rare one may lose"
    return ""


def resampled_interval(
    reference: Resampled, candidate: Resampled, difference: float, error: float
) -> tuple[float, float]:
    """The BCa bootstrap interval of the difference between two models, drawn in pairs.

    Quantiles of the differences at levels that are corrected for bias and for a spread that depends on the number,
    which the sets without a part say. Farther out than :data:`BEYOND` draws the quantile is that of a normal
    distribution through the last known one and the median.

    Args:
        reference: of the one model.
        candidate: of the other.
        difference: the number of the one less that of the other, on the whole set.
        error: how often either end may err, such as 0.025.

    Source: Efron, Journal of the American Statistical Association 82 (1987), sections 3 and 7; parts instead of single
    examples left out: Efron and Tibshirani, An Introduction to the Bootstrap (1993), section 14.
    """
    differences = _differences(reference.values, candidate.values)
    values = differences[differences.isfinite()].sort().values
    below = float((values < difference).sum()) + 0.5 * float((values == difference).sum())
    bias = _NORMAL.inv_cdf(min(max(below, 0.5), len(values) - 0.5) / len(values))
    pulls = _pulls(reference, candidate)
    spread = float(pulls.square().sum())
    acceleration = float((pulls**3).sum()) / (6 * spread**1.5) if spread > 0 else 0.0
    low, high = (
        _quantile(values, _corrected(sign * _NORMAL.inv_cdf(1 - error), bias, acceleration))
        for sign in (-1, 1)
    )
    return low, high


def _differences(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Set by set; of one with fewer draws so many, since all are drawn in the same order."""
    both = min(len(first), len(second))
    return first[:both] - second[:both]


def _pulls(reference: Resampled, candidate: Resampled) -> torch.Tensor:
    """How far each part draws the difference to itself, (parts,)."""
    without = _differences(reference.left_out, candidate.left_out)
    without = without[without.isfinite()]
    return without.mean() - without


def _making_it(pulls: torch.Tensor) -> float:
    """How many parts make the difference: k if k draw it alike, to either side, and the rest do not.

    Measured from the median, since leaving out what makes no difference lets that of the rest weigh a little more.
    """
    if not len(pulls):
        return 0.0
    away = (pulls - pulls.median()).abs()
    squares = float(away.square().sum())
    return float(away.sum()) ** 2 / squares if squares > 0 else 0.0


def _corrected(deviate: float, bias: float, acceleration: float) -> float:
    """BCa's level for a normal deviate, as a normal deviate."""
    shifted = bias + deviate
    room = 1 - acceleration * shifted
    return bias + shifted / room if room > 0 else math.copysign(math.inf, shifted)


def _quantile(values: torch.Tensor, deviate: float) -> float:
    """The quantile of sorted values at the level of a normal deviate, beyond the values known by extrapolation."""
    if math.isinf(deviate):
        return float(values[-1 if deviate > 0 else 0])
    farthest = -_NORMAL.inv_cdf(BEYOND / len(values))
    within = max(-farthest, min(farthest, deviate))
    found = float(values.quantile(_NORMAL.cdf(within)))
    if within == deviate:
        return found
    median = float(values.median())
    return median + (found - median) * deviate / within
