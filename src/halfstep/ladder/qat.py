"""Rung 3, quantization-aware training: fine-tuning through the fake quantizers, from the best that came before."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable, Sized
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from halfstep.distributed import keep
from halfstep.errors import ArgumentError, DivergedError
from halfstep.evaluate import Score, as_scorers
from halfstep.fake_quantize import Mode
from halfstep.fidelity.reference import knowing_float
from halfstep.files import lock
from halfstep.ladder.evaluation import Verdict as Scored
from halfstep.ladder.float_score import float_evaluation, timed_evaluation
from halfstep.ladder.goal import Asked, GoalSpec
from halfstep.ladder.rung import Cost, Rung
from halfstep.ladder.search import Search
from halfstep.model import QuantizedModel
from halfstep.progress import protected
from halfstep.training.check import check_trainable
from halfstep.training.checkpoint import FILE, OtherTraining, before
from halfstep.training.fit import fit
from halfstep.training.options import Training, check_training
from halfstep.training.trained import Judge, Judgement, Trained


@dataclass(frozen=True)
class QAT(Rung):
    """Quantization-aware training from the best that came before.

    Attributes:
        training: what to do; None leaves the rung out, and a decision says so.
    """

    name, title = "qat", "Quantization-aware training"
    training: Training | None = None

    def climb(self, search: Search) -> Score:
        """See :func:`climb_qat`."""
        assert self.training is not None  # it would have been left out
        # Steps that are trained are not thrown away: training looks at the budget by itself.
        with protected():
            return climb_qat(search, self.training)

    def cost(self, search: Search) -> Cost:
        """The float control, the start, one every so many epochs, the end, and the last good state if it diverged."""
        training = self.training
        if training is None:
            return Cost(0)
        marks = training.epochs / training.evaluate_every
        if isinstance(training.labelled, Sized):  # marks lie at whole steps
            steps = len(training.labelled)
            marks = max(1, round(training.epochs * steps)) / max(1, round(training.evaluate_every * steps))
        return Cost(training.control + 3 + math.ceil(marks), not_counted="training")

    def missing(self) -> str:
        """The training, where there is none."""
        return "" if self.training is not None else "training=hs.Training(labelled, loss)"

    def check(self, model: QuantizedModel) -> None:
        """Raise what :func:`.check_trainable` raises."""
        if self.training is not None:
            check_trainable(model, self.training)

    def identity(self) -> str:
        """Of the training: its data, loss and options."""
        return "" if self.training is None else self.training.identity().digest


def train(
    model: QuantizedModel,
    training: Training,
    metric: Any = None,
    max_drop: Asked = None,
    directory: str | Path | None = None,
) -> Trained:
    """Fine-tune ``model`` in place through its quantizers.

    Args:
        model: calibrated; starts from its ranges, and its float layers stay float.
        training: what to do.
        metric: as for :func:`quantize`; scored every ``training.evaluate_every`` epochs, and the model is left as the
            best that was seen, the start included. None keeps the last state.
        max_drop: stop when the score is within it of the float model's; needs a metric. None trains to the end.
        directory: for ``training.safetensors``; a training that was interrupted goes on from there, with the same
            result on the CPU.

    Returns:
        What happened: losses, scores, seconds, the step that was kept, the float control's score.

    Raises:
        ArgumentError: if ``max_drop`` or the control is asked for without a metric.
        NotObservedError: if a site has no range.
        TrainingError: if nothing can be trained, the loss cannot be used, or ``training`` is no :class:`.Training`.
        DivergedError: if the loss became NaN or infinite; the model is back at its last good state.
        DataError: if the batches cannot be used.
        RunError: if the checkpoint cannot be written, or is another training's.

    >>> training = hs.Training(labelled, torch.nn.functional.cross_entropy, epochs=1)  # doctest: +SKIP
    >>> hs.train(q, training, hs.Accuracy(held_out)).best_step  # doctest: +SKIP
    """
    check_training(training)
    folder = None if directory is None else Path(directory)
    with nullcontext() if folder is None else lock(folder):
        return _train(model, training, metric, max_drop, folder)


def _train(
    model: QuantizedModel, training: Training, metric: Any, max_drop: Asked, folder: Path | None
) -> Trained:
    if metric is None:
        if max_drop is not None or training.control:
            what = "max_drop" if max_drop is not None else "control"
            raise ArgumentError(f"{what}: needs a metric; give hs.train(..., metric=hs.Accuracy(labelled))")
        return _fit(model, training, None, folder)
    scorer, aim = as_scorers(metric), GoalSpec(0.0 if max_drop is None else max_drop)
    if max_drop is not None:
        aim.check(scorer)
    scorer = knowing_float(scorer, model)
    float_score, made = float_evaluation(scorer, model)
    goal = aim.goal(float_score, scorer)
    search = Search(model, scorer, goal, made)
    control = _control(search, training, folder) if training.control else None
    trained = _fit(model, training, _judge(search, stop=max_drop is not None), folder)
    return replace(trained, control=None if control is None else control.value)


def climb_qat(search: Search, training: Training, directory: Path | None = None) -> Score:
    """Fine-tune the model until it meets the goal, leave the best that was seen, and return its score.

    Starts from the search's best candidate so far. A training that diverges is no error here: the best state before
    it stays, and a decision says what happened. Where the budget ends it, what was trained until then is scored first.

    Args:
        search: its model is calibrated.
        training: what to do.
        directory: for the checkpoint; the journal's if None.

    Raises:
        BudgetSpent: if the goal is not met by the time.
        HalfstepError: as :func:`train`, for data, losses and models that cannot be used.
    """
    folder = directory or search.journal.folder
    if search.best is not None:
        search.best.snapshot.restore()
    search.check_budget()
    if training.control:
        control = _control(search, training, folder)
        search.decide(f"the float model, fine-tuned in the same way, scores {search.goal.words(control)}")
    try:
        trained = _go_on(search, training, folder)
    except DivergedError as error:
        search.decide(f"QAT diverged: {error}")
        return search.evaluate("QAT, the last good state", paid=True)
    search.found["training"] = trained
    kept = f"step {trained.best_step}" if trained.best_step else "the start"
    # It is in memory, but for a run that went on: then it is the best again.
    score = search.evaluate(f"QAT, {kept}", paid=True)
    if trained.distilled:
        search.decide(f"distillation from the float model: {trained.distilled}")
    skipped = (
        f", {trained.skipped} of which overflowed float16 and changed nothing" if trained.skipped else ""
    )
    search.decide(
        f"QAT scores {search.goal.words(score)}, after {trained.steps} of {trained.planned} steps "
        f"from a learning rate of {trained.learning_rate:g}{skipped}; {kept} was kept"
    )
    if trained.steps < trained.planned and not search.goal.met(score):
        search.check_budget()
    return score


def _go_on(search: Search, training: Training, folder: Path | None) -> Trained:
    """Train from the checkpoint, if there is one of this training; another one's is kept aside."""

    def go() -> Trained:
        judge = _judge(search, stop=True)
        return _fit(search.model, training, judge, folder, lambda: bool(search.spent()))

    try:
        return go()
    except OtherTraining:
        assert folder is not None
        aside = folder / "training.other.safetensors"
        os.replace(folder / FILE, aside)
        before(folder / FILE).unlink(missing_ok=True)
        search.decide(
            f"The training begins anew: it starts from another network than the one kept in {aside.name}"
        )
        return go()


