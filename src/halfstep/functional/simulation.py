"""fake_quantize: the rounding error of a format, in floats, with a gradient to train through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halfstep.formats import Format
from halfstep.functional.arithmetic import arithmetic
from halfstep.functional.checks import check_operands
from halfstep.functional.gradients import CLIPPED_STE, Gradient
from halfstep.granularity import Granularity, PerTensor, counts

#: float32 rounds the scale, so the element that set the range may lie a few units in the last place outside
#: it.
_EDGE = 1 + 2.0**-20


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    format: Format,
    granularity: Granularity = PerTensor(),  # noqa: B008 - frozen, so sharing it is safe
    gradient: Gradient = CLIPPED_STE,
) -> Tensor:
    """Round ``x`` to the nearest number of a format and return that number.

    Equal bit for bit to ``dequantize(quantize(x))``, except that NaN stays NaN. Infinities saturate. ``x`` is
    never modified. Without gradients it is a few in-place operations on one fresh buffer.

    Args:
        x: float16, bfloat16, float32 or float64, any shape. Arithmetic is float32 (float64 for float64).
        scale: positive, of ``granularity.parameter_shape(x.shape)``. Gets a gradient if it requires one; for
            a learned log2 step pass ``torch.exp2(log2_scale)``.
        zero_point: integers of the same shape; floats if it is learned (rounded here, gradient straight
            through). Not read by formats that have none or a fixed one, where None will do.
        format: which numbers exist.
        granularity: which elements share a scale.
        gradient: the surrogate: ``STE``, ``CLIPPED_STE``, ``LSQ``, ``PACT``, ``XNOR`` or one of your own
            options.

    Returns:
        A tensor of ``x``'s shape and dtype.

    Raises:
        FormatError: ``x`` is no float, the parameters' shape does not fit, or a scale is not positive (the
            last is looked at only on the CPU, where it waits for nothing).

    >>> fake_quantize(torch.tensor([0.12, -9.0, 0.25]), torch.tensor(0.1), None, Integer(4))
    tensor([ 0.1000, -0.7000,  0.2000])
    """
    check_operands(x, scale, zero_point, format, granularity)
    learned = zero_point is not None and zero_point.requires_grad
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad or learned):
        result: Tensor = _FakeQuantize.apply(  # type: ignore[no-untyped-call]
            x, scale, zero_point, format, granularity, gradient
        )
        return result
    return arithmetic(format).fake_quantize(x, scale, zero_point, format, granularity)


class _FakeQuantize(torch.autograd.Function):
    """The forward staircase with a surrogate's backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        scale: Tensor,
        zero_point: Tensor | None,
        format: Format,
        granularity: Granularity,
        gradient: Gradient,
    ) -> Tensor:
        result = arithmetic(format).fake_quantize(x, scale, zero_point, format, granularity)
        ctx.save_for_backward(x, scale, zero_point, result if ctx.needs_input_grad[1] else None)
        ctx.format, ctx.granularity, ctx.gradient = format, granularity, gradient
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point, result = ctx.saved_tensors
        granularity, gradient = ctx.granularity, ctx.gradient
        inside = _inside(x, scale, zero_point, ctx.format, granularity, gradient)
        expanded = granularity.expand(scale, x.shape)
        count = x.numel() // max(scale.numel(), 1)

        grad_x = grad_scale = grad_zero_point = None
        if ctx.needs_input_grad[0]:
            grad_x = gradient.input(grad, x, inside, expanded, count)
        if ctx.needs_input_grad[1]:
            kept = torch.where(inside, result - x if gradient.rounding else 0.0, result)
            grad_scale = granularity.reduce(grad.to(scale.dtype) * kept.to(scale.dtype) / expanded, "sum")
        if ctx.needs_input_grad[2]:
            outside = torch.where(inside, 0.0, -expanded)
            grad_zero_point = granularity.reduce(grad.to(scale.dtype) * outside, "sum")
        if gradient.balanced:
            balance = (counts(granularity, x) * ctx.format.reach).clamp(min=1).rsqrt()
            grad_scale = None if grad_scale is None else grad_scale * balance
            grad_zero_point = None if grad_zero_point is None else grad_zero_point * balance
        return grad_x, grad_scale, grad_zero_point, None, None, None


def _inside(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    format: Format,
    granularity: Granularity,
    gradient: Gradient,
) -> Tensor:
    """Return where ``x`` lies in the effective range; everywhere, for a surrogate that does not clip."""
    if not gradient.clipped:
        return torch.ones((), dtype=torch.bool, device=x.device)
    low, high = format.range(scale, zero_point)
    low, high = granularity.expand(low * _EDGE, x.shape), granularity.expand(high * _EDGE, x.shape)
    return (x >= low) & (x <= high)
