"""A codebook whose values are learned: thresholds follow as the midpoints at every step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from halfstep.errors import FormatError
from halfstep.formats.codebook import midpoints
from halfstep.functional import codebook, gradients
from halfstep.functional.checks import check_parameters, check_real
from halfstep.functional.gradients import CLIPPED_STE, Gradient
from halfstep.functional.uniform import working_dtype
from halfstep.granularity import Granularity, PerTensor


def fake_quantize_learned(
    x: Tensor,
    values: Tensor,
    scale: Tensor | None = None,
    granularity: Granularity = PerTensor(),  # noqa: B008 - frozen, so sharing it is safe
    gradient: Gradient = CLIPPED_STE,
) -> Tensor:
    """Round ``x`` to the nearest of ``scale * values``, with gradients to the values.

    The gradient of a value is the sum of the gradients of the elements that became it, times their scale.
    Values may be in any order: they are sorted here, so that training cannot break the codebook by moving two
    past each other. NaN stays NaN; infinities become the outermost values.

    Args:
        x: float16, bfloat16, float32 or float64, any shape.
        values: (n,) for one table, or (\\*parameters, n); float32, usually a Parameter.
        scale: positive, of ``granularity.parameter_shape(x.shape)``; None for absolute values.
        granularity: which elements share a scale, and a table if there are several.
        gradient: the surrogate for ``x`` and ``scale``.

    Returns:
        A tensor of ``x``'s shape and dtype.

    Raises:
        FormatError: ``x`` is no float, or the parameters or tables do not fit.

    >>> values = torch.tensor([0.0, 1.0], requires_grad=True)
    >>> fake_quantize_learned(torch.tensor([0.2, 0.6, 0.9]), values).sum().backward()
    >>> values.grad
    tensor([1., 2.])
    """
    check_real(x)
    if values.dim() < 1 or values.shape[-1] < 2:
        raise FormatError(f"values: got shape {tuple(values.shape)}, needed 2 or more along the last axis")
    if scale is not None:
        check_parameters(x.shape, scale, None, granularity)
    result: Tensor = _FakeQuantizeLearned.apply(  # type: ignore[no-untyped-call]
        x, values.sort(dim=-1).values, scale, granularity, gradient
    )
    return result


class _FakeQuantizeLearned(torch.autograd.Function):
    """Nearest value forward; surrogate for the input, exact derivative for the values."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        scale: Tensor | None,
        granularity: Granularity,
        gradient: Gradient,
    ) -> Tensor:
        numbers = _normalised(x, scale, granularity)
        tables = codebook.table(values, numbers, granularity)
        result = codebook.replace(numbers, tables, midpoints(tables), False, granularity)
        if scale is not None:
            result.mul_(granularity.expand(scale, x.shape))
        ctx.save_for_backward(x, values, scale)
        ctx.granularity, ctx.gradient = granularity, gradient
        return result.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, values, scale = ctx.saved_tensors
        granularity, gradient = ctx.granularity, ctx.gradient
        # A single table has scalar ends even where there are many scales: bring all to the parameter's shape.
        shape = granularity.parameter_shape(x.shape)
        scales = (torch.ones((), device=x.device) if scale is None else scale).expand(shape)
        low, high = (values[..., end].expand(shape) * scales for end in (0, -1))
        kept = gradients.kept(grad, x, low, high, granularity, gradient)
        grad_x = grad_values = grad_scale = None
        if ctx.needs_input_grad[0]:
            count = x.numel() // max(scales.numel(), 1)
            grad_x = gradient.of_input(kept, grad, x, granularity.expand(scales, x.shape), count)
        if ctx.needs_input_grad[1]:
            numbers = _normalised(x, scale, granularity)
            thresholds = midpoints(codebook.table(values, numbers, granularity))
            amounts = (grad.to(numbers.dtype) * granularity.expand(scales, x.shape)).to(numbers.dtype)
            grad_values = codebook.totals(numbers, amounts, thresholds, granularity).to(values.dtype)
        if ctx.needs_input_grad[2]:
            numbers = _normalised(x, scale, granularity)
            tables = codebook.table(values, numbers, granularity)
            result = codebook.replace(numbers, tables, midpoints(tables), False, granularity)
            result.mul_(granularity.expand(scale, x.shape))
            reach = 1.0  # values are in units of the scale
            balance = gradients.balance(x, reach, granularity, gradient)
            grad_scale = balance * gradients.of_scale(
                grad, kept, x, result, scale, reach, granularity, gradient
            )
        return grad_x, grad_values, grad_scale, None, None


def _normalised(x: Tensor, scale: Tensor | None, granularity: Granularity) -> Tensor:
    """Return ``x / scale`` as a fresh tensor of the dtype that is computed in."""
    numbers = x.to(working_dtype(x.dtype), copy=True)
    return numbers if scale is None else numbers.div_(granularity.expand(scale, x.shape))
