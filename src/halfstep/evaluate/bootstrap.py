"""Interval for the mean of differences of any distribution, by resampling examples."""

from __future__ import annotations

from statistics import NormalDist

import torch

#: Resamples, and how many drawn indices are held in memory at a time.
RESAMPLES = 2000
CHUNK = 2**22


def bootstrap_interval(differences: torch.Tensor, confidence: float, seed: int = 0) -> tuple[float, float]:
    """The BCa bootstrap interval of the mean: percentiles of resampled means, corrected for bias and skewness.

    The same seed gives the same interval. Of width 0 where all differences are equal.

    Args:
        differences: (n,), one a pair: drawing pairs is what makes the bootstrap a paired one.
        confidence: 0.95 for a 95% interval.
        seed: of the resampling.

    Returns:
        Lower and upper end.

    >>> bootstrap_interval(torch.tensor([1.0, 1.0]), 0.95)
    (1.0, 1.0)

    Source: Efron, Journal of the American Statistical Association 82 (1987); for a mean the acceleration is a sixth
    of the skewness over sqrt(n).
    """
    count, mean = len(differences), differences.mean()
    centred = differences - mean
    squares = (centred**2).sum()
    if squares == 0:
        return float(mean), float(mean)
    generator = torch.Generator().manual_seed(seed)
    rows = max(1, CHUNK // count)
    means = torch.cat(
        [
            differences[
                torch.randint(count, (min(rows, RESAMPLES - start), count), generator=generator)
            ].mean(1)
            for start in range(0, RESAMPLES, rows)
        ]
    )
    acceleration = float((centred**3).sum() / (6 * squares**1.5))
    # Half of the ties: where differences take few values, many resampled means equal the mean itself.
    below = float((means < mean).sum() + (means == mean).sum() / 2) / RESAMPLES
    normal = NormalDist()
    bias = normal.inv_cdf(min(max(below, 1 / RESAMPLES), 1 - 1 / RESAMPLES))
    levels = []
    for level in ((1 - confidence) / 2, (1 + confidence) / 2):
        z = bias + normal.inv_cdf(level)
        levels.append(normal.cdf(bias + z / (1 - acceleration * z)))
    low, high = means.quantile(torch.tensor(levels, dtype=means.dtype)).tolist()
    return low, high
