"""Quantizing some elements of a tensor and letting the others pass, with the gradients of both, for learning.

With a mask m of ones and zeros, ``x^ = m Q(x) + (1 - m) x``. Of torch's operators that is about twenty passes over
memory there and back, which take longer than the convolutions between them; compiled it is two.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from halfstep.formats import Format, Integer
from halfstep.functional import one_pass
from halfstep.functional.fake_quantize import (
    CLIPPED_STE,
    Gradient,
    StraightThrough,
    fake_quantize,
    scale_balance,
    widened,
)
from halfstep.granularity import Granularity, PerTensor


def quantize_some(
    x: Tensor,
    mask: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    format: Format,
    granularity: Granularity = PerTensor(),  # noqa: B008 - frozen, so sharing it is safe
    gradient: Gradient = CLIPPED_STE,
) -> Tensor:
    """Return :func:`fake_quantize` of the elements where ``mask`` is 1, and the others as they are.

    Args:
        x: as there.
        mask: ones and zeros of ``x``'s shape and dtype.
        scale: as there, as are all others.
        zero_point: see there.
        format: see there.
        granularity: see there.
        gradient: see there; to elements that are not quantized it passes whole.

    >>> quantize_some(torch.tensor([0.12, 0.12]), torch.tensor([1.0, 0.0]), torch.tensor(0.1), None, Integer(4))
    tensor([0.1000, 0.1200])
    """
    if _serves(x, mask, scale, format, gradient):
        result: Tensor = _QuantizeSome.apply(x, mask, scale, zero_point, format, gradient)  # type: ignore[no-untyped-call]
        return result
    return torch.lerp(x, fake_quantize(x, scale, zero_point, format, granularity, gradient), mask)


def _serves(x: Tensor, mask: Tensor, scale: Tensor, format: Format, gradient: Gradient) -> bool:
    """Whether the compiled arithmetic can be used: that of a clipped gradient with LSQ's scale."""
    return (
        isinstance(format, Integer)
        and one_pass.serves_dense(x, scale, format)
        and mask.dtype == x.dtype
        and mask.stride() == x.stride()
        and isinstance(gradient, StraightThrough)
        and gradient.clipped
        and gradient.rounding
    )


class _QuantizeSome(torch.autograd.Function):
    """The formulas at the head of :mod:`halfstep.functional.fake_quantize`, times the mask."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        mask: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        format: Integer,
        gradient: StraightThrough,
    ) -> Tensor:
        ctx.save_for_backward(x, mask, scale, zero_point)
        ctx.format, ctx.gradient = format, gradient
        result = torch.empty_like(x)
        forwards, _ = _loops()
        forwards(*map(one_pass.flat, (x, mask, result)), _steps(scale, zero_point, format))
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, mask, scale, zero_point = ctx.saved_tensors
        grad = torch.empty_like(x).copy_(grad) if grad.stride() != x.stride() else grad
        grad_x, change = torch.empty_like(x), torch.empty_like(x)  # of x^ by the scale, in units of it
        low, high = (np.float32(end.item()) for end in widened(*ctx.format.range(scale, zero_point)))
        _, backwards = _loops()
        arrays = map(one_pass.flat, (grad, x, mask, grad_x, change))
        backwards(*arrays, _steps(scale, zero_point, ctx.format), (low, high))
        balance = scale_balance(x, ctx.format.reach, PerTensor(), ctx.gradient)
        grad_scale = grad_zero_point = None
        if ctx.needs_input_grad[2]:
            total = torch.dot(*(each.as_strided((x.numel(),), (1,)) for each in (grad, change)))
            grad_scale = balance * total
        if ctx.needs_input_grad[3]:
            grad_zero_point = balance * -scale * (grad.sum() - grad_x.sum())
        return grad_x, None, grad_scale, grad_zero_point, None, None


def _steps(
    scale: Tensor, zero_point: Tensor | None, format: Integer
) -> tuple[np.float32, np.float32, np.float32]:
    """The scale, and the least and the greatest number of steps."""
    shift = format.shift(zero_point)
    code = shift.item() if isinstance(shift, Tensor) else shift
    least, greatest = np.float32(format.quant_min - code), np.float32(format.quant_max - code)
    return np.float32(scale.item()), least, greatest


@cache
def _loops() -> tuple[Callable[..., None], Callable[..., None]]:
    from halfstep.machine_code import compiled

    zero, one = np.float32(0), np.float32(1)

    def forwards(x: Any, mask: Any, result: Any, numbers: Any) -> None:
        scale, least, greatest = numbers
        for i in range(x.size):
            steps = np.rint(x[i] / scale)
            steps = least if steps < least else steps
            steps = greatest if steps > greatest else steps
            result[i] = zero + scale * steps if mask[i] > zero else x[i]

    # Without branches, whose outcomes no processor foretells: masks are random.
    def backwards(grad: Any, x: Any, mask: Any, grad_x: Any, change: Any, numbers: Any, ends: Any) -> None:
        scale, least, greatest = numbers
        low, high = ends
        for i in range(x.size):
            steps = np.rint(x[i] / scale)
            steps = least if steps < least else steps
            steps = greatest if steps > greatest else steps
            nearest = low if x[i] < low else x[i]
            nearest = high if nearest > high else nearest
            inside = one if nearest == x[i] else zero
            grad_x[i] = grad[i] * (one - mask[i] * (one - inside))
            change[i] = mask[i] * (steps - inside * (x[i] / scale))

    return compiled(forwards, "quantize_some"), compiled(backwards, "quantize_some_back")
