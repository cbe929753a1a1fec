"""The state of a model at one moment: kept, restored, and named by what it computes.

The state of a model that a repair may change, so that it can be put back.

A candidate to come back to: what a model computes at one moment, without the statistics.

A name for what a model computes: the same for the same candidate, in this process and in a later one.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from halfstep.calibrators.calibrator import Calibrator, WeightCalibrator
from halfstep.fake_quantize import FakeQuantize, Mode
from halfstep.graph.placement import Choices
from halfstep.model import QuantizedModel
from halfstep.precision import STEPS
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


@dataclass(frozen=True)
class ModelState:
    """Parameters, ranges and layers put back of a model.

    Attributes:
        model: the model itself, which may have changed since.
        put_back: the layers put to each step towards float, by the step's attribute.
        state: a copy of its parameters, buffers, scales and zero points.
    """

    model: QuantizedModel
    put_back: dict[str, frozenset[str]]
    state: dict[str, torch.Tensor]

    @classmethod
    def of(cls, model: QuantizedModel) -> ModelState:
        """The model as it stands."""
        state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        return cls(model, put_back_in(model), state)

    def restore(self) -> QuantizedModel:
        """Put the model back to this moment, quantizing."""
        self.model.choose(Choices(**self.put_back))
        self.model.load_state_dict(self.state, strict=False)  # quantizers made since then are not in use
        for site in self.model.sites.values():
            site.calibrated = True
        self.model.set_mode(Mode.QUANTIZE)
        return self.model


def put_back_in(model: QuantizedModel) -> dict[str, frozenset[str]]:
    """The layers of ``model`` at each step towards float, by the step's attribute, cheapest step first."""
    return {step.attribute: frozenset(getattr(model, step.attribute)) for step in STEPS.values()}


def fingerprint(model: QuantizedModel) -> str:
    """A digest of all that an evaluation of ``model`` depends on, besides the data.

    The graph, the layers in float, which sites take part with which format and range, the shifts and steps of biases,
    and every parameter. Two models that differ in none of these have the same fingerprint, however they came about.

    Returns:
        32 hexadecimal digits.
    """
    digest = hashlib.sha256()
    _add(digest, str(model.graph))
    for site in model.placement.sites:
        module = model.sites[site.name]
        readers = [[str(reader) for reader in position.readers] for position in site.positions]
        values = [str(position.value) for position in site.positions]
        _add(digest, (site.name, module.mode.value, site.format, repr(site.granularity), values, readers))
        _add(digest, module.state_dict())
    stretches = {bias.layer: bias.stretch for bias in model.placement.biases}
    for name, shift in model.shifts.items():
        _add(digest, (name, shift.active, stretches.get(name), shift.shift))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if not name.startswith("quantizers."):
            _add(digest, (name, tensor))
    return digest.hexdigest()[:32]


def _add(digest: Any, value: Any) -> None:
    """Feed ``value`` to the digest, with its type and size, so that no two values look alike."""
    if isinstance(value, torch.Tensor):
        digest.update(f"tensor {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    elif dataclasses.is_dataclass(value):
        _add(digest, {field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    elif isinstance(value, dict):
        _add(digest, [part for pair in value.items() for part in pair])
    elif isinstance(value, (list, tuple)):
        digest.update(f"list {len(value)} ".encode())
        for part in value:
            _add(digest, part)
    else:
        text = repr(value).encode()
        digest.update(f"{type(value).__name__} {len(text)} ".encode() + text)
