"""The whole ladder in one call."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from halfstep.errors import RunError
from halfstep.evaluate import as_scorer
from halfstep.export.onnx import export_float, export_onnx
from halfstep.export.verify import verify
from halfstep.graph.capture import capture
from halfstep.graph.fold import fold
from halfstep.graph.inputs import ModelInputs
from halfstep.ladder.calibration import observe
from halfstep.ladder.goal import Goal
from halfstep.ladder.outcome import Outcome
from halfstep.ladder.ptq import climb_ptq
from halfstep.ladder.search import Evaluation, Search, float_evaluation
from halfstep.model import QuantizedModel
from halfstep.progress import steps
from halfstep.recipe import Recipe
from halfstep.runtime.deployed import DeployedModel
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
        return QuantizedModel(fold(capture(model, example_inputs)), found, recipe or Recipe.int8())


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
) -> Outcome:
    """Quantize ``model`` so that its score drops by no more than ``max_drop``, and prove it on the deployed file.

    Args:
        model: a trained module; left untouched.
        example_inputs: a tensor, a tuple or a dict, with a batch of at least 2.
        calibration: model inputs, each a tensor, a tuple or a dict; iterated once.
        metric: :class:`Accuracy`, :class:`Metric`, or any callable from a model to a float.
        max_drop: in the metric's unit, against the float model on the same examples.
        recipe: what to quantize, and how; :meth:`Recipe.int8` if None.
        target: where it will run.
        directory: for ``model.onnx``, ``float.onnx`` and ``outcome.json``; None keeps nothing.
        threads: of the runtime, for one operator; None for all cores.

    Raises:
        HalfstepError: a subclass that says what was wrong with the model, the data, the metric or the directory.
    """
    folder = _writable(directory)
    scorer = as_scorer(metric)
    prepared = prepare(model, example_inputs, recipe, target)
    float_score, made = float_evaluation(scorer, prepared)
    goal = Goal(max_drop, float_score, scorer.higher_is_better)
    observe(prepared, calibration)

    search = Search(prepared, scorer, goal, made)
    score = climb_ptq(search)

    with tempfile.TemporaryDirectory() as temporary:
        place = folder or Path(temporary)
        with steps("exporting"):
            scores = {"float_score": repr(float_score.value), "score": repr(score.value), "rung": "ptq"}
            file = export_onnx(prepared, place / "model.onnx", scores)
            float_file = export_float(prepared, place / "float.onnx")
        with steps("verifying on the runtime"):
            proof = verify(file, prepared, prepared.sample, float_file, threads)
        deployed = DeployedModel(file, prepared.captured.in_spec, prepared.captured.out_spec, threads)
        with steps("evaluating the deployed file"):
            deployed_score = scorer.evaluate(deployed)
    search.evaluations.append(Evaluation("deployed file", deployed_score.value, 0.0))
    outcome = Outcome(
        met=goal.met(deployed_score),
        rung="ptq",
        float_score=float_score.value,
        score=score.value,
        deployed_score=deployed_score.value,
        max_drop=max_drop,
        float_layers=tuple(sorted(prepared.float_layers)),
        evaluations=len(search.evaluations),
        history=tuple(search.evaluations),
        decisions=tuple(search.decisions),
        verification=proof,
        model=prepared,
        directory=folder,
    )
    if folder is not None:
        outcome.save(folder / "outcome.json")
    return outcome


def _writable(directory: str | Path | None) -> Path | None:
    """The directory, made if need be, known to be writable before any work is done."""
    if directory is None:
        return None
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise RunError(
            f"directory {folder} cannot be written: {error.strerror}; choose another one"
        ) from error
    return folder
