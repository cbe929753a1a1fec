"""Size and latency of every rung's best as a file, in one race: what accuracy costs."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from halfstep.export.verify import Verification
from halfstep.ladder.exports import Exports
from halfstep.ladder.search import Candidate, Search
from halfstep.progress import BudgetSpent, interruptible, track
from halfstep.runtime.deployed import DeployedModel
from halfstep.runtime.file import file_size
from halfstep.runtime.latency import race


def measure_files(
    search: Search,
    exports: Exports,
    proof: Verification,
    final: float,
    float_file: Path,
    threads: int | None,
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
        are simulated.
    """
    speeds = proof.latency
    points = [
        _point("float", search.goal.float_score.value, proof.float_size, speeds["float"]),
        _point("final file", final, proof.size, speeds["quantized"]),
    ]
    below = {name: candidate for name, candidate in search.reached.items() if candidate is not search.best}
    try:
        with interruptible(search.check_time):
            return points + (_race(search, exports, below, float_file, threads) if below else [])
    except BudgetSpent as spent:
        search.decide(f"size and speed of what came before were not measured, the budget is spent: {spent}")
        return points


def _race(
    search: Search, exports: Exports, below: Mapping[str, Candidate], float_file: Path, threads: int | None
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
