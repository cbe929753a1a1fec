"""Layers that are slower in integers than in float on this machine, found by running files, and put back."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from halfstep.ladder.costs import ROUNDS, microseconds
from halfstep.model import QuantizedModel
from halfstep.precision import Group, groups_of

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
    found: list[str] = []
    saved, tried = 0.0, 0
    for _ in range(PASSES):
        groups = [group for group in groups_of(model) if among is None or set(group.layers) <= set(among)]
        if not groups:
            break
        costs = microseconds(model, groups, threads, rounds, batch)
        tried = tried or len(groups)
        slow = sorted((i for i, cost in enumerate(costs) if cost < 0), key=costs.__getitem__)
        candidates = [_union(groups, chosen) for chosen in _choices(slow, len(groups))]
        again = microseconds(model, candidates, threads, rounds, batch, LEAST)
        cost, best = min(zip(again, candidates, strict=True), key=lambda pair: pair[0])
        if cost >= 0:
            break
        floats = model.float_layers | set(best.layers)
        model.choose(replace(model.choices, float_layers=floats))
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
