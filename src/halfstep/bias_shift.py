"""BiasShift: the module that sits on a quantized layer's bias."""

from __future__ import annotations

import torch
from torch import nn


class BiasShift(nn.Module):
    """Adds to a bias what its layer lost by quantization, while the layer is quantized; zero until corrected.

    The float bias stays what it was, for layers put back to float.

    Args:
        channels: of the layer's output.
    """

    shift: torch.Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.active = False
        self.register_buffer("shift", torch.zeros(channels))

    def forward(self, bias: torch.Tensor) -> torch.Tensor:
        """Shape, dtype and device of ``bias`` are kept."""
        return bias + self.shift.to(bias.dtype) if self.active else bias
