"""The state of a model that a repair may change, so that it can be put back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from halfstep.calibrators.calibrator import Calibrator, WeightCalibrator
from halfstep.fake_quantize import FakeQuantize
from halfstep.model import QuantizedModel
from halfstep.statistics import ChannelRange, Histogram


@dataclass(frozen=True)
class _Site:
    calibrated: bool
    calibrated_by: Calibrator | WeightCalibrator | None
    histogram: Histogram
    channels: ChannelRange | None
    scale: torch.Tensor
    zero_point: torch.Tensor
    offset: torch.Tensor | None


@dataclass(frozen=True)
class Snapshot:
    """Parameters, ranges, statistics, learned roundings and bias shifts of a model at one moment.

    Costs one copy of the parameters. Statistics are not copied: repairs replace them and never add to them.

    Attributes:
        parameters: by name, as in the user's model.
        sites: by name.
        shifts: of the biases, by layer.
    """

    parameters: Mapping[str, torch.Tensor]
    sites: Mapping[str, _Site]
    shifts: Mapping[str, torch.Tensor]

    @classmethod
    def of(cls, model: QuantizedModel) -> Snapshot:
        """The state of ``model`` as it is."""
        return cls(
            {name: tensor.detach().clone() for name, tensor in _parameters(model).items()},
            {name: _site(module) for name, module in model.sites.items()},
            {name: module.shift.clone() for name, module in model.shifts.items()},
        )

    @torch.no_grad()
    def restore(self, model: QuantizedModel) -> None:
        """Put ``model`` back; its layers must be quantized or in float as they were."""
        for name, tensor in _parameters(model).items():
            if name in self.parameters:
                tensor.copy_(self.parameters[name])
        sites, shifts = model.sites, model.shifts
        for name, state in self.sites.items():
            site = sites[name]
            site.scale.copy_(state.scale)
            site.zero_point.copy_(state.zero_point)
            site.calibrated, site.calibrated_by = state.calibrated, state.calibrated_by
            site.histogram, site.channels, site.offset = state.histogram, state.channels, state.offset
        for name, module in shifts.items():
            if name in self.shifts:
                module.shift.copy_(self.shifts[name])
            else:
                module.shift.zero_()


@contextmanager
def undone_on_error(model: QuantizedModel) -> Iterator[Snapshot]:
    """Leave ``model`` as it was if the block raises, Ctrl-C included; the block gets the snapshot."""
    before = Snapshot.of(model)
    try:
        yield before
    except BaseException:
        before.restore(model)
        raise


def _parameters(model: QuantizedModel) -> dict[str, torch.Tensor]:
    """Every tensor that the float graph reads."""
    names = {str(node.target) for node in model.graph.nodes if node.op == "get_attr"}
    return {name: model.weight(name) for name in sorted(names)}


def _site(module: FakeQuantize) -> _Site:
    return _Site(
        module.calibrated,
        module.calibrated_by,
        module.histogram,
        module.channels,
        module.scale.detach().clone(),
        module.zero_point.detach().clone(),
        module.offset,
    )
