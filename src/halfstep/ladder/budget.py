"""How much work a climb may cost."""

from __future__ import annotations

import math
from dataclasses import dataclass

from halfstep.errors import ArgumentError
from halfstep.progress import Interrupted


class BudgetSpent(Interrupted):
    """Stops a rung where it is; the climb goes on with the best candidate so far."""


@dataclass(frozen=True)
class Budget:
    """A bound on evaluations, on time, or on both; what is reached first ends the search.

    The float baseline and the deployed file are always evaluated, and count.

    Attributes:
        evaluations: full evaluations of the metric, parts counted as parts; None for any number.
        minutes: since the start of the call; None for any time.

    >>> Budget(evaluations=3).spent(evaluations=3, seconds=1.0)
    '3 of 3 evaluations'
    """

    evaluations: int | None = None
    minutes: float | None = None

    def __post_init__(self) -> None:
        for name in ("evaluations", "minutes"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise ArgumentError(
                    f"budget: {name} is {value}, needed a number above 0, or None for no bound"
                )

    def spent(self, evaluations: float, seconds: float) -> str:
        """What is used up, in words; empty while there is something left."""
        if self.evaluations is not None and evaluations >= self.evaluations:
            return f"{evaluations:.3g} of {self.evaluations} evaluations"
        if self.minutes is not None and seconds >= self.minutes * 60:
            return f"{seconds / 60:.1f} of {self.minutes:g} minutes"
        return ""

    def __str__(self) -> str:
        bounds = [f"{value:g} {name}" for name, value in vars(self).items() if value is not None]
        return " or ".join(bounds) or "no bound"
