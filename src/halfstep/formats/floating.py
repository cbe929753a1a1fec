"""Floating-point formats of 8 bits and fewer: levels that grow with the magnitude."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfstep.errors import FormatError
from halfstep.formats.format import checked_range, storable


@dataclass(frozen=True)
class Floating:
    """Sign, exponent and mantissa, rounded to nearest even; beyond the largest number it saturates.

    real = scale * number. The bias is ``2**(exponent_bits - 1) - 1``; the exponent field 0 holds subnormals.

    Args:
        exponent_bits: 2 to 5.
        mantissa_bits: 1 to 3.
        storage: torch's dtype of the same format, which then does the rounding and says which codes are
            infinite or NaN. None for formats whose codes are all finite, as the 6- and 4-bit ones.

    Raises:
        FormatError: a width out of range, or a storage dtype of another format.

    >>> E4M3.parameters(torch.tensor(-3.0), torch.tensor(7.0))
    (tensor(0.0156), tensor(0, dtype=torch.int32))
    >>> Floating(2, 1).largest
    6.0

    Sources: Micikevicius et al. 2022, "FP8 Formats for Deep Learning"; OCP Microscaling Formats 1.0, section
    5.3.
    """

    exponent_bits: int
    mantissa_bits: int
    storage: torch.dtype | None = None

    def __post_init__(self) -> None:
        if not (2 <= self.exponent_bits <= 5 and 1 <= self.mantissa_bits <= 3):
            raise FormatError(
                f"floating format: got {self.exponent_bits} exponent and {self.mantissa_bits} mantissa bits, "
                "needed 2 to 5 and 1 to 3"
            )
        if self.storage is not None:
            number = torch.finfo(self.storage)
            if number.bits != self.bits or number.eps != 2.0**-self.mantissa_bits:
                raise FormatError(f"storage: got {self.storage}, needed the torch dtype of {self}")

    @property
    def bits(self) -> int:
        """Bits of a stored code."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def levels(self) -> int:
        """How many codes there are; two are zero, and some of an 8-bit format are no finite number."""
        codes: int = 2**self.bits
        return codes

    @property
    def dtype(self) -> torch.dtype:
        """Codes are bit patterns in uint8."""
        return torch.uint8

    @property
    def symmetric(self) -> bool:
        """Always: a sign bit."""
        return True

    @property
    def smallest_exponent(self) -> int:
        """The exponent of the smallest normal number, and of the subnormals."""
        bias: int = 2 ** (self.exponent_bits - 1) - 1
        return 1 - bias

    @property
    def largest(self) -> float:
        """The largest finite number: 448 for E4M3, 57344 for E5M2, 6 for E2M1."""
        if self.storage is not None:
            return torch.finfo(self.storage).max
        top = 2**self.exponent_bits - 2 + self.smallest_exponent
        return float((2 - 2.0**-self.mantissa_bits) * 2.0**top)

    @property
    def reach(self) -> float:
        """The largest magnitude before scaling."""
        return self.largest

    def parameters(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale that puts the farther end on the largest number, and zeros for the zero point.

        Args:
            low: lower ends, any shape.
            high: upper ends, same shape.

        Returns:
            scale (float32; 1 for a zero range) and zero_point (int32), both of that shape.

        Raises:
            FormatError: an end that is NaN or infinite, ``low > high``, or a scale beyond float32.
        """
        low, high = checked_range(low, high)
        scale = storable(torch.maximum(-low, high) / self.largest)
        return scale, torch.zeros_like(scale, dtype=torch.int32)

    def range(self, scale: Tensor, zero_point: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return minus and plus the largest number, times ``scale``; ``zero_point`` is not read."""
        return -self.largest * scale, self.largest * scale

    def __str__(self) -> str:
        return f"E{self.exponent_bits}M{self.mantissa_bits}"


E4M3 = Floating(4, 3, torch.float8_e4m3fn)
E5M2 = Floating(5, 2, torch.float8_e5m2)
E2M1 = Floating(2, 1)
