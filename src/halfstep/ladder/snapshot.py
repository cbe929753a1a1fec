"""A candidate to come back to: what a model computes at one moment, without the statistics."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from halfstep.fake_quantize import Mode
from halfstep.graph.placement import Choices
from halfstep.ladder.steps import STEPS
from halfstep.model import QuantizedModel


@dataclass(frozen=True)
class Snapshot:
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
    def of(cls, model: QuantizedModel) -> Snapshot:
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
