"""The state of a climb: the model, the goal, and every evaluation made."""

from __future__ import annotations

import time
import warnings
from dataclasses import dataclass, field

import torch

from halfstep.evaluate import EarlyStopping, Metric, Score, Scorer, early_stopping
from halfstep.fake_quantize import Mode
from halfstep.ladder.fingerprint import fingerprint
from halfstep.ladder.goal import Goal
from halfstep.model import QuantizedModel
from halfstep.progress import steps

#: Examples on which the float model is scored a second time, to see whether the metric answers the same.
REPEATED = 1000
AGAIN = "float again, for the metric's noise"


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the metric.

    Attributes:
        what: the candidate, in words.
        score: its value in the metric's unit, over the examples seen.
        seconds: what it took.
        examples: how many examples were scored; None where the metric is not a mean over examples.
        total: how many there are.
        key: the candidate's fingerprint.
    """

    what: str
    score: float
    seconds: float
    examples: int | None = None
    total: int | None = None
    key: str = ""

    @property
    def share(self) -> float:
        """The share of a full evaluation that it took, 0 to 1."""
        return self.examples / self.total if self.examples is not None and self.total else 1.0


@dataclass(frozen=True)
class Verdict:
    """Whether a candidate meets the goal.

    Attributes:
        met: whether it does.
        score: over the examples seen; its ``per_example`` is in the data's own order only if ``complete``.
        complete: whether all examples were seen, or the verdict was given early, at the goal's confidence.
    """

    met: bool
    score: Score
    complete: bool


@dataclass
class Search:
    """What the rungs share.

    Attributes:
        model: the simulation; rungs leave it as the best candidate they found.
        scorer: the metric.
        goal: the target.
        evaluations: every evaluation, in order.
        decisions: what was decided and why, one sentence each.
        memory: verdicts by the candidates' fingerprints: nothing is scored twice.
        early: whether :meth:`judge` may stop before all examples are seen.
    """

    model: QuantizedModel
    scorer: Scorer
    goal: Goal
    evaluations: list[Evaluation] = field(default_factory=list)
    decisions: list[str] = field(default_factory=list)
    memory: dict[str, Verdict] = field(default_factory=dict)
    early: bool = True

    def __post_init__(self) -> None:
        found = early_stopping(self.scorer, self.goal.float_score)
        self._stopper: EarlyStopping | None = found if isinstance(found, EarlyStopping) else None
        #: Why no evaluation can stop early; empty if it can.
        self.never_early = found if isinstance(found, str) else ""

    def evaluate(self, what: str) -> Score:
        """Score the simulation as it stands on all examples; a candidate that was scored before costs nothing."""
        key = fingerprint(self.model)
        known = self.memory.get(key)
        if known is not None and known.complete:
            return known.score
        start = time.perf_counter()
        seen = 0
        with steps(f"evaluating {what}"):
            if known is not None and self._stopper is not None and known.score.per_example is not None:
                seen = len(known.score.per_example) if self._stopper.picks else 0
                score = self._stopper.finish(self.model, known.score.per_example)
            else:
                score = self.scorer.evaluate(self.model)
        count = None if score.count is None else score.count - seen
        self._record(what, score, time.perf_counter() - start, count, score.count, key)
        self.memory[key] = Verdict(self.goal.met(score), score, complete=True)
        return score

    def judge(self, what: str) -> Verdict:
        """Whether the simulation as it stands meets the goal, from as few examples as that takes.

        A verdict given early is wrong with a probability of at most 1 - confidence. A strict goal is met only on
        all examples; it can be missed early.
        """
        key = fingerprint(self.model)
        if key in self.memory:
            return self.memory[key]
        if self._stopper is None or not self.early:
            self.evaluate(what)
            return self.memory[key]
        start, goal = time.perf_counter(), self.goal
        with steps(f"judging {what}", self._stopper.total) as advance:
            scores, side = self._stopper.run(
                self.model, goal.max_drop, 1 - goal.confidence, accept=not goal.strict, progress=advance
            )
        complete = len(scores) == self._stopper.total
        score = self._stopper.finish(self.model, scores) if complete else Score.mean(scores)
        met = goal.met(score) if complete else side == "below"
        self._record(what, score, time.perf_counter() - start, len(scores), self._stopper.total, key)
        self.memory[key] = Verdict(met, score, complete)
        return self.memory[key]

    def _record(
        self, what: str, score: Score, seconds: float, examples: int | None, total: int | None, key: str
    ) -> None:
        self.evaluations.append(Evaluation(what, score.value, seconds, examples, total, key))
        better = -self.goal.drop(score)
        if examples == total and better > max(self.goal.max_drop, 0.05 * abs(self.goal.float_score.value)):
            way = "lower" if self.goal.higher_is_better else "higher"
            self.decide(
                f"{what} scores {score.value:g}, much better than the float model's {self.goal.float_score.value:g}. "
                f"If the metric is better the {way} it is, say higher_is_better={not self.goal.higher_is_better}"
            )

    @property
    def full_evaluations(self) -> float:
        """What all evaluations together cost, in evaluations of every example."""
        return sum(evaluation.share for evaluation in self.evaluations)

    @property
    def saved(self) -> int:
        """Examples that no candidate had to be scored on, thanks to early stopping."""
        seen: dict[str, int] = {}
        totals: dict[str, int] = {}
        for evaluation in self.evaluations:
            if evaluation.examples is not None and evaluation.total is not None and evaluation.key:
                seen[evaluation.key] = seen.get(evaluation.key, 0) + evaluation.examples
                totals[evaluation.key] = evaluation.total
        return sum(totals[key] - seen[key] for key in seen)

    def decide(self, sentence: str) -> None:
        """Record a decision."""
        self.decisions.append(sentence)


def timed_evaluation(scorer: Scorer, model: QuantizedModel, what: str) -> tuple[Score, Evaluation]:
    """Score ``model`` and tell the progress listener of it."""
    start = time.perf_counter()
    with steps(f"evaluating {what}"):
        score = scorer.evaluate(model)
    return score, Evaluation(what, score.value, time.perf_counter() - start, score.count, score.count)


def float_evaluation(scorer: Scorer, model: QuantizedModel) -> tuple[Score, list[Evaluation]]:
    """Score the float network, once on everything and once more on a part, to see whether the metric repeats itself.

    Warns where it does not: a drop smaller than the metric's own noise cannot be seen. Where the examples come in
    another order each time, the score is returned without those of single examples, since nothing could be paired.

    Returns:
        The score, and the evaluations made.
    """
    with model.using(Mode.FLOAT):
        score, first = timed_evaluation(scorer, model, "float")
        made = [first]
        if isinstance(scorer, Metric) and score.per_example is not None:
            start = time.perf_counter()
            parts: list[torch.Tensor] = []
            with steps(f"evaluating {AGAIN}"):
                for part in scorer.stream(model):
                    parts.append(part)
                    if sum(map(len, parts)) >= REPEATED:
                        break
            part, seconds = torch.cat(parts), time.perf_counter() - start
            made.append(Evaluation(AGAIN, float(part.mean()), seconds, len(part), score.count))
            if torch.equal(part, score.per_example[: len(part)]):
                return score, made
        whole, second = timed_evaluation(scorer, model, AGAIN)
    return _compared(score, whole), [*made, second]


def _compared(first: Score, second: Score) -> Score:
    """The score to go on with, after two evaluations of the same model."""
    noise = abs(first.value - second.value)
    if noise > 1e-12 * max(abs(first.value), 1.0):
        warnings.warn(
            f"metric: the float model scores {first.value:.6g}, and {second.value:.6g} when scored again: drops "
            f"smaller than that difference ({noise:.2g}) cannot be told from noise; make the metric repeat itself "
            "(fixed seeds, no random augmentation, no sampling)",
            stacklevel=3,
        )
    if first.per_example is None:
        return first
    warnings.warn(
        "metric: the scores of single examples differ between two evaluations of the float model, so candidates "
        "cannot be compared with it example by example; give the examples in the same order each time "
        "(a loader with shuffle=False)",
        stacklevel=3,
    )
    return Score(first.value)
