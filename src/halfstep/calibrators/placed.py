"""A format placed on many candidate ranges at once: which level a value goes to, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from halfstep.formats import Format, Integer
from halfstep.statistics import Float64


class Placed(Protocol):
    """A format with the parameters of C candidate ranges."""

    def levels(self, x: Float64) -> Float64:
        """Return the number of the level that each x, (B,), is rounded to: (C, B), ascending with x."""

    def squared_error(self, x: Float64) -> Float64:
        """Return (x - Q(x))^2 of each x, (B,): (C, B)."""

    def error_integral(self, x: Float64) -> Float64:
        """Return an antiderivative of (x - Q(x))^2 at each x, (B,): (C, B)."""


def place(format: Format, low: Float64, high: Float64) -> Placed:
    """Place a format on ranges [low, high], both (C,), by its own rule for scale and zero point."""
    scale, zero_point = format.parameters(torch.from_numpy(low), torch.from_numpy(high))
    column, offset = scale.double().numpy()[:, None], zero_point.double().numpy()[:, None]
    if isinstance(format, Integer):
        lowest = format.quant_min - offset + format.half
        return _Uniform(column, format.half, lowest, lowest + (format.levels - 1))
    raise TypeError(format)


@dataclass(frozen=True)
class _Uniform:
    """Levels at whole steps, or at odd half steps, from ``lowest`` to ``highest``."""

    scale: Float64  # (C, 1)
    half: float
    lowest: Float64  # (C, 1)
    highest: Float64  # (C, 1)

    def levels(self, x: Float64) -> Float64:
        rounded = np.rint(x / self.scale - self.half) + self.half
        return np.clip(rounded, self.lowest, self.highest)

    def squared_error(self, x: Float64) -> Float64:
        return (x - self.levels(x) * self.scale) ** 2

    def error_integral(self, x: Float64) -> Float64:
        # In steps: a whole cell contributes 1/12, the cell that x lies in a third of its distance to the level cubed.
        u = x / self.scale
        level = self.levels(x)
        u -= level
        return (u * u * u / 3 + level / 12) * self.scale**3
