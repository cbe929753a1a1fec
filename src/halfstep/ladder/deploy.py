"""The end of a climb: the file, what it turned out to be, and its own score."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from halfstep.evaluate import Score
from halfstep.export.onnx import export_float, export_onnx
from halfstep.export.verify import verify
from halfstep.ladder.advice import advise
from halfstep.ladder.evaluation import Verdict
from halfstep.ladder.files import measure_files
from halfstep.ladder.outcome import Outcome
from halfstep.ladder.portrait import portray_input, portray_sites
from halfstep.ladder.rung import Reached
from halfstep.ladder.search import Search, timed_evaluation
from halfstep.progress import steps
from halfstep.runtime.deployed import DeployedModel


def deploy(search: Search, path: Sequence[Reached], place: Path, threads: int | None) -> Outcome:
    """Export the best candidate to ``place``, verify the file, and score it on its runtime.

    Args:
        search: its model is the best candidate.
        path: the rungs climbed.
        place: a directory.
        threads: of the runtime.
    """
    model, best = search.model, search.best
    assert best is not None
    rung = next((name for name, reached in search.reached.items() if reached is best), path[-1].rung)
    with steps("exporting"):
        scores = {
            "float_score": repr(search.goal.float_score.value),
            "score": repr(best.score.value),
            "rung": rung,
        }
        file = export_onnx(model, place / "model.onnx", scores)
        float_file = export_float(model, place / "float.onnx")
    with steps("verifying on the runtime"):
        proof = verify(file, model, model.sample, float_file, threads)
    deployed = DeployedModel(file, model.captured.in_spec, model.captured.out_spec, threads)
    score = _file_score(search, deployed, file)
    outcome = Outcome(
        met=search.goal.met(score),
        rung=rung,
        float_score=search.goal.float_score.value,
        score=best.score.value,
        deployed_score=score.value,
        max_drop=search.goal.max_drop,
        float_layers=tuple(sorted(model.float_layers)),
        evaluations=len(search.evaluations),
        history=tuple(search.evaluations),
        decisions=tuple(search.decisions),
        verification=proof,
        model=model,
        directory=search.journal.folder,
        path=tuple(path),
        advice=advise(search, path, score),
        metrics=search.goal.standings(score),
    )
    with steps("measuring the rungs' files"):
        files = measure_files(search, proof, score.value, float_file, threads)
    _write_down(search, outcome, files)
    outcome = replace(outcome, entries=tuple(search.journal.entries))
    if search.journal.folder is not None:
        outcome.save(search.journal.folder / "outcome.json")
    return outcome


def _file_score(search: Search, deployed: DeployedModel, file: Path) -> Score:
    """The score of the file, unless the very same bytes were scored before."""
    key = f"file {hashlib.sha256(file.read_bytes()).hexdigest()}"
    if key in search.memory:
        return search.memory[key].score
    score, made = timed_evaluation(search.scorer, deployed, "the deployed file")
    verdict = Verdict(search.goal.met(score), score, complete=True)
    search.record(replace(made, key=key, rung="deployed"), verdict)
    return score


def _write_down(search: Search, outcome: Outcome, files: list[dict[str, Any]]) -> None:
    """What the report needs beside what the journal holds already."""
    search.journal.write("sites", sites=portray_sites(outcome.model))
    picture = portray_input(outcome.model)
    if picture is not None:
        search.journal.write("picture", **picture)
    known_by_now = ("history", "decisions", "path", "latency_ms")
    record = {name: value for name, value in outcome.to_dict().items() if name not in known_by_now}
    latency = {name: asdict(value) for name, value in outcome.verification.latency.items()}
    search.journal.write("outcome", **record, measured={"latency_ms": latency, "files": files})
