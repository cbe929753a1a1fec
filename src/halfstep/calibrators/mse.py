"""The range with the least mean squared error."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from halfstep.calibrators.calibrator import cover
from halfstep.calibrators.histogram_search import HistogramSearch
from halfstep.calibrators.slabs import Slabs
from halfstep.calibrators.weight_search import best_weight_range
from halfstep.formats import Format
from halfstep.granularity import Granularity
from halfstep.statistics import Histogram


@dataclass(frozen=True)
class MSE:
    """The range that minimises the mean of (x - Q(x))^2: what is clipped against what is rounded.

    The error has many local minima at few bits, so the whole range of candidates is searched before the best few
    minima are refined, to a hundred-thousandth of the range. An affine format's two ends are searched as a pair. No
    candidate is wider than the data. The error is that of the format's own levels, whatever the format.

    >>> histogram = Histogram()
    >>> histogram.update(torch.randn(1_000_000, generator=torch.Generator().manual_seed(0)))
    >>> low, high = MSE().range(histogram, Integer(4))
    >>> round(high, 1)  # the optimum of the normal distribution is 2.47
    2.5
    """

    def range(self, histogram: Histogram, format: Format) -> tuple[float, float]:
        """Return the best (low, high).

        Raises:
            NotObservedError: the histogram is empty.
        """
        lowest, highest = cover(histogram.min, histogram.max, format)
        if lowest == highest:
            return lowest, highest
        return HistogramSearch(Slabs.of(histogram), lowest, highest, format).best()

    def weight_range(
        self, weight: Tensor, format: Format, granularity: Granularity, importance: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the best range of every row that shares a parameter, all rows searched at once.

        Args:
            weight: any shape that has the granularity's axis; finite.
            format: a symmetric one gets (-a, a).
            granularity: how the elements share parameters.
            importance: non-negative weights of the squared errors, broadcastable to ``weight``'s shape; say, the mean
                squares of the inputs that each element multiplies, (1, inputs) for a linear layer. None: all equal.

        Returns:
            low and high, float32, of ``granularity.parameter_shape(weight.shape)``, within the row's extremes.

        Raises:
            ArgumentError: an importance that does not broadcast to the weight, or is negative, NaN or infinite.
        """
        return best_weight_range(weight, format, granularity, importance)

    def __str__(self) -> str:
        return "mse"
