"""Bias correction: the mean error that quantization gives a channel is taken off its bias."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from halfstep.graph.inputs import ModelInputs
from halfstep.model import QuantizedModel
from halfstep.repair.ranges import sample_of
from halfstep.repair.record import Repair
from halfstep.repair.walk import LayerRun, layer_by_layer


def correct_bias(model: QuantizedModel, batches: Iterable[ModelInputs] | None = None) -> Repair:
    """Shift each bias by the mean difference of the float and the quantized output, channel by channel, in order.

    Each layer sees what the corrected layers before it make, so errors that those leave are corrected as well. The
    float bias stays as it was: the shift acts while the layer is quantized, and is part of the exported bias.

    Args:
        model: calibrated.
        batches: model inputs; the sample that the model kept if None.

    Raises:
        DataError: if there are no inputs.

    Source: Nagel, van Baalen, Blankevoort, Welling, "Data-Free Quantization Through Weight Equalization and Bias
    Correction", 2019, section 4.2 (empirical form).
    """

    def correct(step: LayerRun, notes: list[str]) -> tuple[float, float] | str:
        if step.layer.name not in model.shifts:
            return "it has no bias; give it one (of zeros) to have it corrected"
        return _rms(shift_bias(model, step)), _rms(mean_error(step))

    measure = "root mean square of the channels' mean errors"
    return layer_by_layer(model, sample_of(model, batches), "bias correction", measure, correct)


def shift_bias(model: QuantizedModel, step: LayerRun) -> Tensor:
    """Take the mean error of a layer's channels off its bias, and return what it was; the layer has a shift."""
    shift, parameter = model.shifts[step.layer.name], step.layer.operator.bias
    assert parameter is not None
    error = mean_error(step)
    bias = model.weight(str(parameter.target)).detach()
    rounding = shift(bias) - shift.corrected(bias)  # in the error too, and no business of the shift
    shift.shift.add_((error + rounding).to(shift.shift))
    return error


def mean_error(step: LayerRun) -> Tensor:
    """The mean of the float output less the quantized one, for each channel, float64."""
    axis = 1 if step.layer.operator.kind in ("conv", "conv_transpose") else -1
    wanted = [step.run_float(x) for x in step.float_inputs]
    got = [step.run(x) for x in step.inputs]
    return _mean(wanted, axis) - _mean(got, axis)


def _mean(outputs: Sequence[Tensor], axis: int) -> Tensor:
    rows = [output.movedim(axis, 0).flatten(1).double() for output in outputs]
    total = torch.stack([each.sum(1) for each in rows]).sum(0)
    return total / sum(each.shape[1] for each in rows)


def _rms(error: Tensor) -> float:
    return float(error.square().mean().sqrt())
