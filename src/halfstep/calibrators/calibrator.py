"""What every calibrator does: a histogram and a format go in, a range comes out."""

from __future__ import annotations

from collections.abc import Hashable
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
