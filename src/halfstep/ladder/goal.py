"""The accuracy target: how far from the float model's score is near enough."""

from __future__ import annotations

import math
from dataclasses import dataclass

from halfstep.errors import ArgumentError
from halfstep.evaluate import Score


@dataclass(frozen=True)
class Goal:
    """A largest drop against the float model.

    Attributes:
        max_drop: in the metric's unit, at least 0.
        float_score: the float model's.
        higher_is_better: which way a drop goes.
    """

    max_drop: float
    float_score: Score
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.max_drop) and self.max_drop >= 0):
            raise ArgumentError(
                f"max_drop: got {self.max_drop}, needed a number of at least 0 in the metric's unit "
                "(0.01 is one point of an accuracy from 0 to 1)"
            )

    def drop(self, score: Score) -> float:
        """How much worse ``score`` is than the float model's; negative where it is better."""
        difference = self.float_score.value - score.value
        return difference if self.higher_is_better else -difference

    def met(self, score: Score) -> bool:
        """Whether the drop is small enough; float rounding of the difference does not count against it."""
        return self.drop(score) <= self.max_drop + 1e-12
