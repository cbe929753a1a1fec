"""Fitting anew what repairs learned for other layers in float, in one walk through the network."""

from __future__ import annotations

from collections.abc import Iterable

from halfstep.graph.inputs import ModelInputs
from halfstep.model import QuantizedModel
from halfstep.repair.bias import shift_bias
from halfstep.repair.moments import too_large, why_not_rounded
from halfstep.repair.ranges import sample_of
from halfstep.repair.record import OUTPUT_ERROR, Repair
from halfstep.repair.rounding import gptq_rows, round_layer
from halfstep.repair.walk import LayerRun, layer_by_layer


def refit_layers(model: QuantizedModel, batches: Iterable[ModelInputs] | None = None) -> Repair:
    """Round the layers again that were rounded for other layers put back, and shift the biases that were shifted.

    Only those behind which something else is quantized now than before (``model.compensations.missing``), layer after
    layer, each on what the layers before it make. Roundings are GPTQ's, whatever found those of before: other repairs
    of the weights add little to it, and take longer.

    Args:
        model: calibrated.
        batches: model inputs; the sample that the model kept if None.

    Raises:
        DataError: if there are no inputs.
    """
    wanted = model.compensations.missing

    def fit(step: LayerRun, notes: list[str]) -> tuple[float, float] | str:
        layer = step.layer
        if layer.name not in wanted:
            return ""
        rounded, shifted = model.compensations.kinds(layer.name)
        error = 0.0, 0.0
        if rounded and not (why_not_rounded(model, layer) or too_large(layer.operator)):
            error = round_layer(model, step, gptq_rows, notes)
        if shifted:
            shift_bias(model, step)
        return error

    return layer_by_layer(model, sample_of(model, batches), "refit", OUTPUT_ERROR, fit)
