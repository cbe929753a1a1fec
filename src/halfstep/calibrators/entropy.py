"""The range that loses least information, as the Kullback-Leibler divergence measures it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from halfstep.calibrators.calibrator import cover
from halfstep.calibrators.error import place
from halfstep.errors import ArgumentError
from halfstep.formats import Format
from halfstep.statistics import Float64, Histogram, Int64

_AT_ONCE = 1 << 18  # elements of a temporary array: 2 MiB, which stay in the cache


@dataclass(frozen=True)
class Entropy:
    """The threshold T for which the distribution after quantization tells least apart from the one before.

    For a candidate T, P is the distribution of the values over the histogram's bins, what lies beyond T added to
    the outermost bin on its side. Q is what is known after quantization: of every level only how many values inside
    the range went to it, spread evenly (by width) over the bins that went to it and are not empty. The divergence
    KL(P || Q) is the information lost, clipping included, and the smallest wins.

    The bins have a relative width, so no number of bins has to be chosen and no outlier spoils them. Candidates
    are the outer edges of the bins, from the first that has as many bins inside as the format has levels, and that
    clips no more than half of the values that are not zero. Exact zeros are left out: every format maps them to
    themselves. An affine format has the range from max(min, -T) to min(max, T).

    Args:
        candidates: at most so many are tried, evenly picked.

    Raises:
        ArgumentError: ``candidates`` is below 1.

    >>> histogram = Histogram()
    >>> histogram.update(torch.cat([torch.linspace(0.0, 1.0, 10_000), torch.tensor([10.0])]))
    >>> low, high = Entropy().range(histogram, Integer(8))
    >>> high < 1.1
    True

    Source: S. Migacz, 8-bit inference with TensorRT, GTC 2017; for its published faults see ``docs/calibration.md``.
    """

    candidates: int = 512

    def __post_init__(self) -> None:
        if self.candidates < 1:
            raise ArgumentError(f"candidates: got {self.candidates}, needed at least 1")

    def range(self, histogram: Histogram, format: Format) -> tuple[float, float]:
        """Return the best (low, high).

        Raises:
            NotObservedError: the histogram is empty.
        """
        lowest, highest = cover(histogram.min, histogram.max, format)
        values, counts = histogram.bins()
        values, counts = values[values != 0], counts[values != 0]
        if not values.size:
            return lowest, highest
        thresholds = self._thresholds(values, counts, format)
        low = np.maximum(-thresholds, lowest).astype(np.float32).astype(np.float64)
        high = np.minimum(thresholds, highest).astype(np.float32).astype(np.float64)
        divergence = divergences(values, counts, low, high, format)
        best = divergence.size - 1 - divergence[::-1].argmin()  # the widest of equals
        return float(low[best]), float(high[best])

    def _thresholds(self, values: Float64, counts: Int64, format: Format) -> Float64:
        """Return the candidates, ascending: outer edges of bins; the last holds all."""
        edges, which = np.unique(_outer_edges(values), return_inverse=True)
        inside = np.cumsum(np.bincount(which, counts))
        bins = np.cumsum(np.bincount(which))
        useful = np.flatnonzero((bins >= format.levels) & (2 * inside >= inside[-1]))
        useful = useful if useful.size else np.array([edges.size - 1])
        picked = np.unique(np.linspace(useful[0], edges.size - 1, self.candidates).round().astype(np.int64))
        chosen: Float64 = edges[picked]
        return chosen

    def __str__(self) -> str:
        return "entropy" if self == Entropy() else f"entropy({self.candidates} candidates)"


def divergences(values: Float64, counts: Int64, low: Float64, high: Float64, format: Format) -> Float64:
    """Return KL(P || Q) in nats for each candidate range.

    Args:
        values: (B,) means of non-empty bins, ascending, none of them zero.
        counts: (B,) how many values each holds.
        low: (C,) lower ends of the candidates.
        high: (C,) upper ends.
        format: what is placed on [low, high].

    Raises:
        ArgumentError: a range holds no bin.
    """
    result = np.empty(low.size)
    rows = max(1, _AT_ONCE // values.size)
    for start in range(0, low.size, rows):
        some = slice(start, start + rows)
        result[some] = _divergences(values, counts.astype(np.float64), low[some], high[some], format)
    return result


def _divergences(values: Float64, n: Float64, low: Float64, high: Float64, format: Format) -> Float64:
    widths = _widths(values)
    # Bins inside: (C,)
    first, stop = (np.searchsorted(values, low), np.searchsorted(values, high, side="right"))
    if (first == stop).any():
        raise ArgumentError("divergence: got a range that holds no bin, needed one that holds at least one")
    total, reached = n.sum(), np.append(0.0, np.cumsum(n))
    below, inside, above = reached[first], reached[stop] - reached[first], total - reached[stop]

    # Runs of bins that went to the same level; a run also ends where the range does.
    levels = place(format, low, high).levels(values)  # (C, B)
    rows, bins = np.arange(low.size), np.arange(values.size)
    starts = np.ones(levels.shape, bool)
    starts[:, 1:] = levels[:, 1:] != levels[:, :-1]
    starts |= (bins == first[:, None]) | (bins == stop[:, None])
    runs = np.flatnonzero(starts)
    row, bin = np.divmod(runs, values.size)
    count = np.add.reduceat(np.broadcast_to(n, levels.shape).ravel(), runs)
    density = count / np.add.reduceat(np.broadcast_to(widths, levels.shape).ravel(), runs)
    within = (bin >= first[row]) & (bin < stop[row])
    kept = np.bincount(row, np.where(within, count * np.log(density), 0.0), minlength=low.size)
    surprise = np.append(0.0, np.cumsum(n * np.log(n / widths)))
    lost = surprise[stop] - surprise[first] - kept + inside * np.log(inside / total)

    # The outermost bins also hold what was clipped, which Q knows nothing of.
    run_of = np.cumsum(starts.ravel()) - 1
    alone = stop - first == 1
    for end, clipped in (
        (first, np.where(alone, 0.0, below)),
        (stop - 1, above + np.where(alone, below, 0.0)),
    ):
        own, width = n[end], widths[end]
        known = density[run_of[rows * values.size + end]] * total / inside
        lost += (
            (own + clipped) * np.log((own + clipped) / width)
            - own * np.log(own / width)
            - clipped * np.log(known)
        )
    divergence: Float64 = lost / total
    return divergence


def _outer_edges(values: Float64) -> Float64:
    """Return the magnitude at which the bin of each value ends."""
    widths = _widths(values)
    edges: Float64 = (np.floor(np.abs(values) / widths) + 1) * widths
    return edges


def _widths(values: Float64) -> Float64:
    """Return the width of the bin that holds each value: 2^-7 of the power of two below it."""
    _, exponent = np.frexp(values)
    widths: Float64 = np.ldexp(1.0, np.maximum(exponent, -125) - 8)
    return widths
