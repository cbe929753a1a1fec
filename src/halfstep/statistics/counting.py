"""The compiled count: one pass over a block of float32 that fills bins, finds extremes and gathers the tails.

Each element costs one addition to one 64-bit word: the upper 24 bits count, the lower 40 add up the offsets within
the bin (see :mod:`.keys`). Four words per bin take turns, so that a run of equal values (the zeros of a ReLU, the
sixes of a ReLU6, the steps of an image) does not wait for its own last addition. Every thread counts in a table of its
own, and only the span of bins that the block touched is added to the histogram afterwards.

Threads are ordinary Python threads around kernels that release the GIL: numba's own parallel layers take seconds to
compile, and one of them aborts the process when two threads of a user meet in it. The kernels are compiled at
the first call of a process (about a second) and not cached on disk, because numba refuses to cache, with an error at
definition, where neither the installation nor the home directory can be written.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from halfstep.statistics.keys import BINS, NEGATIVE_INF, POSITIVE_INF, SPECIALS, Int64

TAIL = 1024  # samples kept at either end
LANES = 4  # words per bin that take turns
PIECE = 1 << 24  # elements counted before the words are emptied: a lane's count stays below 2^24, its sum below 2^40
PER_THREAD = 1 << 15  # fewer elements than this are not worth handing to a second thread
_BLOCK = 512  # elements surveyed at once, in vector registers, before they are counted one by one
_CANDIDATES = 8 * TAIL

_LOWEST = np.iinfo(np.int32).min
_HIGHEST = np.iinfo(np.int32).max


@dataclass
class Tails:
    """The largest and the smallest samples, as ordered integers; absent ones are the identity of max and min."""

    upper: NDArray[np.int32]  # (TAIL,) descending
    lower: NDArray[np.int32]  # (TAIL,) ascending

    @classmethod
    def empty(cls) -> Tails:
        """Return tails that hold no sample."""
        return cls(np.full(TAIL, _LOWEST, np.int32), np.full(TAIL, _HIGHEST, np.int32))

    def include(self, upper: NDArray[np.int32], lower: NDArray[np.int32]) -> None:
        """Keep the extremes of what is held and what is offered; the order of offers does not matter."""
        if upper.size:
            every = np.concatenate([self.upper, upper])
            every.partition(every.size - TAIL)
            self.upper = np.sort(every[-TAIL:])[::-1].copy()
        if lower.size:
            every = np.concatenate([self.lower, lower])
            every.partition(TAIL)
            self.lower = np.sort(every[:TAIL])


class Workspace:
    """One thread's tables, reused by every histogram that this thread fills; empty between two calls."""

    def __init__(self) -> None:
        self.table = np.zeros(BINS * LANES, np.int64)  # the operating system commits only pages that are touched
        self.span = np.zeros(2, np.int64)
        self.upper = np.empty(_CANDIDATES, np.int32)
        self.lower = np.empty(_CANDIDATES, np.int32)
        self.filled = np.zeros(2, np.int64)


class _PerThread(threading.local):
    def __init__(self) -> None:
        self.workspace = Workspace()


_own = _PerThread()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="halfstep-count")


if hasattr(os, "register_at_fork"):  # a forked child has none of its parent's threads
    os.register_at_fork(after_in_child=_pool.cache_clear)


def count(words: NDArray[np.uint32], counts: Int64, offsets: Int64, specials: Int64, tails: Tails, threads: int) -> None:
    """Add a block of float32, given as its bits, to a histogram's arrays.

    NaN and infinities go to ``specials`` and to no bin. An empty block changes nothing.

    Args:
        words: (n,) contiguous bits of the samples.
        counts: (65536,) samples per bin, added to.
        offsets: (65536,) sum of the offsets per bin, added to.
        specials: (5,) NaN, +inf, -inf, positive and negative subnormals that share zero's bin, added to.
        tails: the extremes, replaced by those of both.
        threads: at most this many threads take part.
    """
    for start in range(0, words.size, PIECE):
        piece = words[start : start + PIECE]
        parts = max(1, min(threads, piece.size // PER_THREAD))
        cuts = [piece.size * i // parts for i in range(parts + 1)]
        shares = [piece[a:b] for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
        others = [_pool().submit(_count_share, share, tails) for share in shares[1:]]
        own = _count_share(shares[0], tails)
        for workspace, found, ends in [own, *(other.result() for other in others)]:
            _kernels().empty(workspace.table, workspace.span, counts, offsets)
            specials += found
            tails.include(ends.upper, ends.lower)


def _count_share(words: NDArray[np.uint32], tails: Tails) -> tuple[Workspace, Int64, Tails]:
    """Count one thread's share into that thread's own workspace."""
    tally = _kernels().tally
    own = _own.workspace
    own.span[:] = (BINS, -1)
    found = np.zeros(SPECIALS, np.int64)
    ends = Tails(tails.upper, tails.lower)
    none = np.empty(0, np.int32)
    start, changed = 0, False
    while start < words.size:  # the kernel comes back early when its list of candidates is full
        limits = np.array([ends.upper[-1], ends.lower[-1]], np.int64)
        own.filled[:] = 0
        start = tally(words, start, own.table, own.span, found, limits, own.upper, own.lower, own.filled)
        if own.filled.any():
            ends.include(own.upper[: own.filled[0]], own.lower[: own.filled[1]])
            changed = True
    return own, found, ends if changed else Tails(none, none)


@dataclass(frozen=True)
class _Kernels:
    tally: Callable[..., int]
    empty: Callable[..., None]


@cache
def _kernels() -> _Kernels:
    raise RuntimeError
