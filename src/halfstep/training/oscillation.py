"""What keeps weights of few bits from jumping to and fro between two codes, which makes a training end at random."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch

from halfstep.errors import TrainingError
from halfstep.fake_quantize import FakeQuantize
from halfstep.functional import dequantize, quantize
from halfstep.model import QuantizedModel

#: Weights of at most so many bits are looked after; with more, a jump by one code costs nothing.
BITS = 4


class Keeper(Protocol):
    """Looks after the weights in a training."""

    def before_step(self, share: float) -> None:
        """After the backward pass; ``share`` of the training is over, 0 to 1."""

    def after_step(self) -> None:
        """After the optimizer's step."""

    def state(self) -> dict[str, torch.Tensor]:
        """What a checkpoint needs."""

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        """Go on from there."""


@dataclass(frozen=True)
class Damping:
    """Pulls every weight towards the number that it rounds to, the more the further the training is.

    Adds ``strength * (1 - cos(pi * share)) / 2 * sum (w - Q(w))^2`` to the loss, over the weights inside their range.

    Attributes:
        strength: at the end of the training.

    Source: Nagel et al. 2022, "Overcoming Oscillations in Quantization-Aware Training", section 4.2.
    """

    strength: float = 1e-2

    def __post_init__(self) -> None:
        if not (math.isfinite(self.strength) and self.strength > 0):
            raise TrainingError(f"Damping: strength is {self.strength}, needed a number above 0")

    def start(self, model: QuantizedModel) -> Keeper:
        """Look after ``model``'s weights from now on."""
        return _Damper(model, self.strength)


@dataclass(frozen=True)
class Freezing:
    """Fixes a weight for good once it jumps to and fro too often, at the code where it was most of the time.

    A jump counts if it undoes the one before it; how often it happens is a running mean over the steps.

    Attributes:
        threshold: jumps per step at which a weight is frozen.
        momentum: of the running means; 0.02 looks back about 50 steps.

    Source: Nagel et al. 2022, "Overcoming Oscillations in Quantization-Aware Training", section 4.3, algorithm 1.
    """

    threshold: float = 0.02
    momentum: float = 0.02

    def __post_init__(self) -> None:
        for name in ("threshold", "momentum"):
            if not 0 < getattr(self, name) < 1:
                raise TrainingError(f"Freezing: {name} is {getattr(self, name)}, needed a number from 0 to 1")

    def start(self, model: QuantizedModel) -> Keeper:
        """Look after ``model``'s weights from now on."""
        return _Freezer(model, self)


def _weights(model: QuantizedModel) -> dict[str, tuple[torch.Tensor, FakeQuantize]]:
    """The weights of few bits that train, with their sites, by name."""
    found = {site.name: model.sites[site.name] for site in model.placement.sites if site.is_weight}
    return {
        name: (model.weight(name), site)
        for name, site in found.items()
        if site.format.bits <= BITS and model.weight(name).requires_grad
    }


class _Damper:
    def __init__(self, model: QuantizedModel, strength: float) -> None:
        self.weights, self.strength = _weights(model), strength

    @torch.no_grad()
    def before_step(self, share: float) -> None:
        strength = self.strength * (1 - math.cos(math.pi * share)) / 2
        for weight, site in self.weights.values():
            if weight.grad is None or not strength:
                continue
            low, high = (site.granularity.expand(end, weight.shape) for end in site.range())
            inside = (weight >= low) & (weight <= high)
            weight.grad.add_((weight - site.rounded(weight)).mul_(inside), alpha=2 * strength)

    def after_step(self) -> None:
        pass

    def state(self) -> dict[str, torch.Tensor]:
        return {}

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        pass


class _Freezer:
    """For each weight: its code, the direction of its last jump, how often it jumps back, its mean code, and the code
    that it is frozen at (-2**15 while it is free)."""

    FREE = -(2**15)

    def __init__(self, model: QuantizedModel, options: Freezing) -> None:
        self.weights, self.options = _weights(model), options
        self.tensors: dict[str, torch.Tensor] = {}
        for name, (weight, site) in self.weights.items():
            codes = _codes(weight, site)
            self.tensors |= {
                f"{name}:code": codes,
                f"{name}:direction": torch.zeros_like(codes),
                f"{name}:frequency": torch.zeros_like(codes, dtype=torch.float32),
                f"{name}:mean": codes.float(),
                f"{name}:frozen": torch.full_like(codes, self.FREE),
            }

    def before_step(self, share: float) -> None:
        pass

    @torch.no_grad()
    def after_step(self) -> None:
        momentum = self.options.momentum
        for name, (weight, site) in self.weights.items():
            code, direction, frequency, mean, frozen = (
                self.tensors[f"{name}:{part}"]
                for part in ("code", "direction", "frequency", "mean", "frozen")
            )
            codes = _codes(weight, site)
            jump = (codes - code).sign()
            back = (jump != 0) & (jump == -direction)
            frequency.lerp_(back.float(), momentum)
            mean.lerp_(codes.float(), momentum)
            direction.copy_(torch.where(jump != 0, jump, direction))
            code.copy_(codes)
            newly = (frozen == self.FREE) & (frequency > self.options.threshold)
            frozen.copy_(torch.where(newly, mean.round().to(frozen.dtype), frozen))
            at = frozen != self.FREE
            if at.device.type == "cpu" and not bool(
                at.any()
            ):  # elsewhere the question would wait for the device
                continue
            numbers = dequantize(
                torch.where(at, frozen, codes), site.scale, site.zero_point, site.format, site.granularity
            )
            weight.copy_(torch.where(at, numbers, weight))

    def state(self) -> dict[str, torch.Tensor]:
        return self.tensors

    def restore(self, state: dict[str, torch.Tensor]) -> None:
        for name, tensor in self.tensors.items():
            tensor.copy_(state[name])


def _codes(weight: torch.Tensor, site: FakeQuantize) -> torch.Tensor:
    codes = quantize(weight.detach(), site.scale.detach(), site.zero_point, site.format, site.granularity)
    return codes.to(torch.int16)
