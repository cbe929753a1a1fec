"""Scale and zero point of a tensor from the tensor itself, in the arithmetic that runtimes use."""

from __future__ import annotations

import torch
from torch import Tensor

from halfstep.errors import FormatError
from halfstep.formats import Integer
from halfstep.granularity import Granularity


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
