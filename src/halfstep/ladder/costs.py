"""What leaving layers in float costs in time, measured on the runtime of the target and kept.

Layers that are slower in integers than in float on this machine, found by running files, and put back.

What was timed on this machine, kept in the journal: a resumed search decides by the same figures.

A time is that of one candidate, on one runtime and processor, with so many threads. Where any of these is another one,
it is measured anew.
"""

from __future__ import annotations

import functools
import hashlib
import json
import statistics
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from halfstep.graph.layer_precision import LayerPrecision
from halfstep.ladder.alike import labels_of
from halfstep.ladder.heats import ROUNDS, heats, not_fastest, slower_or_faster
from halfstep.ladder.identity import machine
from halfstep.ladder.search import Search
from halfstep.model import QuantizedModel
from halfstep.precision import Group, groups_of
from halfstep.runtime.deployed import DeployedModel
from halfstep.runtime.latency import enough_rounds, race
from halfstep.snapshot import fingerprint


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
        least: a share of the fully quantized file's time; differences within it are 0 too. Where it is above 0 only the
            fastest file is looked for, and what is clearly slower has fewer rounds.

    Returns:
        Microseconds for each group.

    Raises:
        NotObservedError: if no example was kept.
        ArgumentError: if ``batch`` is less than 1.
        ExportError: if the runtime cannot run a file.
    """
    now = model.precision
    states = [now.with_layers("float", group.layers) for group in groups]
    raced = heats(model, now, states, threads, rounds, batch, not_fastest if least else slower_or_faster)
    return [file.longer if abs(file.longer) > max(file.noise, least * file.base) else 0.0 for file in raced]


def race_choices(
    model: QuantizedModel, choices: Sequence[LayerPrecision], threads: int | None = None
) -> list[float]:
    """Microseconds that a batch takes under each of ``choices``, raced as files against the first of them.

    Args:
        model: calibrated; it is the same afterwards.
        choices: the layers at the steps towards float, for each file; two at least.
        threads: of the runtime, for one operator; None for all cores.

    Raises:
        NotObservedError: if no example was kept.
        ExportError: if the runtime cannot run a file.
    """
    raced = heats(model, choices[0], choices[1:], threads, asked=not_fastest)
    first = statistics.median(file.base for file in raced)
    return [first, *(first + file.longer for file in raced)]


#: What was put to float changes what its neighbours cost: they are timed again, this often at most.
PASSES = 2

#: A network must be faster by this share of its time. Two sessions of one file differ by up to as much, and a layer in
#: float takes four times the memory.
LEAST = 0.04


@dataclass(frozen=True)
class Tuning:
    """What was left in float for speed.

    Attributes:
        float_layers: the layers, by name; empty if integers are as fast as float everywhere.
        saved: microseconds that a batch takes less with them in float, all together.
        tried: how many groups were timed.
    """

    float_layers: tuple[str, ...]
    saved: float
    tried: int

    def __str__(self) -> str:
        if not self.float_layers:
            return f"no layer is left in float for speed: none of {self.tried} groups is faster so"
        return f"left in float for speed: {', '.join(self.float_layers)} ({self.saved:.0f} us less a batch)"


def tune(
    model: QuantizedModel,
    threads: int | None = None,
    rounds: int = ROUNDS,
    batch: int | None = None,
    among: Collection[str] | None = None,
) -> Tuning:
    """Leave layers in float where integers lose time: small depthwise convs, islands between float operators.

    A file is written for each group of layers with the group in float, and all are run in turns. Then those that are
    faster by more than noise, together and the best alone, race runs of groups from either end of the network (a
    quarter, a half, three quarters of it: conversions are paid at a border, so one group alone may lose where many
    together win) and the network wholly in float. The fastest is taken, and what is left is timed again.

    Which layers lose depends on the batch: a conversion costs a batch of one as much as a layer, and a large one
    next to nothing.

    Groups with the same surroundings (see :func:`.labels_of`) are timed once, and again only once their surroundings
    have changed.

    Args:
        model: calibrated; afterwards ``float_layers`` holds what was found too.
        threads: of the runtime, for one operator; None for all cores.
        rounds: interleaved runs of every file, at least 3.
        batch: how many examples a run takes; None for the first batch that calibration kept.
        among: the layers that may be left in float; None for all.

    Raises:
        NotObservedError: if no example was kept to time.
        ArgumentError: if ``batch`` is less than 1.
        ExportError: if the runtime cannot run a file.
    """
    found, known = list[str](), dict[str, float]()
    saved, tried = 0.0, 0
    for _ in range(PASSES):
        groups = [group for group in groups_of(model) if among is None or set(group.layers) <= set(among)]
        if not groups:
            break
        labels = labels_of(model, groups)
        new = dict[str, Group]()
        for label, group in zip(labels, groups, strict=True):
            if label not in known:
                new.setdefault(label, group)
        known.update(zip(new, microseconds(model, list(new.values()), threads, rounds, batch), strict=True))
        costs = [known[label] for label in labels]
        tried = tried or len(groups)
        slow = sorted((i for i, cost in enumerate(costs) if cost < 0), key=costs.__getitem__)
        candidates = [_union(groups, chosen) for chosen in _choices(slow, len(groups))]
        again = microseconds(model, candidates, threads, rounds, batch, LEAST)
        cost, best = min(zip(again, candidates, strict=True), key=lambda pair: pair[0])
        if cost >= 0:
            break
        floats = model.float_layers | set(best.layers)
        model.choose(model.precision.but(float=floats))
        found += best.layers
        saved -= cost
    model.fit_anew()
    order = {name: index for index, name in enumerate(model.layer_names)}
    return Tuning(tuple(sorted(found, key=order.__getitem__)), saved, tried)


def _choices(slow: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """Sets of groups worth a race, by their indices: the slow ones, the slowest, runs from either end, all."""
    everything, quarters = range(count), sorted({count // 4, count // 2, 3 * count // 4} - {0})
    runs = [part for n in quarters for part in (everything[:n], everything[-n:])]
    return list(
        dict.fromkeys(tuple(sorted(chosen)) for chosen in (slow, slow[:1], *runs, everything) if chosen)
    )


def _union(groups: Sequence[Group], chosen: Sequence[int]) -> Group:
    return Group(
        tuple(name for i in chosen for name in groups[i].layers),
        tuple(kind for i in chosen for kind in groups[i].kinds),
    )


def group_times(search: Search, groups: Sequence[Group], threads: int | None) -> list[float]:
    """:func:`.microseconds` of groups of layers in the search's model as it stands."""
    asked = {"groups": [group.layers for group in groups], "rounds": ROUNDS}
    times: list[float] = _measured(
        search, "groups", asked, threads, lambda: microseconds(search.model, groups, threads)
    )
    return times


