"""BiasShift: the module that sits on a quantized layer's bias."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from halfstep.fake_quantize import FakeQuantize, Mode
from halfstep.functional.checks import check_whole

#: The smallest normal float32: a step below it would be no number to divide by.
SMALLEST = 2.0**-126

#: A bias must stay below this many steps: int32, with room for the products that it is added to.
BIAS_STEPS = 2**30


@dataclass(frozen=True)
class BiasSteps:
    """The steps in which a file stores a bias: those of the layer's products of codes.

    Attributes:
        activation: quantizes what the layer reads.
        weight: quantizes its weight.
        stretch: what the file multiplies the weight's codes by, a power of two.
    """

    activation: FakeQuantize
    weight: FakeQuantize
    stretch: int

    @property
    def taken(self) -> bool:
        """Whether both are quantized just now, so that there are sums of codes to add to."""
        return self.activation.mode is Mode.QUANTIZE and self.weight.mode is Mode.QUANTIZE

    def size(self) -> torch.Tensor:
        """``scale_x * scale_w / stretch`` in float32, of the shape of ``scale_w``.

        No gradient leads back to the scales: whatever they are, the stored bias is within half a step of the float one.
        """
        size = self.activation.scale.detach() * self.weight.scale.detach()
        if self.stretch > 1:
            size /= self.stretch
        return size.clamp_min_(SMALLEST)

    def codes(self, bias: torch.Tensor) -> torch.Tensor:
        """The bias in whole steps, ties to even, as float32: beyond 2^24 floats are whole anyway."""
        return bias.detach().float().div(self.size()).round_()

    def rounded(self, bias: torch.Tensor) -> torch.Tensor:
        """The bias that the file's DequantizeLinear makes, bit for bit; gradients pass straight through."""
        if bias.requires_grad and torch.is_grad_enabled():
            result: torch.Tensor = _Rounded.apply(bias, self.size())  # type: ignore[no-untyped-call]
            return result
        return _rounded(bias, self.size())


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bias: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
        return _rounded(bias, size)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def _rounded(bias: torch.Tensor, size: torch.Tensor) -> torch.Tensor:
    return bias.float().div(size).round_().mul_(size).to(bias.dtype)


class BiasShift(nn.Module):
    """Adds to a bias what its layer lost by quantization, and rounds it as the file does, while the layer is quantized.

    The shift is zero until corrected. The float bias stays what it was, for layers put back to float.

    Args:
        shift: of each channel of the layer's output; shared, not copied.
        steps: those that the file stores the bias in; None where it stores floats.
    """

    shift: torch.Tensor

    def __init__(self, shift: torch.Tensor, steps: BiasSteps | None = None) -> None:
        super().__init__()
        self.active, self.steps = False, steps
        self.register_buffer("shift", shift)
        #: A bias and what it becomes, for as long as neither it nor the steps change; see :meth:`hold`.
        self.held: tuple[torch.Tensor, torch.Tensor] | None = None

    def forward(self, bias: torch.Tensor) -> torch.Tensor:
        """Shape, dtype and device of ``bias`` are kept."""
        if not self.active:
            return bias
        if (held := self.held) is not None and held[0] is bias:
            return held[1]
        check_whole(bias)
        corrected = self.corrected(bias)
        if self.steps is None or not self.steps.taken:
            return corrected
        return self.steps.rounded(corrected)

    def hold(self, bias: torch.Tensor) -> None:
        """Keep what ``bias`` becomes, as :meth:`.FakeQuantize.hold` does."""
        self.held = None
        self.held = bias, self(bias)

    def widen(self, bias: torch.Tensor, weight: Callable[[str], torch.Tensor]) -> None:
        """Widen the weight's range in channels whose bias, shift included, would not fit 32 bits.

        Where batch norm all but switched a channel off, its folded weight is tiny beside its bias, and those steps too
        fine. Where it did, or where a channel was pruned, nothing but the bias is left, and any steps do for a weight
        of zeros: the finest that the bias fits.

        Args:
            bias: without the shift.
            weight: the float weight of a name.
        """
        if self.steps is None or not self.steps.activation.calibrated:
            return
        scale, activation = self.steps.weight.scale, self.steps.activation.scale
        needed = self.corrected(bias).abs() * self.steps.stretch / (activation * BIAS_STEPS)
        if scale.dim() == 0:
            needed = needed.max()
        needed = needed.to(scale.dtype)
        site = self.steps.weight
        empty = site.granularity.reduce(weight(site.name).detach(), "absmax") == 0
        scale.copy_(torch.where(empty & (needed > 0), needed, torch.maximum(scale, needed)))

    def corrected(self, bias: torch.Tensor) -> torch.Tensor:
        """The bias with the shift, not rounded."""
        return bias + self.shift.to(bias.dtype)
