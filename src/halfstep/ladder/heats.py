"""Files that differ in their layers' precision, raced against one of them: as many at a time as memory has room for,
each for as many rounds as its answer needs.
"""

from __future__ import annotations

import functools
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from halfstep.errors import ArgumentError, NotObservedError
from halfstep.export.onnx import export_onnx, foresee
from halfstep.graph.layer_precision import LayerPrecision
from halfstep.ladder.identity import free_memory
from halfstep.model import QuantizedModel
from halfstep.progress import track
from halfstep.runtime.deployed import DeployedModel
from halfstep.runtime.file import file_size
from halfstep.runtime.latency import enough_rounds, in_turns, lower_quartile

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


#: Which files a heat can do without from here on, given the milliseconds of the base, of its twin and of each file.
Asked = Callable[..., list[bool]]

#: Standard deviations that the number of rounds with a difference of one sign is away from half of them where it is
#: clear: all of 7, 12 of 14, 23 of 31.
CLEAR = 2.6


def slower_or_faster(base: Sequence[float], twin: Sequence[float], *files: Sequence[float]) -> list[bool]:
    """Of each file, whether it is clear that it is slower than the base and its twin, or that it is faster."""
    return [_sign(base, twin, file) != 0 for file in files]


def not_fastest(base: Sequence[float], twin: Sequence[float], *files: Sequence[float]) -> list[bool]:
    """Of each file, whether it is clearly slower than the base and its twin, or than the fastest of the others."""
    running = [file for file in files if len(file) == len(base)]
    best = min(running, key=lower_quartile, default=base)
    return [max(_sign(base, twin, file), _sign(best, best, file)) > 0 for file in files]


def _sign(base: Sequence[float], twin: Sequence[float], file: Sequence[float]) -> int:
    """1 if a file is clearly slower than the mean of two others in the same rounds, -1 if faster; else 0.

    The sign test: what disturbs a round may be as large as it likes.
    """
    rounds = list(zip(base, twin, file, strict=False))
    slower, faster = (sum(sign * (2 * c - a - b) > 0 for a, b, c in rounds) for sign in (1, -1))
    apart = CLEAR * math.sqrt(len(rounds))
    return int(slower - faster >= apart) - int(faster - slower >= apart)


def heats(
    model: QuantizedModel,
    base: LayerPrecision,
    others: Sequence[LayerPrecision],
    threads: int | None = None,
    rounds: int = ROUNDS,
    batch: int | None = None,
    asked: Asked = slower_or_faster,
) -> list[Raced]:
    """Race a file for each of ``others`` against the base's, in heats whose sessions fit into memory.

    A heat has at most :data:`HEAT` files, and no more than :data:`MEMORY` has room for; they are written, run and
    deleted before the next one. The base and a twin of it run in each, and a file is compared with them alone: so a
    slow phase of the machine hits both sides of a difference, and each heat has its own measure of noise. A file leaves
    its heat as soon as what is asked of it is clear.

    Args:
        model: calibrated; it is the same afterwards.
        base: the layers at the steps towards float that the others are compared with.
        others: the same, for each file.
        threads: of the runtime, for one operator; None for all cores.
        rounds: interleaved runs, at least 3; more of them where a run takes a fraction of a millisecond.
        batch: how many examples a run takes, repeated if need be; None for the first calibration batch as it is.
        asked: which files can leave, given the milliseconds of the base, of its twin and of the files, a row each.

    Returns:
        A figure for each of ``others``.

    Raises:
        NotObservedError: if no example was kept.
        ArgumentError: if ``batch`` is less than 1.
        ExportError: if the runtime cannot run a file.
    """
    inputs, before, found = _inputs(model, batch), model.precision, list[Raced]()
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        try:
            foresee(model, [base, *others])
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
                found += _race([first, first, *heat], model.target.runtime, inputs, threads, rounds, asked)
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


def _written(
    model: QuantizedModel, choices: Sequence[LayerPrecision], folder: Path
) -> Iterator[tuple[Path, int]]:
    """A file for each of ``choices``, written when it is asked for, and its bytes."""
    for index, chosen in enumerate(track(choices, "files to race")):
        file = _write(model, chosen, folder / f"{index}.onnx")
        yield file, file_size(file)


def _write(model: QuantizedModel, chosen: LayerPrecision, path: Path) -> Path:
    model.choose(chosen)
    return export_onnx(model, path, check=False)


def _race(
    files: Sequence[Path],
    runtime: str,
    inputs: Sequence[torch.Tensor],
    threads: int | None,
    rounds: int,
    asked: Asked,
) -> list[Raced]:
    """How the files behind the first two did; the sessions live as long as this call."""
    sessions = [DeployedModel(file, threads=threads, runtime=runtime) for file in files]
    names = [str(index) for index in range(len(files))]
    contestants = {
        name: functools.partial(session, *inputs) for name, session in zip(names, sessions, strict=True)
    }

    def leave(times: Mapping[str, Sequence[float]]) -> list[str]:
        clear = asked(*(times[name] for name in names))
        return [name for name, is_clear in zip(names[2:], clear, strict=True) if is_clear]

    times = in_turns(contestants, enough_rounds(contestants["0"], rounds), warmup=1, leave=leave)
    base, twin, *others = (times[name] for name in names)
    return [_compared(base, twin, other) for other in others]


def _compared(base: Sequence[float], twin: Sequence[float], other: Sequence[float]) -> Raced:
    """In the rounds that the file ran in, which its heat may have gone on behind."""
    first, second, third = (1e3 * lower_quartile(row[: len(other)]) for row in (base, twin, other))
    return Raced((first + second) / 2, third - (first + second) / 2, abs(second - first))
