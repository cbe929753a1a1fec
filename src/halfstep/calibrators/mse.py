"""Ranges of least mean squared error, of what a histogram saw and of a weight; codebooks of a site's own.

The range with the least mean squared error.

The search for the range of least mean squared error, over what a histogram saw.

The search for the ranges of least mean squared error of a weight, many rows at once.

A codebook of a site's own, straight from what was seen there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfstep.calibrators.calibrator import Max, cover
from halfstep.calibrators.error import Slabs
from halfstep.errors import ArgumentError, FormatError, NotObservedError
from halfstep.formats import Codebook, Format
from halfstep.functional import fake_quantize, kmeans_codebook
from halfstep.granularity import Granularity, PerChannel
from halfstep.statistics import Float64, Histogram


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


_PER_OCTAVE = 16  # slabs per power of two in the first search


_FOLLOWED = (4, 4, 2, 1, 1, 1)  # local minima that each round refines


# Candidates around each, in units of the last distance between candidates.
_WINDOW = np.linspace(-1.0, 1.0, 9)


_FINER = 4  # how much smaller that distance is afterwards


class HistogramSearch:
    """Finds the range of least error for one site.

    Candidates are named by their extents: the logarithm of the one end, or of both, relative to the widest.
    """

    def __init__(self, slabs: Slabs, lowest: float, highest: float, format: Format) -> None:
        self.slabs, self.format = slabs, format
        self.lowest, self.highest = lowest, highest
        self.paired = not format.symmetric and lowest < 0 < highest
        self.step = 1 / 8 if self.paired else 1 / 16  # octaves between the candidates of the first search

    def ranges(self, extents: Float64) -> tuple[Float64, Float64]:
        """Return the ranges (low, high), each (C,), of extents (C, 1) or (C, 2); as float32 would hold them."""
        low, high = self.lowest * np.exp2(extents[:, 0]), self.highest * np.exp2(extents[:, -1])
        return low.astype(np.float32).astype(np.float64), high.astype(np.float32).astype(np.float64)

    def errors(self, slabs: Slabs, extents: Float64) -> Float64:
        """Return the mean squared error of each candidate, (C,)."""
        return slabs.mean_squared_error(*self.ranges(extents), self.format)

    def best(self) -> tuple[float, float]:
        """Search coarsely everywhere, then finely around the best few local minima."""
        starts = self._starts()
        width = self.step
        for followed in _FOLLOWED:
            starts = starts[:followed]
            for side in range(starts.shape[1]):
                tried = np.repeat(starts[:, None], _WINDOW.size, axis=1)  # (starts, window, sides)
                tried[..., side] = np.minimum(tried[..., side] + width * _WINDOW, 0.0)
                errors = self.errors(self.slabs, tried.reshape(-1, starts.shape[1])).reshape(tried.shape[:2])
                starts = tried[np.arange(len(starts)), errors.argmin(axis=1)]
            starts = starts[errors.min(axis=1).argsort(kind="stable")]
            width /= _FINER
        starts = np.vstack([np.zeros_like(starts[:1]), starts])  # the widest wins ties
        winner = self.errors(self.slabs, starts).argmin()
        low, high = self.ranges(starts[winner : winner + 1])
        return float(low[0]), float(high[0])

    def _starts(self) -> Float64:
        """Return the extents of the best local minima on a grid: (starts, sides)."""
        coarse = self.slabs.coarser(_PER_OCTAVE)
        line: Float64 = -self.step * np.arange(40 / self.step)[:, None]  # 40 octaves
        widest = self.errors(coarse, line[:1])
        line = line[: self._useful(coarse, widest[0], self.lowest, self.highest)]
        along = self.errors(coarse, line)
        if not self.paired:
            return line[_minima(along)]
        # A side that clips more than the best symmetric shrinking errs in all cannot be part of the optimum.
        lows = self._useful(coarse, along.min(), self.lowest, np.inf)
        highs = self._useful(coarse, along.min(), -np.inf, self.highest)
        # (lows, highs, 2)
        grid = -self.step * np.indices((lows, highs)).transpose(1, 2, 0).astype(np.float64)
        errors = self.errors(coarse, grid.reshape(-1, 2)).reshape(lows, highs)
        return grid[_minima(errors)]

    def _useful(self, slabs: Slabs, error: float, lowest: float, highest: float) -> int:
        """Return how many steps inwards the clipping alone stays below an error that is known to be possible."""
        extents = np.exp2(-self.step * np.arange(40 / self.step))[:, None]
        beyond = np.maximum(slabs.centres - highest * extents, lowest * extents - slabs.centres)
        clipped = np.maximum(beyond, 0.0) ** 2 @ (slabs.counts / slabs.counts.sum())
        return int(np.searchsorted(clipped, error, side="right")) + 1


def _minima(errors: Float64) -> tuple[NDArray[np.int64], ...]:
    """Return the indices of the best entries of an array that are no larger than their neighbours along any axis."""
    local = np.ones(errors.shape, bool)
    for axis in range(errors.ndim):
        ahead = np.diff(errors, axis=axis)
        wall = (
            [(int(a == axis), 0) for a in range(errors.ndim)],
            [(0, int(a == axis)) for a in range(errors.ndim)],
        )
        local &= np.pad(ahead <= 0, wall[0], constant_values=True)
        local &= np.pad(ahead >= 0, wall[1], constant_values=True)
    where = np.flatnonzero(local)
    best = where[np.argsort(errors.ravel()[where], kind="stable")[: _FOLLOWED[0]]]
    return np.unravel_index(best, errors.shape)


_ROWS = PerChannel(0)


_AT_ONCE = 1 << 18  # elements searched together: 1 MiB, so that the temporary tensors stay in the cache


_STEP = 1 / 16  # octaves between the candidates of the first search


_STEPS = 160  # ten octaves inwards at most


_CHECK = 4  # candidates after which the search asks whether narrower ones can still win


_OCTAVES = (1 / 64, 1 / 256)  # octaves between the candidates around the best of a symmetric range


_SIDES = (1 / 4, 1 / 16, 1 / 64, 1 / 256)  # the same for either end of an affine one


_NEIGHBOURS = (-3, -2, -1, 1, 2, 3)


def best_weight_range(
    weight: Tensor, format: Format, granularity: Granularity, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return low and high of least mean squared error; arguments as :meth:`.MSE.weight_range`."""
    if isinstance(format, Codebook) and format.values.dim() > 1:
        raise FormatError(f"{format}: got one table per parameter, needed a single one to search ranges for")
    weight = weight.detach().float()
    shape = granularity.parameter_shape(weight.shape)
    rows = granularity.rows(weight, 0.0).contiguous()
    importance = _padding(weight, granularity, rows) if importance is None else _checked(importance, weight)
    weights = None if importance is None else granularity.rows(importance.expand(weight.shape), 0.0)
    count = max(1, _AT_ONCE // max(1, rows.shape[1]))
    lows, highs = [torch.empty(0, device=rows.device)], [torch.empty(0, device=rows.device)]
    for first in range(0, rows.shape[0], count):
        some = slice(first, first + count)
        low, high = _Search(rows[some], format, None if weights is None else weights[some]).best()
        lows.append(low)
        highs.append(high)
    return torch.cat(lows).reshape(shape), torch.cat(highs).reshape(shape)


class _Search:
    """Shrinks every row's range in the same steps, and keeps for each the best it has seen.

    An affine range is shrunk as a whole first, then at either end.
    """

    def __init__(self, rows: Tensor, format: Format, weights: Tensor | None) -> None:
        self.rows, self.format, self.weights = rows, format, weights
        self.low, self.high = self.widest = Max().weight_range(rows, format, _ROWS)
        self.error = self._error(self.low, self.high)

    def best(self) -> tuple[Tensor, Tensor]:
        """Return the best low and high of each row."""
        widest_low, widest_high = self.widest
        for k in range(1, _STEPS):
            low, high = (end * 2.0 ** (-_STEP * k) for end in self.widest)
            if k % _CHECK == 0 and bool((self._clipping(low, high) > self.error).all()):
                break
            self._try(low, high)
        for step in _OCTAVES if self.format.symmetric else _SIDES:
            for moves_low, moves_high in [(1, 1)] if self.format.symmetric else [(1, 0), (0, 1)]:
                low, high = self.low, self.high
                for i in _NEIGHBOURS:
                    self._try(
                        (low * 2.0 ** (step * i * moves_low)).maximum(widest_low),
                        (high * 2.0 ** (step * i * moves_high)).minimum(widest_high),
                    )
        return self.low, self.high

    def _try(self, low: Tensor, high: Tensor) -> None:
        error = self._error(low, high)
        better = error < self.error
        self.low, self.high = torch.where(better, low, self.low), torch.where(better, high, self.high)
        self.error = torch.where(better, error, self.error)

    def _error(self, low: Tensor, high: Tensor) -> Tensor:
        """Return each row's sum of squared errors."""
        scale, zero_point = self.format.parameters(low, high)
        return self._sum(fake_quantize(self.rows, scale, zero_point, self.format, _ROWS).sub_(self.rows))

    def _clipping(self, low: Tensor, high: Tensor) -> Tensor:
        """Return the part of it that clipping alone causes; it only grows as the range shrinks."""
        return self._sum(self.rows.clamp(low[:, None], high[:, None]).sub_(self.rows))

    def _sum(self, difference: Tensor) -> Tensor:
        if self.weights is None:
            return difference.square_().sum(dim=1)
        return difference.square_().mul_(self.weights).sum(dim=1)


def _padding(weight: Tensor, granularity: Granularity, rows: Tensor) -> Tensor | None:
    """Return ones if rows are padded, which a format without zero must not be blamed for; None if there are none."""
    return torch.ones_like(weight) if rows.numel() > weight.numel() else None


def _checked(importance: Tensor, weight: Tensor) -> Tensor:
    importance = importance.detach().to(weight.device, torch.float32)
    try:
        importance.expand(weight.shape)
    except RuntimeError:
        raise ArgumentError(
            f"importance: got shape {tuple(importance.shape)}, needed one that broadcasts to {tuple(weight.shape)}"
        ) from None
    if not bool(((importance >= 0) & importance.isfinite()).all()):
        raise ArgumentError("importance: got negative, NaN or infinite numbers, needed 0 or more")
    return importance


def fitted_codebook(histogram: Histogram, bits: int) -> Codebook:
    """Return the ``2**bits`` absolute values of least mean squared error over a histogram's bins: exact k-means.

    Each bin stands where the mean of its samples is, and weighs as many as it holds; so the values are the optimum for
    the samples to the width of a bin, 2^-7 of the value. Values are real numbers, so no range has to be chosen after.

    Args:
        histogram: not empty.
        bits: 1 to 8.

    Raises:
        NotObservedError: the histogram is empty.
        FormatError: bits out of range.

    >>> histogram = Histogram()
    >>> histogram.update(torch.tensor([0.0, 1.0, 10.0, 12.0]))
    >>> fitted_codebook(histogram, bits=1).values
    tensor([ 0.5000, 11.0000])
    """
    if not histogram.count:
        raise NotObservedError("no finite value was observed; run at least one batch through the model first")
    values, counts = histogram.bins()
    return kmeans_codebook(torch.from_numpy(values), bits, weights=torch.from_numpy(counts).double())
