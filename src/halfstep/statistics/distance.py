"""How far apart two streams of values are: do the evaluation data look like the calibration data?"""

from __future__ import annotations

import numpy as np

from halfstep.errors import NotObservedError
from halfstep.statistics.histogram import Histogram


def distance(a: Histogram, b: Histogram) -> float:
    """Return the largest difference between the shares of values below a threshold, over all thresholds.

    0 means the same distribution, 1 that the two do not overlap. It does not depend on the unit, nor on how many
    values either saw. Exact at the edges of the histograms' bins. NaN and infinities are left out.

    Args:
        a: the one.
        b: the other; the result is the same either way round.

    Raises:
        NotObservedError: either is empty.

    >>> a, b = Histogram(), Histogram()
    >>> a.update(torch.tensor([0.0, 1.0, 2.0, 3.0]))
    >>> b.update(torch.tensor([0.0, 1.0, 2.0, 30.0, 40.0]))
    >>> round(distance(a, b), 3)  # below 4: all of a, 3 of 5 of b
    0.4

    Source: the two-sample statistic of Kolmogorov and Smirnov.
    """
    for histogram in (a, b):
        if not histogram.count:
            raise NotObservedError(
                "distance: got a histogram that saw no finite value, needed two that saw some"
            )
    (keys_a, counts_a), (keys_b, counts_b) = a.keyed_counts(), b.keyed_counts()
    keys = np.union1d(keys_a, keys_b)
    shares = []
    for own, counts in ((keys_a, counts_a), (keys_b, counts_b)):
        share = np.zeros(keys.size)
        share[np.searchsorted(keys, own)] = counts / counts.sum()
        shares.append(np.cumsum(share))
    return float(np.abs(shares[0] - shares[1]).max())
