"""A test that may look after every example: is the mean of bounded differences above a threshold, or not?"""

from __future__ import annotations

import math
from typing import Literal

import torch

#: What is staked on each side, as shares of the most that cannot go bankrupt, and the shares of the capital that are
#: staked so: most of it for the middle, where the hard cases are, which the clear ones at both ends can spare.
STAKES = {0.02: 0.3, 0.04: 0.5, 0.08: 1.0, 0.15: 2.0, 0.3: 2.0, 0.5: 1.0, 0.75: 0.5, 0.95: 0.3}
MOST = max(STAKES)

Side = Literal["above", "below"]


class SequentialTest:
    """Two gamblers, one of whom must lose: the first bets that the mean is above the threshold, the second below.

    The odds are fair if the mean *is* the threshold. A gambler who starts with 1 and bets against the truth reaches
    1 / level with a probability of at most ``level``, however often one looks (Ville's inequality), so his
    reaching it is evidence at that level. Each spreads his capital over stakes from small (for a mean near the
    threshold) to large (for one far off).

    With a known ``total`` the examples are drawn without replacement and the mean is that of all of them: what a
    full evaluation would say. The fair odds then follow from what is left, and the test ends with certainty at the
    latest when the rest cannot change the answer. The stakes grow as total / left, since the fair odds move away from
    the truth so: what the threshold would still need, the fewer examples must bring. That is how the likelihood ratio
    of two means of the whole grows.

    Valid only for examples in random order.

    Args:
        threshold: a mean equal to it counts as below.
        low: the smallest possible difference.
        high: the largest possible one.
        level: the largest probability of a wrong answer on either side, such as 0.05.
        total: how many examples there are; None for a mean over the population that they are a sample of.

    >>> test = SequentialTest(threshold=0.01, low=-1.0, high=1.0, level=0.05)
    >>> test.update(torch.ones(20))  # 20 differences of 1
    'above'

    Source: Waudby-Smith and Ramdas, Journal of the Royal Statistical Society B 86 (2024), the capital process of a
    bounded mean, with and without replacement; here bet against the one value that matters.
    """

    def __init__(
        self, threshold: float, low: float, high: float, level: float, total: int | None = None
    ) -> None:
        self.threshold, self.low, self.high, self.level, self.total = threshold, low, high, level, total
        self.seen, self.sum = 0, 0.0
        self.answer: Side | None = None
        shares = torch.tensor(list(STAKES.values()), dtype=torch.float64)
        # Logarithms of the capital at each stake, (stakes,).
        self._above = self._below = (shares / shares.sum()).log()

    def update(self, differences: torch.Tensor) -> Side | None:
        """Take further differences, (n,), in random order; the answer, or None while there is none.

        An answer once given stands.
        """
        x = differences.double()
        if self.answer is None and len(x):
            drawn = self.seen + torch.arange(len(x), dtype=torch.float64)
            mean, possible = self._fair_means(x, drawn)
            stakes = self._stakes(drawn)
            above = self._bet(self._above, stakes * ((x - mean) / (mean - self.low))[:, None], possible)
            below = self._bet(self._below, stakes * ((mean - x) / (self.high - mean))[:, None], possible)
            self.seen += len(x)
            self.sum += float(x.sum())
            self.answer = self._certain() or self._first(above, below)
            self._above, self._below = above[-1], below[-1]
        return self.answer

    def _stakes(self, drawn: torch.Tensor) -> torch.Tensor:
        """The stakes after so many examples, (n, stakes)."""
        grown = torch.ones_like(drawn) if self.total is None else self.total / (self.total - drawn)
        return (grown[:, None] * torch.tensor(list(STAKES), dtype=torch.float64)).clamp(max=MOST)

    def _fair_means(self, x: torch.Tensor, drawn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is left before each example must average this for the threshold to be the mean, (n,); and if it can."""
        if self.total is None:
            mean = torch.full_like(x, self.threshold)
        else:
            sums = self.sum + torch.cumsum(x, 0) - x
            mean = (self.total * self.threshold - sums) / (self.total - drawn)
        margin = 1e-9 * (self.high - self.low)
        # Where the rest cannot have that mean there is nothing to bet on: certainty is around the corner.
        possible = (mean > self.low + margin) & (mean < self.high - margin)
        return torch.where(possible, mean, (self.low + self.high) / 2), possible

    @staticmethod
    def _bet(capital: torch.Tensor, gain: torch.Tensor, possible: torch.Tensor) -> torch.Tensor:
        """Logarithms of the capital after each example, (n, stakes)."""
        growth = torch.log1p(gain) * possible[:, None]
        return capital + torch.cumsum(growth, 0)

    def _first(self, above: torch.Tensor, below: torch.Tensor) -> Side | None:
        """Whose capital, of all stakes together, reaches 1 / level first."""
        needed = -math.log(self.level)
        sides: tuple[tuple[torch.Tensor, Side], ...] = ((above, "above"), (below, "below"))
        reached = [(capital.logsumexp(1) >= needed, side) for capital, side in sides]
        firsts = [(int(rich.nonzero()[0]), side) for rich, side in reached if rich.any()]
        return min(firsts)[1] if firsts else None

    def _certain(self) -> Side | None:
        """The answer where what is left cannot change it."""
        if self.total is None:
            return None
        left, tolerance = self.total - self.seen, 1e-12 * self.total
        if self.sum + left * self.low > self.total * self.threshold + tolerance:
            return "above"
        if self.sum + left * self.high <= self.total * self.threshold + tolerance:
            return "below"
        return None
