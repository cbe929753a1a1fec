"""A codebook or a scale, fitted to given data.

The best codebook for given data: exact 1-D k-means by dynamic programming, and Lloyd-Max descent.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfstep.errors import DataError, FormatError
from halfstep.formats import Codebook
from halfstep.formats.codebook import increasing
from halfstep.formats.format import SMALLEST_SCALE, storable
from halfstep.granularity import Granularity, PerTensor


def kmeans_codebook(
    samples: Tensor,
    bits: int,
    granularity: Granularity = PerTensor(),  # noqa: B008 - frozen, so sharing it is safe
    weights: Tensor | None = None,
) -> Codebook:
    """Return the codebook of ``2**bits`` absolute values with the least (weighted) squared error: exact
    k-means.

    Where a parameter has fewer distinct samples than values, each sample becomes a value, and the values left
    over stand just above the largest one.

    Args:
        samples: floats, any shape; or the bins of a histogram.
        bits: 1 to 8.
        granularity: one table for all, or one for each channel or group.
        weights: of ``samples``' shape, non-negative: a histogram's counts, or importances such as the
            diagonal of the Fisher information.

    Returns:
        A codebook with ``scaled=False``; its tables have the shape (\\*parameters, 2**bits).

    Raises:
        DataError: no samples, NaN or infinities, or negative weights.
        FormatError: bits out of range, or too many distinct samples: pass a histogram instead.

    >>> kmeans_codebook(torch.tensor([0.0, 1.0, 10.0, 12.0]), bits=1).values
    tensor([ 0.5000, 11.0000])

    Source: :func:`halfstep.functional.fitting.exact_kmeans`.
    """
    return _fitted(exact_kmeans, "k-means", samples, bits, granularity, weights)


def lloyd_max_codebook(
    samples: Tensor,
    bits: int,
    granularity: Granularity = PerTensor(),  # noqa: B008 - frozen, so sharing it is safe
    weights: Tensor | None = None,
) -> Codebook:
    """Return the codebook that Lloyd's iteration reaches from an even grid: quick, but only a local optimum.

    Arguments, result and errors are those of :func:`kmeans_codebook`.
    """
    return _fitted(lloyd_max, "Lloyd-Max", samples, bits, granularity, weights)


def _fitted(
    solve: Callable[[Numbers, Numbers | None, int], Numbers],
    name: str,
    samples: Tensor,
    bits: int,
    granularity: Granularity,
    weights: Tensor | None,
) -> Codebook:
    """Solve for each parameter's table."""
    if not 1 <= bits <= 8:
        raise FormatError(f"bits: got {bits}, needed 1 to 8 for a fitted codebook")
    if weights is not None and weights.shape != samples.shape:
        raise DataError(
            f"weights: got shape {tuple(weights.shape)}, needed {tuple(samples.shape)} as the samples"
        )
    shape = granularity.parameter_shape(samples.shape)
    # A weight of zero takes the padding of a ragged last group out.
    weights = torch.ones_like(samples) if weights is None else weights
    rows = granularity.rows(samples.detach().double().cpu(), 0.0).numpy()
    row_weights = granularity.rows(weights.detach().double().cpu(), 0.0).numpy()
    levels: int = 2**bits
    found = [
        np.unique(solve(r, w, levels).astype(np.float32)) for r, w in zip(rows, row_weights, strict=True)
    ]
    tables = np.stack([np.pad(values, (0, levels - len(values)), "edge") for values in found])
    return Codebook(increasing(torch.from_numpy(tables)).reshape(*shape, levels), scaled=False, name=name)


def binary_scale(x: Tensor, granularity: Granularity) -> Tensor:
    """Return mean\\|x\\| per parameter: the scale with the least squared error for :meth:`Codebook.binary`.

    A parameter whose elements are all zero gets the smallest scale, so that it stays next to nothing.

    Args:
        x: floats, any shape.
        granularity: XNOR-Net takes one scale per filter, ``PerChannel(0)``.

    Returns:
        float32 of the parameter's shape.

    >>> binary_scale(torch.tensor([[1.0, -3.0], [0.5, 0.5]]), PerChannel(0))
    tensor([2.0000, 0.5000])

    Source: Rastegari et al. 2016, "XNOR-Net", equation 6.
    """
    return storable(granularity.reduce(x.detach().double(), "absmean"), instead=SMALLEST_SCALE)


