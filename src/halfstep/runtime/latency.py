"""Latency of files against each other, in interleaved runs."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from halfstep.errors import ArgumentError
from halfstep.progress import may_go_on

#: Runs that a profile of single nodes is the median of.
PROFILED = 15


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one contestant, and how often it is as fast as the first.

    Attributes:
        median: median time of a run in ms.
        spread: interquartile range over the median.
        speedup: median over the rounds of (first contestant's time / this one's time).
        undisturbed: the lower quartile in ms: what a run takes while other programs leave it the processor.
    """

    median: float
    spread: float
    speedup: float
    undisturbed: float


#: A contestant's runs add up to this many milliseconds, if ``enough_rounds`` counts them: a run of a fraction of a
#: millisecond is at the mercy of the scheduler, and many of them are not.
STEADY = 150.0
#: Fewer rounds tell nothing of how much a figure varies.
FEWEST = 3
#: But never more than this many rounds for one that was asked for.
MOST = 10


def enough_rounds(run: Callable[[], object], least: int) -> int:
    """How many rounds a race of contestants like ``run`` needs: at least ``least``, more if they are fast.

    >>> enough_rounds(lambda: time.sleep(0.001), 31) > 100
    True
    """
    typical = race({"typical": run}, rounds=5)["typical"].median
    return min(MOST * least, max(least, round(STEADY / typical)))


#: A race that may end early has so many rounds at least: enough for a median and quartiles.
STATED = 7


def race(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int = 21,
    warmup: int = 3,
    seconds: float = math.inf,
) -> dict[str, Latency]:
    """Run each contestant once a round, ``rounds`` times, so that a slow phase of the machine hits all of them.

    Args:
        contestants: what to run, by name; the first is the one that speed-ups refer to.
        rounds: counted rounds, at least :data:`FEWEST`.
        warmup: rounds that do not count.
        seconds: once the counted rounds have taken so long, the race ends behind round :data:`STATED`.

    Raises:
        ArgumentError: if the rounds are too few for a spread.
    """
    times = in_turns(contestants, rounds, warmup, seconds)
    first = next(iter(times.values()))
    result = {}
    for name, series in times.items():
        quartiles = statistics.quantiles(series, n=4)
        median = statistics.median(series)
        ratios = [a / b for a, b in zip(first, series, strict=True)]
        spread = (quartiles[2] - quartiles[0]) / median
        result[name] = Latency(median, spread, statistics.median(ratios), quartiles[0])
    return result


def in_turns(
    contestants: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 3,
    seconds: float = math.inf,
    leave: Callable[[Mapping[str, Sequence[float]]], Collection[str]] = lambda times: (),
) -> dict[str, list[float]]:
    """Milliseconds of each contestant's counted runs, as :func:`race` has them run.

    Args:
        contestants: what to run, by name.
        rounds: counted rounds, at least :data:`FEWEST`.
        warmup: rounds that do not count.
        seconds: once the counted rounds have taken so long, no more are run behind round :data:`STATED`.
        leave: says after every quarter of the rounds, but not before :data:`STATED`, whose figures suffice, given the
            milliseconds so far; those are run no more. Once all but two have left, none is.

    Raises:
        ArgumentError: if the rounds are too few for a spread.
    """
    if rounds < FEWEST:
        raise ArgumentError(f"rounds: got {rounds}, needed at least {FEWEST}, or there is no spread to state")
    times: dict[str, list[float]] = {name: [] for name in contestants}
    stage = max(STATED, rounds // 4)
    names, begun = list(contestants), time.perf_counter()
    for index in range(warmup + rounds):
        may_go_on()
        counted = index - warmup
        if counted == 0:
            begun = time.perf_counter()
        if counted >= STATED and time.perf_counter() - begun > seconds:
            break
        if counted > 0 and counted % stage == 0 and (gone := leave(times)):
            names = [name for name in names if name not in gone]
            if len(names) <= 2:
                break
        # Alternate the order: running right behind another contestant must not always hit the same one.
        for name in names if index % 2 else reversed(names):
            contestants[name]()  # untimed: the caches hold what the contestant before left there
            start = time.perf_counter()
            contestants[name]()
            if counted >= 0:
                times[name].append((time.perf_counter() - start) * 1e3)
    return times


def lower_quartile(series: Sequence[float]) -> float:
    """What a run takes while other programs leave it the processor; two times at least."""
    return statistics.quantiles(series, n=4)[0]


def per_run(times: Mapping[str, Sequence[float]], runs: int) -> dict[str, float]:
    """What each node takes in a run, from all its times in ``runs`` runs; one may be executed several times in each.

    >>> per_run({"conv": [9.0, 2.0, 2.0], "gather": [1.0] * 6}, runs=3)  # the first run is the slowest
    {'conv': 2.0, 'gather': 2.0}
    """
    return {name: statistics.median(series) * len(series) / runs for name, series in times.items()}
