"""What leaving a group of layers in float costs in time, measured on the runtime of the target."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch.utils import _pytree as pytree

from halfstep.errors import NotObservedError
from halfstep.export.onnx import export_onnx
from halfstep.graph.inputs import call_arguments
from halfstep.ladder.groups import Group
from halfstep.model import QuantizedModel
from halfstep.progress import track
from halfstep.runtime.deployed import DeployedModel
from halfstep.runtime.latency import race

#: Interleaved runs of every file.
ROUNDS = 31


def microseconds(
    model: QuantizedModel, groups: Sequence[Group], threads: int | None = None, rounds: int = ROUNDS
) -> list[float]:
    """How much longer a batch takes with each group in float than with none, conversions between them included.

    Writes a file for each group and runs them all in turns, on the first batch that calibration kept. Negative where
    float is faster. What the fully quantized file differs from its own twin is taken as noise: nothing closer to 0
    than that is told apart from it.

    Args:
        model: calibrated; it is the same afterwards.
        groups: to be left in float, one at a time.
        threads: of the runtime, for one operator; None for all cores.
        rounds: interleaved runs, at least 3.

    Returns:
        Microseconds for each group.

    Raises:
        NotObservedError: if no example was kept.
        ExportError: if the runtime cannot run a file.
    """
    if not model.sample:
        raise NotObservedError("latency: no example was kept to time; run observe() first")
    leaves = [x for x in pytree.tree_leaves(call_arguments(model.sample[0])) if isinstance(x, torch.Tensor)]
    before = model.float_layers
    with tempfile.TemporaryDirectory() as directory:
        sessions = []
        try:
            for index, names in enumerate(
                track([(), (), *(group.layers for group in groups)], "files with one layer in float")
            ):
                model.float_layers = before | set(names)
                file = export_onnx(model, Path(directory) / f"{index}.onnx", check=False)
                sessions.append(DeployedModel(file, threads=threads, runtime=model.target.runtime))
        finally:
            model.float_layers = before
        contestants = {str(index): functools.partial(file, *leaves) for index, file in enumerate(sessions)}
        raced = race(contestants, rounds)
    base, null, *others = raced.values()
    noise = abs(1 / null.speedup - 1)
    return [
        1e3 * base.median * (lost if abs(lost) > noise else 0.0)
        for lost in (1 / other.speedup - 1 for other in others)
    ]
