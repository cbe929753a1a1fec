"""The whole ladder in one call."""

from __future__ import annotations

import functools
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from halfstep.distributed import Crew, crew
from halfstep.errors import ArgumentError, CaptureError
from halfstep.evaluate import as_scorers, parts
from halfstep.export.onnx import export_float
from halfstep.fidelity.reference import knowing_float
from halfstep.files import are_one
from halfstep.graph.inputs import ModelInputs
from halfstep.graph.padding import Mask
from halfstep.graph.shapes import Dynamic
from halfstep.graph.states import States
from halfstep.journal import Journal
from halfstep.ladder.beginning import begin
from halfstep.ladder.climb import ascend
from halfstep.ladder.deploy import deploy, file_score
from halfstep.ladder.goal import Asked, GoalSpec
from halfstep.ladder.identity import claim_run
from halfstep.ladder.outcome import Outcome
from halfstep.ladder.pace import CHECKED, FLOAT, UNCHECKED, Exports, Pace, check_latency
from halfstep.ladder.partial import Partial
from halfstep.ladder.prepare import PORTABLE, check_model, prepare, settle
from halfstep.ladder.qat import QAT
from halfstep.ladder.ranks import agree, follow
from halfstep.ladder.rung import Rung
from halfstep.ladder.rungs import RUNGS, find_rungs
from halfstep.ladder.search import Search
from halfstep.ladder.speed import tune_for_speed
from halfstep.live import shown
from halfstep.model import QuantizedModel
from halfstep.onnx_in.from_file import origin_of
from halfstep.onnx_in.origin import QUANTIZED
from halfstep.progress import Budget, steps
from halfstep.quiet import undisturbed
from halfstep.recipe import Recipe
from halfstep.targets import Target, find_target
from halfstep.training.options import Training, check_training

#: Networks that a run writes.
FILES = (CHECKED, UNCHECKED, FLOAT)


