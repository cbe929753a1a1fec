"""Uniform formats: evenly spaced levels, stored as integers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from halfstep.errors import FormatError
from halfstep.formats.format import SMALLEST_SCALE, checked_range, storable


@dataclass(frozen=True)
class Integer:
    """Integers of 2 to 16 bits: real = scale * (code - zero_point).

    A code is ``clip(round(x / scale) + zero_point, quant_min, quant_max)``; ties go to the even integer.

    Args:
        bits: width of a code, 2 to 16.
        signed: codes centred on zero, or starting at zero. Both are the same grid, the zero point differs by
            ``2**(bits - 1)``.
        symmetric: the range is [-a, a] and the zero point is fixed (0 if signed, ``2**(bits - 1)`` if not):
            the "scale mode". Otherwise the range is any [low, high] that contains zero: affine.
        narrow: leave out the lowest code, so that there are as many negative as positive levels. ``None``
            stands for the usual choice: True for signed symmetric formats, False for all others.
        mid_rise: levels at odd half steps, real = scale * (code - zero_point + 1/2): an even number of
            levels, symmetric about zero, and zero is none of them. The default, mid-tread, has a level at
            zero.
        power_of_two: :meth:`parameters` rounds the scale up to a power of two (fixed point).
        round_shifted: round ``x / scale + zero_point`` together, as Wu et al. (2020) write it, instead of
            adding the zero point after rounding as ONNX, torch and ONNX Runtime do. The two differ only where
            ``x / scale`` lies exactly between two integers and the zero point is odd.

    Raises:
        FormatError: bits out of range, or a mid-rise format that is affine or narrow.

    >>> Integer(8, signed=False, symmetric=False).parameters(torch.tensor(-1.0), torch.tensor(4.1))
    (tensor(0.0200), tensor(50, dtype=torch.int32))
    >>> print(Integer(4), Integer(8, signed=False, symmetric=False), sep=", ")
    s4 scale, u8 affine

    Source: Wu, Judd, Zhang, Isaev, Micikevicius, "Integer Quantization for Deep Learning Inference", 2020,
    section 3.
    """

    bits: int = 8
    signed: bool = True
    symmetric: bool = True
    narrow: bool | None = None
    mid_rise: bool = False
    power_of_two: bool = False
    round_shifted: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 16:
            raise FormatError(f"bits: got {self.bits}, needed 2 to 16; for 1 bit use Codebook.binary()")
        if self.mid_rise and (self.narrow or not self.symmetric):
            raise FormatError(
                "mid_rise: got an affine or narrow format, needed a symmetric one with an even number of "
                "levels; leave narrow unset and symmetric=True"
            )
        if self.narrow is None:
            object.__setattr__(self, "narrow", self.signed and self.symmetric and not self.mid_rise)

    @property
    def quant_min(self) -> int:
        """The smallest code."""
        lowest: int = -(2 ** (self.bits - 1)) if self.signed else 0
        return lowest + bool(self.narrow)

    @property
    def quant_max(self) -> int:
        """The largest code."""
        highest: int = 2 ** (self.bits - self.signed) - 1
        return highest

    @property
    def levels(self) -> int:
        """How many codes there are."""
        return self.quant_max - self.quant_min + 1

    @property
    def fixed_zero_point(self) -> int | None:
        """The zero point that a symmetric format always has; None for an affine one."""
        if not self.symmetric:
            return None
        return 0 if self.signed else 2 ** (self.bits - 1)

    @property
    def half(self) -> float:
        """What a code is shifted by before scaling: 1/2 for mid-rise, else 0."""
        return 0.5 if self.mid_rise else 0.0

    @property
    def dtype(self) -> torch.dtype:
        """The smallest torch dtype that holds every code; int32 for u16, as torch's uint16 lacks arithmetic."""
        if self.bits <= 8:
            return torch.int8 if self.signed else torch.uint8
        return torch.int16 if self.quant_max < 2**15 else torch.int32

    @property
    def reach(self) -> float:
        """The largest magnitude in steps: 127 for s8 scale, 255 for an affine 8-bit format."""
        if self.fixed_zero_point is None:
            return float(self.quant_max - self.quant_min)
        return self.quant_max - self.fixed_zero_point + self.half

    def parameters(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scale and zero point whose range covers [low, high].

        The range is first widened to contain zero. A zero range gives scale 1 and zero point 0 (or the code
        nearest to 0); a mid-rise format, which has no zero, gets the smallest scale instead. The round-off of
        the zero point moves an affine range by up to half a step: :meth:`range` tells the effective one.

        Args:
            low: lower ends, any shape.
            high: upper ends, same shape.

        Returns:
            scale (float32) and zero_point (int32), both of that shape. Computed in float64.

        Raises:
            FormatError: an end that is NaN or infinite, ``low > high``, or a scale beyond float32.

        >>> Integer(8).parameters(torch.tensor(-2.54), torch.tensor(1.0))
        (tensor(0.0200), tensor(0, dtype=torch.int32))
        """
        low, high = checked_range(low, high)
        if self.fixed_zero_point is None:
            scale = (high - low) / (self.quant_max - self.quant_min)
        else:
            # The outermost mid-rise cell reaches half a step beyond its level: 2**(bits - 1) steps in all.
            scale = torch.maximum(-low, high) / (self.quant_max - self.fixed_zero_point + 2 * self.half)
        if self.power_of_two:
            mantissa, exponent = torch.frexp(scale)  # mantissa in [1/2, 1), 0 for a zero scale
            scale = torch.where(scale > 0, torch.exp2((exponent - (mantissa == 0.5).int()).double()), scale)
        scale = storable(scale, instead=SMALLEST_SCALE if self.mid_rise else 1.0)
        if self.fixed_zero_point is not None:
            return scale, torch.full_like(scale, self.fixed_zero_point, dtype=torch.int32)
        zero_point = self.quant_min - torch.round(low / scale.double())
        zero_point = torch.where(low == high, 0.0, zero_point)
        return scale, zero_point.clamp(self.quant_min, self.quant_max).int()

    def range(self, scale: Tensor, zero_point: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the effective range: the outermost levels (mid-rise: the outer ends of the outermost cells).

        Args:
            scale: any shape.
            zero_point: same shape; not read by a symmetric format, whose zero point is fixed.

        >>> Integer(8).range(torch.tensor(0.5))
        (tensor(-63.5000), tensor(63.5000))
        """
        shift = self.shift(zero_point)
        return scale * (self.quant_min - shift), scale * (self.quant_max - shift + 2 * self.half)

    def shift(self, zero_point: Tensor | None) -> int | Tensor:
        """Return the zero point that holds: the fixed one, else the one given, a learned float rounded to a code.

        Raises:
            FormatError: an affine format without a zero point.
        """
        if self.fixed_zero_point is not None:
            return self.fixed_zero_point
        if zero_point is None:
            raise FormatError(f"zero_point: got None, needed a tensor for the affine format {self}")
        if zero_point.is_floating_point():  # a learned one
            return zero_point.detach().round().clamp(self.quant_min, self.quant_max)
        return zero_point

    def __str__(self) -> str:
        words = [f"{'s' if self.signed else 'u'}{self.bits}", "scale" if self.symmetric else "affine"]
        if self.narrow != (self.signed and self.symmetric and not self.mid_rise):
            words.append("narrow" if self.narrow else "full")
        options = {
            "mid-rise": self.mid_rise,
            "power-of-two": self.power_of_two,
            "round-shifted": self.round_shifted,
        }
        return " ".join(words + [word for word, on in options.items() if on])
