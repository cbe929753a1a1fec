"""Counting a block of float32: its bits are shared out to threads, and each thread's count is added up.

Every thread counts in a table of its own, and only the span of bins that the block touched is added to the
histogram afterwards. Threads are ordinary Python threads around kernels that release the GIL: numba's own
parallel layers take longer to compile, and its default one aborts the process when two threads of a user meet
in it.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from halfstep.statistics.kernels import CANDIDATES, LANES, kernels
from halfstep.statistics.keys import BINS, SIGN, SPECIALS, Int64
from halfstep.statistics.tails import Tails

PIECE = 1 << 24  # elements between two emptyings: a word's count stays below 2^24, its sum below 2^40
PER_THREAD = 1 << 15  # fewer elements than this are not worth handing to another thread


def count(
    words: NDArray[np.int32], counts: Int64, offsets: Int64, specials: Int64, tails: Tails, threads: int
) -> None:
    """Add a block of float32, given as its bits, to a histogram's arrays.

    NaN and infinities go to ``specials`` and to no bin. An empty block changes nothing.

    Args:
        words: (n,) contiguous bits of the samples.
        counts: (65536,) samples per bin, added to.
        offsets: (65536,) sum of the offsets per bin, added to.
        specials: (5,) NaN, +inf, -inf, positive and negative subnormals that share zero's bin, added to.
        tails: the ends of the stream, replaced by those of the stream and the block.
        threads: at most this many threads take part.
    """
    for start in range(0, words.size, PIECE):
        piece = words[start : start + PIECE]
        parts = max(1, min(threads, piece.size // PER_THREAD))
        cuts = [piece.size * i // parts for i in range(parts + 1)]
        shares = [_Share(piece[a:b]) for a, b in pairwise(cuts)]
        waiting = [_pool().submit(share.count, tails) for share in shares[1:]]
        shares[0].count(tails)
        for future in waiting:
            future.result()
        for share in shares:
            share.empty_into(counts, offsets, specials, tails)


class _Workspace:
    """The private table and candidate lists of one share; all zero while it waits for the next."""

    def __init__(self) -> None:
        self.table = np.zeros(
            BINS * LANES, np.int64
        )  # the operating system commits only the pages that are touched
        self.upper = np.empty(CANDIDATES, np.int32)
        self.lower = np.empty(CANDIDATES, np.int32)


_free: list[_Workspace] = []  # pop and append are atomic


class _Share:
    """The part of a block that one thread counts."""

    def __init__(self, words: NDArray[np.int32]) -> None:
        self.words = words
        self.workspace = _free.pop() if _free else _Workspace()
        self.span = np.array([SIGN, -1])  # lowest and highest bin touched, both signs together
        self.specials = np.zeros(SPECIALS, np.int64)
        self.filled = np.zeros(2, np.int64)  # candidates in the lists of the workspace
        self.overflow: Tails | None = None  # the best of the lists that were full

    def count(self, before: Tails) -> None:
        """Count into the private table; only samples beyond the tails held ``before`` can be candidates."""
        own, start = self.workspace, 0
        limits = np.array([before.upper[-1], before.lower[-1]], np.int64)
        while True:
            start = kernels().tally(
                self.words,
                start,
                own.table,
                self.span,
                self.specials,
                limits,
                own.upper,
                own.lower,
                self.filled,
            )
            if start == self.words.size:
                return
            self.overflow = self.overflow or Tails.empty()  # a list of candidates is full
            self._offer(self.overflow)
            limits[0] = max(limits[0], self.overflow.upper[-1])
            limits[1] = min(limits[1], self.overflow.lower[-1])
            self.filled[:] = 0

    def empty_into(self, counts: Int64, offsets: Int64, specials: Int64, tails: Tails) -> None:
        """Add what was counted to the histogram, and leave the workspace zero for the next share."""
        kernels().empty(self.workspace.table, self.span[0], self.span[1], counts, offsets)
        specials += self.specials
        self._offer(tails)
        if self.overflow is not None:
            tails.include(self.overflow.upper, self.overflow.lower)
        _free.append(self.workspace)

    def _offer(self, tails: Tails) -> None:
        tails.include(self.workspace.upper[: self.filled[0]], self.workspace.lower[: self.filled[1]])


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="halfstep-count")


if hasattr(os, "register_at_fork"):  # a forked child has none of its parent's threads
    os.register_at_fork(after_in_child=_pool.cache_clear)
