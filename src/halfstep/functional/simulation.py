"""fake_quantize: the rounding error of a format, in floats, with a gradient to train through."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halfstep.formats import Format
from halfstep.functional import gradients
from halfstep.functional.arithmetic import arithmetic
from halfstep.functional.checks import check_operands
from halfstep.functional.gradients import CLIPPED_STE, Gradient
from halfstep.functional.uniform import working_dtype
from halfstep.granularity import Granularity, PerTensor


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
    never modified. Without gradients it is a few in-place operations on one fresh buffer; under ``torch.compile``, on
    a GPU above all, it is one kernel (two for a codebook).

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
    check_operands(x, scale, zero_point, granularity)
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
        # In half precision its rounding would be as large as the round-off: there it is computed again.
        exact = ctx.needs_input_grad[1] and result.dtype == working_dtype(x.dtype)
        ctx.save_for_backward(x, scale, zero_point, result if exact else None)
        ctx.format, ctx.granularity, ctx.gradient = format, granularity, gradient
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, zero_point, result = ctx.saved_tensors
        granularity, gradient = ctx.granularity, ctx.gradient
        low, high = ctx.format.range(scale, zero_point)
        kept = gradients.kept(grad, x, low, high, granularity, gradient)
        balance = gradients.balance(x, ctx.format.reach, granularity, gradient)
        grad_x = grad_scale = grad_zero_point = None
        if ctx.needs_input_grad[0]:
            count = x.numel() // max(scale.numel(), 1)
            grad_x = gradient.of_input(kept, grad, x, granularity.expand(scale, x.shape), count)
        if ctx.needs_input_grad[1]:
            if result is None:
                wide = x.to(working_dtype(x.dtype))
                result = arithmetic(ctx.format).fake_quantize(
                    wide, scale, zero_point, ctx.format, granularity
                )
            reach = ctx.format.reach
            grad_scale = balance * gradients.of_scale(
                grad, kept, x, result, scale, reach, granularity, gradient
            )
        if ctx.needs_input_grad[2]:
            grad_zero_point = balance * gradients.of_zero_point(grad, kept, scale, granularity)
        return grad_x, grad_scale, grad_zero_point, None, None, None