def _fit(
    model: QuantizedModel,
    training: Training,
    judge: Judge | None,
    directory: Path | None,
    stop: Callable[[], bool] | None = None,
) -> Trained:
    model.set_mode(Mode.QUANTIZE)
    return fit(model, training, judge, directory, stop)


def _judge(search: Search, stop: bool) -> Judge:
    def judge(step: int) -> Judgement:
        # The steps are made; not to score them would throw them away.
        score = search.evaluate(f"QAT, step {step}" if step else "QAT, the start", paid=True)
        return Judgement(score.value, search.goal.loss(score), stop and search.goal.met(score))

    return judge


def _float_twin(model: QuantizedModel) -> QuantizedModel:
    """A model of its own with the same parameters, which passes floats."""
    twin = copy.deepcopy(model)
    twin.set_mode(Mode.FLOAT)
    return twin


def _control(search: Search, training: Training, directory: Path | None) -> Score:
    """The score of the float model after the same training, without quantizers."""
    key = "float control"
    if (known := search.recall(key)) is not None:
        return known.score
    model = _float_twin(search.model)
    keep(model, search.model, by=_float_twin)
    folder = None if directory is None else directory / "control"
    fit(model, training, None, folder, lambda: bool(search.spent()))
    search.check_budget()
    score, made = timed_evaluation(search.scorer, model, "the float control")
    search.memory.record(replace(made, key=key), Scored(search.goal.met(score), score, complete=True))
    return score
