"""The arithmetic of :class:`~halfstep.formats.Floating`: saturate, then round the mantissa to nearest even."""

from __future__ import annotations

import torch
from torch import Tensor

from halfstep.formats import Floating
from halfstep.functional.uniform import working_dtype
from halfstep.granularity import Granularity


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, format: Floating, granularity: Granularity
) -> Tensor:
    """Return bit patterns; NaN stays NaN where the format has one, else becomes 0."""
    numbers = _rounded(_saturated(x, scale, format, granularity), format)
    if format.storage is not None:
        patterns = numbers.to(format.storage).view(torch.uint8)
        return patterns.masked_fill_(numbers.isnan(), 0x7F)  # torch lets a NaN's sign differ by position
    numbers = numbers.nan_to_num(nan=0.0)
    # Magnitudes in increasing order have consecutive patterns: count steps, and a full row of them per exponent.
    row: int = 2**format.mantissa_bits
    power = _power(numbers, format)
    exponent = torch.frexp(power).exponent - 1
    pattern = numbers.abs() / power * row + (exponent - format.smallest_exponent) * row
    return (pattern + torch.signbit(numbers) * (format.levels // 2)).to(format.dtype)


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    format: Floating,
    granularity: Granularity,
    dtype: torch.dtype,
) -> Tensor:
    """Return ``scale`` times the number that each bit pattern stands for."""
    working = working_dtype(dtype)
    if format.storage is not None:
        numbers = codes.to(torch.uint8).view(format.storage).to(working)
    else:
        numbers = _decoded(codes.int(), format, working)
    return numbers.mul_(granularity.expand(scale, codes.shape)).to(dtype)


def fake_quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, format: Floating, granularity: Granularity
) -> Tensor:
    """Return ``dequantize(quantize(x))``, except that NaN stays NaN."""
    numbers = _rounded(_saturated(x, scale, format, granularity), format)
    return numbers.mul_(granularity.expand(scale, x.shape)).to(x.dtype)


def _saturated(x: Tensor, scale: Tensor, format: Floating, granularity: Granularity) -> Tensor:
    """Return ``x / scale`` clipped to the finite numbers, as a fresh tensor of the dtype that is computed in."""
    working = working_dtype(x.dtype)
    scale = granularity.expand(scale, x.shape).to(working)
    numbers = x / scale if x.dtype == working else x.to(working).div_(scale)
    # QuantizeLinear adds a zero point of 0.0 before it rounds, so -0.0 becomes 0.0; small negatives become -0.0.
    return numbers.clamp_(-format.largest, format.largest).add_(0.0)


def _rounded(numbers: Tensor, format: Floating) -> Tensor:
    """Round to the mantissa's step at each number's exponent, ties to even."""
    step = _power(numbers, format).mul_(2.0**-format.mantissa_bits)
    return torch.div(numbers, step, out=numbers).round_().mul_(step)  # dividing by a power of two is exact


def _power(numbers: Tensor, format: Floating) -> Tensor:
    """Return the power of two at or below each magnitude, but not below that of the subnormals.

    Clearing all bits but the exponent's leaves it: many times faster than frexp. NaN gives infinity.
    """
    if numbers.dtype == torch.float64:
        power = (numbers.view(torch.int64) & 0x7FF0_0000_0000_0000).view(torch.float64)
    else:
        power = (numbers.view(torch.int32) & 0x7F80_0000).view(torch.float32)
    return power.clamp_(min=2.0**format.smallest_exponent)


def _decoded(patterns: Tensor, format: Floating, dtype: torch.dtype) -> Tensor:
    """Return the number of each bit pattern of a format whose patterns are all finite."""
    row: int = 2**format.mantissa_bits
    sign = 1 - 2 * (patterns // (format.levels // 2))
    magnitude = patterns % (format.levels // 2)
    field = magnitude // row  # 0: subnormal, without the leading one and with the exponent of field 1
    mantissa = magnitude % row + (field > 0) * row
    exponent = field.clamp(min=1) - 1 + format.smallest_exponent - format.mantissa_bits
    return torch.ldexp((sign * mantissa).to(dtype), exponent) * torch.where(mantissa == 0, sign, 1)