def quantize(
    model: nn.Module | str | Path | Mapping[str, nn.Module],
    example_inputs: ModelInputs | None,
    calibration: Iterable[ModelInputs] | Mapping[str, Iterable[ModelInputs]],
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
    rungs: str | Rung | Iterable[str | Rung] = tuple(RUNGS),
    budget: Budget | None = None,
    partial: Partial | None = None,
    max_float: float | None = None,
    tune: bool = False,
    fresh: bool = False,
    command: str = "",
    progress: bool = True,
    dynamic: Dynamic | None = None,
    padding: Mask | None = None,
    float_from: str | Sequence[str] | None = None,
    states: States = None,
    autocast: torch.dtype | None = None,
    latency: float | None = None,
) -> Outcome:
    """Quantize ``model`` so that its score drops by no more than allowed, and prove it on the deployed file.

    Climbs rung after rung, each from the best candidate so far, and stops at the first that meets the target. If none
    does, the outcome is the best that was found, with ``met`` False and advice.

    With a ``directory`` everything is kept in a journal: the same call again goes on where an earlier one was killed,
    on another processor too, and repeats no finished evaluation. Model, data, metric, loss and options are compared
    with the earlier call's by their content, for which data are read once more; with others the directory is refused.
    Of what cannot be compared (what a function reads) a part of the float model's scores is taken again.

    In every process of an initialised ``torch.distributed`` (gloo or nccl), all of which make the same call with the
    same model and all of the data, the work is shared: docs/scaling.md says how. Rank 0 decides and writes; the outcome
    is the same on all, and the one that a single process would have.

    Args:
        model: a trained module, or the path of an ONNX file; left untouched. In half precision or float64 it is
            computed in float32, and its own scores are what the drop is measured from; inputs may come in its type or
            in float32. Or several modules by name, an encoder and the decoder around which a loop is: one ladder, one
            budget and one outcome for all, and a file each.
        example_inputs: a tensor, a tuple or a dict, with a batch of at least 2; None makes some up for a file. Of
            several modules a dict of them.
        calibration: model inputs, each a tensor, a tuple or a dict; iterated once. Of several modules a dict of them.
        metric: :class:`Accuracy`, :class:`Metric`, :class:`SetMetric`, or any callable from a model to a float; without
            labels :class:`Agreement`, :class:`Cosine` or :class:`SQNR`; or several of them by name, all of which must
            keep to their targets. The first one leads: single figures are its. Of several modules a function gets a
            dict of them, each to be called as the user's is; labelled inputs are dicts by module, and so are outputs.
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
        confidence: of the drops' intervals, 0.95 for 95%: with it the upper ends of all candidates hold together, and
            so the lower ends. Each is widened for the candidates examined on the same examples before.
        strict: demand that the upper end of the interval keeps to the target, not only the drop that was measured. If
            the labelled examples are a random sample, a network that drops by more than the target on all such data is
            then accepted with a probability of at most 1 - confidence, however many candidates are tried, see
            :class:`.Goal`; docs/confidence.md says how many examples that takes. Not strict, nothing of the kind is
            promised: of many candidates the first that passes is likely to be worse than it looks.
        rungs: which to climb, from the bottom up: ``"ptq"``, ``"partial"``, ``"qat"``, or with options
            :class:`PTQ`, :class:`Partial`, :class:`QAT`, or a :class:`Rung` of your own; PTQ always; one may be given
            alone. ``"mixed_bits"`` (:class:`MixedBits`) among them is climbed from what meets the target, and makes it
            cheaper.
        budget: what the search may cost; None for no bound.
        partial: how to look for layers to put back to float; short for ``Partial(...)`` among the rungs.
        max_float: short for ``Partial(max_float=...)``: the share of layers that partial quantization may leave in
            float while there are rungs left to climb, 0.5 if None; what leaves more is kept for the case that no later
            rung meets the target.
        tune: measure every group of layers on this machine, and leave in float those that integers slow down, where
            the target still holds; a decision says which.
        fresh: begin anew in a used directory; what an earlier run left there is moved to a folder in it.
        command: what to type to do it again; the report shows it.
        dynamic: dimensions of the inputs that may vary beside the batch, as :func:`prepare` takes them.
        padding: what only fills a batch up, as :func:`prepare` takes it.
        float_from: modules from whose first value on everything is left in float, as :func:`prepare` takes them.
        states: outputs that are given back as inputs, as :func:`prepare` takes them.
        autocast: ``torch.bfloat16`` for calibration in mixed precision, as :func:`prepare` takes it.
        latency: how many times as fast as float the file must be beside the accuracy target, on the target's runtime
            and this machine, such as 2.0. The outcome is the most accurate that was found to be so fast; ``met`` is
            False where none is, or that one misses the accuracy. What meets the accuracy with layers in float, but too
            slowly, is kept in reserve while rungs are left; where the best is too slow at the end, layers that integers
            slow down go to float, as with ``tune``.
        progress: show what is being done: bars on a terminal and in notebooks, the log called ``"halfstep"`` elsewhere.

    Raises:
        HalfstepError: a subclass that says what was wrong with the model, the data, the metric or the directory.
    """
    started = time.perf_counter()
    if training is not None:
        check_training(training)
    check_model(model)
    asked = (rungs,) if isinstance(rungs, (str, Rung)) else tuple(rungs)
    ladder = find_rungs(asked, training, partial, max_float)
    training = next((rung.training for rung in ladder if isinstance(rung, QAT)), training)
    aim = GoalSpec(max_drop, relative_drop, floor, confidence, strict)
    found, recipe = find_target(target), recipe or Recipe.int8()
    check_latency(latency, found)
    with (
        undisturbed(),
        crew() as ranks,
        shown(progress and ranks.leads),
        Journal(_checked_directory(ranks, model, directory), fresh) as journal,
        tempfile.TemporaryDirectory() as name,
    ):
        _check_new(journal)
        temporary = Path(name)
        scorer = as_scorers(metric)
        aim.check(scorer)
        settled = settle(recipe, found, journal.entries)
        settled = replace(settled, portable=ranks.everyone.told(settled.portable))
        prepared = prepare(
            model,
            example_inputs,
            settled,
            found,
            dynamic=dynamic,
            padding=padding,
            float_from=float_from,
            states=states,
            autocast=autocast,
        )
        _check_sites(prepared)
        calibration = prepared.captured.batches(calibration)
        for rung in ladder:
            rung.check(prepared)
        if not ranks.leads:
            return follow(ranks, prepared, scorer, calibration, training)
        with steps("exporting the float network"):  # what cannot be deployed is known now
            float_file = export_float(prepared, temporary / FLOAT)
        claimed = claim_run(journal, prepared, scorer, aim, training)
        if recipe.portable is None:
            journal.write(PORTABLE, portable=settled.portable)
        scorer = knowing_float(scorer, prepared)
        agree(ranks, prepared, scorer, calibration, training, claimed.judged)
        search = begin(journal, prepared, scorer, aim, calibration, budget or Budget(), claimed)
        search.started, search.threads = started, threads
        _write_settings(search, ladder, aim, command, latency)
        exports = Exports(temporary)
        search.score_file = functools.partial(file_score, search, exports, threads)
        pace = None if latency is None else Pace(latency, exports, float_file, threads)
        path = ascend(search, ladder, tune, pace)
        if tune or (pace is not None and search.best is not None and not pace.enough(search, search.best)):
            tune_for_speed(search, threads)
        return ranks.end(
            deploy(search, path, exports, journal.folder or temporary, float_file, threads, pace)
        )


