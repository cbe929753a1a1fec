"""What leaving a group of layers in float costs in time, measured on the runtime of the target."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from halfstep.errors import ArgumentError, NotObservedError
from halfstep.export.onnx import export_onnx
from halfstep.graph.choices import Choices
from halfstep.graph.inputs import batch_size, tensors_of
from halfstep.ladder.groups import Group
from halfstep.model import QuantizedModel
from halfstep.progress import track
from halfstep.runtime.deployed import DeployedModel
from halfstep.runtime.latency import enough_rounds, race

#: Interleaved runs of every file.
ROUNDS = 31


def microseconds(
    model: QuantizedModel,
    groups: Sequence[Group],
    threads: int | None = None,
    rounds: int = ROUNDS,
    batch: int | None = None,
    least: float = 0.0,
) -> list[float]:
    """How much longer a batch takes with each group in float than with none, conversions between them included.

    Writes a file for each group and runs them all in turns, on the first batch that calibration kept. Negative where
    float is faster. What the fully quantized file differs from its own twin is taken as noise: nothing closer to 0
    than that is told apart from it.

    Args:
        model: calibrated; it is the same afterwards.
        groups: to be left in float, one at a time.
        threads: of the runtime, for one operator; None for all cores.
        rounds: interleaved runs, at least 3; more of them where a run takes a fraction of a millisecond.
        batch: how many examples a run takes, repeated if need be; None for the first calibration batch as it is.
        least: a share of the fully quantized file's time; differences within it are 0 too.

    Returns:
        Microseconds for each group.

    Raises:
        NotObservedError: if no example was kept.
        ArgumentError: if ``batch`` is less than 1.
        ExportError: if the runtime cannot run a file.
    """
    now = model.choices
    states = [replace(now, float_layers=now.float_layers | set(group.layers)) for group in groups]
    base, null, *others = race_choices(model, [now, now, *states], threads, rounds, batch)
    mean = (base + null) / 2
    noise = max(abs(null - base), least * mean)
    return [other - mean if abs(other - mean) > noise else 0.0 for other in others]


def race_choices(
    model: QuantizedModel,
    choices: Sequence[Choices],
    threads: int | None = None,
    rounds: int = ROUNDS,
    batch: int | None = None,
) -> list[float]:
    """Microseconds that a batch takes under each of ``choices``: a file is written for each, and all run in turns.

    Args:
        model: calibrated; it is the same afterwards.
        choices: the layers at the steps towards float, for each file.
        threads: of the runtime, for one operator; None for all cores.
        rounds: interleaved runs, at least 3; more of them where a run takes a fraction of a millisecond.
        batch: how many examples a run takes, repeated if need be; None for the first calibration batch as it is.

    Raises:
        NotObservedError: if no example was kept.
        ArgumentError: if ``batch`` is less than 1.
        ExportError: if the runtime cannot run a file.
    """
    if not model.sample:
        raise NotObservedError("latency: no example was kept to time; run observe() first")
    if batch is not None and batch < 1:
        raise ArgumentError(f"batch: got {batch}, needed at least 1")
    inputs = model.sample[0]
    if batch is not None:
        inputs = model.captured.select(inputs, torch.arange(batch) % batch_size(inputs))
    leaves = tensors_of(inputs)
    before = model.choices
    with tempfile.TemporaryDirectory() as directory:
        sessions = []
        try:
            for index, chosen in enumerate(track(choices, "files to race")):
                model.choose(chosen)
                file = export_onnx(model, Path(directory) / f"{index}.onnx", check=False)
                sessions.append(DeployedModel(file, threads=threads, runtime=model.target.runtime))
        finally:
            model.choose(before)
        contestants = {str(index): functools.partial(file, *leaves) for index, file in enumerate(sessions)}
        raced = race(contestants, enough_rounds(contestants["0"], rounds))
    return [1e3 * file.undisturbed for file in raced.values()]
