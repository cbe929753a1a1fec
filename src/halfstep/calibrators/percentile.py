"""The range that leaves out a fixed share of the values."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from math import ceil

from halfstep.calibrators.calibrator import cover
from halfstep.errors import ArgumentError
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
