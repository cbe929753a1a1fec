"""The search for the range of least mean squared error, over what a histogram saw."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from halfstep.calibrators.slabs import Slabs
from halfstep.formats import Format
from halfstep.statistics import Float64

_PER_OCTAVE = 16  # slabs per power of two in the first search
_FOLLOWED = (4, 4, 2, 1, 1, 1)  # local minima that each round refines
_WINDOW = np.linspace(
    -1.0, 1.0, 9
)  # candidates around each, in units of the last distance between candidates
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
        grid = -self.step * np.indices((lows, highs)).transpose(1, 2, 0).astype(
            np.float64
        )  # (lows, highs, 2)
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
