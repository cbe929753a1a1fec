"""The whole ladder in one call."""

from __future__ import annotations

import functools
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from halfstep.errors import ArgumentError
from halfstep.evaluate import Scorer, as_scorers, parts
from halfstep.graph.capture import capture
from halfstep.graph.decompose import decompose
from halfstep.graph.fold import fold
from halfstep.graph.inputs import ModelInputs
from halfstep.ladder.aim import Aim, Asked
from halfstep.ladder.ascent import ascend
from halfstep.ladder.budget import Budget
from halfstep.ladder.calibration import observe
from halfstep.ladder.claims import claim
from halfstep.ladder.concerns import halving, sentences, unlike_sites, watching
from halfstep.ladder.deploy import deploy, file_score
from halfstep.ladder.doubts import doubts
from halfstep.ladder.identity import Examples
from halfstep.ladder.journal import Journal
from halfstep.ladder.outcome import Outcome
from halfstep.ladder.partial import Partial
from halfstep.ladder.rung import Means, Rung
from halfstep.ladder.rungs import RUNGS, find_rungs
from halfstep.ladder.search import Search, float_evaluation
from halfstep.ladder.speed import favour_speed
from halfstep.model import QuantizedModel
from halfstep.progress import steps
from halfstep.recipe import Recipe
from halfstep.targets import Target, find_target
from halfstep.training.options import Training, check_training


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
    max_drop: Asked = None,
    recipe: Recipe | None = None,
    target: str | Target = "onnxruntime",
    directory: str | Path | None = None,
    threads: int | None = None,
    *,
    training: Training | None = None,
    relative_drop: Asked = None,
    floor: Asked = None,
    confidence: float = 0.95,
    strict: bool = False,
    rungs: Iterable[str] = tuple(RUNGS),
    budget: Budget | None = None,
    partial: Partial | None = None,
    max_float: float = 0.5,
    tune: bool = False,
    command: str = "",
) -> Outcome:
    """Quantize ``model`` so that its score drops by no more than allowed, and prove it on the deployed file.

    Climbs rung after rung, each from the best candidate so far, and stops at the first that meets the target. If none
    does, the outcome is the best that was found, with ``met`` False and advice.

    With a ``directory`` everything is kept in a journal: the same call again goes on where an earlier one was killed
    and repeats no finished evaluation. Data are read once more then, to see that they are the same.

    Args:
        model: a trained module; left untouched.
        example_inputs: a tensor, a tuple or a dict, with a batch of at least 2.
        calibration: model inputs, each a tensor, a tuple or a dict; iterated once.
        metric: :class:`Accuracy`, :class:`Metric`, or any callable from a model to a float; or several of them by name,
            all of which must keep to their targets. The first one leads: single figures are its.
        max_drop: in the metric's unit, against the float model on the same examples; 0.01 unless another target is
            given. Of several metrics, one number for each or a dict of numbers by name; so ``relative_drop`` and
            ``floor`` too.
        recipe: what to quantize, and how; :meth:`Recipe.int8` if None.
        target: where it will run.
        directory: for the journal, ``model.onnx``, ``float.onnx`` and ``outcome.json``; None keeps nothing.
        threads: of the runtime, for one operator; None for all cores.
        training: for quantization-aware training; without it that rung is left out, and the outcome says so.
        relative_drop: instead of ``max_drop``: a share of the float score.
        floor: instead of ``max_drop``: the worst score allowed.
        confidence: of the drop's intervals, 0.95 for 95%.
        strict: demand that the interval keeps to the target, not only the drop itself.
        rungs: which to climb, from the bottom up: ``"ptq"`` always.
        budget: what the search may cost; None for no bound.
        partial: how to look for layers to put back to float.
        max_float: the share of layers that partial quantization may leave in float while there are rungs left to
            climb; what leaves more is kept for the case that no later rung meets the target.
        tune: measure every group of layers on this machine, and leave in float those that integers slow down, where
            the target still holds; a decision says which.
        command: what to type to do it again; the report shows it.

    Raises:
        HalfstepError: a subclass that says what was wrong with the model, the data, the metric or the directory.
    """
    ladder = find_rungs(tuple(rungs))
    if not 0 <= max_float <= 1:
        raise ArgumentError(f"max_float: got {max_float}, needed a share of the layers, 0 to 1")
    if training is not None:
        check_training(training)
    aim = Aim(max_drop, relative_drop, floor, confidence, strict)
    found, recipe = find_target(target), recipe or Recipe.int8()
    with Journal(directory) as journal, tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        scorer = as_scorers(metric)
        aim.check(scorer)
        prepared = prepare(model, example_inputs, recipe, found)
        if training is not None:
            journal.claim("training", repr(training.describe()))
        search = _begin(journal, prepared, scorer, aim, calibration, budget or Budget())
        _settle(search, ladder, aim, command)
        score_file = functools.partial(file_score, search, temporary / "model.onnx", threads)
        path = ascend(search, ladder, Means(training, partial), max_float, score_file)
        if tune:
            favour_speed(search, threads, score_file)
        return deploy(search, path, journal.folder or temporary, threads)


def _begin(
    journal: Journal,
    prepared: QuantizedModel,
    scorer: Scorer,
    aim: Aim,
    calibration: Iterable[ModelInputs],
    budget: Budget,
) -> Search:
    """The float baseline and the statistics, with what is to be said of the data: what every rung starts from."""
    judged = claim(journal, prepared, scorer, aim)
    with watching(prepared) as seen:
        baseline, made = float_evaluation(scorer, prepared, journal)
    goal = aim.goal(baseline, scorer)
    calibrated = Examples()
    with halving(prepared) as unsteady:
        observe(prepared, _watched(calibration, calibrated))
    journal.claim("calibration data", calibrated.digest())
    search = Search(prepared, scorer, goal, journal=journal, budget=budget, rung="data")
    if made:
        said = [*doubts(calibrated, judged), *sentences([*unlike_sites(prepared, seen), *unsteady])]
    else:  # nothing was watched, since the float model was not run again: what was said then holds
        said = [
            entry.data["measured"]["sentence"]
            for entry in journal.of("decision")
            if entry.data["rung"] == "data"
        ]
    for sentence in said:
        warnings.warn(sentence, stacklevel=3)
        search.decide(sentence, aloud=False)  # a warning is heard anyway
    search.rung = ""
    return search


def _settle(search: Search, ladder: Sequence[Rung], aim: Aim, command: str) -> None:
    """Write down what was asked, with every default resolved."""
    model, goal = search.model, search.goal
    search.journal.write(
        "settings",
        target=model.target.name,
        recipe=repr(model.recipe),
        asked=str(aim),
        max_drop=goal.max_drop,
        float_score=goal.float_score.value,
        higher_is_better=goal.higher_is_better,
        confidence=goal.confidence,
        strict=goal.strict,
        metric=", ".join(
            f"{name} {type(part).__name__}".lstrip() for name, part in parts(search.scorer).items()
        ),
        examples=goal.float_score.count,
        rungs=[rung.name for rung in ladder],
        budget=str(search.budget),
        command=command,
    )


def _watched(batches: Iterable[ModelInputs], examples: Examples) -> Iterator[ModelInputs]:
    for inputs in batches:
        yield inputs
        examples.add(inputs)  # after the model has accepted it
