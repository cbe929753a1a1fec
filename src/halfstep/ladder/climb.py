"""The whole ladder in one call."""

from __future__ import annotations

import difflib
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

from halfstep.errors import ArgumentError
from halfstep.evaluate import Scorer, as_scorer
from halfstep.graph.capture import capture
from halfstep.graph.decompose import decompose
from halfstep.graph.fold import fold
from halfstep.graph.inputs import ModelInputs
from halfstep.ladder.budget import Budget, BudgetSpent
from halfstep.ladder.calibration import observe
from halfstep.ladder.concerns import sentences, unlike_sites, watching
from halfstep.ladder.deploy import deploy
from halfstep.ladder.environment import environment
from halfstep.ladder.goal import Goal
from halfstep.ladder.identity import Examples, metric_digest, model_digest
from halfstep.ladder.journal import Journal
from halfstep.ladder.outcome import Outcome
from halfstep.ladder.ptq import climb_ptq
from halfstep.ladder.rung import Rung, Step
from halfstep.ladder.search import Search, float_evaluation
from halfstep.model import QuantizedModel
from halfstep.progress import steps
from halfstep.recipe import Recipe
from halfstep.targets import Target, find_target


def prepare(
    model: nn.Module,
    example_inputs: ModelInputs,
    recipe: Recipe | None = None,
    target: str | Target = "onnxruntime",
) -> QuantizedModel:
    """Capture ``model``, fold its batch norms, and place its sites; it passes floats until observed and calibrated.

    Args:
        model: left untouched.
        example_inputs: a tensor, a tuple or a dict, with a batch of at least 2.
        recipe: what to quantize, and how; :meth:`Recipe.int8` if None.
        target: where it will run.

    Raises:
        CaptureError: if the model cannot be captured.
        RecipeError: if a pattern of the recipe matches no layer.
    """
    found = find_target(target)
    with steps("capturing"):
        captured = decompose(fold(capture(model, example_inputs)), found.decomposed)
        return QuantizedModel(captured, found, recipe or Recipe.int8())


def quantize(
    model: nn.Module,
    example_inputs: ModelInputs,
    calibration: Iterable[ModelInputs],
    metric: Any,
    max_drop: float = 0.01,
    recipe: Recipe | None = None,
    target: str | Target = "onnxruntime",
    directory: str | Path | None = None,
    threads: int | None = None,
    rungs: Sequence[str] = ("ptq",),
    budget: Budget | None = None,
) -> Outcome:
    """Quantize ``model`` so that its score drops by no more than ``max_drop``, and prove it on the deployed file.

    Climbs rung after rung, each from the best candidate so far, and stops at the first that meets the target. If none
    does, the outcome is the best that was found, with ``met`` False and advice.

    With a ``directory`` everything is kept in a journal: the same call again goes on where an earlier one was killed
    and repeats no finished evaluation. Data are read once more then, to see that they are the same.

    Args:
        model: a trained module; left untouched.
        example_inputs: a tensor, a tuple or a dict, with a batch of at least 2.
        calibration: model inputs, each a tensor, a tuple or a dict; iterated once.
        metric: :class:`Accuracy`, :class:`Metric`, or any callable from a model to a float.
        max_drop: in the metric's unit, against the float model on the same examples.
        recipe: what to quantize, and how; :meth:`Recipe.int8` if None.
        target: where it will run.
        directory: for the journal, ``model.onnx``, ``float.onnx`` and ``outcome.json``; None keeps nothing.
        threads: of the runtime, for one operator; None for all cores.
        rungs: which to climb, in order.
        budget: what the search may cost; None for no bound.

    Raises:
        HalfstepError: a subclass that says what was wrong with the model, the data, the metric or the directory.
    """
    ladder = _ladder(rungs)
    found, recipe = find_target(target), recipe or Recipe.int8()
    with Journal(directory) as journal, tempfile.TemporaryDirectory() as temporary:
        scorer = as_scorer(metric)
        prepared = prepare(model, example_inputs, recipe, found)
        _claim(journal, prepared, scorer, max_drop)
        search = _begin(journal, prepared, scorer, max_drop, calibration, budget or Budget())
        path = _climb(search, ladder)
        return deploy(search, path, journal.folder or Path(temporary), threads)


def _ladder(names: Sequence[str]) -> list[Rung]:
    known = {
        "ptq": Rung("ptq", "post-training quantization", climb_ptq),
    }
    wanted = f"needed some of {', '.join(map(repr, known))}"
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ArgumentError(f"rungs: got {name!r}, {wanted}{hint}")
    if not names:
        raise ArgumentError(f"rungs: got none, {wanted}")
    return [known[name] for name in names]


def _claim(journal: Journal, prepared: QuantizedModel, scorer: Scorer, max_drop: float) -> None:
    """Make the directory this run's own, or see that it is."""
    journal.claim("model", model_digest(prepared.captured))
    journal.claim("recipe", repr(prepared.recipe))
    journal.claim("configuration", f"target {prepared.target.name}, max_drop {max_drop!r}")
    journal.claim("metric", metric_digest(scorer))
    labelled = getattr(scorer, "labelled", None)
    if labelled is not None:
        examples = Examples()
        for item in labelled:
            if isinstance(item, (tuple, list)) and len(item) == 2:  # anything else is the metric's to refuse
                examples.add(*item)
        journal.claim("labelled data", examples.digest())
    journal.write("environment", packages=environment())


def _begin(
    journal: Journal,
    prepared: QuantizedModel,
    scorer: Scorer,
    max_drop: float,
    calibration: Iterable[ModelInputs],
    budget: Budget,
) -> Search:
    """The float baseline and the statistics: what every rung starts from."""
    with watching(prepared) as seen:
        baseline, _ = float_evaluation(scorer, prepared, journal)
    goal = Goal(max_drop, baseline, scorer.higher_is_better)
    examples = Examples()
    observe(prepared, _watched(calibration, examples))
    journal.claim("calibration data", examples.digest())
    search = Search(prepared, scorer, goal, journal=journal, budget=budget)
    for sentence in sentences(unlike_sites(prepared, seen)):
        warnings.warn(sentence, stacklevel=3)
        search.decide(sentence)
    return search


def _watched(batches: Iterable[ModelInputs], examples: Examples) -> Iterator[ModelInputs]:
    for inputs in batches:
        yield inputs
        examples.add(inputs)  # after the model has accepted it


def _climb(search: Search, ladder: Sequence[Rung]) -> list[Step]:
    """Climb until a rung meets the goal or the budget is spent; the model is the best candidate then."""
    path: list[Step] = []
    for rung in ladder:
        start, note = time.perf_counter(), ""
        search.rung = rung.name
        try:
            rung.climb(search)
        except BudgetSpent as spent:
            note = f"the budget is spent: {spent}"
            search.decide(f"{rung.title} ended early, {note}")
        best = search.best
        assert best is not None  # a search evaluates one candidate whatever the budget
        best.snapshot.restore()
        search.journal.save(rung.name, best.snapshot.state)
        step = Step(
            rung=rung.name,
            met=search.goal.met(best.score),
            score=best.score.value,
            drop=search.goal.drop(best.score),
            what=best.what,
            float_layers=tuple(sorted(best.snapshot.float_layers)),
            evaluations=sum(made.rung == rung.name for made in search.evaluations),
            note=note,
        )
        search.journal.write("step", **asdict(step), measured={"seconds": time.perf_counter() - start})
        path.append(step)
        if step.met or note:
            break
    return path
