"""fake_quantize: the rounding error of a format, in floats, with a gradient to train through.

Surrogate gradients: what the derivative of a rounding staircase is taken to be.

The staircase has slope zero almost everywhere, so training goes through a surrogate. With
x^ = scale * f(x / scale) for every format, and m = 1 where x lies in the effective range [low, high], else
0::

    straight-through   dx^/dx          = 1
    clipped            dx^/dx          = m
    learned scale      dx^/dscale      = (x^ - m x) / scale   LSQ: round(x/s) - x/s inside, the end level
    outside PACT               dx^/dscale      = (1 - m) x^ / scale   only clipped elements move the range
    learned offset     dx^/dzero_point = -(1 - m) scale
    learned value k    dx^/dvalue_k    = scale where x has the code k
    XNOR               dx^/dx          = 1/n + scale 1[|x| <= 1]

A codebook whose values are learned: thresholds follow as the midpoints at every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from halfstep.errors import FormatError
from halfstep.formats import Format, Integer
from halfstep.formats.codebook import midpoints
from halfstep.functional import codebook, uniform
from halfstep.functional.checks import check_operands, check_parameters, check_real
from halfstep.functional.quantize import arithmetic
from halfstep.functional.uniform import on_host, working_dtype
from halfstep.granularity import Granularity, PerTensor, counts

#: float32 rounds the scale, so the element that set the range may lie a few units in the last place outside
#: it.
_EDGE = 1 + 2.0**-20


#: Beside it, so that an end at zero is inside too.
_TINY = 2.0**-126


#: Up to this reach the gradient of a scale may be the difference of two sums in float32, at a cost of about 2%.
_SPARED = 2.0**10


@dataclass(frozen=True)
class StraightThrough:
    """The straight-through estimator and its relatives; the derivatives stand at the head of this file.

    Args:
        clipped: stop the gradient of elements outside the effective range.
        rounding: let the round-off of the elements inside move a learned scale (LSQ); if False only clipped
            elements move it (PACT).
        balanced: multiply the gradient of a learned scale and offset by ``1 / sqrt(n * reach)``, with n
            elements per scale and ``format.reach`` steps, so that their updates are in proportion to the
            weights' (LSQ).

    Sources: Bengio et al. 2013 (STE); Choi et al. 2018, PACT; Esser et al. 2020, "Learned Step Size
    Quantization", section 2.1; Bhalgat et al. 2020, LSQ+ (offset).
    """

    clipped: bool = True
    rounding: bool = True
    balanced: bool = False

    def of_input(self, kept: Tensor, grad: Tensor, x: Tensor, scale: Tensor, count: int) -> Tensor:
        """Return the gradient for ``x``: what clipping kept of ``grad``."""
        return kept


@dataclass(frozen=True)
class Xnor:
    """XNOR-Net's gradient of a binarised weight: ``grad * (1/n + scale * 1[|x| <= limit])``.

    It stands for the derivative through the sign and through scale = mean\\|x\\| together, so the scale
    should be recomputed by :func:`~halfstep.functional.binary_scale` at each step and not be learned as well.

    Args:
        limit: the largest magnitude that still receives the sign's gradient.

    Source: Rastegari et al. 2016, "XNOR-Net", section 3.1.
    """

    limit: float = 1.0
    clipped: bool = False
    rounding: bool = True
    balanced: bool = False

    def of_input(self, kept: Tensor, grad: Tensor, x: Tensor, scale: Tensor, count: int) -> Tensor:
        """Return the gradient for ``x``; ``count`` elements share each scale."""
        return grad * (1.0 / count + torch.where(x.abs() <= self.limit, scale, 0.0)).to(grad.dtype)


Gradient = StraightThrough | Xnor

STE = StraightThrough(clipped=False)


CLIPPED_STE = StraightThrough()


LSQ = StraightThrough(balanced=True)


PACT = StraightThrough(rounding=False)


XNOR = Xnor()


def grad_inside(
    grad: Tensor, x: Tensor, low: Tensor, high: Tensor, granularity: Granularity, gradient: Gradient
) -> Tensor:
    """Return ``grad`` where ``x`` lies in [low, high], else 0; all of it for a surrogate that does not clip.

    torch's comparisons and ``where`` take five times as long on the CPU as the one fused kernel of hardtanh,
    which wants bounds that are numbers: a range of one scale has them, any other is first mapped to [-1, 1].
    Compiled code does without comparisons at all: torch would keep their answers from the forward pass, and writes
    them one by one.
    """
    if not gradient.clipped:
        return grad
    x = x.to(working_dtype(x.dtype))  # in bfloat16 the bounds would be rounded too
    if on_host(low):
        return _within(grad, x, *(end.item() for end in widened(low, high)))
    centre = granularity.expand((low + high) / 2, x.shape)
    half_width = granularity.expand((high - low) / 2, x.shape)
    position = (x - centre) / half_width
    if torch.compiler.is_compiling():
        room = _EDGE - position.abs()  # a multiple of eps / 2 next to the edge
        return (grad * (room * (2 / torch.finfo(x.dtype).eps)).clamp(0, 1)).to(grad.dtype)
    return _within(grad, position, -_EDGE, _EDGE)


def widened(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return a range with room for the element that set it."""
    return low.double() * _EDGE - _TINY, high.double() * _EDGE + _TINY


