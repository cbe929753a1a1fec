"""Fit a codebook or a scale to given data."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from halfstep.errors import DataError, FormatError
from halfstep.formats import Codebook
from halfstep.formats.codebook import increasing
from halfstep.formats.format import SMALLEST_SCALE, storable
from halfstep.formats.kmeans import Numbers, exact_kmeans, lloyd_max
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

    Source: :func:`halfstep.formats.kmeans.exact_kmeans`.
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
