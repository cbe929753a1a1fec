"""Which ranges move during training, and how."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from halfstep.errors import TrainingError
from halfstep.fake_quantize import LEARNABLE, FakeQuantize
from halfstep.formats import Codebook
from halfstep.functional import LSQ, XNOR
from halfstep.model import QuantizedModel
from halfstep.ranges import widen_for_bias

WEIGHTS = ("learned", "follow", "fixed")
ACTIVATIONS = ("learned", "fixed")


@dataclass(frozen=True)
class Ranges:
    """What moves beside the weights. All is fixed in the first ``after`` of the steps.

    Attributes:
        weights: ``"learned"``: the steps of weights by gradient (LSQ); ``"follow"``: in proportion to the mean
            magnitude of the weights that share them; ``"fixed"``: as calibrated. Binary weights always follow: their
            mean magnitude is the best scale, and XNOR-Net's gradient assumes it.
        activations: ``"learned"`` or ``"fixed"``.
        offsets: with learned activations, learn affine zero points too, except of ranges that start at 0.
        codebooks: learn the values of codebooks.
        after: share of the steps before anything of this begins.
        rate: learning rate over that of the weights; of scales log2 is learned, so an update is a relative one.

    Raises:
        TrainingError: naming the option that cannot be.
    """

    weights: str = "learned"
    activations: str = "learned"
    offsets: bool = False
    codebooks: bool = True
    after: float = 0.1
    rate: float = 1.0

    def __post_init__(self) -> None:
        for name, known in (("weights", WEIGHTS), ("activations", ACTIVATIONS)):
            if getattr(self, name) not in known:
                raise TrainingError(
                    f"Ranges: {name} is {getattr(self, name)!r}, needed one of {', '.join(map(repr, known))}"
                )
        if not 0 <= self.after <= 1:
            raise TrainingError(f"Ranges: after is {self.after}, needed 0 to 1, a share of the steps")
        if not self.rate > 0:
            raise TrainingError(f"Ranges: rate is {self.rate}, needed a number above 0")


class MovingRanges:
    """The ranges of a model in training.

    Args:
        model: calibrated; its sites get the parameters that :class:`Ranges` asks for.
        options: which.
    """

    def __init__(self, model: QuantizedModel, options: Ranges) -> None:
        self.options = options
        self.model = model
        self.sites = [module for module in model.sites.values() if not module.dynamic]
        self.parameters: list[nn.Parameter] = []
        self._following: list[Callable[[], None]] = []
        _take_up(model)
        for site in model.placement.sites:
            module = model.sites[site.name]
            if module.dynamic:  # its range comes from each tensor
                continue
            binary = site.is_weight and isinstance(module.format, Codebook) and module.format.levels == 2
            how = options.activations
            if site.is_weight:
                how = "follow" if binary else options.weights
            module.gradient = XNOR if binary else LSQ
            learned = how == "learned"
            offset = learned and options.offsets and not site.is_weight
            self.parameters += module.learn(learned, offset, options.codebooks and not binary)
            if how == "follow":
                self._following.append(_follower(model, module, site.name))
        self.move(False)

    def move(self, moving: bool) -> None:
        """Let the learned parameters move, or hold them."""
        for parameter in self.parameters:
            parameter.requires_grad_(moving)
        self.moving = moving

    def follow(self) -> None:
        """After a step of the optimizer: bring the ranges that follow the weights up to date."""
        if self.moving:
            for follow in self._following:
                follow()

    def settle(self) -> None:
        """Make plain scales and zero points of what was learned, with room for the biases, as they are exported."""
        for module in self.sites:
            module.settle()
        for layer in self.model.layers:
            widen_for_bias(self.model, layer)

    @contextmanager
    def settled(self) -> Iterator[None]:
        """The model as it would be exported, for the length of a block; then all is as it was, to the bit.

        So the course of a training does not depend on how often it is scored.
        """
        before = [
            (
                {name: getattr(module, name) for name in LEARNABLE},
                {name: buffer.clone() for name, buffer in module.named_buffers(recurse=False)},
            )
            for module in self.sites
        ]
        self.settle()
        try:
            yield
        finally:
            for module, (parameters, buffers) in zip(self.sites, before, strict=True):
                for name, parameter in parameters.items():
                    setattr(module, name, parameter)
                for name, buffer in module.named_buffers(recurse=False):
                    buffer.copy_(buffers[name])
            self.move(self.moving)


@torch.no_grad()
def _take_up(model: QuantizedModel) -> None:
    """Let weights and biases themselves be where learned roundings and shifts have them.

    Training goes on from there, whatever is put back to float afterwards. A bias that several layers read stays, and so
    do their shifts.
    """
    for site in model.placement.sites:
        module = model.sites[site.name]
        if module.offset is not None:
            weight = model.weight(site.name)
            weight.copy_(module.shifted(weight))
            module.offset = None
    readers = Counter(layer.operator.bias for layer in model.layers)
    for layer in model.layers:
        shift, node = model.shifts.get(layer.name), layer.operator.bias
        if shift is not None and node is not None and readers[node] == 1:
            bias = model.weight(str(node.target))
            bias.copy_(shift.corrected(bias))
            shift.shift.zero_()
    model.compensations.forget()


def _follower(model: QuantizedModel, module: FakeQuantize, name: str) -> Callable[[], None]:
    """Keeps scale / mean|weight| at what it is now; a row of zeros keeps its scale."""

    def magnitude() -> torch.Tensor:
        return module.granularity.reduce(model.weight(name).detach(), "absmean")

    before = magnitude()
    proportion = torch.where(before > 0, module.scale / before, 0.0)

    def follow() -> None:
        scale = proportion * magnitude()
        module.scale.copy_(torch.where(scale > 0, scale, module.scale))

    return follow
