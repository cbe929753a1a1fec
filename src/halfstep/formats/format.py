"""What every number format can say about itself, and the rules for ranges and scales that all share."""

from __future__ import annotations

import warnings
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from halfstep.errors import FormatError

#: The smallest normal float32. A smaller scale would lose bits or be flushed to zero by a processor.
SMALLEST_SCALE = 2.0**-126
LARGEST_SCALE = torch.finfo(torch.float32).max


@runtime_checkable
class Format(Protocol):
    """A set of representable numbers with its rounding rule, as a frozen record.

    ``scale`` and ``zero_point`` place the format's own numbers on the real line; both may have any shape, one
    element for each :mod:`granularity <halfstep.granularity>` parameter.
    """

    @property
    def bits(self) -> int:
        """Bits of a stored code."""

    @property
    def levels(self) -> int:
        """How many codes there are."""

    @property
    def symmetric(self) -> bool:
        """Whether its range is [-a, a] for every scale."""

    @property
    def dtype(self) -> torch.dtype:
        """The smallest torch dtype that holds a code."""

    @property
    def reach(self) -> float:
        """The largest magnitude before scaling: the range is about ``reach * scale``."""

    def parameters(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return (scale float32, zero_point int32) that cover [low, high], elementwise."""

    def range(self, scale: Tensor, zero_point: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the effective range (low, high) of given parameters, elementwise."""


def checked_range(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Return the range in float64, widened to contain zero.

    Zero is always inside: padding and ReLU produce it exactly, and without it the zero point would leave the
    codes.

    Raises:
        FormatError: an end that is NaN or infinite, or ``low > high``.

    >>> checked_range(torch.tensor(1.0), torch.tensor(4.0))
    (tensor(0., dtype=torch.float64), tensor(4., dtype=torch.float64))
    """
    low, high = low.detach().double(), high.detach().double()
    if not bool((torch.isfinite(low) & torch.isfinite(high) & (low <= high)).all()):
        raise FormatError(
            f"range: got low {_extremes(low)} and high {_extremes(high)}, needed finite numbers with "
            "low <= high; leave NaN and infinities out of the statistics"
        )
    return low.clamp(max=0.0), high.clamp(min=0.0)


def storable(scale: Tensor, instead: float = 1.0) -> Tensor:
    """Return float64 scales as float32, with ``instead`` where the range was zero.

    A scale below 2**-126 (a range of about 1e-36) is no normal float32: its tensor is treated as zero, with a
    warning.

    Raises:
        FormatError: a scale beyond float32.
    """
    if bool((scale > LARGEST_SCALE).any()):
        raise FormatError(f"range: its scale {_extremes(scale)} does not fit float32; needed a smaller range")
    tiny = scale < SMALLEST_SCALE
    if bool((tiny & (scale > 0)).any()):
        warnings.warn(
            f"a range so small that its scale is below {SMALLEST_SCALE:.3g} is treated as zero", stacklevel=3
        )
    return torch.where(tiny, instead, scale).float()


def check_scale(scale: Tensor) -> None:
    """Raise unless every scale is a positive finite number.

    Raises:
        FormatError: a scale that is zero, negative, NaN or infinite.
    """
    if not scale.numel():
        return
    low, high = (scale, scale) if scale.numel() == 1 else torch.aminmax(scale)  # NaN propagates
    if not 0 < low.item() <= high.item() <= LARGEST_SCALE:
        raise FormatError(f"scale: got {_extremes(scale)}, needed positive finite numbers")


def _extremes(values: Tensor) -> str:
    """Return a scalar, or the smallest and largest of many, for a message."""
    if values.numel() == 1:
        return f"{values.item():g}"
    return f"from {values.amin().item():g} to {values.amax().item():g}" if values.numel() else "nothing"
