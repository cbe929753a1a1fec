"""The end of a climb: files, what they turned out to be, and what would help where the target was missed.

Size and latency of every rung's best as a file, in one race: what accuracy costs.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from halfstep.errors import RefusedError
from halfstep.evaluate import CallableMetric, Score, classifies, parts
from halfstep.export.onnx import copy_file
from halfstep.export.verify import Verification, verify
from halfstep.ladder.evaluation import Verdict
from halfstep.ladder.float_score import timed_evaluation
from halfstep.ladder.identity import runtime_identity
from halfstep.ladder.outcome import Outcome
from halfstep.ladder.pace import CHECKED, UNCHECKED, Exports, Pace, rung_of
from halfstep.ladder.ranks import hand_out
from halfstep.ladder.rung import RungResult
from halfstep.ladder.search import Evaluated, Search
from halfstep.ladder.site_records import portray_input, record_sites
from halfstep.onnx_in.origin import Origin
from halfstep.progress import BudgetSpent, interruptible, steps, track
from halfstep.runtime.deployed import DeployedModel
from halfstep.runtime.file import file_size, module_file
from halfstep.runtime.latency import race

#: Fewer calibration examples than this are worth a word.
FEW = 128


def advise(search: Search, path: Sequence[RungResult], deployed: Score) -> tuple[str, ...]:
    """The cheapest next steps first; nothing if the target is met."""
    goal, best = search.asked, search.best
    if goal.met(deployed):
        return ()
    advice = []
    if best is not None and goal.met(best.score):
        advice.append(
            f"The simulation meets the target ({goal.words(best.score)}), the file does not ({goal.words(deployed)}): "
            "a slightly smaller max_drop makes the search keep clear of the edge"
        )
    if note := next((step.note for step in path if step.note), ""):
        cure = "the same call" if note.startswith("it failed") else "a larger budget"
        advice.append(f"The search stopped early, {note}; {cure} goes on from here")
    climbed = {step.rung for step in path}
    if "partial" not in climbed and not note:
        advice.append("Partial quantization was not tried: add 'partial' to rungs")
    if "qat" not in climbed and not note:
        advice.append(
            "Training was not tried: with training=hs.Training(labelled, loss) the last rung wins back most of what "
            "few bits lose"
        )
    bits = [site.format.bits for site in search.model.sites.values()]
    if bits and min(bits) < 7:  # 7 may be a processor's need
        advice.append(f"{min(bits)} bits are few: 8 bits for the side that loses more")
    if 0 < search.calibrated < FEW:
        advice.append(f"{search.calibrated} calibration examples are few; {FEW} or more give steadier ranges")
    for (asked, _), part in zip(goal.each(deployed), goal.standings(deployed), strict=True):
        if part.met:
            continue
        of = f" for {part.metric}" if part.metric else ""
        if goal.strict and part.high is None:
            advice.append(f"A strict target{of} cannot be met without an interval: {part.unsure}")
            continue
        needed = part.high if goal.strict and part.high is not None else part.drop
        target = f"max_drop of {needed:.4g}"
        if asked.target == "floor":
            worst = part.float_score + (-needed if asked.higher_is_better else needed)
            target = f"floor of {worst:.4g}"
        advice.append(f"A {target}{of} would be met by what was found")
    return tuple(advice)


def measure_files(
    search: Search, exports: Exports, proof: Verification, final: float, float_file: Path, threads: int | None
) -> list[dict[str, Any]]:
    """The float file, the best of each rung below the last one, and the final file.

    Those of the rungs below are left out where the budget's minutes are used up; a decision says so.

    The model is the best candidate again afterwards.

    Args:
        search: after the climb.
        exports: the files of candidates.
        proof: of the final file.
        final: its score.
        float_file: its float counterpart.
        threads: of the runtime.

    Returns:
        ``name``, ``score``, ``bytes``, ``ms`` of a batch, and ``speedup`` over float for each; scores of rungs below
        are what the climb had of them, most of them simulations'. They are raced later, so their ``ms`` are the float
        file's of the first race over their speed-up.
    """
    speeds = proof.latency
    points = [
        _point("float", search.goal.float_score.value, proof.float_size, speeds["float"]),
        _point("final file", final, proof.size, speeds["quantized"]),
    ]
    below = {name: candidate for name, candidate in search.reached.items() if candidate is not search.best}
    try:
        with interruptible(search.check_time):
            raced = _race(search, exports, below, float_file, threads) if below else []
            return points + [{**point, "ms": speeds["float"].median / point["speedup"]} for point in raced]
    except BudgetSpent as spent:
        search.decide(f"size and speed of what came before were not measured, the budget is spent: {spent}")
        return points


def _race(
    search: Search, exports: Exports, below: Mapping[str, Evaluated], float_file: Path, threads: int | None
) -> list[dict[str, Any]]:
    """Write, run and compare the candidates' files; the model is the best one again afterwards."""
    best = search.best
    assert best is not None
    captured, inputs = search.model.captured, search.model.file_inputs(search.model.sample[0])
    specs = captured.in_spec, captured.out_spec
    runtime = search.model.target.runtime
    models = {"float": DeployedModel(float_file, *specs, threads, runtime)}
    sizes = {}
    try:
        for name, candidate in track(below.items(), "files of the rungs", len(below)):
            file = exports.file(search, candidate, check=False)
            models[name] = DeployedModel(file, *specs, threads, runtime)
            sizes[name] = file_size(file)
    finally:
        best.snapshot.restore()
    latency = race({name: functools.partial(model, *inputs) for name, model in models.items()})
    return [
        _point(name, candidate.score.value, sizes[name], latency[name]) for name, candidate in below.items()
    ]


