"""Size and latency of every rung's best as a file, in one race: what accuracy costs."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

from halfstep.export.onnx import export_onnx
from halfstep.export.verify import Verification
from halfstep.graph.inputs import tensors_of
from halfstep.ladder.search import Search
from halfstep.runtime.deployed import DeployedModel
from halfstep.runtime.latency import race
from halfstep.runtime.size import file_size


def measure_files(
    search: Search, proof: Verification, final: float, float_file: Path, threads: int | None
) -> list[dict[str, Any]]:
    """The float file, the best of each rung below the last one, and the final file.

    The model is the best candidate again afterwards.

    Args:
        search: after the climb.
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
    best = search.best
    below = {name: candidate for name, candidate in search.reached.items() if candidate is not best}
    if best is None or not below:
        return points
    captured, inputs = search.model.captured, tensors_of(search.model.sample[0])
    specs = captured.in_spec, captured.out_spec
    runtime = search.model.target.runtime
    with tempfile.TemporaryDirectory() as directory:
        models = {"float": DeployedModel(float_file, *specs, threads, runtime)}
        sizes = {}
        for name, candidate in below.items():
            file = export_onnx(candidate.snapshot.restore(), Path(directory) / f"{name}.onnx", check=False)
            models[name] = DeployedModel(file, *specs, threads, runtime)
            sizes[name] = file_size(file)
        best.snapshot.restore()
        latency = race({name: functools.partial(model, *inputs) for name, model in models.items()})
    return points + [
        _point(name, candidate.score.value, sizes[name], latency[name]) for name, candidate in below.items()
    ]


def _point(name: str, score: float, size: int, latency: Any) -> dict[str, Any]:
    return {"name": name, "score": score, "bytes": size, "ms": latency.median, "speedup": latency.speedup}