def ternary_scale(x: Tensor, granularity: Granularity) -> Tensor:
    """Return the scale with the least squared error for :meth:`Codebook.ternary`, exactly.

    Keeping the k largest magnitudes at their mean saves ``(their sum)**2 / k``; the best of all k is taken. A
    parameter whose elements are all zero gets scale 1.

    Args:
        x: floats, any shape.
        granularity: which elements share a scale.

    Returns:
        float32 of the parameter's shape.

    >>> ternary_scale(torch.tensor([0.1, -2.0, 4.0, 0.0]), PerTensor())
    tensor(3.)
    """
    if x.numel() == 0:
        raise DataError(
            f"ternary scale of an empty tensor of shape {tuple(x.shape)}: needed at least one element"
        )
    magnitudes = granularity.rows(x.detach().double().abs(), 0.0).sort(dim=1, descending=True).values
    sums = magnitudes.cumsum(1)
    count = torch.arange(1, sums.shape[1] + 1, device=x.device)
    kept = (sums.square() / count).argmax(1, keepdim=True)  # (parameters, 1)
    means = (sums / count).gather(1, kept)
    return storable(means.reshape(granularity.parameter_shape(x.shape)))


Numbers = NDArray[np.float64]

#: Entries of the dynamic programme's table (4 bytes each) beyond which a histogram should be used instead.
MOST_ENTRIES = 2**28


def exact_kmeans(samples: Numbers, weights: Numbers | None, levels: int) -> Numbers:
    """Return the values that minimise ``sum(weight * (sample - nearest value)**2)``: the global optimum.

    Clusters of sorted numbers are intervals, and the best last boundary moves right as more samples are
    added, so each of the ``levels`` rows is filled by divide and conquer: O(levels n log n) time for n
    distinct samples.

    Args:
        samples: (n,), any order, finite. Equal samples are merged.
        weights: (n,) non-negative: counts of a histogram, or importances. None stands for ones.
        levels: how many values.

    Returns:
        Increasing values, ``levels`` of them or one per distinct sample where there are fewer.

    Raises:
        DataError: no samples, NaN or infinities, or negative weights.
        FormatError: so many distinct samples that a histogram is needed.

    >>> exact_kmeans(np.array([0.0, 1.0, 10.0, 12.0]), None, 2)
    array([ 0.5, 11. ])

    Source: Wu 1991, "Optimal quantization by matrix searching" (the monotone boundaries).
    """
    points, weights = distinct(samples, weights)
    if len(points) <= levels:
        return points
    if len(points) * levels > MOST_ENTRIES:
        raise FormatError(
            f"k-means: got {len(points)} distinct samples for {levels} values, needed at most "
            f"{MOST_ENTRIES // levels}; pass a histogram's bins and counts instead"
        )
    mean, w, wx, wxx = _prefix_sums(points, weights)
    boundaries = _compiled_boundaries()(w, wx, wxx, levels)
    optimum: Numbers = mean + _segment_means(w, wx, boundaries)
    return optimum


def lloyd_max(samples: Numbers, weights: Numbers | None, levels: int) -> Numbers:
    """Return values that no step of Lloyd's iteration improves: a local optimum.

    Starts from an even grid over the samples' range, so it is never worse than that grid. An empty cell keeps
    its value. Arguments, result and errors are those of :func:`exact_kmeans`.

    Source: Lloyd 1982; Max 1960.
    """
    points, weights = distinct(samples, weights)
    if len(points) <= levels:
        return points
    mean, w, wx, _ = _prefix_sums(points, weights)
    cell = (points[-1] - points[0]) / levels
    values: Numbers = points[0] - mean + cell * (np.arange(levels) + 0.5)
    points = points - mean
    previous = None
    for _ in range(10_000):
        inner = np.searchsorted(points, (values[1:] + values[:-1]) / 2, side="right")
        boundaries = np.concatenate(([0], inner, [len(points)]))
        if previous is not None and np.array_equal(boundaries, previous):
            break
        previous = boundaries
        filled = w[boundaries[1:]] > w[boundaries[:-1]]
        values = np.where(filled, _segment_means(w, wx, boundaries, values), values)
    return mean + values


