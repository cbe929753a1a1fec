"""The state of a climb: the model, the goal, and every evaluation made."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import InitVar, dataclass, field, replace
from typing import Any

from halfstep.batches import scored
from halfstep.errors import RefusedError
from halfstep.evaluate import EarlyStopping, Score, Scorer, early_stopping, share_of_error
from halfstep.fake_quantize import Mode
from halfstep.granularity import PerTensor
from halfstep.graph.layer_precision import STEPS, LayerPrecision
from halfstep.journal import Journal
from halfstep.ladder.checkpoints import Checkpoints
from halfstep.ladder.evaluation import Decision, Evaluation, Evaluations, Verdict
from halfstep.ladder.goal import Goal
from halfstep.ladder.repairs import Refits
from halfstep.model import QuantizedModel
from halfstep.precision import bits_on_request
from halfstep.progress import Budget, BudgetSpent, protected, say, steps
from halfstep.snapshot import Snapshot, fingerprint


@dataclass(frozen=True)
class Evaluated:
    """A fully quantized model that was evaluated.

    Attributes:
        what: it is, in words.
        score: on all examples, of the simulation or, where its ``simulated`` says so, of the file.
        snapshot: to come back to it.
        key: its fingerprint.
        bits: that its weights take more than by the recipe, as :func:`.bits_on_request` counts; below 0 for fewer.
    """

    what: str
    score: Score
    snapshot: Snapshot
    key: str
    bits: int

    @classmethod
    def of(cls, model: QuantizedModel, what: str, score: Score, key: str = "") -> Evaluated:
        """``model`` as it stands; its fingerprint is taken where it is not known."""
        return cls(what, score, Snapshot.of(model), key or fingerprint(model), bits_on_request(model))


@dataclass
class Search:
    """What the rungs share.

    Args:
        made: evaluations that were made before it, such as the float model's.

    Attributes:
        model: the simulation; rungs leave it as the best candidate they found.
        scorer: the metric.
        goal: the target that simulations are held to.
        asked: the target that was asked for; another one once a file lost more than its simulation.
        decided: what was decided and why, in order.
        found: what rungs found out on the way, by name: ``"halves"``, ``"sensitivity"`` ...; each has ``to_dict()``.
        early: whether :meth:`judge` may stop before all examples are seen.
        journal: where everything is kept; what it holds already is remembered and not done again.
        budget: what the search may cost.
        rung: the one that is being climbed.
        best: the best candidate so far; None before the first.
        reached: the best candidate at the end of each rung, by the rung's name.
        calibrated: examples that the ranges come from; 0 where that is not known.
        threads: of the runtime, for one operator, where files are timed; None for all cores.
        score_file: exports a candidate and scores the file on its runtime, if that is not known and the budget is not
            used up, or with ``paid=True``; what the score is remembered by, and the score. Raises
            :class:`.RefusedError` where the file is not what was simulated. None where there is no file.
        memory: every evaluation, and what is known of the candidates by them.
        started: when the budget's minutes began, by ``time.perf_counter``.
    """

    model: QuantizedModel
    scorer: Scorer
    goal: Goal
    made: InitVar[Sequence[Evaluation]] = ()
    decided: list[Decision] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)
    early: bool = True
    journal: Journal = field(default_factory=Journal)
    budget: Budget = field(default_factory=Budget)
    rung: str = ""
    best: Evaluated | None = None
    reached: dict[str, Evaluated] = field(default_factory=dict)
    calibrated: int = 0
    threads: int | None = None
    score_file: Callable[..., tuple[str, Score]] | None = None
    started: float = field(default_factory=lambda: time.perf_counter())

    def __post_init__(self, made: Sequence[Evaluation]) -> None:
        self.asked = self.goal
        self._scored = scored(self.model, self.scorer)
        self.checkpoints = Checkpoints(self.journal, self.model)
        self.refits = Refits(self.model, self.checkpoints)
        self.memory = Evaluations(self.journal, made)
        found = early_stopping(self.scorer, self.goal.float_score)
        if any(self.model.captured.batch_axes):  # examples are drawn along the first dimension
            found = "the batch is not the first dimension of the inputs"
        self._stopper: EarlyStopping | None = found if isinstance(found, EarlyStopping) else None
        self._no_stopper = found if isinstance(found, str) else ""

    def hold_to(self, goal: Goal) -> None:
        """Hold simulations to another goal; what is remembered is judged by the one that holds."""
        self.goal = goal

    def choose(self, precision: LayerPrecision) -> None:
        """Let other layers be put back, and what repairs had learned be fitted anew for them."""
        self.model.choose(precision)
        self.refits()

    @property
    def never_early(self) -> str:
        """Why no verdict on the simulation as it stands can be early; empty if one can."""
        if self._no_stopper:
            return self._no_stopper
        mixed = any(
            site.dynamic and site.mode is Mode.QUANTIZE and isinstance(site.granularity, PerTensor)
            for site in self.model.sites.values()
        )
        return "ranges per tensor at run time make an example's score depend on its batch" if mixed else ""

    def examined(self, key: str) -> int | None:
        """Which candidate the simulation as it stands is, see :meth:`.Evaluations.examined`.

        None for what cannot be accepted, since some of its sites let floats through.
        """
        return self.memory.examined(key) if self._acceptable else None

    @property
    def _acceptable(self) -> bool:
        return all(site.mode is Mode.QUANTIZE for site in self.model.sites.values())

    def recall(self, key: str) -> Verdict | None:
        """What is remembered under a key, by the goal that holds; see :meth:`.Evaluations.recall`."""
        return self.memory.recall(key, self.goal)

    def evaluate(self, what: str, paid: bool = False) -> Score:
        """Score the simulation as it stands on all examples; a candidate that was scored before costs nothing.

        Args:
            what: it is, in words.
            paid: score it even if the budget is used up.

        Raises:
            BudgetSpent: if it is.
        """
        key = fingerprint(self.model)
        known = self.recall(key)
        if known is not None and known.complete:
            self._consider(what, known, key)
            return known.score
        if not paid:
            self.check_budget()
        start = time.perf_counter()
        seen = 0
        taken = self.memory.taken(key)
        # What was begun is scored: its verdict is worth the time.
        with protected(), steps(f"evaluating {what}"):
            if taken is not None and self._stopper is not None:
                seen = len(taken) if self.picks else 0
                score = self._stopper.finish(self._scored, taken)
            else:
                score = self.scorer.evaluate(self._scored)
        score = score.numbered(self.examined(key) or 1)
        count = None if score.count is None else score.count - seen
        verdict = Verdict(self.goal.met(score), score, complete=True)
        self._record(what, verdict, time.perf_counter() - start, count, score.count, key)
        return score

    def accept(self, what: str) -> Score:
        """Score the simulation as it stands, or, where few of the examples say that it meets the goal, its file.

        The file is what has to meet the goal in the end, and it is scored on all examples anyway; so the simulation
        need not run on all of them too. Where the file misses the goal or is refused, it does.

        Args:
            what: the candidate, in words.

        Returns:
            The score on all examples, of whichever it is.
        """
        # Once files lose more than their simulations, these are held to less than files are.
        if (
            self.score_file is None
            or self.goal.strict
            or self.goal is not self.asked
            or self._stopper is None
        ):
            return self.evaluate(what)
        verdict = self.judge(what)
        if verdict.complete:
            return verdict.score
        if verdict.met:
            key = fingerprint(self.model)
            candidate = Evaluated.of(self.model, what, verdict.score, key)
            try:
                with protected():  # as a simulation's score is
                    _, score = self.score_file(candidate)
            except RefusedError:
                return self.evaluate(what)
            if self.goal.met(score):
                score = replace(score, simulated=verdict.score.count)
                accepted = replace(candidate, score=score)
                if self._leads(self.rank(accepted)):
                    self._keep(accepted)
                self._suspect(what, score)
                return score
        return self.evaluate(what)

    def judge(self, what: str, final: bool = False) -> Verdict:
        """Whether the simulation as it stands meets the goal, from as few examples as that takes.

        All examples would overturn a verdict given early with a probability of at most 1 - confidence, taken by
        itself: of many one may well be wrong. A strict goal is met only on all examples; it can be missed early.

        Args:
            what: the candidate, in words.
            final: more examples are seen before the candidate is refused, so many that all verdicts of a search that
                are final are right together with the goal's confidence: this one has its share of the error.
        """
        key = fingerprint(self.model)
        known = self.recall(key)
        if known is not None and (known.complete or (self.early and (known.met or not final))):
            self._consider(what, known, key)
            return known
        if self._stopper is None or self.never_early or not self.early:
            score = self.evaluate(what)
            return Verdict(self.goal.met(score), score, complete=True)
        examined, goal = self.examined(key), self.goal
        level = 1 - goal.confidence
        if final:
            level = share_of_error(level, examined or 1)
        self.check_budget()
        start, before = time.perf_counter(), self.memory.taken(key)
        with protected(), steps(f"judging {what}", self._stopper.total) as advance:
            scores, side = self._stopper.run(
                self._scored, goal.max_drop, level, accept=not goal.strict, progress=advance, seen=before
            )
        if known is not None and before is not None and len(scores) == len(before):
            return known  # not one example more was needed to say it at this level
        complete = len(scores) == self._stopper.total
        score = self._stopper.finish(self._scored, scores) if complete else Score.mean(scores)
        score = score.numbered(examined or 1)
        met = goal.met(score) if complete else side == "below"
        verdict = Verdict(met, score, complete, None if complete else goal.max_drop)
        count = len(scores) - (len(before) if before is not None and self.picks else 0)
        self._record(what, verdict, time.perf_counter() - start, count, self._stopper.total, key)
        return verdict

    def rivals(self, what: str, best: Score) -> bool:
        """Whether the simulation as it stands may do as well as a candidate that was evaluated.

        Both are compared example by example, on as few as it takes to see that this one is worse; all would say
        otherwise with a probability of at most 1 - confidence. True where no verdict can be early.

        Args:
            what: the candidate, in words.
            best: the other one's score, on all examples.
        """
        if self.never_early or not self.early:
            return True
        goal = self.goal
        self.goal = replace(goal, max_drop=goal.drop(best), strict=False)
        try:
            return self.judge(what).met
        finally:
            self.goal = goal

    @property
    def evaluations(self) -> list[Evaluation]:
        """Every evaluation, in order."""
        return self.memory.made

    @property
    def picks(self) -> bool:
        """Whether examples that were scored for an early verdict need not be scored again to go on from there."""
        return self._stopper is not None and self._stopper.picks

    def drop(self, verdict: Verdict) -> float:
        """How much worse than float a judged candidate is, on the examples that it was judged on."""
        if verdict.complete or self._stopper is None:
            return self.goal.drop(verdict.score)
        return self._stopper.drop(verdict.score)

    def check_budget(self) -> None:
        """Raise once the budget is used up, but let one candidate pass, so that there is always a best one.

        Raises:
            BudgetSpent: saying by what.
        """
        if (spent := self.spent()) and self.best is not None:
            raise BudgetSpent(spent)

    def check_time(self) -> None:
        """What long loops ask between their steps: raise once the minutes are used up, if there is a best candidate.

        Evaluations that are used up end no loop: a resumed run has them all from the start, and repeats the work
        between them.

        Raises:
            BudgetSpent: saying by what.
        """
        spent = self.budget.spent(0, time.perf_counter() - self.started)
        if spent and self.best is not None:
            raise BudgetSpent(spent)

    def spent(self) -> str:
        """What of the budget is used up, in words; empty while there is something left."""
        return self.budget.spent(self.memory.cost, time.perf_counter() - self.started)

    def seconds_left(self) -> float | None:
        """Seconds until the budget's minutes are used up; None where it bounds no time."""
        if self.budget.minutes is None:
            return None
        return self.budget.minutes * 60 - (time.perf_counter() - self.started)

    def _consider(self, what: str, verdict: Verdict, key: str) -> None:
        """Keep the candidate if it is the best so far: meets the goal, few float layers, few bits, a small drop."""
        if not (verdict.complete and self._acceptable):
            return
        # A snapshot is taken of the best alone.
        if self._leads(self._rank(verdict.score, self.model.precision, bits_on_request(self.model))):
            self._keep(Evaluated.of(self.model, what, verdict.score, key))

    def _leads(self, rank: tuple[float, ...]) -> bool:
        return self.best is None or rank < self.rank(self.best)

    def _keep(self, candidate: Evaluated) -> None:
        self.best = candidate
        say(f"best so far {self.goal.words(candidate.score)}: {candidate.what}")

    def rank(self, candidate: Evaluated) -> tuple[float, ...]:
        """Less is better: meets the goal, few layers in float, few at the steps before, few bits, a small drop."""
        return self._rank(candidate.score, candidate.snapshot.precision, candidate.bits)

    def _rank(self, score: Score, precision: LayerPrecision, bits: int) -> tuple[float, ...]:
        met = self.goal.met(score)
        steps = [step for step in reversed(STEPS.values()) if step.bits is None]
        return (
            not met,
            *(len(precision[step.name]) if met else 0 for step in steps),
            bits if met else 0,
            self.goal.loss(score),
        )

    def _record(
        self, what: str, verdict: Verdict, seconds: float, examples: int | None, total: int | None, key: str
    ) -> None:
        score = verdict.score
        made = Evaluation(what, score.value, seconds, examples, total, key, self.rung, self.examined(key))
        self.memory.record(made, verdict)
        self._consider(what, verdict, key)
        if verdict.complete:
            self._suspect(what, score)

    def _suspect(self, what: str, score: Score) -> None:
        """Say where a score is so good that the metric may be read the wrong way round."""
        for goal, part in self.goal.each(score):
            if -goal.drop(part) > max(goal.max_drop, 0.05 * abs(goal.float_score.value)):
                way = "lower" if goal.higher_is_better else "higher"
                self.decide(
                    f"{what} scores {f'{goal.name} {part.value:g}'.lstrip()}, much better than the float model's "
                    f"{goal.float_score.value:g}. If the metric is better the {way} it is, say "
                    f"higher_is_better={not goal.higher_is_better}"
                )

    def replay(self, rung: str, decisions: Iterable[Decision]) -> None:
        """Take a rung that an earlier run climbed as climbed: its evaluations count, its decisions are said."""
        self.memory.replay(rung)
        for made in decisions:
            if made.rung == rung:
                self.decide(made.sentence, key=made.key)

    @property
    def decisions(self) -> tuple[str, ...]:
        """What was decided and why, one sentence each."""
        return tuple(made.sentence for made in self.decided)

    def decide(self, sentence: str, aloud: bool = True, key: str = "") -> None:
        """Record a decision, and tell the progress listener of it if ``aloud``.

        Args:
            sentence: what was decided, and why.
            aloud: whether it is said now, too.
            key: the sentence without the times that it tells of, where a run that goes on measures others: else the
                journal would have the decision twice.
        """
        made = Decision(self.rung, key or sentence, sentence)
        self.decided.append(made)
        made.keep(self.journal)
        if aloud:
            say(sentence)