def _checked_directory(
    ranks: Crew, model: nn.Module | str | Path | Mapping[str, nn.Module], directory: str | Path | None
) -> str | Path | None:
    """The run's directory, which only rank 0 has; raise where a file of the run would take the network's own place."""
    if directory is None or not ranks.leads:
        return None
    for network in model.values() if isinstance(model, Mapping) else (model,):
        if isinstance(network, nn.Module):
            source = None if (origin := origin_of(network)) is None else origin.source.path
        else:
            source = Path(network)
        for taken in (Path(directory) / name for name in FILES):
            if source is not None and are_one(taken, source):
                raise ArgumentError(
                    f"directory: {directory} holds {taken.name}, which the network is read from and which the run "
                    "would write over; needed another directory"
                )
    return directory


def _check_new(journal: Journal) -> None:
    """Raise where a run that begins would write over files that no run of this directory wrote."""
    there = [name for name in FILES if journal.folder is not None and (journal.folder / name).exists()]
    if there and not journal.resumed:
        raise ArgumentError(
            f"directory: {journal.folder} holds {there[0]} and no journal, so no run wrote it that could go on; needed "
            "another directory, or fresh=True (--fresh), which moves it to a folder in this one"
        )


def _check_sites(prepared: QuantizedModel) -> None:
    """Raise where there is nothing to quantize."""
    if prepared.placement.sites:
        return
    kinds = {each.operator.kind for each in prepared.placement.float_operators}
    others = [each for each in prepared.placement.float_operators if each.reason and QUANTIZED not in kinds]
    floats = prepared.layers or others
    reasons = "; ".join(f"{each.name!r} {each.reason}" for each in floats[:3])
    raise CaptureError(
        "nothing of the network is to be quantized: "
        + (reasons or "it has no layers" + (" that are not quantized already" if QUANTIZED in kinds else ""))
        + "; give a network in float with convs or products by weights, and a recipe that quantizes them"
    )


def _write_settings(
    search: Search, ladder: Sequence[Rung], aim: GoalSpec, command: str, latency: float | None
) -> None:
    """Write down what was asked, with every default resolved."""
    model, goal = search.model, search.goal
    timed: dict[str, Any] = {} if latency is None else {"latency": latency}
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
        **timed,
    )
