"""Counting a block of float32: on the processor's threads, or on an accelerator.

Counting a block of float32: its bits are shared out to threads, and what each counted is added up.

Every thread counts in a table of its own, and only the span of bins that the block touched is added to the histogram
afterwards. The threads are OpenMP's: a pool of Python's has to be woken, while torch's threads, which have just
computed the block, keep spinning for a while (measured after a convolution on two cores, ns per element: 0.6 so,
1.1 with a pool, 1.0 with a single thread).

The same count in plain torch operations, for tensors on an accelerator: only the number of NaN is waited for.

Also for the host where numba is told not to compile.
"""

from __future__ import annotations

import os
import threading
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from halfstep.statistics.bins import (
    BINS,
    ENDS,
    FIRST_SPECIAL,
    LOWEST,
    NAN,
    SIGN,
    SPECIALS,
    TAIL,
    Int64,
    Tails,
)
from halfstep.statistics.kernels import LANES, OFFERED, kernels

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


# Numba's fallback for a missing OpenMP aborts the process if two threads enter it at once.
_turn = threading.Lock()


# OpenMP's threads do not survive a fork, and numba aborts a child that asks for them.
_forked = threading.Event()

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


# Elements per step: bounds the temporary memory to some 150 MB, and keeps the packed words in range.
_PIECE = 1 << 22


_SPREAD = 512  # places that zeros take in turn; additions to one address are done one after the other


_MAGNITUDE = 0x7FFFFFFF


class Tally:
    """Counts that live on a device until somebody reads them.

    Additions of integers are exact in any order, so the atomic additions of a GPU give the same state as the
    CPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._sums = torch.zeros(2, BINS, dtype=torch.int64, device=device)  # counts, offsets
        self._specials = torch.zeros(5, dtype=torch.int64, device=device)
        self._ends = torch.full((ENDS, TAIL), LOWEST, dtype=torch.int32, device=device)

    def add(self, flat: Tensor) -> None:
        """Count a 1-D tensor of float32, float16 or bfloat16; nothing waits for the device."""
        for piece in torch.split(flat, _PIECE):
            self._add_bits(piece.float().view(torch.int32))

    def _add_bits(self, bits: Tensor) -> None:
        magnitude = bits & _MAGNITUDE
        bits = torch.where(magnitude == 0, 0, bits)  # -0.0 counts as zero
        special, first_special = magnitude >= (FIRST_SPECIAL << 16), FIRST_SPECIAL << 16
        tiny = (magnitude > 0) & (magnitude < 0x10000)
        negative = bits < 0
        self._specials += torch.stack(
            [
                (magnitude > first_special).sum(),
                (bits == first_special).sum(),
                ((magnitude == first_special) & negative).sum(),
                (tiny & ~negative).sum(),
                (tiny & negative).sum(),
            ]
        )
        # Places 0 .. BINS - 1 are the bins; then those of zeros, and one for what is not counted.
        places = ((bits >> 16) & 0xFFFF).to(torch.int64)
        turn = torch.arange(bits.numel(), device=self.device) % _SPREAD + BINS
        places = torch.where(magnitude == 0, turn, places)
        places = torch.where(special, BINS + _SPREAD, places)
        words = torch.zeros(BINS + _SPREAD + 1, dtype=torch.int64, device=self.device)
        words.scatter_add_(0, places, (bits & 0xFFFF).to(torch.int64) + (1 << 40))
        self._sums[0] += words[:BINS] >> 40
        self._sums[1] += words[:BINS] & ((1 << 40) - 1)
        self._sums[0, 0] += words[BINS:-1].sum() >> 40

        ordered = bits ^ ((bits >> 31) & _MAGNITUDE)
        offered = torch.where(special, LOWEST, torch.stack([ordered, ~ordered]))
        largest = offered.topk(min(TAIL, bits.numel())).values
        self._ends = torch.cat([self._ends, largest], dim=1).topk(TAIL).values

    @property
    def nans(self) -> Tensor:
        """How many NaN were counted here, on the device."""
        return self._specials[NAN]

    def empty_into(self, counts: Int64, offsets: Int64, specials: Int64, tails: Tails) -> None:
        """Wait for the device, and add what it counted to a histogram's arrays."""
        sums = self._sums.cpu().numpy()
        counts += sums[0]
        offsets += sums[1]
        specials += self._specials.cpu().numpy()
        tails.merge(Tails(self._ends.cpu().numpy()))
