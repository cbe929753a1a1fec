"""The largest and smallest samples of a stream, exactly: what makes extremes and high percentiles exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TAIL = 1024  # samples kept at either end
ENDS = 2  # the largest, and the smallest as complements

LOWEST = np.iinfo(np.int32).min  # pads a tail that has fewer samples


@dataclass
class Tails:
    """The ends of a stream as ordered integers (:func:`.keys.order`).

    The complement ``~n`` turns the order of integers around. So the smallest samples are held as complements, and both
    ends are kept by the same rule: the largest first.

    Attributes:
        ends: (2, 1024) int32, each row descending: the largest samples, and the complements of the smallest.
    """

    ends: NDArray[np.int32]

    @classmethod
    def empty(cls) -> Tails:
        """Return tails that hold no sample."""
        return cls(np.full((ENDS, TAIL), LOWEST, np.int32))

    @classmethod
    def of(cls, upper: NDArray[np.int32], lower: NDArray[np.int32]) -> Tails:
        """Return tails that hold these: the largest, descending, and the smallest, ascending."""
        return cls(np.stack([upper, ~lower]))

    @property
    def upper(self) -> NDArray[np.int32]:
        """(1024,) the largest, descending."""
        upper: NDArray[np.int32] = self.ends[0].copy()
        return upper

    @property
    def lower(self) -> NDArray[np.int32]:
        """(1024,) the smallest, ascending."""
        lower: NDArray[np.int32] = ~self.ends[1]
        return lower

    @property
    def least(self) -> NDArray[np.int32]:
        """(2,) only what is larger than this belongs to an end."""
        least: NDArray[np.int32] = self.ends[:, -1].copy()
        return least

    def include(self, end: int, offered: Sequence[NDArray[np.int32]]) -> None:
        """Keep the largest of what an end holds and is offered; order and grouping of offers do not matter."""
        if any(part.size for part in offered):
            self.ends[end] = np.sort(np.concatenate([self.ends[end], *offered]))[: -TAIL - 1 : -1]

    def merge(self, other: Tails) -> None:
        """Keep the ends of this stream and another one."""
        for end, part in enumerate(other.ends):
            self.include(end, [part])
