"""The rounding error of many candidate ranges at once, over what a histogram saw.

A format placed on many candidate ranges at once: which level a value goes to, and what that costs.

What a histogram saw, as uniform densities that errors can be integrated over.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol

import numpy as np
import torch

from halfstep.errors import FormatError
from halfstep.formats import Codebook, Format, Integer
from halfstep.functional import dequantize
from halfstep.granularity import PerTensor
from halfstep.statistics import Float64, Histogram, Int64


class Placed(Protocol):
    """A format with the parameters of C candidate ranges."""

    def levels(self, x: Float64) -> Float64:
        """Return the number of the level that each x, (B,), is rounded to: (C, B), ascending with x."""

    def squared_error(self, x: Float64) -> Float64:
        """Return (x - Q(x))^2 of each x, (B,): (C, B)."""

    def error_integral(self, x: Float64) -> Float64:
        """Return an antiderivative of (x - Q(x))^2 at each x, (B,): (C, B)."""


def place(format: Format, low: Float64, high: Float64) -> Placed:
    """Place a format on ranges [low, high], both (C,), by its own rule for scale and zero point.

    Raises:
        FormatError: a codebook with one table per channel; a histogram knows no channels.
    """
    scale, zero_point = format.parameters(torch.from_numpy(low), torch.from_numpy(high))
    column = scale.double().numpy()[:, None]
    if isinstance(format, Integer):
        lowest = format.quant_min - zero_point.double().numpy()[:, None] + format.half
        return _Uniform(column, format.half, lowest, lowest + (format.levels - 1))
    if isinstance(format, Codebook):
        if format.values.dim() != 1:
            raise FormatError(
                f"{format}: got one table per parameter, needed a single one for a whole tensor"
            )
        values, thresholds = format.values.double().numpy(), format.thresholds.double().numpy()
        return _Table(column, values, thresholds, "right" if format.ties_up else "left")
    values = _numbers(format)
    return _Table(column, values, (values[1:] + values[:-1]) / 2, "left")


def levels(format: Format, low: float, high: float) -> Float64:
    """Return the numbers that a format can represent when it covers [low, high], ascending.

    >>> levels(Integer(2), -3.0, 3.0)
    array([-3.,  0.,  3.])
    """
    scale, zero_point = format.parameters(torch.tensor(low), torch.tensor(high))
    if isinstance(format, Integer):
        codes = np.arange(format.quant_min, format.quant_max + 1) - int(zero_point) + format.half
        return np.asarray(codes * float(scale), np.float64)
    return np.asarray(_numbers(format) * float(scale), np.float64)


def _numbers(format: Format) -> Float64:
    """Return the finite numbers that the codes of a format stand for, ascending, zero once."""
    codes = torch.arange(format.levels, dtype=torch.int32).to(format.dtype)
    numbers = dequantize(codes, torch.tensor(1.0), None, format, PerTensor())
    return np.unique(numbers[torch.isfinite(numbers)].double().numpy() + 0.0)


@dataclass(frozen=True)
class _Uniform:
    """Levels at whole steps, or at odd half steps, from ``lowest`` to ``highest``."""

    scale: Float64  # (C, 1)
    half: float
    lowest: Float64  # (C, 1)
    highest: Float64  # (C, 1)

    def levels(self, x: Float64) -> Float64:
        return self._round(x / self.scale)

    def _round(self, u: Float64) -> Float64:
        rounded = np.rint(u - self.half) + self.half if self.half else np.rint(u)
        return np.clip(rounded, self.lowest, self.highest, out=rounded)

    def squared_error(self, x: Float64) -> Float64:
        error: Float64 = (x - self.levels(x) * self.scale) ** 2
        return error

    def error_integral(self, x: Float64) -> Float64:
        # In steps: a whole cell contributes 1/12, the cell that x lies in a third of its distance to the level cubed.
        u = x / self.scale
        level = self._round(u)
        u -= level
        integral: Float64 = (u * u * u / 3 + level / 12) * self.scale**3
        return integral


@dataclass(frozen=True)
class _Table:
    """Levels and thresholds of a sorted table, times a scale."""

    scale: Float64  # (C, 1)
    values: Float64  # (n,)
    thresholds: Float64  # (n - 1,)
    side: Literal[
        "left", "right"
    ]  # "left": a number equal to a threshold goes down; a tie costs the same either way

    def _codes(self, u: Float64) -> Int64:
        codes: Int64 = np.searchsorted(self.thresholds, u, side=self.side)
        return codes

    def levels(self, x: Float64) -> Float64:
        return self._codes(x / self.scale).astype(np.float64)

    def squared_error(self, x: Float64) -> Float64:
        error: Float64 = (x - self.values[self._codes(x / self.scale)] * self.scale) ** 2
        return error

    @cached_property
    def _jumps(self) -> Float64:
        """What has to be added to (u - value)^3 / 3 in each cell for it to be continuous at the thresholds."""
        left, right = self.thresholds - self.values[:-1], self.thresholds - self.values[1:]
        return np.append(0.0, np.cumsum((left**3 - right**3) / 3))

    def error_integral(self, x: Float64) -> Float64:
        u = x / self.scale
        codes = self._codes(u)
        u -= self.values[codes]
        integral: Float64 = (u * u * u / 3 + self._jumps[codes]) * self.scale**3
        return integral


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