def file_times(search: Search, choices: Sequence[LayerPrecision], threads: int | None) -> list[float]:
    """:func:`.race_choices` of the search's model."""
    asked = {"choices": [chosen.to_dict() for chosen in choices], "rounds": ROUNDS}
    times: list[float] = _measured(
        search, "files", asked, threads, lambda: race_choices(search.model, choices, threads)
    )
    return times


def tuned(search: Search, threads: int | None, among: Collection[str] | None = None) -> Tuning:
    """:func:`.tune` of the search's model, which is left with what was found."""
    asked = {"among": None if among is None else sorted(among), "rounds": ROUNDS}
    model = search.model

    def measure() -> dict[str, Any]:
        with model.compensations.set_aside():  # a file is as fast without them
            return asdict(tune(model, threads, among=among))

    known = _measured(search, "tuning", asked, threads, measure)
    floats = model.float_layers | set(known["float_layers"])
    search.choose(model.precision.but(float=floats))
    return Tuning(tuple(known["float_layers"]), known["saved"], known["tried"])


def file_speed(search: Search, file: Callable[[], Path], float_file: Path, threads: int | None) -> float:
    """How many times as fast as float the file of the search's model is, on the first batch that calibration kept.

    Args:
        search: its model is a candidate.
        file: writes the candidate's file; not asked where its speed is known.
        float_file: the float network's.
        threads: of the runtime, for one operator; None for all cores.
    """
    model = search.model

    def measure() -> float:
        specs = model.captured.in_spec, model.captured.out_spec
        inputs = model.file_inputs(model.sample[0])
        paths = {"float": float_file, "quantized": file()}
        runs = {
            name: functools.partial(DeployedModel(path, *specs, threads, model.target.runtime), *inputs)
            for name, path in paths.items()
        }
        return race(runs, enough_rounds(runs["float"], ROUNDS))["quantized"].speedup

    return float(_measured(search, "speed", {"rounds": ROUNDS}, threads, measure))


def _measured(
    search: Search, what: str, asked: dict[str, Any], threads: int | None, measure: Callable[[], Any]
) -> Any:
    """What ``measure`` returns, as plain data: from the journal, if the very same was measured before."""
    about = {
        "what": what,
        "asked": asked,
        "candidate": fingerprint(search.model),
        "machine": machine(),
        "threads": threads,
    }
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:32]
    for entry in search.journal.of("timing"):
        if entry.data["key"] == key:
            return entry.data["measured"]["result"]
    result = measure()
    search.journal.write("timing", what=what, key=key, measured={"result": result})
    return result
