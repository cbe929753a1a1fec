"""Counting a block of float32: its bits are shared out to threads, and what each counted is added up.

Every thread counts in a table of its own, and only the span of bins that the block touched is added to the histogram
afterwards. The threads are OpenMP's: a pool of Python's has to be woken, while torch's threads, which have just
computed the block, keep spinning for a while (measured after a convolution on two cores, ns per element: 0.6 so,
1.1 with a pool, 1.0 with a single thread).
"""

from __future__ import annotations

import os
import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfstep.statistics.kernels import LANES, OFFERED, kernels
from halfstep.statistics.keys import BINS, NAN, SIGN, SPECIALS, Int64
from halfstep.statistics.tails import ENDS, Tails

PIECE = 1 << 23  # elements between two emptyings: a word's count stays below 2^23, its sum below 2^40
PER_THREAD = 1 << 15  # fewer elements than this are not worth handing to another thread


def interpreted() -> bool:
    """Whether numba is told not to compile (NUMBA_DISABLE_JIT): the loops would then take a thousand times as long."""
    import numba

    return bool(numba.config.DISABLE_JIT)  # type: ignore[attr-defined]


def count(
    words: NDArray[np.int32], counts: Int64, offsets: Int64, specials: Int64, tails: Tails, threads: int
) -> int:
    """Add a block of float32, given as its bits, to a histogram's arrays, and return how many NaN it has.

    NaN and infinities go to ``specials`` and to no bin. An empty block changes nothing. Several threads may add to the
    same arrays at once.

    Args:
        words: (n,) contiguous bits of the samples.
        counts: (65536,) samples per bin, added to.
        offsets: (65536,) sum of the offsets per bin, added to.
        specials: (5,) NaN, +inf, -inf, positive and negative subnormals that share zero's bin, added to.
        tails: the ends of the stream, those of the block included.
        threads: at most this many threads take part.
    """
    nans = 0
    for start in range(0, words.size, PIECE):
        piece = words[start : start + PIECE]
        shares = max(1, min(threads, piece.size // PER_THREAD))
        workspace = _workspace(shares)
        done, least = False, tails.least(piece)
        while not done:  # the kernel comes back early when no more can be offered
            # What the tails hold grows meanwhile, if others hand over: then more is offered than they take.
            _run(
                piece,
                shares,
                tails.ends if least is None else np.maximum(least, tails.ends[:, :1]),
                *workspace,
            )
            with HANDING_OVER:
                before = specials[NAN]
                tails.take_in(*workspace[-2:])
                done = kernels().hand_over(piece.size, tails.ends, counts, offsets, specials, *workspace)
                nans += int(specials[NAN] - before)
        _free.append(workspace)
    return nans


def _workspace(shares: int) -> tuple[NDArray[Any], ...]:
    """Return a free workspace with room for as many shares, or a new one; two threads of a user never get the same."""
    free = _free.pop() if _free else None
    if free is not None and len(free[0]) >= shares:
        return free
    # All are zero again, and the spans empty, when a workspace waits for the next block.
    reached = np.zeros(shares, np.int64)  # how many elements of its share each has counted
    # Zeros come from the operating system, which commits only the pages that are touched.
    tables = np.zeros((shares, LANES, BINS), np.int64)
    # Lowest and highest bin touched, both signs together; the zeros, which touch none; whether any was negative.
    spans = np.tile(np.array([SIGN, -1, 0, 0]), (shares, 1))
    specials = np.zeros((shares, SPECIALS), np.int64)
    offered = np.empty((shares, ENDS, OFFERED), np.int32)  # to the tails
    filled = np.zeros((shares, ENDS), np.int64)  # how many these are
    return reached, tables, spans, specials, offered, filled


HANDING_OVER = threading.Lock()  # statistics are changed by one thread at a time; it takes microseconds
_free: list[tuple[NDArray[Any], ...]] = []  # pop and append are atomic
_turn = (
    threading.Lock()
)  # numba's fallback for a missing OpenMP aborts the process if two threads enter it at once
_forked = (
    threading.Event()
)  # OpenMP's threads do not survive a fork, and numba aborts a child that asks for them

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked.set)


def _run(words: NDArray[np.int32], shares: int, *arrays: NDArray[Any]) -> None:
    """Count all shares: one after the other, or at once."""
    if shares == 1 or _forked.is_set():
        kernels().one_by_one(words, shares, *arrays)
        return
    import numba

    with _turn:
        if shares >= numba.config.NUMBA_NUM_THREADS:  # type: ignore[attr-defined]
            kernels().at_once(words, shares, *arrays)
            return
        before = numba.get_num_threads()
        numba.set_num_threads(min(shares, before))
        try:
            kernels().at_once(words, shares, *arrays)
        finally:
            numba.set_num_threads(before)
