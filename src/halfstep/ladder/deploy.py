"""The end of a climb: the file, what it turned out to be, and its own score."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from halfstep.errors import RefusedError
from halfstep.evaluate import Score, classifies
from halfstep.export.onnx import copy_file
from halfstep.export.verify import verify
from halfstep.ladder.advice import advise
from halfstep.ladder.environment import runtime_identity
from halfstep.ladder.evaluation import Verdict
from halfstep.ladder.exports import CHECKED, UNCHECKED, Exports, rung_of
from halfstep.ladder.files import measure_files
from halfstep.ladder.outcome import Outcome
from halfstep.ladder.pace import Pace
from halfstep.ladder.portrait import portray_input, portray_sites
from halfstep.ladder.rung import Reached
from halfstep.ladder.search import Search, timed_evaluation
from halfstep.onnx_in.origin import Origin
from halfstep.progress import steps
from halfstep.runtime.deployed import DeployedModel

#: The entry of the journal that a run ends with, and the checkpoint of its network.
OUTCOME = "outcome"


def deploy(
    search: Search,
    path: Sequence[Reached],
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
    slow = "" if pace is None else pace.missed(proof.latency["quantized"].speedup)
    advice = (slow, *advice) if slow else advice
    files = measure_files(search, exports, proof, score.value, float_file, threads)
    outcome = Outcome(
        met=search.asked.met(score) and not refused and not slow,
        rung=rung_of(search, best),
        float_score=search.asked.float_score.value,
        score=best.score.value,
        deployed_score=score.value,
        max_drop=search.asked.max_drop,
        float_layers=tuple(sorted(model.float_layers)),
        evaluations=len(search.evaluations),
        history=tuple(search.evaluations),
        decisions=tuple(search.decisions),
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
    file, refused = place / CHECKED, place / UNCHECKED
    for candidate in (best, *sorted(others.values(), key=search.rank)):
        search.best = candidate
        candidate.snapshot.restore()
        try:
            _, score = file_score(search, exports, threads)
        except RefusedError as error:
            search.decide(f"The file of {candidate.what} is refused: {error}")
            why = why or str(error)
        else:
            refused.unlink(missing_ok=True)  # an earlier run's
            return copy_file(exports.file(search, candidate), file), score, ""
    search.best = best
    best.snapshot.restore()
    file.unlink(missing_ok=True)
    _, score = file_score(search, exports, threads, check=False)
    return copy_file(exports.file(search, best, check=False), refused), score, why


def file_score(
    search: Search, exports: Exports, threads: int | None, check: bool = True
) -> tuple[str, Score]:
    """Score the best candidate's file on its runtime; the key that is remembered by, and the score.

    The very same bytes are not scored again by the same versions on the same processor.

    Args:
        search: its model is the best candidate.
        exports: the files of candidates.
        threads: of the runtime.
        check: whether the file must answer as the simulation.

    Raises:
        ExportError: if the file cannot be written.
        RefusedError: if its runtime does not take it, or it answers otherwise than the simulation.
    """
    model, best = search.model, search.best
    assert best is not None
    file = exports.file(search, best, check)
    key = f"file {hashlib.sha256(file.read_bytes()).hexdigest()}, {runtime_identity(model.target.runtime)}"
    if (known := search.recall(key)) is not None:
        return key, known.score
    deployed = DeployedModel(file, model.captured.in_spec, model.captured.out_spec, threads)
    score, made = timed_evaluation(search.scorer, deployed, "the deployed file")
    # The same network but for rounding, so its file is no candidate of its own, and held to the same error.
    score = score.numbered(best.score.examined)
    verdict = Verdict(search.asked.met(score), score, complete=True)
    search.record(replace(made, key=key, rung="deployed", examined=score.examined), verdict)
    return key, score


def _write_down(search: Search, outcome: Outcome, files: list[dict[str, Any]]) -> None:
    """The end of the journal, and the network itself, to export it again.

    The entry says which call of the directory it ends: how many have asked for something else than the one before.
    """
    best = search.best
    assert best is not None
    known_by_now = (
        "history",
        "decisions",
        "path",
        "latency_ms",
        "latency_by_size",
        "microseconds",
        "environment",
    )
    record = {name: value for name, value in outcome.to_dict().items() if name not in known_by_now}
    latency = {name: asdict(value) for name, value in outcome.verification.latency.items()}
    times = {name: round(time, 2) for name, time in outcome.verification.microseconds.items()}
    by_size = outcome.to_dict()["latency_by_size"]
    measured = {"latency_ms": latency, "latency_by_size": by_size, "files": files, "microseconds": times}
    search.checkpoints.keep_network(OUTCOME, best.key, best.snapshot.state)
    search.journal.write(
        OUTCOME,
        **record,
        what=best.what,
        key=best.key,
        put_back={name: sorted(layers) for name, layers in best.snapshot.put_back.items()},
        call=len(search.journal.of("settings")),
        measured=measured,
    )


def _portray(search: Search) -> None:
    """What pictures in the report are made of."""
    search.journal.write("sites", **portray_sites(search.model))
    picture = portray_input(search.model)
    if picture is not None:
        search.journal.write("picture", **picture)
