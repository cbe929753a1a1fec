"""A rung that is climbed by itself: its search, and what all results of such have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from halfstep.evaluate import Drop, Score, as_scorers
from halfstep.fidelity.reference import knowing_float
from halfstep.identity import Identity
from halfstep.journal import Journal
from halfstep.ladder.evaluation import Evaluation
from halfstep.ladder.float_score import float_evaluation
from halfstep.ladder.goal import GoalSpec
from halfstep.ladder.identity import claim_run
from halfstep.ladder.search import Search
from halfstep.model import QuantizedModel


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What came of a search by itself. The model is left as it says.

    Attributes:
        met: whether the goal is met, by its own rule.
        float_score: of the float model.
        score: of the model as it is left, on all examples.
        drop: from the one to the other, with its interval, corrected for the candidates examined.
        history: every evaluation.
        decisions: what was decided and why, one sentence each.
        full_evaluations: what it all cost, in evaluations of every example.
        saved: examples that early verdicts spared.
    """

    met: bool
    float_score: float
    score: float
    drop: Drop
    history: tuple[Evaluation, ...]
    decisions: tuple[str, ...]
    full_evaluations: float
    saved: int

    @classmethod
    def of(cls, search: Search, score: Score, **own: Any) -> Self:
        """What a search came to, with the model's score and what the kind of search has of its own."""
        return cls(
            met=search.goal.met(score),
            float_score=search.goal.float_score.value,
            score=score.value,
            drop=search.goal.compare(score),
            history=tuple(search.evaluations),
            decisions=search.decisions,
            full_evaluations=search.memory.replayed_cost,
            saved=search.memory.saved,
            **own,
        )

    @property
    def found(self) -> str:
        """What was found, in a few words; may be empty."""
        return ""

    def __str__(self) -> str:
        """The verdict and the decisions."""
        head = ", ".join(filter(None, (f"{'met' if self.met else 'not met'}: drop {self.drop}", self.found)))
        return "\n".join([head, *(f"- {sentence}" for sentence in self.decisions)])


@contextmanager
def search_by_itself(
    model: QuantizedModel, metric: Any, aim: GoalSpec, directory: str | Path | None, rung: str
) -> Iterator[Search]:
    """The search of a rung that is climbed by itself, with the float model scored.

    Args:
        model: observed and calibrated.
        metric: as for :func:`halfstep.quantize`.
        aim: what is asked for.
        directory: of the journal; None keeps nothing.
        rung: its name.

    Raises:
        ArgumentError: if the float model itself misses the target.
        MetricError: if the metric cannot be used.
        RunError: if the directory belongs to another search, or cannot be written.
    """
    scorer = as_scorers(metric)
    aim.check(scorer)
    with Journal(directory) as journal:
        unseen: tuple[str, ...] = ()
        if directory is not None:
            unseen = claim_run(journal, model, scorer, aim).unseen
            own = [(name, x) for name, x in model.named_parameters() if not name.startswith("quantizers.")]
            journal.claim("parameters", Identity(own).digest)
        scorer = knowing_float(scorer, model)
        score, _ = float_evaluation(scorer, model, journal, unseen)
        yield Search(model, scorer, aim.goal(score, scorer), journal=journal, rung=rung)
