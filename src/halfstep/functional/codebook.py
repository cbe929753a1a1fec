"""The arithmetic of :class:`~halfstep.formats.Codebook`: find the cell, look the value up."""

from __future__ import annotations

import torch
from torch import Tensor

from halfstep.errors import FormatError
from halfstep.formats import Codebook
from halfstep.functional import lookup
from halfstep.functional.uniform import working_dtype
from halfstep.granularity import Granularity


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, format: Codebook, granularity: Granularity
) -> Tensor:
    """Return for each element the number of thresholds below ``x / scale``; NaN gets the code of zero."""
    normalised = torch.nan_to_num(
        _normalised(x, scale, format, granularity), nan=0.0, posinf=None, neginf=None
    )
    thresholds = table(format.thresholds, normalised, granularity)
    return search(normalised, thresholds, format.ties_up, granularity).to(format.dtype)


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    format: Codebook,
    granularity: Granularity,
    dtype: torch.dtype,
) -> Tensor:
    """Return ``scale * values[codes]``."""
    if codes.numel() and not 0 <= int(codes.amin()) <= int(codes.amax()) < format.levels:
        raise FormatError(
            f"codes: got {int(codes.amin())} to {int(codes.amax())}, needed 0 to {format.levels - 1} for {format}"
        )
    values = table(format.values.to(working_dtype(dtype)), codes, granularity)
    return _times_scale(look_up(codes.long(), values, granularity), scale, format, granularity).to(dtype)


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, format: Codebook, granularity: Granularity
) -> Tensor:
    """Return ``dequantize(quantize(x))``, except that NaN stays NaN."""
    normalised = _normalised(x, scale, format, granularity)
    thresholds = table(format.thresholds, normalised, granularity)
    values = table(format.values, normalised, granularity)
    result = replace(normalised, values, thresholds, format.ties_up, granularity)
    return _times_scale(result, scale, format, granularity).to(x.dtype)


def table(numbers: Tensor, x: Tensor, granularity: Granularity) -> Tensor:
    """Return a format's table on ``x``'s device, in ``x``'s dtype if that is a float: (n,) or (\\*parameters,
    n).

    Raises:
        FormatError: one table per parameter, but for parameters of another shape.
    """
    if numbers.dim() > 1 and numbers.shape[:-1] != granularity.parameter_shape(x.shape):
        raise FormatError(
            f"codebook: got tables for parameters of shape {tuple(numbers.shape[:-1])}, needed "
            f"{granularity.parameter_shape(x.shape)} for a tensor of shape {tuple(x.shape)} quantized {granularity}"
        )
    return numbers.to(x) if x.is_floating_point() else numbers.to(x.device)


def replace(x: Tensor, values: Tensor, thresholds: Tensor, ties_up: bool, granularity: Granularity) -> Tensor:
    """Return the value of each element's cell; NaN stays NaN. May overwrite ``x``, which must be fresh."""
    if lookup.serves(x, thresholds):
        lookup.replace(x, values, thresholds, ties_up)
        return x
    codes = search(x, thresholds, ties_up, granularity)
    return torch.where(x.isnan(), x, look_up(codes, values, granularity))


def totals(x: Tensor, amounts: Tensor, thresholds: Tensor, granularity: Granularity) -> Tensor:
    """Return the sum of ``amounts`` over the elements of each cell, (n,) or (\\*parameters, n).

    Ties go down; NaN is in no cell.
    """
    levels = thresholds.shape[-1] + 1
    if lookup.serves(x, thresholds) and amounts.dtype == torch.float32:
        return lookup.totals(x, amounts, thresholds)
    codes = search(x.nan_to_num(nan=0.0, posinf=None, neginf=None), thresholds, False, granularity)
    amounts = amounts.masked_fill(x.isnan(), 0.0)
    if thresholds.dim() == 1:
        return amounts.new_zeros(levels).index_add(0, codes.reshape(-1), amounts.reshape(-1))
    rows = granularity.rows(amounts, 0.0)  # the padding of a ragged group adds zeros
    sums = amounts.new_zeros(len(rows), levels).scatter_add(1, granularity.rows(codes, 0), rows)
    return sums.reshape(*thresholds.shape[:-1], levels)


def search(x: Tensor, thresholds: Tensor, ties_up: bool, granularity: Granularity) -> Tensor:
    """Return for each element how many thresholds lie below it (``ties_up``: or at it), as int64."""
    if lookup.serves(x, thresholds):
        codes = x.clone()
        lookup.replace(codes, torch.arange(len(thresholds) + 1.0), thresholds, ties_up)
        return codes.long()
    if thresholds.dim() == 1:
        return torch.bucketize(x.contiguous(), thresholds, right=ties_up)
    rows = granularity.rows(x, 0.0).contiguous()
    codes = torch.searchsorted(thresholds.reshape(len(rows), -1), rows, right=ties_up)
    return granularity.unrows(codes, x.shape)


def look_up(codes: Tensor, values: Tensor, granularity: Granularity) -> Tensor:
    """Return the value of each int64 code: from the one table, or from that of the element's parameter."""
    if values.dim() == 1:
        return values[codes]
    rows = granularity.rows(codes, 0)
    return granularity.unrows(values.reshape(len(rows), -1).gather(1, rows), codes.shape)


def _normalised(x: Tensor, scale: Tensor, format: Codebook, granularity: Granularity) -> Tensor:
    """Return ``x / scale`` as a fresh tensor of the dtype that is computed in."""
    working = working_dtype(x.dtype)
    if not format.scaled:
        return x.to(working, copy=True)
    scale = granularity.expand(scale, x.shape).to(working)
    return x / scale if x.dtype == working else x.to(working).div_(scale)


def _times_scale(values: Tensor, scale: Tensor, format: Codebook, granularity: Granularity) -> Tensor:
    """Multiply by the scale in place, unless the values are absolute."""
    return values.mul_(granularity.expand(scale, values.shape)) if format.scaled else values
