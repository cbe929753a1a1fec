"""What accuracy was asked for, before the float model's score is known."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace

from halfstep.errors import ArgumentError, named
from halfstep.evaluate import SQNR, Metric, Score, Scorer, parts
from halfstep.ladder.goal import Goal

#: Asked where nothing is said: one point of an accuracy from 0 to 1.
MAX_DROP = 0.01

#: A number for one metric (or for each of several), or numbers by the metrics' names.
Asked = float | Mapping[str, float] | None


@dataclass(frozen=True)
class Aim:
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

    >>> str(Aim(relative_drop=0.01))
    'relative_drop 0.01'
    >>> str(Aim(max_drop=0.01, floor={"worst class": 0.8}))
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
            self._target(name)

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
