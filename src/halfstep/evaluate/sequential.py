"""A test that may look after every example: is the mean of bounded differences above a threshold, or not?"""

from __future__ import annotations

import math
from typing import Literal

import torch

#: What is staked on each side, as shares of the most that cannot go bankrupt: the capital is spread over all.
STAKES = (0.02, 0.04, 0.08, 0.15, 0.3, 0.5, 0.75, 0.95)

Side = Literal["above", "below"]


class SequentialTest:
    """Two gamblers, one of whom must lose: the first bets that the mean is above the threshold, the second below.

    The odds are fair if the mean *is* the threshold. A gambler who starts with 1 and bets against the truth reaches
    1 / level with a probability of at most ``level``, however often one looks (Ville's inequality), so his
    reaching it is evidence at that level. Each spreads his capital over stakes from small (for a mean near the
    threshold) to large (for one far off).

    With a known ``total`` the examples are drawn without replacement and the mean is that of all of them: what a
    full evaluation would say. The fair odds then follow from what is left, and the test ends with certainty at the
    latest when the rest cannot change the answer.

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
        # Logarithms of the capital at each stake, (stakes,).
        self._above = torch.zeros(len(STAKES), dtype=torch.float64)
        self._below = torch.zeros(len(STAKES), dtype=torch.float64)

    def update(self, differences: torch.Tensor) -> Side | None:
        """Take further differences, (n,), in random order; the answer, or None while there is none.

        An answer once given stands.
        """
        x = differences.double()
        if self.answer is None and len(x):
            mean, possible = self._fair_means(x)
            above = self._bet(self._above, (x - mean) / (mean - self.low), possible)
            below = self._bet(self._below, (mean - x) / (self.high - mean), possible)
            self.seen += len(x)
            self.sum += float(x.sum())
            self.answer = self._certain() or self._first(above, below)
            self._above, self._below = above[-1], below[-1]
        return self.answer

    def _fair_means(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is left before each example must average this for the threshold to be the mean, (n,); and if it can."""
        if self.total is None:
            mean = torch.full_like(x, self.threshold)
        else:
            drawn = self.seen + torch.arange(len(x), dtype=torch.float64)
            sums = self.sum + torch.cumsum(x, 0) - x
            mean = (self.total * self.threshold - sums) / (self.total - drawn)
        margin = 1e-9 * (self.high - self.low)
        # Where the rest cannot have that mean there is nothing to bet on: certainty is around the corner.
        possible = (mean > self.low + margin) & (mean < self.high - margin)
        return torch.where(possible, mean, (self.low + self.high) / 2), possible

    @staticmethod
    def _bet(capital: torch.Tensor, gain: torch.Tensor, possible: torch.Tensor) -> torch.Tensor:
        """Logarithms of the capital after each example, (n, stakes)."""
        stakes = torch.tensor(STAKES, dtype=torch.float64)
        growth = torch.log1p(stakes * gain[:, None]) * possible[:, None]
        return capital + torch.cumsum(growth, 0)

    def _first(self, above: torch.Tensor, below: torch.Tensor) -> Side | None:
        """Whose mean capital reaches 1 / level first."""
        needed = math.log(len(STAKES) / self.level)
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
