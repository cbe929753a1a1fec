"""Ranges that leave something out: a fixed share of the values, or all but the average of the batches.

The average range of the batches, the newest weighing most.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil

from halfstep.calibrators.calibrator import cover
from halfstep.errors import ArgumentError, NotObservedError
from halfstep.formats import Format
from halfstep.statistics import Histogram


@dataclass(frozen=True)
class Percentile:
    """The smallest range that holds ``p`` percent of the values on each side.

    A symmetric format gets the percentile of the absolute values; an affine one the percentile of the values as its
    upper end, and of their negatives as its lower end. 100 is the range of the data.

    Where so few values differ from zero that such a range holds only zero, it holds ``p`` percent of the values that
    are not zero instead: outliers among them are still left out, and zeros are represented whatever the range.
    Exact where at most 1024 values are left out on a side, otherwise right to 2^-7 of itself.

    Args:
        p: percent, from 50 to 100; read as the decimal it is written as.

    Raises:
        ArgumentError: ``p`` is out of its domain.

    >>> histogram = Histogram()
    >>> histogram.update(torch.arange(1.0, 1001.0))
    >>> Percentile(99.9).range(histogram, Integer(8))
    (-999.0, 999.0)
    """

    p: float = 99.99

    def __post_init__(self) -> None:
        if not 50 <= self.p <= 100:
            raise ArgumentError(f"percentile: got {self.p}, needed percent from 50 to 100, such as 99.99")

    @property
    def share(self) -> Fraction:
        """``p`` as a fraction of one: 99.99 is 9999/10000 exactly."""
        return Fraction(repr(self.p)) / 100

    def range(self, histogram: Histogram, format: Format) -> tuple[float, float]:
        """Return the range that holds the share on each side.

        Raises:
            NotObservedError: the histogram is empty.
        """
        live = histogram.count - histogram.zero_count
        for left_out in (self.left_out(histogram.count), self.left_out(live), 0):
            low, high = _leaving_out(histogram, format, left_out)
            if low < high:
                break
        return low, high

    def left_out(self, count: int) -> int:
        """How many of so many values are beyond the range, on each side."""
        return count - ceil(self.share * count)

    def __str__(self) -> str:
        return f"percentile({self.p:g})" if float(f"{self.p:g}") == self.p else f"percentile({self.p})"


def _leaving_out(histogram: Histogram, format: Format, left_out: int) -> tuple[float, float]:
    """The range without so many of the largest magnitudes, or without so many values on each side."""
    count = histogram.count
    if format.symmetric:
        high = histogram.magnitude_quantile(Fraction(count - left_out, max(count, 1)))
        return -high, high
    return cover(histogram.nth(1 + left_out), histogram.nth(count - left_out), format)


@dataclass(frozen=True)
class MovingAverage:
    """An exponential moving average of each batch's smallest and largest value.

    Unlike all other calibrators it depends on the order and the size of the batches, and on how they were split over
    processes. It is here for those who want to compare with tools that use it. It needs
    ``Histogram(batch_ranges=True)``, and nobody else pays for that.

    Args:
        momentum: weight of the past, at least 0 and below 1; the average starts as the first batch's range.

    Raises:
        ArgumentError: ``momentum`` is out of its domain.

    >>> histogram = Histogram(batch_ranges=True)
    >>> for top in (10.0, 20.0):
    ...     histogram.update(torch.tensor([0.0, top]))
    >>> MovingAverage(momentum=0.9).range(histogram, Integer(8))
    (-11.0, 11.0)
    """

    momentum: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ArgumentError(f"momentum: got {self.momentum}, needed at least 0 and less than 1")

    def range(self, histogram: Histogram, format: Format) -> tuple[float, float]:
        """Return the averaged (low, high).

        Raises:
            NotObservedError: no batch held a finite value.
            ArgumentError: the histogram did not keep the ranges of its batches.
        """
        ranges = histogram.batch_ranges
        if not ranges:
            raise NotObservedError(
                "no finite value was observed; run at least one batch through the model first"
            )
        low, high = ranges[0]
        for batch_low, batch_high in ranges[1:]:
            low += (1 - self.momentum) * (batch_low - low)
            high += (1 - self.momentum) * (batch_high - high)
        return cover(low, high, format)

    def __str__(self) -> str:
        return f"moving average({self.momentum:g})"