def _point(name: str, score: float, size: int, latency: Any) -> dict[str, Any]:
    return {"name": name, "score": score, "bytes": size, "ms": latency.median, "speedup": latency.speedup}


#: The entry of the journal that a run ends with, and the checkpoint of its network.
OUTCOME = "outcome"


def deploy(
    search: Search,
    path: Sequence[RungResult],
    exports: Exports,
    place: Path,
    float_file: Path,
    threads: int | None,
    pace: Pace | None = None,
) -> Outcome:
    """Put the best candidate's file in ``place``, verify it, and score it on its runtime.

    Where its file is refused, the next best candidate that a rung ended with takes its place. Where every file is, the
    best one's is written as ``refused.onnx``, for those who want to see what is wrong; the target is not met then,
    whatever it scores.

    Args:
        search: its model is the best candidate.
        path: the rungs climbed.
        exports: the files of candidates.
        place: a directory.
        float_file: the float network's, for comparison; copied to ``place``.
        threads: of the runtime.
        pace: how fast the file must be; None for any speed.
    """
    file, score, refused = _file_that_holds(search, exports, place, threads)
    model, best = search.model, search.best
    assert best is not None
    advice = advise(search, path, score)
    sure = search.asked.evidence(score)
    if not any(sure in said for said in search.decisions):
        search.decide(f"On the deployed file: {sure}")
    if refused:
        advice = (f"No file answers as its simulation: {refused}", *advice)
    if float_file.parent != place:
        float_file = copy_file(float_file, place / float_file.name)
    with steps("verifying on the runtime"):
        proof = verify(file, model, model.sample, float_file, threads, classes=classifies(search.scorer))
    if isinstance(origin := model.captured.origin, Origin):
        from halfstep.export.calls import changes  # onnx loads when it is needed

        for sentence in changes(origin.source, file):
            search.decide(sentence)
    simulation, known = best.score, search.recall(best.key)
    if simulation.simulated is not None and known is not None:  # it may have been simulated further since
        simulation = known.score if known.complete else replace(simulation, simulated=known.score.count)
    slow = "" if pace is None else pace.missed(proof.latency["quantized"].speedup)
    advice = (slow, *advice) if slow else advice
    files = measure_files(search, exports, proof, score.value, float_file, threads)
    outcome = Outcome(
        met=search.asked.met(score) and not refused and not slow,
        rung=rung_of(search, best),
        float_score=search.asked.float_score.value,
        score=simulation.value,
        simulated=simulation.simulated,
        deployed_score=score.value,
        max_drop=search.asked.max_drop,
        float_layers=tuple(sorted(model.float_layers)),
        evaluations=len(search.evaluations),
        history=tuple(search.evaluations),
        decisions=search.decisions,
        verification=proof,
        model=model,
        directory=search.journal.folder,
        path=tuple(path),
        advice=advice,
        metrics=search.asked.standings(score),
        refused=refused,
        latency=None if pace is None else pace.least,
    )
    _write_down(search, outcome, files)
    if search.journal.folder is not None:
        outcome.save(search.journal.folder / "outcome.json")
    # Last: pictures of a large network may find no memory, and the outcome is to be there then.
    _portray(search)
    return replace(outcome, entries=tuple(search.journal.entries))


