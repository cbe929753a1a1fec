"""Surrogate gradients: what the derivative of a rounding staircase is taken to be.

The staircase has slope zero almost everywhere, so training goes through a surrogate. With x^ = scale * f(x /
scale) for every format, and m = 1 where x lies in the effective range [low, high], else 0::

    straight-through   dx^/dx     = 1
    clipped            dx^/dx     = m
    learned scale      dx^/dscale = x^/scale - m x/scale   (LSQ: round(x/s) - x/s inside, the end level
    outside) PACT               dx^/dscale = (1 - m) x^/scale       (only clipped elements move the range)
    learned offset     dx^/dzero_point = -(1 - m) scale
    XNOR               dx^/dx     = 1/n + scale 1[|x| <= 1]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


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

    def input(self, grad: Tensor, x: Tensor, inside: Tensor, scale: Tensor, count: int) -> Tensor:
        """Return the gradient for ``x``, elementwise."""
        return torch.where(inside, grad, 0.0) if self.clipped else grad


@dataclass(frozen=True)
class Xnor:
    """XNOR-Net's gradient of a binarised weight: ``grad * (1/n + scale * 1[|x| <= limit])``.

    It stands for the derivative through the sign and through scale = mean\\|x\\| together, so the scale gets
    none of its own.

    Args:
        limit: the largest magnitude that still receives the sign's gradient.

    Source: Rastegari et al. 2016, "XNOR-Net", section 3.1.
    """

    limit: float = 1.0

    clipped: bool = True
    rounding: bool = False
    balanced: bool = False

    def input(self, grad: Tensor, x: Tensor, inside: Tensor, scale: Tensor, count: int) -> Tensor:
        """Return the gradient for ``x``; ``count`` elements share each scale."""
        return grad * (1.0 / count + torch.where(x.abs() <= self.limit, scale, 0.0)).to(grad.dtype)


Gradient = StraightThrough | Xnor

STE = StraightThrough(clipped=False)
CLIPPED_STE = StraightThrough()
LSQ = StraightThrough(balanced=True)
PACT = StraightThrough(rounding=False)
XNOR = Xnor()
