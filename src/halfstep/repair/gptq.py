"""GPTQ: weights are rounded one input after another, and the inputs that are left make up for the error."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from halfstep.graph.inputs import ModelInputs
from halfstep.model import QuantizedModel
from halfstep.repair.quadratic import Grid, Quadratic
from halfstep.repair.record import Repair
from halfstep.repair.rounding import round_layers

#: Inputs after which the error is handed on to all that are left at once.
BLOCK = 128


def gptq(model: QuantizedModel, batches: Iterable[ModelInputs] | None = None) -> Repair:
    """Round each layer's weight so that the error of one input's weights is made up for by those not yet rounded.

    Works on linear layers, convs of any groups, and products with a matrix, on any format, layer after layer, each on
    what the layers before it make. The target is the float layer's output on the float network's inputs. A row is
    taken only where the layer's output error falls, so no layer gets worse on the sample.

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
