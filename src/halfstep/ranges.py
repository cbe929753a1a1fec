"""The ranges of all sites at once, and the room that they leave for biases.

The ranges of all sites at once: asked of calibrators, and given to a model.

Room for biases: kernels hold them as int32 in steps of what their codes multiply to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from halfstep.calibrators import MSE, Calibrator, WeightCalibrator
from halfstep.fake_quantize import FakeQuantize, Mode
from halfstep.graph.placement import Layer
from halfstep.model import QuantizedModel


@dataclass(frozen=True, eq=False)
class SiteRange:
    """The range of one site, and who gave it.

    Attributes:
        calibrator: the activation's or the weight's.
        low: of the shape of the site's scale.
        high: the same.
    """

    calibrator: Calibrator | WeightCalibrator
    low: Tensor
    high: Tensor

    def agrees(self, other: SiteRange) -> bool:
        """Whether the other's range is the same, whoever gave it."""
        return torch.equal(self.low, other.low) and torch.equal(self.high, other.high)


#: An answer for every site, or for those of one side.
Answers = Mapping[str, SiteRange]


def activation_sites(model: QuantizedModel) -> dict[str, FakeQuantize]:
    """The quantizers of the activations that have a range to choose, by site, in the graph's order."""
    return {
        site.name: model.sites[site.name]
        for site in model.placement.sites
        if not (site.is_weight or site.dynamic)
    }


def activation_answers(model: QuantizedModel, calibrator: Calibrator) -> dict[str, SiteRange]:
    """What ``calibrator`` answers for every activation, from what was observed.

    Raises:
        NotObservedError: naming a site that saw no data.
    """
    return {
        name: SiteRange(calibrator, *module.observed_range(calibrator))
        for name, module in activation_sites(model).items()
    }


def weight_answers(model: QuantizedModel, calibrator: WeightCalibrator) -> dict[str, SiteRange]:
    """What ``calibrator`` answers for every weight."""
    return {
        site.name: SiteRange(
            calibrator, *model.sites[site.name].weight_range(model.weight(site.name), calibrator)
        )
        for site in model.placement.sites
        if site.is_weight
    }


def own_answers(model: QuantizedModel) -> dict[str, SiteRange]:
    """What the calibrator that each site was calibrated by answers now; MSE where none was.

    Raises:
        NotObservedError: naming a site that saw no data.
    """
    found: dict[str, SiteRange] = {}
    for name, module in activation_sites(model).items():
        activations = module.calibrated_by or MSE()
        assert isinstance(activations, Calibrator)
        found[name] = SiteRange(activations, *module.observed_range(activations))
    for site in model.placement.sites:
        if site.is_weight:
            module = model.sites[site.name]
            weights = module.calibrated_by or MSE()
            assert isinstance(weights, WeightCalibrator)
            found[site.name] = SiteRange(weights, *module.weight_range(model.weight(site.name), weights))
    return found


def set_ranges(model: QuantizedModel, answers: Answers) -> None:
    """Give sites their ranges, widen weights' where a bias needs it, and let the model quantize from now on."""
    model.compensations.forget()
    model.forget_widths()
    for name, answer in answers.items():
        module = model.sites[name]
        module.set_range(answer.low, answer.high)
        module.calibrated_by = answer.calibrator
    for layer in model.layers:
        if all(name in answers for name in layer.sites):
            widen_for_bias(model, layer)
    model.set_mode(Mode.QUANTIZE)


def widen_for_bias(model: QuantizedModel, layer: Layer) -> None:
    """Widen the range of a layer's weight where its bias needs that; see :meth:`.BiasShift.widen`."""
    shift, bias = model.shifts.get(layer.name), layer.operator.bias
    if shift is not None and bias is not None:
        shift.widen(model.weight(str(bias.target)).detach(), model.weight)
