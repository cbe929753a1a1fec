"""The arithmetic of the bins: how a float32 becomes a bin, and what the bin's integers say about its samples.

A bin is named by the upper 16 bits of a float32: sign, exponent and 7 bits of mantissa. So every power of two is
cut into 128 bins of equal width, from the smallest number to the largest, and no range has to be known before.
All samples of a bin share these 16 bits. The lower 16 are an integer offset within the bin; their sum is exact in
an int64, so a count and one integer per bin give the exact sum, hence the exact mean, of the bin's samples.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]

BINS = 1 << 16
SIGN = 1 << 15  # keys from here on are negative numbers
FIRST_SPECIAL = 0x7F80  # keys of infinities and NaN: the exponent is all ones
OFFSETS = 1 << 16  # offsets within a bin are 0 .. OFFSETS - 1

# Positions in the int64 vector that stands beside the bins. Subnormals below 2^-133 share the bin of zero.
NAN, POSITIVE_INF, NEGATIVE_INF, TINY_POSITIVE, TINY_NEGATIVE = range(5)
SPECIALS = 5


def order(bits: NDArray[np.int32]) -> NDArray[np.int32]:
    """Map the bits of float32 to integers that sort as the numbers do; applying it twice gives the bits back.

    >>> order(np.float32([-1.0, -0.0, 0.0, 1.0]).view(np.int32)).tolist()
    [-1065353217, -1, 0, 1065353216]
    """
    ordered: NDArray[np.int32] = bits ^ ((bits >> 31) & np.int32(0x7FFFFFFF))
    return ordered


def significand(keys: Int64) -> Int64:
    """Return the leading part of a bin's magnitude in units of 2^16 offsets."""
    mantissa: Int64 = keys & 0x7F
    return np.where((keys & 0x7F80) == 0, mantissa, mantissa | 0x80)


def exponent(keys: Int64) -> Int64:
    """Return e such that one offset within the bin is worth 2^e."""
    exponents: Int64 = np.maximum((keys >> 7) & 0xFF, 1) - 150
    return exponents


def exact_sum(keys: Int64, counts: Int64, offsets: Int64) -> float:
    """Return the sum of all samples, rounded once: the additions are done in integers of any length."""
    signs = np.where(keys < SIGN, 1, -1)
    exponents = exponent(keys)
    total = 0
    for e in np.unique(exponents):
        here = exponents == e
        whole = int(np.sum((signs * significand(keys) * counts)[here]))
        part = int(np.sum((signs * offsets)[here]))
        total += (whole * OFFSETS + part) << (int(e) + 149)
    return total / (1 << 149)  # the division of Python's integers rounds correctly
