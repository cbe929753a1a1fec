"""The average range of the batches, the newest weighing most."""

from __future__ import annotations

from dataclasses import dataclass

from halfstep.calibrators.calibrator import cover
from halfstep.errors import ArgumentError, NotObservedError
from halfstep.formats import Format
from halfstep.statistics import Histogram


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
