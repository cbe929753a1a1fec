"""quantize and dequantize, with the one table of which arithmetic serves which kind of format.

quantize and dequantize: real numbers to integer codes and back.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from halfstep.errors import FormatError
from halfstep.formats import Codebook, Floating, Format, Integer
from halfstep.functional import codebook, floating, uniform
from halfstep.functional.checks import check_codes, check_operands
from halfstep.granularity import Granularity, PerTensor


def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    format: Format,
    granularity: Granularity = PerTensor(),  # noqa: B008 - frozen, so sharing it is safe
) -> Tensor:
    """Return the codes of the numbers of a format that are nearest to ``x``.

    Infinities saturate. NaN has no code in an integer or codebook format and gets the code of zero. Not
    differentiable: train through :func:`fake_quantize`.

    Args:
        x: float16, bfloat16, float32 or float64, any shape.
        scale: positive, of ``granularity.parameter_shape(x.shape)``.
        zero_point: integers of the same shape; not read by formats that have none or a fixed one.
        format: which numbers exist.
        granularity: which elements share a scale.

    Returns:
        Codes in ``format.dtype``, of ``x``'s shape.

    Raises:
        FormatError: ``x`` is no float, the parameters' shape does not fit, or a scale is not positive.

    >>> quantize(torch.tensor([0.12, -9.0, 0.25]), torch.tensor(0.1), None, Integer(4))
    tensor([ 1, -7,  2], dtype=torch.int8)
    """
    check_operands(x, scale, zero_point, granularity)
    with torch.no_grad():
        return arithmetic(format).quantize(x, scale, zero_point, format, granularity)


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    format: Format,
    granularity: Granularity = PerTensor(),  # noqa: B008 - frozen, so sharing it is safe
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Return the real numbers that codes stand for.

    Args:
        codes: integers, any shape.
        scale: positive, of ``granularity.parameter_shape(codes.shape)``.
        zero_point: integers of the same shape; not read by formats that have none or a fixed one.
        format: which numbers exist.
        granularity: which elements share a scale.
        dtype: of the result. Computed in float32, or float64 if that is asked for.

    Returns:
        Real numbers of the codes' shape.

    Raises:
        FormatError: ``codes`` are no integers, the parameters' shape does not fit, or a scale is not
            positive.

    >>> dequantize(torch.tensor([1, -7, 2]), torch.tensor(0.1), None, Integer(4))
    tensor([ 0.1000, -0.7000,  0.2000])
    """
    check_codes(codes, scale, zero_point, granularity)
    with torch.no_grad():
        return arithmetic(format).dequantize(codes, scale, zero_point, format, granularity, dtype)


class Arithmetic(Protocol):
    """What a module of arithmetic provides. Nothing here is differentiated; no argument is modified."""

    def quantize(
        self, x: Tensor, scale: Tensor, zero_point: Tensor | None, format: Any, granularity: Granularity
    ) -> Tensor:
        """Return codes."""

    def dequantize(
        self,
        codes: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        format: Any,
        granularity: Granularity,
        dtype: torch.dtype,
    ) -> Tensor:
        """Return real numbers."""

    def fake_quantize(
        self, x: Tensor, scale: Tensor, zero_point: Tensor | None, format: Any, granularity: Granularity
    ) -> Tensor:
        """Return the real numbers of the codes of ``x``."""


_TABLE: dict[type, Arithmetic] = {Integer: uniform, Codebook: codebook, Floating: floating}


def arithmetic(format: Format) -> Arithmetic:
    """Return the arithmetic of a format's kind.

    Raises:
        FormatError: an object that is no format.
    """
    if type(format) not in _TABLE:
        needed = ", ".join(kind.__name__ for kind in _TABLE)
        raise FormatError(f"format: got {format!r}, needed one of {needed}")
    return _TABLE[type(format)]
