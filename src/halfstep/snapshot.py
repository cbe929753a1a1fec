"""The state of a model at one moment: kept, restored, and named by what it computes."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from halfstep.calibrators.calibrator import Calibrator, WeightCalibrator
from halfstep.distributed import StatePart
from halfstep.fake_quantize import Mode
from halfstep.graph.layer_precision import LayerPrecision
from halfstep.model import QuantizedModel
from halfstep.statistics import ChannelRange, Histogram


@dataclass(frozen=True)
class _Seen:
    """What a site saw, and whom its range is from."""

    histogram: Histogram
    channels: ChannelRange | None
    calibrated_by: Calibrator | WeightCalibrator | None


@dataclass(frozen=True)
class Snapshot:
    """A model at one moment, to come back to: what it computes, and what its sites saw.

    Costs one copy of the parameters and of learned roundings. Statistics are not copied: they are replaced later, never
    added to.

    Attributes:
        model: the model itself, which may have changed since.
        precision: of its layers.
        state: a copy of its state dict: parameters, ranges, learned roundings, shifts of biases.
        seen: by site; empty in a snapshot from a file, which leaves statistics as they are.
    """

    model: QuantizedModel
    precision: LayerPrecision
    state: dict[str, torch.Tensor]
    seen: Mapping[str, _Seen] = field(default_factory=dict)

    @classmethod
    def of(cls, model: QuantizedModel) -> Snapshot:
        """The model as it stands."""
        state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        seen = {
            name: _Seen(site.histogram, site.channels, site.calibrated_by)
            for name, site in model.sites.items()
        }
        return cls(model, model.precision, state, seen)

    def restore(self) -> QuantizedModel:
        """Put the model back to this moment."""
        self.model.choose(self.precision)
        self.model.load_state_dict(self.state, strict=False)  # quantizers made since then are not in use
        sites = self.model.sites
        for name, seen in self.seen.items():
            site = sites[name]
            site.histogram, site.channels = seen.histogram, seen.channels
            site.calibrated_by = seen.calibrated_by
        return self.model


class ModelReplica:
    """Keeps the model of every rank of a run what rank 0's is: what it computes, and its sample; not what it saw.

    Args:
        model: this rank's.
    """

    def __init__(self, model: QuantizedModel) -> None:
        self.model = model
        self._choices = self._sample = 0  # how often they changed
        self._last: tuple[object, list[object]] = None, []

    def parts(self) -> dict[str, StatePart]:
        """The state by modules, which of them take part, and the layers at each step towards float."""
        model, sample = self.model, [*self.model.sample]
        precision = model.precision
        known, kept = self._last
        self._choices += precision != known
        if len(kept) != len(sample) or any(old is not new for old, new in zip(kept, sample, strict=True)):
            self._sample += 1
        self._last = precision, list(sample)
        by_module: dict[str, dict[str, torch.Tensor]] = {}
        for name, tensor in model.state_dict().items():
            if not name.endswith("_extra_state"):
                by_module.setdefault(name.rpartition(".")[0], {})[name] = tensor
        modes = {name: site.mode.value for name, site in model.sites.items()}
        active = {name: shift.active for name, shift in model.shifts.items()}
        # With other layers in float quantizers may be other modules: all of them are sent.
        return {
            "precision": StatePart(precision.to_dict()),
            **{
                f"module {name}": StatePart(self._choices if name.startswith("quantizers") else 0, tensors)
                for name, tensors in by_module.items()
            },
            "modes": StatePart((model.mode.value, modes, active, self._choices)),
            "sample": StatePart(self._sample, large=sample),
        }

    def take(self, parts: Mapping[str, StatePart]) -> None:
        """Be what rank 0's model is, of which these parts have changed."""
        model = self.model
        if "precision" in parts:
            model.compensations.forget()
            model.choose(LayerPrecision.of_dict(parts["precision"].plain))
        state = {key: tensor for part in parts.values() for key, tensor in part.tensors.items()}
        model.load_state_dict(state, strict=False)
        if "modes" in parts:
            mode, modes, active, _ = parts["modes"].plain
            model.mode = Mode(mode)
            for name, site in model.sites.items():
                site.mode = Mode(modes[name])
            for name, shift in model.shifts.items():
                shift.active = active[name]
        if "sample" in parts:
            model.sample = parts["sample"].large


@contextmanager
def undone_on_error(model: QuantizedModel) -> Iterator[Snapshot]:
    """Leave ``model`` as it was if the block raises, Ctrl-C included; the block gets the snapshot."""
    before = Snapshot.of(model)
    try:
        yield before
    except BaseException:
        before.restore()
        raise


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
