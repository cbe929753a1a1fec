"""Rounding up or down by what the layer's output feels."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from halfstep.graph.inputs import ModelInputs
from halfstep.model import QuantizedModel
from halfstep.repair.layer_weight import LayerWeight, unfit
from halfstep.repair.moments import gather, too_large
from halfstep.repair.quadratic import DAMPING, Grid, Quadratic
from halfstep.repair.ranges import sample_of
from halfstep.repair.record import OUTPUT_ERROR, Repair, Treated
from halfstep.repair.walk import Step, walk, while_time_lasts

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
    start = time.perf_counter()
    treated, skipped = [], []
    notes: list[str] = []
    for step in while_time_lasts(walk(model, sample_of(model, batches), name), notes):
        if reason := unfit(model, step.layer) or too_large(step.layer.operator):
            skipped.append((step.layer.name, reason))
            continue
        clock = time.perf_counter()
        was, now, note = round_layer(model, step, find)
        notes += [note] * bool(note)
        treated.append(Treated(step.layer.name, was, now, time.perf_counter() - clock))
    return Repair(
        name, OUTPUT_ERROR, tuple(treated), tuple(skipped), tuple(notes), time.perf_counter() - start
    )


def round_layer(model: QuantizedModel, step: Step, find: Round) -> tuple[float, float, str]:
    """Round the rows of a layer that is not unfit; its output error before and after, and a note if there is one."""
    weight = LayerWeight.of(model, step.layer)
    moments = gather(weight.op, weight.rows(), step.inputs, step.float_inputs)
    form = Quadratic.of(moments, weight.rows())
    old = weight.rounded_rows().double()
    new = find(form, Grid.of(weight), old)
    was, now = moments.error(old), moments.error(new)
    better = now < was
    if bool(better.any()):
        weight.round_to(torch.where(better[..., None], new, old))
    note = ""
    if form.singular:
        note = (
            f"{step.layer.name}: its inputs do not span all directions on the sample (singular second moments); "
            f"damped by {DAMPING:.0%} of their mean square"
        )
    return float(was.sum()), float(torch.where(better, now, was).sum()), note
