"""The compiled loops over elements.

Each element costs one addition to one 64-bit word: the upper 24 bits count, the lower 40 add up the offsets
within the bin (see :mod:`.keys`). Four words per bin take turns, so that a run of equal values (the zeros of
a ReLU, the sixes of a ReLU6, the steps of an image) does not wait for its own last addition.

The kernels are compiled at the first call of a process and not cached on disk, because numba refuses to
cache, with an error at definition, where neither the installation nor the home directory can be written.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from halfstep.statistics.keys import (
    FIRST_SPECIAL,
    NAN,
    NEGATIVE_INF,
    POSITIVE_INF,
    SIGN,
    TINY_NEGATIVE,
    TINY_POSITIVE,
)

LANES = 4  # words per bin that take turns
_BLOCK = (
    8192  # elements surveyed in vector registers, then counted one by one while the first cache holds them
)
_STRETCH = 512  # where a block reaches beyond the tails, only its stretches that do are searched
CANDIDATES = 2 * _BLOCK  # room for samples that may belong to the tails


@dataclass(frozen=True)
class Kernels:
    """Count shares into private tables, in turn or in parallel, and empty such a table into a histogram."""

    one_by_one: Callable[..., None]
    at_once: Callable[..., None]
    empty: Callable[..., None]


@cache
def kernels() -> Kernels:
    """Compile; numba is imported here and not with the package."""
    from numba import njit, prange

    one = 1 << 40
    sums = one - 1
    magnitudes = 0x7FFFFFFF
    first_special = FIRST_SPECIAL << 16

    @njit(nogil=True)
    def survey(block: Any) -> Any:
        """Return the largest and smallest sample, as ordered integers, and the least magnitude less 1."""
        high, low, small = np.int32(-0x80000000), np.int32(0x7FFFFFFF), np.int32(0x7FFFFFFF)
        for i in range(block.size):
            bits = block[i]
            ordered = np.int32(bits ^ ((bits >> 31) & magnitudes))
            if ordered > high:
                high = ordered
            if ordered < low:
                low = ordered
            less = np.int32(
                ((bits & magnitudes) - 1) & magnitudes
            )  # zero wraps to the largest: it is no magnitude
            if less < small:
                small = less
        return high, low, small

    @njit(nogil=True)
    def exceptional(block: Any, table: Any, specials: Any) -> Any:
        """Count a stretch that may hold NaN, infinities and subnormals; return its finite extremes."""
        high, low, small = np.int64(-0x80000000), np.int64(0x7FFFFFFF), np.int64(magnitudes)
        for i in range(block.size):
            bits = np.int64(block[i])
            magnitude = bits & magnitudes
            if magnitude > first_special:
                specials[NAN] += 1
                continue
            if magnitude == first_special:
                specials[POSITIVE_INF if bits > 0 else NEGATIVE_INF] += 1
                continue
            if 0 < magnitude < 0x10000:
                specials[TINY_POSITIVE if bits > 0 else TINY_NEGATIVE] += 1
            table[(((bits >> 16) & 0xFFFF) << 2) | (i & 3)] += one + (bits & 0xFFFF)
            ordered = bits ^ ((bits >> 31) & magnitudes)
            high, low = max(high, ordered), min(low, ordered)
            if magnitude > 0:
                small = min(small, magnitude - 1)
        return high, low, small

    @njit(nogil=True)
    def gather(block: Any, limits: Any, upper: Any, lower: Any, filled: Any) -> None:
        """Append the finite samples beyond the limits to the lists of candidates."""
        high, low, _ = survey(block)
        if high <= limits[0] and low >= limits[1]:
            return
        for i in range(block.size):
            bits = np.int64(block[i])
            ordered = bits ^ ((bits >> 31) & magnitudes)
            if (ordered > limits[0] or ordered < limits[1]) and (bits & magnitudes) < first_special:
                if ordered > limits[0]:
                    upper[filled[0]] = ordered
                    filled[0] += 1
                if ordered < limits[1]:
                    lower[filled[1]] = ordered
                    filled[1] += 1

    @njit(nogil=True)
    def tally(
        words: Any,
        table: Any,
        span: Any,
        specials: Any,
        limits: Any,
        upper: Any,
        lower: Any,
        filled: Any,
    ) -> int:
        """Count until the end or a full list of candidates; return how many were counted."""
        size: int = words.size
        start = 0
        while start < size:
            if max(filled[0], filled[1]) + _BLOCK > CANDIDATES:
                return start
            # A view that starts at zero: numba then knows that its indices are not negative.
            block = words[start : start + _BLOCK]
            high, low, small = survey(block)
            top = max(np.int64(high), -np.int64(low) - 1)  # the largest magnitude's bits
            special = top >= first_special
            if special or small < 0xFFFF:
                finite = exceptional(block, table, specials)
                high, low, small = np.int32(finite[0]), np.int32(finite[1]), np.int32(finite[2])
                top = max(np.int64(high), -np.int64(low) - 1)
            else:
                for i in range(0, block.size - 3, 4):  # written out: four lanes, no carried dependency
                    a, b = np.int64(block[i]), np.int64(block[i + 1])
                    c, d = np.int64(block[i + 2]), np.int64(block[i + 3])
                    table[((a >> 14) & 0x3FFFC)] += one + (a & 0xFFFF)
                    table[((b >> 14) & 0x3FFFC) | 1] += one + (b & 0xFFFF)
                    table[((c >> 14) & 0x3FFFC) | 2] += one + (c & 0xFFFF)
                    table[((d >> 14) & 0x3FFFC) | 3] += one + (d & 0xFFFF)
                for i in range(block.size // 4 * 4, block.size):
                    a = np.int64(block[i])
                    table[((a >> 14) & 0x3FFFC)] += one + (a & 0xFFFF)
            if top >= 0:
                span[0] = min(span[0], (np.int64(small) + 1) >> 16)
                span[1] = max(span[1], top >> 16)
            if high > limits[0] or low < limits[1]:
                for first in range(0, block.size, _STRETCH):
                    gather(block[first : first + _STRETCH], limits, upper, lower, filled)
            start += block.size
        return size

    @njit(nogil=True)
    def fold(table: Any, counts: Any, offsets: Any) -> None:
        for i in range(counts.size):
            a, b, c, d = table[4 * i], table[4 * i + 1], table[4 * i + 2], table[4 * i + 3]
            if a | b | c | d:
                counts[i] += (a >> 40) + (b >> 40) + (c >> 40) + (d >> 40)
                offsets[i] += (a & sums) + (b & sums) + (c & sums) + (d & sums)
                table[4 * i], table[4 * i + 1], table[4 * i + 2], table[4 * i + 3] = 0, 0, 0, 0

    @njit(nogil=True)
    def empty(table: Any, first: int, last: int, counts: Any, offsets: Any) -> None:
        """Move bin 0 and bins ``first`` .. ``last`` of either sign from the table to the histogram."""
        for sign in (0, SIGN):
            for start, stop in ((sign, sign + 1), (sign + first, sign + last + 1)):
                if start < stop:
                    fold(table[4 * start : 4 * stop], counts[start:stop], offsets[start:stop])

    def share_out(
        words: Any,
        cuts: Any,
        reached: Any,
        tables: Any,
        spans: Any,
        specials: Any,
        limits: Any,
        upper: Any,
        lower: Any,
        filled: Any,
    ) -> None:
        """Count each share of the words, from where it was left to the next cut."""
        for i in prange(cuts.size - 1):
            share = words[reached[i] : cuts[i + 1]]
            reached[i] += tally(
                share, tables[i], spans[i], specials[i], limits, upper[i], lower[i], filled[i]
            )

    return Kernels(njit(nogil=True)(share_out), njit(nogil=True, parallel=True)(share_out), empty)
