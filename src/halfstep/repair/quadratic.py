"""The layer's output error as a quadratic form of its quantized rows, and the numbers that those may take."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfstep import functional
from halfstep.formats import Format
from halfstep.granularity import PerChannel
from halfstep.repair.layer_weight import LayerWeight
from halfstep.repair.moments import Moments, as_rows

#: The part of the mean square of the inputs that is added to every input's own: what a sample does not tell should
#: not be fitted.
DAMPING = 0.01


@dataclass(frozen=True)
class Quadratic:
    """``(v - target) H (v - target)``, up to a constant the output's mean squared error, damped towards the weight.

    Attributes:
        target: the rows that real numbers would take, (groups, out, inputs), float64.
        hessian: H, (groups, inputs, inputs), float64, positive definite.
        singular: whether the inputs span fewer directions than there are inputs: only the damping decides the rest.
    """

    target: Tensor
    hessian: Tensor
    singular: bool

    @classmethod
    def of(cls, moments: Moments, rows: Tensor, damping: float = DAMPING) -> Quadratic:
        """The form for a layer's moments and its float rows w.

        With ``d`` the damping, ``(v x' - y)^2 + d (v - w)^2`` is least for ``v = (H + d)^-1 (C + d w)``. An input that
        is always zero keeps its float weight as target.
        """
        amount = damping * moments.inputs.diagonal(dim1=-2, dim2=-1).mean(-1)
        amount = torch.where(amount > 0, amount, 1.0)[:, None]  # a group whose inputs are all zero
        factor, failed = torch.linalg.cholesky_ex(moments.inputs)
        hessian = moments.inputs.clone()
        hessian.diagonal(dim1=-2, dim2=-1).add_(amount)
        torch.linalg.cholesky(hessian, out=factor)
        product = moments.cross + amount[..., None] * rows.double()
        target = torch.cholesky_solve(product.mT, factor).mT
        return cls(target, hessian, bool(failed.any()))

    def value(self, rows: Tensor) -> Tensor:
        """The form for each row, (groups, out)."""
        away = rows.double() - self.target
        return (away @ self.hessian * away).sum(-1)


@dataclass(frozen=True)
class Grid:
    """The numbers that each element of the rows may take.

    Attributes:
        scale: of every element, (groups, out, inputs).
        zero_point: the same.
        format: their format.
    """

    scale: Tensor
    zero_point: Tensor
    format: Format

    @classmethod
    def of(cls, weight: LayerWeight) -> Grid:
        """The grid of a weight at its present range."""
        site, shape = weight.site, weight.tensor.shape
        scale, zero_point = (
            as_rows(weight.op, site.granularity.expand(parameter, shape).expand(shape))
            for parameter in (site.scale, site.zero_point)
        )
        return cls(scale, zero_point, site.format)

    def take(self, order: Tensor) -> Grid:
        """The grid with its inputs in another order, (groups, inputs)."""
        index = order.unsqueeze(1).expand(self.scale.shape)
        return Grid(self.scale.gather(2, index), self.zero_point.gather(2, index), self.format)

    def nearest(self, values: Tensor, column: int) -> Tensor:
        """The nearest numbers to one column of values, (groups, out)."""
        flat = values.reshape(-1, 1)
        scale, zero_point = (p[..., column].reshape(-1) for p in (self.scale, self.zero_point))
        return functional.fake_quantize(flat, scale, zero_point, self.format, PerChannel(0)).reshape(
            values.shape
        )
