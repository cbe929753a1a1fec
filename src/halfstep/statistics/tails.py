"""The largest and smallest samples of a stream, exactly: what makes extremes and high percentiles exact."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TAIL = 1024  # samples kept at either end

_LOWEST = np.iinfo(np.int32).min
_HIGHEST = np.iinfo(np.int32).max


@dataclass
class Tails:
    """The ends of a stream as ordered integers (:func:`.keys.order`), padded where there are fewer
    samples."""

    upper: NDArray[np.int32]  # (TAIL,) descending
    lower: NDArray[np.int32]  # (TAIL,) ascending

    @classmethod
    def empty(cls) -> Tails:
        """Return tails that hold no sample."""
        return cls(np.full(TAIL, _LOWEST, np.int32), np.full(TAIL, _HIGHEST, np.int32))

    def include(self, upper: Sequence[NDArray[np.int32]], lower: Sequence[NDArray[np.int32]]) -> None:
        """Keep the ends of what is held and what is offered; order and grouping of offers do not matter."""
        if any(part.size for part in upper):
            self.upper = np.sort(np.concatenate([self.upper, *upper]))[: -TAIL - 1 : -1].copy()
        if any(part.size for part in lower):
            self.lower = np.sort(np.concatenate([self.lower, *lower]))[:TAIL].copy()
