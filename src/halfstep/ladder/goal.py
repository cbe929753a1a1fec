"""The accuracy target: how far from the float model's score is near enough, and on what evidence."""

from __future__ import annotations

import math
from dataclasses import dataclass

from halfstep.errors import ArgumentError, MetricError
from halfstep.evaluate import Drop, Score, paired_drop


@dataclass(frozen=True)
class Goal:
    """A largest drop against the float model.

    Attributes:
        max_drop: in the metric's unit, at least 0.
        float_score: the float model's.
        higher_is_better: which way a drop goes.
        confidence: of every interval, and of every verdict that is given before all examples are seen.
        strict: whether the drop's interval must keep within ``max_drop`` (True), or its point estimate (False).

    Raises:
        ArgumentError: if ``max_drop`` is negative or no number, or the confidence not between 0.5 and 1.
        MetricError: if a strict goal is asked of a metric without scores of single examples.
    """

    max_drop: float
    float_score: Score
    higher_is_better: bool = True
    confidence: float = 0.95
    strict: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.max_drop) and self.max_drop >= 0):
            raise ArgumentError(
                f"max_drop: got {self.max_drop}, needed a number of at least 0 in the metric's unit "
                "(0.01 is one point of an accuracy from 0 to 1)"
            )
        if not 0.5 <= self.confidence < 1:
            raise ArgumentError(
                f"confidence: got {self.confidence}, needed a number from 0.5 to below 1, such as 0.95"
            )
        if self.strict and self.float_score.per_example is None:
            raise MetricError(
                "a strict goal needs the scores of single examples in the same order each time: use "
                "hs.Metric(labelled, score) or hs.Accuracy(labelled), or let the point estimate decide (strict=False)"
            )

    @classmethod
    def relative(
        cls,
        share: float,
        float_score: Score,
        higher_is_better: bool = True,
        confidence: float = 0.95,
        strict: bool = False,
    ) -> Goal:
        """A largest drop as a share of the float model's score: 0.01 of a score of 0.9 is a drop of 0.009.

        Raises:
            ArgumentError: if the share is negative, or the float model scores 0.
        """
        if not (math.isfinite(share) and share >= 0):
            raise ArgumentError(
                f"relative drop: got {share}, needed a number of at least 0 (0.01 is one percent)"
            )
        if float_score.value == 0:
            raise ArgumentError(
                "relative drop: the float model scores 0, and any share of that is 0; give max_drop"
            )
        return cls(share * abs(float_score.value), float_score, higher_is_better, confidence, strict)

    @classmethod
    def floor(
        cls,
        worst: float,
        float_score: Score,
        higher_is_better: bool = True,
        confidence: float = 0.95,
        strict: bool = False,
    ) -> Goal:
        """A score that must be reached (stayed below, where lower is better), whatever the float model's is.

        In a strict goal the float model's score on these examples is taken as it is: the interval is that of the
        drop from there.

        Raises:
            ArgumentError: if the float model itself does not reach it.
        """
        margin = float_score.value - worst if higher_is_better else worst - float_score.value
        if not margin >= 0:
            needed = "at least" if higher_is_better else "at most"
            raise ArgumentError(
                f"target: the float model itself scores {float_score.value:g}, needed {needed} {worst:g}: no quantized "
                "model is expected to do better; lower the target, or train the float model further. If the metric "
                f"is better the {'lower' if higher_is_better else 'higher'} it is, say "
                f"higher_is_better={not higher_is_better}"
            )
        return cls(margin, float_score, higher_is_better, confidence, strict)

    def drop(self, score: Score) -> float:
        """How much worse ``score`` is than the float model's; negative where it is better."""
        difference = self.float_score.value - score.value
        return difference if self.higher_is_better else -difference

    def compare(self, score: Score) -> Drop:
        """The drop with its confidence interval, from the scores of the same examples."""
        return paired_drop(self.float_score, score, self.higher_is_better, self.confidence)

    def met(self, score: Score) -> bool:
        """Whether the drop is small enough; float rounding of the difference does not count against it."""
        if not self.strict:
            return self.drop(score) <= self.max_drop + 1e-12
        high = self.compare(score).high
        return high is not None and high <= self.max_drop + 1e-12

    def evidence(self, score: Score) -> str:
        """What the interval says beside the point estimate, in a sentence."""
        drop = self.compare(score)
        if drop.low is None or drop.high is None:
            return "The metric gives no scores of single examples, so how sure the drop is cannot be said."
        interval = f"{drop.confidence:.0%} interval of the drop, {drop.low:+.4f} to {drop.high:+.4f},"
        if drop.high <= self.max_drop:
            return f"The {interval} lies within the allowed {self.max_drop:g}."
        if drop.low > self.max_drop:
            return f"The {interval} lies wholly above the allowed {self.max_drop:g}."
        return (
            f"The {interval} includes the allowed {self.max_drop:g}: other examples could decide otherwise "
            f"({drop.count:,} were used)."
        )
