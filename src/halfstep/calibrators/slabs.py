"""What a histogram saw, as uniform densities that errors can be integrated over."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from halfstep.calibrators.placed import place
from halfstep.formats import Format
from halfstep.statistics import Float64, Histogram, Int64

_AT_ONCE = 1 << 18  # elements of a temporary array: 2 MiB, which stay in the cache


@dataclass(frozen=True)
class Slabs:
    """Uniform densities: (B,) centres, half widths and counts, centres ascending.

    See :meth:`halfstep.statistics.Histogram.slabs`.
    """

    centres: Float64
    halves: Float64
    counts: Int64

    @classmethod
    def of(cls, histogram: Histogram) -> Slabs:
        """Return the slabs of all finite values that a histogram saw."""
        return cls(*histogram.slabs())

    def coarser(self, per_octave: int) -> Slabs:
        """Return at most so many slabs per power of two and sign, with the same count, mean and spread as before."""
        if not self.centres.size:
            return self
        sign = np.sign(self.centres)
        octave = np.log2(np.abs(self.centres), out=np.zeros_like(sign), where=sign != 0)
        group = np.floor(octave * per_octave)
        first = np.flatnonzero(np.append(True, (group[1:] != group[:-1]) | (sign[1:] != sign[:-1])))
        n = np.add.reduceat(self.counts, first)
        mean = np.add.reduceat(self.counts * self.centres, first) / n
        away = self.centres - np.repeat(mean, np.diff(np.append(first, group.size)))
        variance = np.add.reduceat(self.counts * (away**2 + self.halves**2 / 3), first) / n
        return Slabs(mean, np.sqrt(3 * variance), n)

    def mean_squared_error(self, low: Float64, high: Float64, format: Format) -> Float64:
        """Return E (x - Q(x))^2 for each candidate range: rounding and clipping error, integrated over each density.

        Args:
            low: (C,) lower ends.
            high: (C,) upper ends.
            format: what is placed on [low, high], by its own rule for scale and zero point.

        Returns:
            (C,) errors, in the square of the values' unit.
        """
        share = self.counts / self.counts.sum()
        wide = self.halves > 0
        point, starts = self.centres[~wide], (self.centres - self.halves)[wide]
        stops, density = (self.centres + self.halves)[wide], share[wide] / (2 * self.halves[wide])
        errors = np.empty(low.size)
        rows = max(1, _AT_ONCE // max(1, self.centres.size))
        for first in range(0, low.size, rows):
            some = slice(first, first + rows)
            placed = place(format, low[some], high[some])
            errors[some] = (placed.error_integral(stops) - placed.error_integral(starts)) @ density
            errors[some] += placed.squared_error(point) @ share[~wide]
        return errors
