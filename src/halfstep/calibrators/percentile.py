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
        if format.symmetric:
            high = histogram.magnitude_quantile(self.share)
            return -high, high
        high = histogram.quantile(self.share)
        left_out = histogram.count - ceil(self.share * histogram.count)
        return cover(histogram.nth(1 + left_out), high, format)

    def __str__(self) -> str:
        return f"percentile({self.p:g})" if float(f"{self.p:g}") == self.p else f"percentile({self.p})"
