"""The largest and smallest samples of a stream, exactly: what makes extremes and high percentiles exact."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from halfstep.statistics.keys import order

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
