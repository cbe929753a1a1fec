"""Observing a model on data and giving its sites their ranges."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from halfstep.calibrators import Max
from halfstep.calibrators.calibrator import Calibrator, WeightCalibrator
from halfstep.errors import DataError, named
from halfstep.fake_quantize import Mode
from halfstep.graph.inputs import ModelInputs, batch_size, call_arguments, tensors_of
from halfstep.model import QuantizedModel
from halfstep.progress import track
from halfstep.repair.bias_room import widen_for_bias
from halfstep.statistics import Histogram

#: The calibration inputs that a model keeps for scoring without labels: at most so many examples and bytes.
SAMPLE_EXAMPLES = 256
SAMPLE_BYTES = 128 * 2**20


def observe(model: QuantizedModel, batches: Iterable[ModelInputs]) -> dict[str, Histogram]:
    """Run the float network once over ``batches``; every activation's site fills its histogram.

    Observing again adds to what is there. The first examples are kept in ``model.sample``, at most
    :data:`SAMPLE_EXAMPLES` and :data:`SAMPLE_BYTES`, for scoring without labels.

    Args:
        model: its mode is the same afterwards.
        batches: inputs, each a tensor, a tuple or a dict; iterated once, batches may differ in size.

    Returns:
        The histograms by site.

    Raises:
        DataError: if there is no batch, or one has a wrong shape or type, or makes NaN (naming batch and site).
    """
    seen = 0
    with model.using(Mode.OBSERVE), torch.no_grad():
        for index, inputs in enumerate(track(batches, "observing")):
            with named(f"calibration batch {index}"):
                args, kwargs = call_arguments(inputs)
                model(*args, **kwargs)
                _keep(model, inputs)
                seen += batch_size(inputs)
    if not seen:
        raise DataError(
            "calibration data: got no batch, needed at least one (a generator can be used only once)"
        )
    return {
        site.name: model.sites[site.name].histogram for site in model.placement.sites if not site.is_weight
    }


def _keep(model: QuantizedModel, inputs: ModelInputs) -> None:
    kept = sum(batch_size(batch) for batch in model.sample)
    used = sum(tensor.nbytes for batch in model.sample for tensor in tensors_of(batch))
    size = sum(tensor.nbytes for tensor in tensors_of(inputs))
    if (kept + batch_size(inputs) <= SAMPLE_EXAMPLES and used + size <= SAMPLE_BYTES) or not model.sample:
        model.sample.append(inputs)


def calibrate(
    model: QuantizedModel, calibrator: Calibrator | None = None, weights: WeightCalibrator | None = None
) -> None:
    """Give every site its scale and zero point, and let the model quantize from now on.

    No data are needed: the histograms of :func:`observe` answer any calibrator and any number format.

    Args:
        model: observed.
        calibrator: for the activations; Max if None.
        weights: for the weights; Max if None.

    Raises:
        NotObservedError: naming the site that saw no data.
    """
    calibrator, weights = calibrator or Max(), weights or Max()
    for site in model.placement.sites:
        module = model.sites[site.name]
        if site.is_weight:
            module.calibrate_weight(model.weight(site.name), weights)
        else:
            module.calibrate(calibrator)
    for layer in model.layers:
        widen_for_bias(model, layer)
    model.set_mode(Mode.QUANTIZE)
