"""Where a sample goes: into a bin of the histogram, and into the exact tails.

The arithmetic of the bins: how a float32 becomes a bin, and what the bin's integers say about its samples.

A bin is named by the upper 16 bits of a float32: sign, exponent and 7 bits of mantissa. So every power of two is
cut into 128 bins of equal width, from the smallest number to the largest, and no range has to be known before.
All samples of a bin share these 16 bits. The lower 16 are an integer offset within the bin; their sum is exact in
an int64, so a count and one integer per bin give the exact sum, hence the exact mean, of the bin's samples.

The largest and smallest samples of a stream, exactly: what makes extremes and high percentiles exact.
"""

from __future__ import annotations

from dataclasses import dataclass

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


TAIL = 1024  # samples kept at either end


MANY = 128  # samples that are worth sorting


GROUPS = 4 * TAIL  # of samples, whose extremes bound the ends


ENDS = 2  # the largest, and the smallest as complements

LOWEST = np.iinfo(np.int32).min  # pads a tail that has fewer samples


@dataclass
class Tails:
    """The ends of a stream as ordered integers (:func:`.keys.order`).

    The complement ``~n`` turns the order of integers around. So the smallest samples are held as complements, and both
    ends are kept by the same rule: the largest first.

    Attributes:
        ends: (2, 1024) int32, the largest samples, and the complements of the smallest. Each row is a heap with its
            least first: what comes in takes the place of that. A row that ascends is one.
    """

    ends: NDArray[np.int32]

    @classmethod
    def empty(cls) -> Tails:
        """Return tails that hold no sample."""
        return cls(np.full((ENDS, TAIL), LOWEST, np.int32))

    @classmethod
    def of(cls, upper: NDArray[np.int32], lower: NDArray[np.int32]) -> Tails:
        """Return tails that hold these, 1024 each, in any order."""
        return cls(np.sort(np.stack([upper, ~lower])))

    @property
    def upper(self) -> NDArray[np.int32]:
        """(1024,) the largest, descending."""
        upper: NDArray[np.int32] = np.sort(self.ends[0])[::-1].copy()
        return upper

    @property
    def lower(self) -> NDArray[np.int32]:
        """(1024,) the smallest, ascending."""
        lower: NDArray[np.int32] = ~np.sort(self.ends[1])[::-1]
        return lower

    def least(self, words: NDArray[np.int32]) -> NDArray[np.int32] | None:
        """What a sample of a block must exceed to stay in either end, (2, 1), where they are not full yet; or None.

        The ends of the first block would else take in one sample after the other, each larger than the one before it.
        The extremes of groups bound them: each of the 1024 groups with the largest has a sample as large as the least
        of these.

        Args:
            words: (n,) contiguous bits of float32. There is no bound for few of them, or with NaN or infinities.
        """
        if words.size < 2 * GROUPS or self.ends[:, 0].min() > LOWEST:
            return None
        groups = words[: words.size // GROUPS * GROUPS].view(np.float32).reshape(-1, GROUPS)
        bounds = np.stack([groups.max(0), -groups.min(0)])
        if not np.isfinite(bounds).all():
            return None
        bounds = np.partition(bounds, GROUPS - TAIL)[:, GROUPS - TAIL :].min(1, keepdims=True)
        bounds[1] = -bounds[1]
        ends = order((bounds + np.float32(0)).view(np.int32))  # no negative zero
        ends[1] = ~ends[1]
        return ends - 1

    def take_in(self, offered: NDArray[np.int32], filled: NDArray[np.int64]) -> None:
        """Take in all that is offered to an end where that is much, which sorting does faster than the heaps.

        Args:
            offered: (shares, 2, n) to each end, as its row holds them.
            filled: (shares, 2) how many these are; 0 afterwards where they were taken in.
        """
        for end in np.flatnonzero(filled.sum(0) > MANY):
            some = (row[end, :count] for row, count in zip(offered, filled[:, end], strict=True))
            self.ends[end] = np.sort(np.concatenate([self.ends[end], *some]))[-TAIL:]
            filled[:, end] = 0

    def merge(self, other: Tails) -> None:
        """Keep the ends of this stream and another one."""
        self.ends[:] = np.sort(np.concatenate([self.ends, other.ends], axis=1))[:, -TAIL:]