def _file_that_holds(
    search: Search, exports: Exports, place: Path, threads: int | None
) -> tuple[Path, Score, str]:
    """The file of the best candidate whose file is not refused, and its score; else the best one's, and why it is.

    The search's best, and its model, are that candidate afterwards.
    """
    best, why = search.best, ""
    assert best is not None
    others = {id(candidate): candidate for candidate in search.reached.values() if candidate is not best}
    file, refused, modules = place / CHECKED, place / UNCHECKED, list(search.model.captured.parts)
    for candidate in (best, *sorted(others.values(), key=search.rank)):
        search.best = candidate
        candidate.snapshot.restore()
        try:
            _, score = file_score(search, exports, threads, candidate, paid=True)
        except RefusedError as error:
            search.decide(f"The file of {candidate.what} is refused: {error}")
            why = why or str(error)
        else:
            _remove(refused, modules)  # an earlier run's
            return copy_file(exports.file(search, candidate), file, modules), score, ""
    search.best = best
    best.snapshot.restore()
    _remove(file, modules)
    _, score = file_score(search, exports, threads, best, check=False, paid=True)
    return copy_file(exports.file(search, best, check=False), refused, modules), score, why


def _remove(file: Path, modules: Iterable[str]) -> None:
    """Remove a file, and those of its modules."""
    for each in (file, *(module_file(file, name) for name in modules)):
        each.unlink(missing_ok=True)


def file_score(
    search: Search,
    exports: Exports,
    threads: int | None,
    candidate: Evaluated,
    check: bool = True,
    paid: bool = False,
) -> tuple[str, Score]:
    """Score a candidate's file on its runtime; the key that is remembered by, and the score.

    The very same bytes are not scored again by the same versions on the same processor.

    Args:
        search: whose candidate it is; its model is the candidate where the file has to be written.
        exports: the files of candidates.
        threads: of the runtime.
        candidate: one that was evaluated.
        check: whether the file must answer as the simulation.
        paid: score it even if the budget is used up.

    Raises:
        BudgetSpent: if it is, and there is a candidate already.
        ExportError: if the file cannot be written.
        RefusedError: if its runtime does not take it, or it answers otherwise than the simulation.
    """
    model = search.model
    file = exports.file(search, candidate, check)
    key = f"file {hashlib.sha256(file.read_bytes()).hexdigest()}, {runtime_identity(model.target.runtime)}"
    if (known := search.recall(key)) is not None:
        return key, known.score
    if not paid:
        search.check_budget()
    deployed = DeployedModel(file, model.captured.in_spec, model.captured.out_spec, threads)
    if any(isinstance(part, CallableMetric) for part in parts(search.scorer).values()):
        hand_out(deployed, model.captured.parts)  # it may ask the other ranks for their part
    score, made = timed_evaluation(search.scorer, deployed, "the deployed file")
    # The same network but for rounding, so its file is no candidate of its own, and held to the same error.
    score = score.numbered(candidate.score.examined)
    verdict = Verdict(search.asked.met(score), score, complete=True)
    search.memory.record(replace(made, key=key, rung="deployed", examined=score.examined), verdict)
    return key, score


def _write_down(search: Search, outcome: Outcome, files: list[dict[str, Any]]) -> None:
    """The end of the journal, and the network itself, to export it again.

    The entry says which call of the directory it ends: how many have asked for something else than the one before.
    """
    best = search.best
    assert best is not None
    record = outcome.to_dict()
    for known_by_now in ("history", "decisions", "path", "environment"):
        del record[known_by_now]
    measured = {name: record.pop(name) for name in ("latency_ms", "latency_by_size", "microseconds")}
    measured["microseconds"] = {name: round(time, 2) for name, time in measured["microseconds"].items()}
    measured["files"] = files
    search.checkpoints.keep_network(OUTCOME, best.key, best.snapshot.state)
    search.journal.write(
        OUTCOME,
        **record,
        what=best.what,
        key=best.key,
        put_back=best.snapshot.precision.to_dict(),
        call=len(search.journal.of("settings")),
        measured=measured,
    )


def _portray(search: Search) -> None:
    """What pictures in the report are made of."""
    search.journal.write("sites", **record_sites(search.model))
    picture = portray_input(search.model)
    if picture is not None:
        search.journal.write("picture", **picture)
