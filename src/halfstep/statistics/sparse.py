"""A histogram without its empty bins, as processes send each other: arrays that add up without a dense one."""

from __future__ import annotations

from dataclasses import astuple, dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from halfstep.statistics.bins import BINS, Int64, Tails
from halfstep.statistics.histogram import Histogram


@dataclass(frozen=True, eq=False)
class Sparse:
    """What :meth:`.Histogram.state_dict` says, in numpy's arrays, which are pickled in a tenth of the time.

    Attributes:
        keys: (n,) of the bins that are not empty, ascending.
        counts: (n,) of their samples.
        offsets: (n,) the sums of their offsets.
        specials: counts of NaN, infinities and the smallest subnormals.
        upper: (1024,) the largest samples as ordered integers, descending.
        lower: (1024,) the smallest, ascending.
    """

    keys: Int64
    counts: Int64
    offsets: Int64
    specials: Int64
    upper: NDArray[np.int32]
    lower: NDArray[np.int32]

    @classmethod
    def of(cls, histogram: Histogram) -> Sparse:
        """What a histogram has seen; the ranges of single batches are left out."""
        state = histogram.state_dict()
        return cls(**{name: state[name].numpy() for name in cls.__dataclass_fields__})

    def merged(self, other: Sparse) -> Sparse:
        """That of both streams, as :meth:`.Histogram.merge` has it."""
        filled = np.zeros(BINS, np.bool_)
        filled[self.keys] = filled[other.keys] = True
        keys = np.flatnonzero(filled)
        counts, offsets = np.zeros(keys.size, np.int64), np.zeros(keys.size, np.int64)
        for each in (self, other):
            places = np.searchsorted(keys, each.keys)
            counts[places] += each.counts
            offsets[places] += each.offsets
        ends = Tails.of(self.upper, self.lower)
        ends.merge(Tails.of(other.upper, other.lower))
        return Sparse(keys, counts, offsets, self.specials + other.specials, ends.upper, ends.lower)

    def put(self, histogram: Histogram) -> None:
        """Let a histogram hold this instead of what it has seen."""
        names = self.__dataclass_fields__
        histogram.load_state_dict(
            {name: torch.from_numpy(array) for name, array in zip(names, astuple(self), strict=True)}
        )
