"""Layers that are slower in integers than in float on this machine, found by running files, and put back."""

from __future__ import annotations

from dataclasses import dataclass

from halfstep.ladder.costs import ROUNDS, microseconds
from halfstep.ladder.groups import Group, groups_of
from halfstep.model import QuantizedModel


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


def tune(model: QuantizedModel, threads: int | None = None, rounds: int = ROUNDS) -> Tuning:
    """Leave layers in float where integers lose time: small depthwise convs, islands between float operators.

    A file is written for each group of layers with the group in float, and all are run in turns on the first batch
    that calibration kept. Those that are faster by more than noise are put to float together, and timed once more:
    together they must be faster too, or the best of them alone is taken.

    Args:
        model: calibrated; afterwards ``float_layers`` holds what was found too.
        threads: of the runtime, for one operator; None for all cores.
        rounds: interleaved runs of every file, at least 3.

    Raises:
        NotObservedError: if no example was kept to time.
        ExportError: if the runtime cannot run a file.
    """
    groups = groups_of(model)
    costs = dict(zip(groups, microseconds(model, groups, threads, rounds), strict=True))
    slow = sorted((group for group in groups if costs[group] < 0), key=costs.__getitem__)
    if len(slow) > 1:
        names = {name for group in slow for name in group.layers}
        found = [layer for layer in model.layers if layer.name in names]
        together = Group(tuple(layer.name for layer in found), tuple(layer.operator.kind for layer in found))
        (cost,) = microseconds(model, [together], threads, rounds)
        if cost < costs[slow[0]]:
            slow, costs[together] = [together], cost
    if not slow:
        return Tuning((), 0.0, len(groups))
    model.float_layers = model.float_layers | set(slow[0].layers)
    return Tuning(slow[0].layers, -costs[slow[0]], len(groups))
