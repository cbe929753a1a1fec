"""The checks that every function makes of its operands."""

from __future__ import annotations

import torch
from torch import Tensor

from halfstep.errors import FormatError
from halfstep.formats.format import check_scale
from halfstep.granularity import Granularity

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_operands(x: Tensor, scale: Tensor, zero_point: Tensor | None, granularity: Granularity) -> None:
    """Raise unless ``x`` is a float tensor and the parameters fit it.

    Raises:
        FormatError: saying which operand, what was got and what was needed.
    """
    check_real(x)
    check_parameters(x.shape, scale, zero_point, granularity)


def check_real(x: Tensor) -> None:
    """Raise unless ``x`` is a float tensor that can be computed with."""
    check_whole(x)
    if x.dtype not in FLOATS:
        raise FormatError(
            f"x: got {x.dtype}, needed float16, bfloat16, float32 or float64; convert it with .float()"
        )


def check_whole(x: Tensor) -> None:
    """Raise if ``x`` is spread over ranks."""
    if type(x) is not Tensor and not torch.compiler.is_compiling() and hasattr(x, "full_tensor"):
        raise FormatError(
            "x: got a part of a tensor that is spread over ranks (DTensor), needed the whole; a quantized model is "
            "sharded as one, hs.shard(model), since its parts are not called by themselves"
        )


def check_codes(codes: Tensor, scale: Tensor, zero_point: Tensor | None, granularity: Granularity) -> None:
    """Raise unless ``codes`` is an integer tensor and the parameters fit it.

    Raises:
        FormatError: saying which operand, what was got and what was needed.
    """
    if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
        raise FormatError(f"codes: got {codes.dtype}, needed integers")
    check_parameters(codes.shape, scale, zero_point, granularity)


def check_parameters(
    shape: torch.Size, scale: Tensor, zero_point: Tensor | None, granularity: Granularity
) -> None:
    """Raise unless ``scale`` and ``zero_point`` have the granularity's shape and the scale is positive."""
    needed = granularity.parameter_shape(shape)
    for name, parameter in (("scale", scale), ("zero_point", zero_point)):
        if parameter is not None and parameter.shape != needed:
            raise FormatError(
                f"{name}: got shape {tuple(parameter.shape)}, needed {needed} for a tensor of shape "
                f"{tuple(shape)} quantized {granularity}"
            )
    if not scale.is_floating_point():
        raise FormatError(f"scale: got {scale.dtype}, needed a float tensor")
    # Looking at the value would make a device wait and would break a compiled graph.
    if scale.device.type == "cpu" and not torch.compiler.is_compiling():
        check_scale(scale.detach())