def distinct(samples: Numbers, weights: Numbers | None) -> tuple[Numbers, Numbers]:
    """Return the distinct samples of positive weight in increasing order, with their summed weights.

    Raises:
        DataError: no samples, NaN or infinities, weights of another length, negative or not finite.
    """
    samples = np.asarray(samples, dtype=np.float64).ravel()
    weights = np.ones_like(samples) if weights is None else np.asarray(weights, dtype=np.float64).ravel()
    if samples.shape != weights.shape:
        raise DataError(f"weights: got {weights.size} for {samples.size} samples, needed one each")
    if not np.isfinite(samples).all():
        raise DataError("samples: got NaN or infinities, needed finite numbers")
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise DataError("weights: got negative or infinite ones, needed 0 or more")
    points, inverse = np.unique(samples, return_inverse=True)
    totals: Numbers = np.bincount(inverse, weights=weights, minlength=len(points)).astype(np.float64)
    if not totals.any():
        raise DataError("samples: got none with a positive weight, needed at least one")
    return points[totals > 0], totals[totals > 0]


def _prefix_sums(points: Numbers, weights: Numbers) -> tuple[float, Numbers, Numbers, Numbers]:
    """Return the mean, and prefix sums of weight and weighted powers about it (centred: sums then cancel less)."""
    mean = float(np.average(points, weights=weights))
    centred = points - mean
    sums = [np.concatenate(([0.0], np.cumsum(weights * centred**power))) for power in (0, 1, 2)]
    return mean, sums[0], sums[1], sums[2]


def _segment_means(
    w: Numbers, wx: Numbers, boundaries: NDArray[np.int64], instead: Numbers | None = None
) -> Numbers:
    """Return each segment's weighted mean; ``instead`` where a segment is empty."""
    weight = np.diff(w[boundaries])
    means = np.diff(wx[boundaries]) / np.where(weight > 0, weight, 1.0)
    return means if instead is None else np.where(weight > 0, means, instead)


@cache
def _compiled_boundaries() -> Callable[[Numbers, Numbers, Numbers, int], NDArray[np.int64]]:
    """Compile the dynamic programme, or load it; numba is imported here, where it is first needed."""
    from numba import njit

    from halfstep.machine_code import compiled

    @njit(nogil=True)
    def cost(w: Any, wx: Any, wxx: Any, i: int, j: int) -> Any:
        """Squared error of points i to j - 1 about their mean."""
        spread = wxx[j] - wxx[i] - (wx[j] - wx[i]) ** 2 / (w[j] - w[i])
        return max(spread, 0.0)

    def boundaries(w: Any, wx: Any, wxx: Any, levels: int) -> Any:
        n = len(w) - 1
        best = np.empty(n + 1)
        best[0] = np.inf
        for j in range(1, n + 1):
            best[j] = cost(w, wx, wxx, 0, j)
        # Where the last cluster of the first j points begins.
        start = np.zeros((levels, n + 1), dtype=np.int32)
        row = np.empty(n + 1)
        stack = np.empty((128, 4), dtype=np.int64)
        for k in range(1, levels):
            row[: k + 1] = np.inf  # k + 1 clusters need as many points
            top = 0
            stack[0] = (k + 1, n, k, n - 1)
            while top >= 0:
                first, last, low, high = stack[top]
                top -= 1
                middle = (first + last) // 2
                least, where = np.inf, low
                for i in range(low, min(high, middle - 1) + 1):
                    candidate = best[i] + cost(w, wx, wxx, i, middle)
                    if candidate < least:
                        least, where = candidate, i
                row[middle], start[k, middle] = least, where
                if first < middle:
                    top += 1
                    stack[top] = (first, middle - 1, low, where)
                if middle < last:
                    top += 1
                    stack[top] = (middle + 1, last, where, high)
            best, row = row, best
        edges = np.empty(levels + 1, dtype=np.int64)
        edges[levels] = n
        for k in range(levels - 1, -1, -1):
            edges[k] = start[k, edges[k + 1]]
        return edges

    return compiled(boundaries, "kmeans_boundaries")
