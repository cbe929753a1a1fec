"""Surrogate gradients: what the derivative of a rounding staircase is taken to be.

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
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfstep.functional.uniform import on_host, working_dtype
from halfstep.granularity import Granularity, counts

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


def kept(
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
        bounds = low.item() * _EDGE - _TINY, high.item() * _EDGE + _TINY
        return _within(grad, x, *bounds)
    centre = granularity.expand((low + high) / 2, x.shape)
    half_width = granularity.expand((high - low) / 2, x.shape)
    position = (x - centre) / half_width
    if torch.compiler.is_compiling():
        room = _EDGE - position.abs()  # a multiple of eps / 2 next to the edge
        return (grad * (room * (2 / torch.finfo(x.dtype).eps)).clamp(0, 1)).to(grad.dtype)
    return _within(grad, position, -_EDGE, _EDGE)


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


def balance(x: Tensor, reach: float, granularity: Granularity, gradient: Gradient) -> Tensor | float:
    """Return what the gradients of scale and offset are multiplied by."""
    if not gradient.balanced:
        return 1.0
    return (counts(granularity, x) * reach).clamp(min=1).rsqrt()
