"""The whole range: nothing is clipped."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from halfstep.calibrators.calibrator import cover
from halfstep.formats import Format
from halfstep.granularity import Granularity
from halfstep.statistics import Histogram


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
