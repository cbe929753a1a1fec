"""The accuracy target: how far from the float model's score is near enough, and on what evidence."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from halfstep.errors import ArgumentError, MetricError
from halfstep.evaluate import Drop, Score, paired_drop, percent

#: An allowed drop of 0 counts as this share of the float score where the use of allowances is compared.
SMALLEST = 1e-3


@dataclass(frozen=True)
class Standing:
    """One metric of a candidate beside its target.

    Attributes:
        metric: its name; empty where there is only one.
        float_score: the float model's.
        score: the candidate's.
        drop: from the one to the other, in the metric's unit.
        low: lower end of the drop's confidence interval, corrected for the candidates examined; None without one.
        high: its upper end.
        max_drop: what is allowed.
        met: whether the drop keeps to it, on the evidence that was asked for.
        examined: candidates that had been looked at on the same examples, this one included.
        unsure: why there is no interval, in words; empty where there is one.
    """

    metric: str
    float_score: float
    score: float
    drop: float
    low: float | None
    high: float | None
    max_drop: float
    met: bool
    examined: int = 1
    unsure: str = ""

    def __str__(self) -> str:
        """The figures in a line, without the name."""
        verdict = "met" if self.met else "not met"
        drop = f"{self.drop:+.4f} (allowed {self.max_drop:g})"
        return f"{self.float_score:.4f} to {self.score:.4f}, drop {drop}, {verdict}"


@dataclass(frozen=True)
class Goal:
    """A largest drop against the float model; of several metrics, one for each.

    What a strict goal guarantees: let the labelled examples be drawn at random from those that count. Then a search
    accepts a network whose drop over all that count exceeds ``max_drop`` with a probability of at most 1 -
    ``confidence``, however many candidates it looks at: the k-th is held to a share of that error, see
    :func:`halfstep.evaluate.share_of_error`. For candidates that would be tried whatever the others score that is a
    theorem, with a quarter of the error to spare. Those that are changes of the best one so far inherit its luck, which
    the quarter is for: in simulated climbs that begin each rung so, 2% to 5% were accepted wrongly at 0.95
    (``bench.confidence``). Of other scores than hits and misses the intervals are approximate. A goal that is not
    strict guarantees nothing of examples that were not seen: at the k-th candidate whose drop is a little above what is
    allowed, luck is sure to help one sooner or later.

    Attributes:
        max_drop: in the metric's unit; negative where a candidate must be better than float.
        float_score: the float model's.
        higher_is_better: which way a drop goes.
        confidence: of the intervals of all candidates that a search looks at, together, metric by metric; and of each
            single verdict given before all examples are seen, which all of them would overturn with a probability of
            at most the rest.
        strict: whether the upper end of the drop's interval must keep within ``max_drop`` (True), or the drop that was
            measured (False). Nothing is met where there is no interval.
        bounds: the smallest and the largest score that an example can have; None if unknown.
        name: of the metric; empty where there is only one.
        others: of several metrics, the goals of those after the first, by name.
        target: what was asked for, ``"max_drop"``, ``"relative_drop"`` or ``"floor"``.

    Raises:
        ArgumentError: if the confidence is not between 0.5 and 1.
        MetricError: if a strict goal is asked of a metric without scores of single examples.
    """

    max_drop: float
    float_score: Score
    higher_is_better: bool = True
    confidence: float = 0.95
    strict: bool = False
    bounds: tuple[float, float] | None = None
    name: str = ""
    others: Mapping[str, Goal] = field(default_factory=dict)
    target: str = "max_drop"

    def __post_init__(self) -> None:
        if not 0.5 <= self.confidence < 1:
            raise ArgumentError(
                f"confidence: got {self.confidence}, needed a number from 0.5 to below 1, such as 0.95"
            )
        if self.strict and not self.float_score.paired:
            raise MetricError(
                "a strict goal needs the scores of single examples in the same order each time: use "
                "hs.Metric(labelled, score), hs.Accuracy(labelled) or hs.SetMetric(labelled, update, compute), or let "
                "the point estimate decide (strict=False)"
            )

    def drop(self, score: Score) -> float:
        """How much worse ``score`` is than the float model's; negative where it is better. Of the leading metric."""
        difference = self.float_score.value - score.value
        return difference if self.higher_is_better else -difference

    def compare(self, score: Score) -> Drop:
        """The drop of the leading metric with its confidence interval, from the scores of the same examples.

        The interval is corrected for the candidates that had been looked at (``score.examined``).
        """
        return paired_drop(self.float_score, score, self.higher_is_better, self.confidence, self.bounds)

    def met(self, score: Score) -> bool:
        """Whether every drop is small enough; float rounding of the difference does not count against it."""
        return all(goal._met(part) for goal, part in self.each(score))

    def _met(self, score: Score) -> bool:
        limit = self.max_drop + 1e-12
        return self.drop(score) <= limit and self._reach(score) <= limit

    def _reach(self, score: Score) -> float:
        """What has to keep within ``max_drop``: the drop itself, or the upper end of its interval."""
        if not self.strict:
            return self.drop(score)
        high = self.compare(score).high
        return math.inf if high is None else high

    def narrowed(self, simulated: Score, file: Score) -> Goal:
        """This goal for simulations whose files lose as much more than they do as this candidate's file does.

        The candidate, whose file misses this goal, does not meet the new one. Where the file loses more than all that
        is allowed, simulations need only be as good as float, or better than the candidate's if that is.

        >>> goal = Goal(0.01, Score(0.90)).narrowed(simulated=Score(0.895), file=Score(0.888))
        >>> round(goal.max_drop, 6)
        0.003
        """
        others = {
            name: goal.narrowed(simulated.others[name], file.others[name])
            for name, goal in self.others.items()
        }
        max_drop = self.max_drop
        if not self._met(file):
            reached = self._reach(simulated)
            max_drop = max(max_drop - (self._reach(file) - reached), min(0.0, reached - 1e-9))
        return replace(self, max_drop=max_drop, others=others)

    def beyond(self, simulated: Score) -> Goal:
        """This goal for simulations after a candidate whose file is worth nothing: float's score, or more than its own.

        >>> Goal(0.01, Score(0.90)).beyond(Score(0.895)).max_drop
        0.0
        """
        others = {name: goal.beyond(simulated.others[name]) for name, goal in self.others.items()}
        return replace(self, max_drop=min(0.0, self._reach(simulated) - 1e-9), others=others)

    def each(self, score: Score) -> list[tuple[Goal, Score]]:
        """Every metric's goal and score, the leading one's first."""
        return [(self, score), *((goal, score.others[name]) for name, goal in self.others.items())]

    def loss(self, score: Score) -> float:
        """What ranks candidates, less is better: the drop; of several metrics, the most that one uses of its allowance.

        >>> goal = Goal(0.01, Score(0.9), others={"worst class": Goal(0.1, Score(0.7))})
        >>> round(goal.loss(Score(0.895, others={"worst class": Score(0.65)})), 3)  # half of either allowance
        0.5
        """
        if not self.others:
            return self.drop(score)
        return max(goal._used(part) for goal, part in self.each(score))

    def _used(self, score: Score) -> float:
        return self.drop(score) / max(self.max_drop, SMALLEST * abs(self.float_score.value), 1e-12)

    def standings(self, score: Score) -> tuple[Standing, ...]:
        """How every metric stands, the leading one first."""
        found = []
        for goal, part in self.each(score):
            drop = goal.compare(part)
            figures = (goal.float_score.value, part.value, drop.value, drop.low, drop.high)
            met = goal._met(part)
            found.append(Standing(goal.name, *figures, goal.max_drop, met, drop.examined, drop.reason))
        return tuple(found)

    def words(self, score: Score) -> str:
        """The score and its drop beside what is allowed; of several metrics, each by name.

        >>> Goal(0.01, Score(0.9)).words(Score(0.85))
        '0.8500, +0.0500 below float (allowed 0.01)'
        """
        return " and ".join(
            f"{goal.name} {part.value:.4f}, {goal.drop(part):+.4f} below float (allowed {goal.max_drop:g})".lstrip()
            for goal, part in self.each(score)
        )

    def evidence(self, score: Score) -> str:
        """What the interval says beside the point estimate, a sentence for each metric."""
        return " ".join(
            f"{goal.name}: {goal._evidence(part)}" if goal.name else goal._evidence(part)
            for goal, part in self.each(score)
        )

    def _evidence(self, score: Score) -> str:
        drop = self.compare(score)
        if drop.low is None or drop.high is None:
            unmet = ", and a strict goal is not met" if self.strict else ""
            return f"How sure the drop is cannot be said{unmet}: {drop.reason}."
        ends = f"{drop.low:+.4f} to {drop.high:+.4f}"
        interval = ", ".join(
            filter(None, (f"{percent(drop.confidence)} interval of the drop", ends, drop.correction))
        )
        if drop.high <= self.max_drop:
            return f"The {interval}, lies within the allowed {self.max_drop:g}."
        if drop.low > self.max_drop:
            return f"The {interval}, lies wholly above the allowed {self.max_drop:g}."
        return (
            f"The {interval}, includes the allowed {self.max_drop:g}: other {drop.unit} could decide otherwise "
            f"({drop.count:,} were used)."
        )
