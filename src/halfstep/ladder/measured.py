"""What was timed on this machine, kept in the journal: a resumed search decides by the same figures.

A time is that of one candidate, on one runtime and processor, with so many threads. Where any of these is another one,
it is measured anew.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from halfstep.graph.placement import Choices
from halfstep.ladder.costs import ROUNDS, microseconds, race_choices
from halfstep.ladder.environment import machine
from halfstep.ladder.search import Search
from halfstep.ladder.tune import Tuning, tune
from halfstep.precision import Group
from halfstep.runtime.deployed import DeployedModel
from halfstep.runtime.latency import enough_rounds, race
from halfstep.snapshot import fingerprint


def group_times(search: Search, groups: Sequence[Group], threads: int | None) -> list[float]:
    """:func:`.microseconds` of groups of layers in the search's model as it stands."""
    asked = {"groups": [group.layers for group in groups], "rounds": ROUNDS}
    times: list[float] = _measured(
        search, "groups", asked, threads, lambda: microseconds(search.model, groups, threads)
    )
    return times


def file_times(search: Search, choices: Sequence[Choices], threads: int | None) -> list[float]:
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
    search.choose(replace(model.choices, float_layers=floats))
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
