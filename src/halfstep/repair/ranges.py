"""Ranges of the sites that a repair touches, and weight ranges that weigh errors by what the layer's output feels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from halfstep.calibrators import MSE
from halfstep.calibrators.calibrator import Calibrator, WeightCalibrator
from halfstep.errors import DataError
from halfstep.fake_quantize import Mode
from halfstep.graph.inputs import ModelInputs, call_arguments
from halfstep.graph.placement import Site
from halfstep.model import QuantizedModel
from halfstep.ranges import widen_for_bias
from halfstep.repair.moments import LayerWeight, gather, too_large, why_not_rounded
from halfstep.repair.record import OUTPUT_ERROR, Repair
from halfstep.repair.walk import LayerRun, layer_by_layer


def sample_of(
    model: QuantizedModel, batches: Iterable[ModelInputs] | None, many: bool = False
) -> list[ModelInputs]:
    """The inputs that a repair works on: ``batches``, or the sample that the model kept; ``many``: all that it kept.

    Raises:
        DataError: if there are none.
    """
    kept = [*model.sample, *(model.reserve if many else ())]
    found = kept if batches is None else list(batches)
    if not found:
        raise DataError(
            "repair: the model keeps no calibration sample; run hs.observe(model, batches) first, or pass batches"
        )
    return found


def observe_sites(model: QuantizedModel, names: Iterable[str], batches: Sequence[ModelInputs]) -> None:
    """Observe the activations of some sites anew, in the float network; what they saw before is forgotten."""
    wanted = list(names)
    if not wanted:
        return
    with model.using(Mode.FLOAT), torch.no_grad():
        for name in wanted:
            model.sites[name].forget()
            model.sites[name].mode = Mode.OBSERVE
        for inputs in batches:
            args, kwargs = call_arguments(inputs)
            model(*args, **kwargs)


def calibrate_again(model: QuantizedModel, sites: Iterable[Site]) -> None:
    """Give sites the ranges that their own calibrators now answer; MSE where none has been at work yet."""
    names = set()
    for site in sites:
        names.add(site.name)
        module = model.sites[site.name]
        calibrator = module.calibrated_by or MSE()
        if site.is_weight:
            assert isinstance(calibrator, WeightCalibrator)
            module.calibrate_weight(model.weight(site.name), calibrator)
        else:
            assert isinstance(calibrator, Calibrator)
            module.calibrate(calibrator)
    for layer in model.layers:
        if names & set(layer.sites):
            widen_for_bias(model, layer)


def weigh_ranges(model: QuantizedModel, batches: Iterable[ModelInputs] | None = None) -> Repair:
    """Choose each weight's range by the squared error weighted with the mean squares of the inputs it multiplies.

    A weight keeps its old range where the layer's output error, which also counts the products of different inputs,
    would grow. A rounding learned for the old range is dropped with it.

    Args:
        model: calibrated.
        batches: model inputs; the sample that the model kept if None.

    Raises:
        DataError: if there are no inputs.
    """

    def weigh(step: LayerRun, notes: list[str]) -> tuple[float, float] | str:
        if reason := why_not_rounded(model, step.layer) or too_large(step.layer.operator):
            return reason
        weight = LayerWeight.of(model, step.layer)
        moments = gather(weight.op, weight.rows(), step.inputs, step.float_inputs)
        before = float(moments.error(weight.rounded_rows()).sum())
        squares = moments.inputs.diagonal(dim1=-2, dim2=-1)  # (groups, inputs)
        importance = weight.tensor_of(squares.unsqueeze(1).expand(weight.rows().shape).float())
        site = weight.site
        old = site.scale.clone(), site.zero_point.clone(), site.offset
        site.set_range(*MSE().weight_range(weight.tensor, site.format, site.granularity, importance))
        widen_for_bias(model, step.layer)
        after = float(moments.error(weight.rounded_rows()).sum())
        if after < before:
            return before, after
        site.scale.copy_(old[0])
        site.zero_point.copy_(old[1])
        site.offset = old[2]
        return before, before

    return layer_by_layer(model, sample_of(model, batches), "weight ranges", OUTPUT_ERROR, weigh)
