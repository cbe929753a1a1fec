"""The arithmetic of :class:`~halfstep.formats.Integer`: divide, round, clip, multiply.

Every function takes parameters of the granularity's own shape and returns a fresh tensor.

Scale and zero point of a tensor from the tensor itself, in the arithmetic that runtimes use.
"""

from __future__ import annotations

import torch
from torch import Tensor

from halfstep.errors import FormatError
from halfstep.formats import Integer
from halfstep.functional import one_pass
from halfstep.granularity import Granularity


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, format: Integer, granularity: Granularity
) -> Tensor:
    """Return integer codes of ``x``; NaN gets the code of zero, infinities saturate."""
    shift = _shift(x, zero_point, format, granularity)
    codes = _rounded_steps(x, scale, shift, format, granularity).add_(shift)
    codes.clamp_(format.quant_min, format.quant_max)
    return torch.where(codes.isnan(), shift, codes).to(format.dtype)


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    format: Integer,
    granularity: Granularity,
    dtype: torch.dtype,
) -> Tensor:
    """Return ``scale * (codes - zero_point)``, computed in float32 (float64 if that is asked for)."""
    x = codes.to(working_dtype(dtype))
    steps = x - _shift(x, zero_point, format, granularity)
    return (steps + format.half).mul_(granularity.expand(scale, x.shape)).to(dtype)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    format: Integer,
    granularity: Granularity,
    overwrite: bool = False,
) -> Tensor:
    """Return ``dequantize(quantize(x))``, equal bit for bit (NaN stays NaN), without leaving floats.

    With ``overwrite`` nobody needs ``x`` afterwards, and the result may lie where it was.
    """
    shift = _shift(x, zero_point, format, granularity)
    if not isinstance(shift, Tensor) and one_pass.serves(x, scale, format):
        least, greatest = format.quant_min - shift, format.quant_max - shift
        return one_pass.fake_quantize(x, scale, least, greatest, overwrite)
    steps = _rounded_steps(x, scale, shift, format, granularity)
    # Clipping the steps themselves to codes minus zero point saves adding the zero point and taking it off
    # again.
    if isinstance(shift, Tensor):
        torch.maximum(steps, format.quant_min - shift, out=steps)
        torch.minimum(steps, format.quant_max - shift, out=steps)
    else:
        steps.clamp_(format.quant_min - shift, format.quant_max - shift)
    if format.half:
        steps.add_(format.half)
    return _scaled(steps, granularity.expand(scale, x.shape)).to(x.dtype)


def _rounded_steps(
    x: Tensor, scale: Tensor, shift: float | Tensor, format: Integer, granularity: Granularity
) -> Tensor:
    """Return how many steps each element is from zero, rounded as the format says, not clipped."""
    working = working_dtype(x.dtype)
    scale = granularity.expand(scale, x.shape).to(working)
    # Division, not multiplication by 1 / scale: that is what QuantizeLinear computes, and it differs near
    # ties.
    steps = x / scale if x.dtype == working else x.to(working).div_(scale)
    if format.mid_rise:
        return steps.floor_()
    if format.round_shifted:
        return steps.add_(shift).round_().sub_(shift)
    return steps.round_()


def _scaled(steps: Tensor, scale: Tensor) -> Tensor:
    """Multiply in place, with -0.0 made +0.0 as integer codes have it."""
    if on_host(scale):
        return torch.add(_ZERO, steps, alpha=scale.item(), out=steps)  # 0 + scale * steps in one pass
    return steps.mul_(scale).add_(0.0)


_ZERO = torch.zeros(())


def _shift(x: Tensor, zero_point: Tensor | None, format: Integer, granularity: Granularity) -> float | Tensor:
    """Return the zero point as a number or a broadcastable tensor."""
    shift = format.shift(zero_point)
    if not isinstance(shift, Tensor):
        return shift
    if on_host(shift):
        return shift.item()
    return granularity.expand(shift, x.shape).to(working_dtype(x.dtype))


def on_host(parameter: Tensor) -> bool:
    """Whether a parameter is one number in the host's memory, which can be read without waiting for a device.

    torch's vectorised CPU kernels want Python numbers; a compiled graph must not depend on one.
    """
    return parameter.dim() == 0 and parameter.device.type == "cpu" and not torch.compiler.is_compiling()


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return what is computed in: float64 for float64, float32 for everything narrower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def run_time_parameters(x: Tensor, format: Integer, granularity: Granularity) -> tuple[Tensor, Tensor]:
    """Return the scale and zero point that cover ``x`` exactly as it is, computed in float32 as runtimes do.

    A tensor of zeros gets scale 1. NaN and infinities propagate into the scale.

    Args:
        x: a float tensor with at least one element.
        format: affine: ``scale = (max - min) / (levels - 1)`` over a range that contains zero, and
            ``zero_point = round(quant_min - min / scale)``. Symmetric: ``scale = max|x| / quant_max``.
        granularity: which elements share a range.

    Returns:
        scale (float32) and zero_point (int32), both of ``granularity.parameter_shape(x.shape)``.

    Raises:
        FormatError: an empty tensor, or a symmetric format with an offset.

    >>> run_time_parameters(torch.tensor([0, 2, -3, -2.5, 1.34, 0.5]), Integer(8, False, False), PerTensor())
    (tensor(0.0196), tensor(153, dtype=torch.int32))

    Source: ONNX, DynamicQuantizeLinear; for the symmetric case the 8-bit arithmetic of ONNX Runtime's MatMulNBits
    (accuracy_level 4), which rounds each row in blocks.
    """
    x = x.detach().float()
    if format.symmetric:
        if format.fixed_zero_point or format.half:
            raise FormatError(f"run-time range: got {format}, needed a format with zero point 0")
        scale = granularity.reduce(x, "absmax") / format.quant_max
        scale = torch.where(scale == 0, 1.0, scale)
        return scale, torch.zeros_like(scale, dtype=torch.int32)
    low, high = granularity.reduce(x, "min").clamp(max=0.0), granularity.reduce(x, "max").clamp(min=0.0)
    scale = (high - low) / (format.quant_max - format.quant_min)
    scale = torch.where(scale == 0, 1.0, scale)
    zero_point = (format.quant_min - low / scale).clamp(format.quant_min, format.quant_max).round()
    return scale, zero_point.int()
