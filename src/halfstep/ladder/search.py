"""The state of a climb: the model, the goal, and every evaluation made."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from halfstep.evaluate import Score, Scorer
from halfstep.fake_quantize import Mode
from halfstep.ladder.goal import Goal
from halfstep.model import QuantizedModel
from halfstep.progress import steps


@dataclass(frozen=True)
class Evaluation:
    """One full evaluation of the metric.

    Attributes:
        what: the candidate, in words.
        score: its value in the metric's unit.
        seconds: what it took.
    """

    what: str
    score: float
    seconds: float


@dataclass
class Search:
    """What the rungs share.

    Attributes:
        model: the simulation; rungs leave it as the best candidate they found.
        scorer: the metric.
        goal: the target.
        evaluations: every evaluation, in order.
        decisions: what was decided and why, one sentence each.
    """

    model: QuantizedModel
    scorer: Scorer
    goal: Goal
    evaluations: list[Evaluation] = field(default_factory=list)
    decisions: list[str] = field(default_factory=list)

    def evaluate(self, what: str) -> Score:
        """Score the simulation as it stands."""
        score, evaluation = timed_evaluation(self.scorer, self.model, what)
        self.evaluations.append(evaluation)
        return score

    def decide(self, sentence: str) -> None:
        """Record a decision."""
        self.decisions.append(sentence)


def timed_evaluation(scorer: Scorer, model: QuantizedModel, what: str) -> tuple[Score, Evaluation]:
    """Score ``model`` and tell the progress listener of it."""
    start = time.perf_counter()
    with steps(f"evaluating {what}"):
        score = scorer.evaluate(model)
    return score, Evaluation(what, score.value, time.perf_counter() - start)


def float_evaluation(scorer: Scorer, model: QuantizedModel) -> tuple[Score, Evaluation]:
    """Score the float network."""
    with model.using(Mode.FLOAT):
        return timed_evaluation(scorer, model, "float")
