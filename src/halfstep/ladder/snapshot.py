"""A candidate to come back to: what a model computes at one moment, without the statistics."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from halfstep.fake_quantize import Mode
from halfstep.model import QuantizedModel


@dataclass(frozen=True)
class Snapshot:
    """Parameters and ranges of a model, and what its layers are put to.

    Attributes:
        model: the model itself, which may have changed since.
        float_layers: as they were.
        dynamic_layers: the same.
        state: a copy of its parameters, buffers, scales and zero points.
    """

    model: QuantizedModel
    float_layers: frozenset[str]
    dynamic_layers: frozenset[str]
    state: dict[str, torch.Tensor]

    @classmethod
    def of(cls, model: QuantizedModel) -> Snapshot:
        """The model as it stands."""
        state = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        return cls(model, model.float_layers, model.dynamic_layers, state)

    def restore(self) -> QuantizedModel:
        """Put the model back to this moment, quantizing."""
        self.model.float_layers = self.float_layers
        self.model.dynamic_layers = self.dynamic_layers
        self.model.load_state_dict(self.state, strict=False)  # quantizers made since then are not in use
        for site in self.model.sites.values():
            site.calibrated = True
        self.model.set_mode(Mode.QUANTIZE)
        return self.model
