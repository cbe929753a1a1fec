"""What accuracy was asked for, before the float model's score is known."""

from __future__ import annotations

from dataclasses import dataclass

from halfstep.errors import ArgumentError
from halfstep.evaluate import Score
from halfstep.ladder.goal import Goal

#: Asked where nothing is said: one point of an accuracy from 0 to 1.
MAX_DROP = 0.01


@dataclass(frozen=True)
class Aim:
    """One of three targets, and on what evidence it counts as met.

    Attributes:
        max_drop: largest drop against float, in the metric's unit; 0.01 if all three are None.
        relative_drop: largest drop as a share of the float score.
        floor: the worst score allowed, whatever the float model's is.
        confidence: of the intervals.
        strict: the drop's interval must keep to the target, not only its point estimate.

    Raises:
        ArgumentError: if more than one target is given.

    >>> str(Aim(relative_drop=0.01))
    'relative_drop 0.01'
    """

    max_drop: float | None = None
    relative_drop: float | None = None
    floor: float | None = None
    confidence: float = 0.95
    strict: bool = False

    def __post_init__(self) -> None:
        given = self._given()
        if len(given) > 1:
            raise ArgumentError(
                f"target: got {' and '.join(given)}, needed one of max_drop, relative_drop, floor"
            )

    def goal(self, float_score: Score, higher_is_better: bool) -> Goal:
        """The target against a float model's score.

        Raises:
            ArgumentError: if the float model itself does not meet it, or a number is out of its domain.
        """
        rest = (float_score, higher_is_better, self.confidence, self.strict)
        if self.floor is not None:
            return Goal.floor(self.floor, *rest)
        if self.relative_drop is not None:
            return Goal.relative(self.relative_drop, *rest)
        return Goal(MAX_DROP if self.max_drop is None else self.max_drop, *rest)

    def __str__(self) -> str:
        given = self._given() or {"max_drop": MAX_DROP}
        words = [f"{name} {value:g}" for name, value in given.items()]
        return ", ".join([*words, f"strict at {self.confidence:g}"] if self.strict else words)

    def _given(self) -> dict[str, float]:
        asked = {"max_drop": self.max_drop, "relative_drop": self.relative_drop, "floor": self.floor}
        return {name: value for name, value in asked.items() if value is not None}
