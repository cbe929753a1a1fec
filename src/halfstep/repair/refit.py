"""Fitting anew what repairs learned for other layers in float, in one walk through the network."""

from __future__ import annotations

import time
from collections.abc import Iterable

from halfstep.graph.inputs import ModelInputs
from halfstep.model import QuantizedModel
from halfstep.repair.bias import shift_bias
from halfstep.repair.moments import too_large, why_not_rounded
from halfstep.repair.ranges import sample_of
from halfstep.repair.record import OUTPUT_ERROR, Repair, Treated
from halfstep.repair.rounding import gptq_rows, round_layer
from halfstep.repair.walk import walk, while_time_lasts


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
    start = time.perf_counter()
    treated, notes, wanted = [], list[str](), model.compensations.missing
    for step in while_time_lasts(walk(model, sample_of(model, batches), "fitting anew"), notes):
        name, clock = step.layer.name, time.perf_counter()
        if name not in wanted:
            continue
        rounded, shifted = model.compensations.kinds(name)
        was = now = 0.0
        if rounded and not (why_not_rounded(model, step.layer) or too_large(step.layer.operator)):
            was, now, note = round_layer(model, step, gptq_rows)
            notes += [note] * bool(note)
        if shifted:
            shift_bias(model, step)
        treated.append(Treated(name, was, now, time.perf_counter() - clock))
    return Repair("refit", OUTPUT_ERROR, tuple(treated), (), tuple(notes), time.perf_counter() - start)
