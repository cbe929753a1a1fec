"""What leaving a group of layers in float costs in time, measured on the runtime of the target."""

from __future__ import annotations

import functools
import shutil
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from halfstep.errors import ArgumentError, NotObservedError
from halfstep.export.onnx import export_onnx
from halfstep.graph.placement import Choices
from halfstep.ladder.environment import free_memory
from halfstep.model import QuantizedModel
from halfstep.precision import Group
from halfstep.progress import track
from halfstep.runtime.deployed import DeployedModel
from halfstep.runtime.file import file_size
from halfstep.runtime.latency import enough_rounds, race

#: Interleaved runs of every file.
ROUNDS = 31

#: Files that race at a time beside the base and its twin, at most. Fewer where they are large.
HEAT = 16
#: Bytes that the sessions of a heat take at most, and no more than half of what is free; one file beside the base and
#: its twin races whatever it takes.
MEMORY = 4 * 2**30
#: Bytes of a session for each byte of its file: the weights as they are stored, and as the kernels want them.
IN_MEMORY = 3


@dataclass(frozen=True)
class Raced:
    """How a file did in its heat, in microseconds of a batch.

    Attributes:
        base: what the base took, the mean of its two sessions.
        longer: what the file took more.
        noise: what the base's two sessions differed by.
    """

    base: float
    longer: float
    noise: float


def microseconds(
    model: QuantizedModel,
    groups: Sequence[Group],
    threads: int | None = None,
    rounds: int = ROUNDS,
    batch: int | None = None,
    least: float = 0.0,
) -> list[float]:
    """How much longer a batch takes with each group in float than with none, conversions between them included.

    Writes a file for each group and runs them in turns, on the first batch that calibration kept, as many at a time as
    memory has room for (see :func:`heats`). Negative where float is faster. What the fully quantized file differs from
    its own twin in the same heat is taken as noise: nothing closer to 0 than that is told apart from it.

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
    raced = heats(model, now, states, threads, rounds, batch)
    return [file.longer if abs(file.longer) > max(file.noise, least * file.base) else 0.0 for file in raced]


def race_choices(
    model: QuantizedModel,
    choices: Sequence[Choices],
    threads: int | None = None,
    rounds: int = ROUNDS,
    batch: int | None = None,
) -> list[float]:
    """Microseconds that a batch takes under each of ``choices``, raced as files against the first of them.

    Args:
        model: calibrated; it is the same afterwards.
        choices: the layers at the steps towards float, for each file; two at least.
        threads: of the runtime, for one operator; None for all cores.
        rounds: interleaved runs, at least 3; more of them where a run takes a fraction of a millisecond.
        batch: how many examples a run takes, repeated if need be; None for the first calibration batch as it is.

    Raises:
        NotObservedError: if no example was kept.
        ArgumentError: if ``batch`` is less than 1.
        ExportError: if the runtime cannot run a file.
    """
    raced = heats(model, choices[0], choices[1:], threads, rounds, batch)
    first = statistics.median(file.base for file in raced)
    return [first, *(first + file.longer for file in raced)]


def heats(
    model: QuantizedModel,
    base: Choices,
    others: Sequence[Choices],
    threads: int | None = None,
    rounds: int = ROUNDS,
    batch: int | None = None,
) -> list[Raced]:
    """Race a file for each of ``others`` against the base's, in heats whose sessions fit into memory.

    A heat has at most :data:`HEAT` files, and no more than :data:`MEMORY` has room for; they are written, run and
    deleted before the next one. The base and a twin of it run in each, and a file is compared with them alone: so a
    slow phase of the machine hits both sides of a difference, and each heat has its own measure of noise.

    Args:
        model: calibrated; it is the same afterwards.
        base: the layers at the steps towards float that the others are compared with.
        others: the same, for each file.
        threads: of the runtime, for one operator; None for all cores.
        rounds: interleaved runs, at least 3; more of them where a run takes a fraction of a millisecond.
        batch: how many examples a run takes, repeated if need be; None for the first calibration batch as it is.

    Returns:
        A figure for each of ``others``.

    Raises:
        NotObservedError: if no example was kept.
        ArgumentError: if ``batch`` is less than 1.
        ExportError: if the runtime cannot run a file.
    """
    inputs, before, found = _inputs(model, batch), model.choices, list[Raced]()
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        try:
            first = _write(model, base, folder / "base.onnx")
            room, size = _room(folder), 2 * file_size(first)
            files = _written(model, others, folder)
            waiting = next(files, None)
            while waiting is not None:
                heat, used = list[Path](), size
                while waiting is not None and (not heat or (len(heat) < HEAT and used + waiting[1] <= room)):
                    heat.append(waiting[0])
                    used += waiting[1]
                    waiting = next(files, None)
                times = _race([first, first, *heat], model.target.runtime, inputs, threads, rounds)
                found += _compared(*times)
                for done in heat:
                    for part in folder.glob(f"{done.name}*"):  # weights may lie beside the file
                        part.unlink()
        finally:
            model.choose(before)
    return found


def _inputs(model: QuantizedModel, batch: int | None) -> list[torch.Tensor]:
    """What a run takes."""
    if not model.sample:
        raise NotObservedError("latency: no example was kept to time; run observe() first")
    if batch is not None and batch < 1:
        raise ArgumentError(f"batch: got {batch}, needed at least 1")
    inputs = model.sample[0]
    if batch is not None:
        inputs = model.captured.select(inputs, torch.arange(batch) % model.captured.batch_size(inputs))
    return model.file_inputs(inputs)


def _room(folder: Path) -> int:
    """Bytes of files that may be there at a time."""
    memory = min(MEMORY, free_memory() // 2)
    return min(memory // IN_MEMORY, shutil.disk_usage(folder).free // 2)


def _written(model: QuantizedModel, choices: Sequence[Choices], folder: Path) -> Iterator[tuple[Path, int]]:
    """A file for each of ``choices``, written when it is asked for, and its bytes."""
    for index, chosen in enumerate(track(choices, "files to race")):
        file = _write(model, chosen, folder / f"{index}.onnx")
        yield file, file_size(file)


def _write(model: QuantizedModel, chosen: Choices, path: Path) -> Path:
    model.choose(chosen)
    return export_onnx(model, path, check=False)


def _race(
    files: Sequence[Path], runtime: str, inputs: Sequence[torch.Tensor], threads: int | None, rounds: int
) -> list[float]:
    """Microseconds of each file; their sessions live as long as this call."""
    sessions = [DeployedModel(file, threads=threads, runtime=runtime) for file in files]
    contestants = {str(index): functools.partial(file, *inputs) for index, file in enumerate(sessions)}
    raced = race(contestants, enough_rounds(contestants["0"], rounds))
    return [1e3 * file.undisturbed for file in raced.values()]


def _compared(base: float, twin: float, *others: float) -> list[Raced]:
    mean = (base + twin) / 2
    return [Raced(mean, other - mean, abs(twin - base)) for other in others]