def _within(grad: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """Return ``grad`` where ``x`` lies between two numbers, else 0."""
    passed: Tensor = torch.ops.aten.hardtanh_backward(grad.to(x.dtype), x, low, high)
    return passed.to(grad.dtype)


def of_scale(
    grad: Tensor,
    kept: Tensor,
    x: Tensor,
    result: Tensor,
    scale: Tensor,
    reach: float,
    granularity: Granularity,
    gradient: Gradient,
) -> Tensor:
    """Return the gradient of a learned scale, summed over the elements that share it.

    The elements inside count with their round-off, and those outside with their end level: with k = what clipping
    kept of the gradient g, ``sum k (x^ - x) + (g - k) x^ = sum g x^ - sum k x``. The two sums on the right need no
    memory for differences, but cancel to a part in ``reach``: float32 can spare that up to :data:`_SPARED`. At 16 bits
    their rounding would be up to 0.7 of the gradient itself.
    """
    grad, kept = grad.to(result.dtype), kept.to(result.dtype)
    inside = x.to(result.dtype) if gradient.rounding else result
    if reach > _SPARED:
        total = _inner(kept, result - inside, granularity) + _inner(grad - kept, result, granularity)
    else:
        total = _inner(grad, result, granularity) - _inner(kept, inside, granularity)
    return (total / scale).to(scale.dtype)


def of_zero_point(grad: Tensor, kept: Tensor, scale: Tensor, granularity: Granularity) -> Tensor:
    """Return the gradient of a learned offset, summed over the elements that share it."""
    lost = _sum(grad.to(scale.dtype), granularity) - _sum(kept.to(scale.dtype), granularity)
    return -scale * lost


def _inner(a: Tensor, b: Tensor, granularity: Granularity) -> Tensor:
    """Return the sum of ``a * b`` over the elements that share a parameter.

    For a single one as a dot product, which needs no memory for the products; compiled code needs none either way.
    """
    if granularity.parameter_shape(a.shape) or torch.compiler.is_compiling():
        return _sum(a * b, granularity)
    order = sorted(range(b.dim()), key=b.stride, reverse=True)  # that of memory: nothing is copied
    return torch.dot(a.permute(order).reshape(-1), b.permute(order).reshape(-1))


def _sum(x: Tensor, granularity: Granularity) -> Tensor:
    """Return the sum over the elements that share a parameter; all of them in the order of memory."""
    return granularity.reduce(x, "sum") if granularity.parameter_shape(x.shape) else x.sum()


def scale_balance(x: Tensor, reach: float, granularity: Granularity, gradient: Gradient) -> Tensor | float:
    """Return what the gradients of scale and offset are multiplied by."""
    if not gradient.balanced:
        return 1.0
    return (counts(granularity, x) * reach).clamp(min=1).rsqrt()


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    format: Format,
    granularity: Granularity = PerTensor(),  # noqa: B008 - frozen, so sharing it is safe
    gradient: Gradient = CLIPPED_STE,
    overwrite: bool = False,
) -> Tensor:
    """Round ``x`` to the nearest number of a format and return that number.

    Equal bit for bit to ``dequantize(quantize(x))``, except that NaN stays NaN. Infinities saturate. Without gradients
    it is a few in-place operations on one fresh buffer; under ``torch.compile``, on a GPU above all, it is one kernel
    (two for a codebook).

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
        overwrite: whether, where there are no gradients, the result may be written into ``x``, which is left as it is
            otherwise.

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
    if overwrite and isinstance(format, Integer):
        return uniform.fake_quantize(x, scale, zero_point, format, granularity, overwrite)
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
        kept = grad_inside(grad, x, low, high, granularity, gradient)
        balance = scale_balance(x, ctx.format.reach, granularity, gradient)
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
            grad_scale = balance * of_scale(grad, kept, x, result, scale, reach, granularity, gradient)
        if ctx.needs_input_grad[2]:
            grad_zero_point = balance * of_zero_point(grad, kept, scale, granularity)
        return grad_x, grad_scale, grad_zero_point, None, None, None


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
        kept = grad_inside(grad, x, low, high, granularity, gradient)
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
            balance = scale_balance(x, reach, granularity, gradient)
            grad_scale = balance * of_scale(grad, kept, x, result, scale, reach, granularity, gradient)
        return grad_x, grad_values, grad_scale, None, None


def _normalised(x: Tensor, scale: Tensor | None, granularity: Granularity) -> Tensor:
    """Return ``x / scale`` as a fresh tensor of the dtype that is computed in."""
    numbers = x.to(working_dtype(x.dtype), copy=True)
    return numbers if scale is None else numbers.div_(granularity.expand(scale, x.shape))
