"""The accuracy target: how far from the float model's score is near enough, and on what evidence.

What accuracy was asked for, before the float model's score is known.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

from halfstep.errors import ArgumentError, MetricError, named
from halfstep.evaluate import SQNR, Drop, Metric, Score, Scorer, paired_drop, parts, percent

#: Asked where nothing is said: one point of an accuracy from 0 to 1.
MAX_DROP = 0.01

#: A number for one metric (or for each of several), or numbers by the metrics' names.
Asked = float | Mapping[str, float] | None


@dataclass(frozen=True)
class GoalSpec:
    """One of three targets, and on what evidence it counts as met; of several metrics, one for each.

    Attributes:
        max_drop: largest drop against float, in the metric's unit; 0.01 if nothing is asked.
        relative_drop: largest drop as a share of the float score.
        floor: the worst score allowed, whatever the float model's is. In a strict target the float model's score on
            these examples is taken as it is: the interval is that of the drop from there.
        confidence: of the intervals, for all candidates together; see :class:`.Goal`, which says what it guarantees.
        strict: the upper end of the drop's interval must keep to the target, not only the drop that was measured.

    Raises:
        ArgumentError: if more than one target is given for a metric.

    >>> str(GoalSpec(relative_drop=0.01))
    'relative_drop 0.01'
    >>> str(GoalSpec(max_drop=0.01, floor={"worst class": 0.8}))
    "max_drop 0.01, floor of 'worst class' 0.8"
    """

    max_drop: Asked = None
    relative_drop: Asked = None
    floor: Asked = None
    confidence: float = 0.95
    strict: bool = False

    def __post_init__(self) -> None:
        names = {name for asked in self._given().values() if isinstance(asked, Mapping) for name in asked}
        for name in ("", *names):
            target, asked = self._target(name)
            if isinstance(asked, str) or not hasattr(asked, "__float__"):
                of = f" of {name!r}" if name else ""
                raise ArgumentError(f"{target}{of}: got {asked!r}, needed a number, such as 0.01")

    def check(self, scorer: Scorer) -> None:
        """See that every name is a metric's, and that a metric with bounds can miss what is asked of it.

        Raises:
            ArgumentError: with the nearest name that is, the largest drop that can be, or the target that can be.
        """
        known = list(filter(None, parts(scorer)))
        for target, asked in self._given().items():
            for name in asked if isinstance(asked, Mapping) else ():
                if name not in known:
                    near = difflib.get_close_matches(str(name), known, n=1)
                    hint = f"; did you mean {near[0]!r}?" if near else ""
                    needed = f"one of {', '.join(map(repr, known))}" if known else "a number, for one metric"
                    raise ArgumentError(f"{target}: got the name {name!r}, needed {needed}{hint}")

        for name, part in parts(scorer).items():
            target, asked = self._target(name)
            if isinstance(part, SQNR) and target != "floor":
                floor = f"{{{name!r}: 30}}" if name else "30"
                raise ArgumentError(
                    f"{target}{f' of {name!r}' * bool(name)}: got {asked:g} for hs.SQNR, needed the fewest dB allowed, "
                    f"such as floor={floor}: beside itself the float model has no noise, so a drop says nothing"
                )
            bounds = part.bounds if isinstance(part, Metric) else None
            if bounds is None or target == "floor":
                continue
            most, unit = bounds[1] - bounds[0], "one point of an accuracy from 0 to 1"
            if target == "relative_drop":
                most, unit = (1.0 if bounds[0] >= 0 and part.higher_is_better else math.inf), "one percent"
            if asked > most:
                of = f" of {name!r}" if name else ""
                raise ArgumentError(
                    f"{target}{of}: got {asked:g}, needed at most {most:g}, since no score lies lower; 0.01 is {unit}"
                )

    def goal(self, float_score: Score, scorer: Scorer) -> Goal:
        """The target against a float model's score.

        Raises:
            ArgumentError: if the float model itself does not meet it, or a number or name is out of its domain.
            MetricError: if a strict target is asked of a metric without scores of single examples.
        """
        (first, leading), *others = parts(scorer).items()
        goal = self._goal(first, float_score, leading)
        rest = {name: self._goal(name, float_score.others[name], part) for name, part in others}
        return replace(goal, others=rest)

    def _goal(self, name: str, float_score: Score, scorer: Scorer) -> Goal:
        target, asked = self._target(name)
        with named(f"metric {name!r}") if name else nullcontext():
            max_drop = TARGETS[target](asked, float_score.value, scorer.higher_is_better)
            bounds = scorer.bounds if isinstance(scorer, Metric) else None
            return Goal(
                max_drop,
                float_score,
                scorer.higher_is_better,
                self.confidence,
                self.strict,
                bounds,
                name,
                target=target,
            )

    def _target(self, name: str) -> tuple[str, float]:
        """The one target of a metric: what is asked of its name, or else of all."""
        of_name, of_all = {}, {}
        for target, asked in self._given().items():
            if not isinstance(asked, Mapping):
                of_all[target] = asked
            elif name in asked:
                of_name[target] = asked[name]
        found = of_name or of_all or {"max_drop": MAX_DROP}
        if len(found) > 1:
            of = f" of {name!r}" if name else ""
            raise ArgumentError(f"target{of}: got {' and '.join(found)}, needed one of {', '.join(TARGETS)}")
        return next(iter(found.items()))

    def __str__(self) -> str:
        words = []
        for target, asked in (self._given() or {"max_drop": MAX_DROP}).items():
            named = asked.items() if isinstance(asked, Mapping) else [("", asked)]
            words += [f"{target} of {name!r} {x:g}" if name else f"{target} {x:g}" for name, x in named]
        return ", ".join([*words, f"strict at {self.confidence:g}"] if self.strict else words)

    def _given(self) -> dict[str, float | Mapping[str, float]]:
        asked = {target: getattr(self, target) for target in TARGETS}
        return {target: value for target, value in asked.items() if value is not None}


def drop_itself(asked: float, float_score: float, higher_is_better: bool) -> float:
    """``max_drop`` as it is.

    Raises:
        ArgumentError: if it is negative or no number.
    """
    if not (math.isfinite(asked) and asked >= 0):
        raise ArgumentError(
            f"max_drop: got {asked}, needed a number of at least 0 in the metric's unit (0.01 is one point of an "
            "accuracy from 0 to 1)"
        )
    return asked


def share_of_float(asked: float, float_score: float, higher_is_better: bool) -> float:
    """The drop that is a share of the float model's score: 0.01 of a score of 0.9 is 0.009.

    Raises:
        ArgumentError: if the share is negative, or the float model scores 0.
    """
    if not (math.isfinite(asked) and asked >= 0):
        raise ArgumentError(
            f"relative_drop: got {asked}, needed a number of at least 0 (0.01 is one percent)"
        )
    if float_score == 0:
        raise ArgumentError(
            "relative_drop: the float model scores 0, and any share of that is 0; give max_drop"
        )
    return asked * abs(float_score)


def down_to_floor(asked: float, float_score: float, higher_is_better: bool) -> float:
    """The drop from the float model's score to the worst one allowed.

    Raises:
        ArgumentError: if the float model itself does not reach it.
    """
    margin = float_score - asked if higher_is_better else asked - float_score
    if not margin >= 0:
        needed = "at least" if higher_is_better else "at most"
        raise ArgumentError(
            f"floor: the float model itself scores {float_score:g}, needed {needed} {asked:g}: no quantized model is "
            "expected to do better; lower the target, or train the float model further. If the metric is better the "
            f"{'lower' if higher_is_better else 'higher'} it is, say higher_is_better={not higher_is_better}"
        )
    return margin


#: The kinds of targets: what was asked and the float score, as a largest drop.
TARGETS: dict[str, Callable[[float, float, bool], float]] = {
    "max_drop": drop_itself,
    "relative_drop": share_of_float,
    "floor": down_to_floor,
}

#: An allowed drop of 0 counts as this share of the float score where the use of allowances is compared.
SMALLEST = 1e-3


@dataclass(frozen=True)
class MetricResult:
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
        drop = f"{self.drop_in_words()} (allowed {self.max_drop:g})"
        return f"{self.float_score:.4f} to {self.score:.4f}, drop {drop}, {verdict}"

    def drop_in_words(self) -> str:
        """The drop, and the interval that it lies in on other examples."""
        if self.low is None or self.high is None:
            return f"{self.drop:+.4f}"
        return f"{self.drop:+.4f} ({self.low:+.4f} to {self.high:+.4f})"


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

    def standings(self, score: Score) -> tuple[MetricResult, ...]:
        """How every metric stands, the leading one first."""
        found = []
        for goal, part in self.each(score):
            drop = goal.compare(part)
            figures = (goal.float_score.value, part.value, drop.value, drop.low, drop.high)
            met = goal._met(part)
            found.append(MetricResult(goal.name, *figures, goal.max_drop, met, drop.examined, drop.reason))
        return tuple(found)

    def words(self, score: Score) -> str:
        """The score and its drop beside what is allowed; of several metrics, each by name.

        >>> Goal(0.01, Score(0.9)).words(Score(0.85))
        '0.8500, +0.0500 below float (allowed 0.01)'
        """
        words = " and ".join(
            f"{goal.name} {part.value:.4f}, {goal.drop(part):+.4f} below float (allowed {goal.max_drop:g})".lstrip()
            for goal, part in self.each(score)
        )
        if score.simulated is None:
            return words
        return f"{words}, as a file; simulated on {score.simulated:,} examples"

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
