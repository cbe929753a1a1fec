"""What every calibrator does: a histogram and a format go in, a range comes out.

The whole range: nothing is clipped.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from halfstep.formats import Format
from halfstep.granularity import Granularity
from halfstep.statistics import Histogram


@runtime_checkable
class Calibrator(Protocol):
    """Turns what was seen at a site into the range that its format shall cover; a frozen record of its options.

    ``str()`` is its short name with options, as tables show it.
    """

    def range(self, histogram: Histogram, format: Format) -> tuple[float, float]:
        """Return (low, high) with low <= 0 <= high, and low == -high for a symmetric format.

        Raises:
            NotObservedError: the histogram is empty.
        """


@runtime_checkable
class WeightCalibrator(Protocol):
    """A calibrator that also answers for a tensor that is known as a whole."""

    def weight_range(self, weight: Tensor, format: Format, granularity: Granularity) -> tuple[Tensor, Tensor]:
        """Return (low, high), both float32 of ``granularity.parameter_shape(weight.shape)``."""


def range_of(calibrator: Calibrator, histogram: Histogram, format: Format) -> tuple[float, float]:
    """What a calibrator answers, searched once for what a histogram holds."""
    if not isinstance(calibrator, Hashable):
        return calibrator.range(histogram, format)
    return histogram.once((calibrator, format), lambda: calibrator.range(histogram, format))


def cover(low: float, high: float, format: Format) -> tuple[float, float]:
    """Widen a range to contain zero, and to be symmetric where the format is.

    >>> cover(-1.0, 3.0, Integer(8)), cover(1.0, 3.0, Integer(8, signed=False, symmetric=False))
    ((-3.0, 3.0), (0.0, 3.0))
    """
    low, high = min(low, 0.0), max(high, 0.0)
    if format.symmetric:
        high = max(-low, high)
        low = -high
    return low, high


@dataclass(frozen=True)
class Max:
    """From the smallest value seen to the largest.

    One outlier sets the step of all others: the right choice for weights per channel, a risky one for activations.

    >>> histogram = Histogram()
    >>> histogram.update(torch.tensor([-1.0, 0.0, 5.0]))
    >>> Max().range(histogram, Integer(8, symmetric=False))
    (-1.0, 5.0)
    """

    def range(self, histogram: Histogram, format: Format) -> tuple[float, float]:
        """Return (min, max), widened as :func:`~halfstep.calibrators.calibrator.cover` says.

        Raises:
            NotObservedError: the histogram is empty.
        """
        return cover(histogram.min, histogram.max, format)

    def weight_range(self, weight: Tensor, format: Format, granularity: Granularity) -> tuple[Tensor, Tensor]:
        """Return the extremes of every row that shares a parameter.

        Args:
            weight: any shape that has the granularity's axis; NaN propagates.
            format: a symmetric one gets (-a, a).
            granularity: how the elements share parameters.

        Returns:
            low and high, float32, of ``granularity.parameter_shape(weight.shape)``, with low <= 0 <= high.
        """
        weight = weight.detach().float()
        if format.symmetric:
            high = granularity.reduce(weight, "absmax")
            return -high, high
        low, high = granularity.reduce(weight, "min"), granularity.reduce(weight, "max")
        return low.clamp(max=0.0), high.clamp(min=0.0)

    def __str__(self) -> str:
        return "max"
