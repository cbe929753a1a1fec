"""Counting a block of float32: its bits are shared out to threads, and what each counted is added up.

Every thread counts in a table of its own, and only the span of bins that the block touched is added to the histogram
afterwards. The threads are OpenMP's, which are those that torch has just computed the block with: a pool of our own
would fight them for the cores, since they keep spinning for a while (measured after a convolution on two cores, ns
per element: 0.6 so, 1.1 with a pool, 1.0 with a single thread).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

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
        shares = max(1, min(threads, piece.size // PER_THREAD))
        workspace = _Workspace.with_room_for(shares)
        workspace.count(piece, shares, tails)
        workspace.empty_into(shares, counts, offsets, specials)
        _free.append(workspace)


class _Workspace:
    """Private tables and candidate lists for a number of shares; all zero while it waits for the next block."""

    def __init__(self, shares: int) -> None:
        # Zeros come from the operating system, which commits only the pages that are touched.
        self.tables = np.zeros((shares, BINS * LANES), np.int64)
        self.spans = np.empty((shares, 2), np.int64)  # lowest and highest bin touched, both signs together
        self.specials = np.zeros((shares, SPECIALS), np.int64)
        self.upper = np.empty((shares, CANDIDATES), np.int32)
        self.lower = np.empty((shares, CANDIDATES), np.int32)
        self.filled = np.zeros((shares, 2), np.int64)

    @classmethod
    def with_room_for(cls, shares: int) -> _Workspace:
        """Return a free workspace, or a new one; two threads of a user never get the same."""
        free = _free.pop() if _free else None
        return free if free is not None and len(free.tables) >= shares else cls(shares)

    def count(self, words: NDArray[np.int32], shares: int, tails: Tails) -> None:
        """Count into the private tables, and offer the tails what may belong to them."""
        cuts = np.array([words.size * i // shares for i in range(shares + 1)])
        reached = cuts[:-1].copy()
        self.spans[:] = (SIGN, -1)
        while (reached < cuts[1:]).any():  # the kernel comes back early when a list of candidates is full
            self.filled[:] = 0
            limits = np.array(
                [tails.upper[-1], tails.lower[-1]], np.int64
            )  # only beyond these is a candidate
            state = (self.tables, self.spans, self.specials, limits, self.upper, self.lower, self.filled)
            _run(shares)(words, cuts, reached, *state)
            for share, (above, below) in enumerate(self.filled[:shares]):
                tails.include(self.upper[share, :above], self.lower[share, :below])

    def empty_into(self, shares: int, counts: Int64, offsets: Int64, specials: Int64) -> None:
        """Add what was counted to the histogram, and leave the workspace zero."""
        for table, (first, last) in zip(self.tables[:shares], self.spans[:shares], strict=True):
            kernels().empty(table, first, last, counts, offsets)
        specials += self.specials.sum(axis=0)
        self.specials[:] = 0


_free: list[_Workspace] = []  # pop and append are atomic
_turn = (
    threading.Lock()
)  # numba's fallback for a missing OpenMP aborts the process if two threads enter it at once
_forked = (
    threading.Event()
)  # OpenMP's threads do not survive a fork, and numba aborts a child that asks for them

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked.set)


def _run(shares: int) -> Callable[..., None]:
    """Return what counts all shares: one after the other, or at once."""
    if shares == 1 or _forked.is_set():
        return kernels().one_by_one
    return _at_once


def _at_once(words: NDArray[np.int32], cuts: Int64, *state: NDArray[Any]) -> None:
    from numba import get_num_threads, set_num_threads

    with _turn:
        before = get_num_threads()
        set_num_threads(min(cuts.size - 1, before))
        try:
            kernels().at_once(words, cuts, *state)
        finally:
            set_num_threads(before)
