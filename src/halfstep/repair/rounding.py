"""Rounding weights by what the layer's output feels: up or down, or one input after another.

The layer's output error as a quadratic form of its quantized rows, and the numbers that those may take.

GPTQ: weights are rounded one input after another, and the inputs that are left make up for the error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from halfstep import functional
from halfstep.formats import Format
from halfstep.granularity import PerChannel
from halfstep.graph.inputs import ModelInputs
from halfstep.model import QuantizedModel
from halfstep.repair.moments import LayerWeight, Moments, as_rows, gather, too_large, why_not_rounded
from halfstep.repair.ranges import sample_of
from halfstep.repair.record import OUTPUT_ERROR, Repair
from halfstep.repair.walk import LayerRun, layer_by_layer

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


#: Sweeps over all inputs of a layer at most; most settle after five.
SWEEPS = 20

#: Finds rows on a grid, given the form to minimise and the rows as they are.
Round = Callable[[Quadratic, Grid, Tensor], Tensor]


def learn_rounding(model: QuantizedModel, batches: Iterable[ModelInputs] | None = None) -> Repair:
    """Move each weight to another number of its format wherever that lowers the layer's output error, until none does.

    The error is a quadratic form of the weights, so the best number of one weight, all others fixed, is known exactly:
    descent over the coordinates needs no step size, no annealing and no random numbers, and works on any format. It
    starts from the rounding that is there (to nearest, or GPTQ's), layer after layer, each on what the layers before
    it make.

    Args:
        model: calibrated.
        batches: model inputs; the sample that the model kept if None.

    Raises:
        DataError: if there are no inputs.

    Source: the objective is that of Nagel, Amjad, van Baalen, Louizos, Blankevoort, "Up or Down? Adaptive Rounding for
    Post-Training Quantization", 2020, section 3; the descent that of Behdin, Acharya, Gupta, Keerthi, Mazumder,
    "QuantEase: Optimization-based Quantization for Language Models", 2023.
    """
    return round_layers(model, batches, "learned rounding", descend)


def descend(form: Quadratic, grid: Grid, rows: Tensor) -> Tensor:
    """Rows on the grid that no change of a single element improves, (groups, out, inputs), float64.

    Args:
        form: what is minimised.
        grid: what the rows may be.
        rows: where to start, on the grid.
    """
    rows = rows.double().clone()
    slope = (rows - form.target) @ form.hessian  # half the gradient
    curvature = form.hessian.diagonal(dim1=-2, dim2=-1)
    for _ in range(SWEEPS):
        moved = 0
        for j in range(rows.shape[-1]):
            old = rows[..., j].clone()
            new = grid.nearest(old - slope[..., j] / curvature[:, j, None], j)
            # Against cycles between two numbers that are as good to the last bit.
            step = new - old
            gain = step * (2 * slope[..., j] + step * curvature[:, j, None])
            step = torch.where(gain < 0, step, 0.0)
            count = int(step.count_nonzero())
            if count:
                rows[..., j] = torch.where(step != 0, new, old)
                slope += step[..., None] * form.hessian[:, j, None, :]
                moved += count
        if not moved:
            break
    return rows


def round_layers(
    model: QuantizedModel, batches: Iterable[ModelInputs] | None, name: str, find: Round
) -> Repair:
    """Round every layer's rows by ``find``, in order; each row only where the layer's output error falls."""

    def round_one(step: LayerRun, notes: list[str]) -> tuple[float, float] | str:
        reason = why_not_rounded(model, step.layer) or too_large(step.layer.operator)
        return reason or round_layer(model, step, find, notes)

    return layer_by_layer(model, sample_of(model, batches), name, OUTPUT_ERROR, round_one)


def round_layer(model: QuantizedModel, step: LayerRun, find: Round, notes: list[str]) -> tuple[float, float]:
    """Round the rows of a layer that is not unfit; its output error before and after."""
    weight = LayerWeight.of(model, step.layer)
    moments = gather(weight.op, weight.rows(), step.inputs, step.float_inputs)
    form = Quadratic.of(moments, weight.rows())
    old = weight.rounded_rows().double()
    new = find(form, Grid.of(weight), old)
    was, now = moments.error(old), moments.error(new)
    better = now < was
    if bool(better.any()):
        weight.round_to(torch.where(better[..., None], new, old))
    if form.singular:
        notes.append(
            f"{step.layer.name}: its inputs do not span all directions on the sample (singular second moments); "
            f"damped by {DAMPING:.0%} of their mean square"
        )
    return float(was.sum()), float(torch.where(better, now, was).sum())


#: Inputs after which the error is handed on to all that are left at once.
BLOCK = 128


def gptq(model: QuantizedModel, batches: Iterable[ModelInputs] | None = None) -> Repair:
    """Round each layer's weight so that the error of one input's weights is made up for by those not yet rounded.

    Works on linear layers, convs of any groups, and products with a matrix, on any format, layer after layer, each on
    what the layers before it make. The target is the float layer's output on the float network's inputs: the rows that
    real numbers would take for it are known in closed form, and it is these that are rounded. (GPTAQ has the same
    target, and corrects for one input's difference at a time in those behind it, which leaves more error: Li et al.,
    2025, arXiv 2504.02692.) A row is taken only where the layer's output error falls, so no layer gets worse on the
    sample.

    Args:
        model: calibrated.
        batches: model inputs; the sample that the model kept if None.

    Raises:
        DataError: if there are no inputs.

    Source: Frantar, Ashkboos, Hoefler, Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative
    Pre-trained Transformers", 2022, section 3; the order is that of falling mean squares of the inputs.
    """
    return round_layers(model, batches, "GPTQ", gptq_rows)


def gptq_rows(form: Quadratic, grid: Grid, rows: Tensor) -> Tensor:
    """Rows on the grid that GPTQ finds, (groups, out, inputs), float64.

    Args:
        form: what is minimised.
        grid: what the rows may be.
        rows: where they are now; not read.
    """
    order = form.hessian.diagonal(dim1=-2, dim2=-1).argsort(-1, descending=True)
    size, groups = order.shape[1], torch.arange(len(order), device=order.device)[:, None, None]
    grid = grid.take(order)
    left = form.target.gather(2, order.unsqueeze(1).expand(form.target.shape))
    # The upper factor U of H^-1 = U^T U: row j tells how the inputs after j make up for an error in j.
    factor = form.hessian[groups, order[:, :, None], order[:, None, :]]
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(factor, out=factor))
    torch.linalg.cholesky(inverse, upper=True, out=factor)
    result = torch.empty_like(left)
    for start in range(0, size, BLOCK):
        stop = min(start + BLOCK, size)
        errors = torch.empty_like(left[..., start:stop])
        for j in range(start, stop):
            result[..., j] = grid.nearest(left[..., j], j)
            error = (left[..., j] - result[..., j]) / factor[:, j, j, None]
            left[..., j:stop] -= error[..., None] * factor[:, j, None, j:stop]
            errors[..., j - start] = error
        left[..., stop:] -= errors @ factor[:, start:stop, stop:]
    return torch.empty_like(result).scatter_(2, order.unsqueeze(1).expand(result.shape), result)
