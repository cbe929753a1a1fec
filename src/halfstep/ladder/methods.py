"""How sensitive is a layer? The methods, and the table of their names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from halfstep.errors import ArgumentError
from halfstep.fake_quantize import Mode
from halfstep.fidelity.compare import Measure
from halfstep.fidelity.fisher import fisher
from halfstep.fidelity.reference import Probe
from halfstep.precision import Group

By = Literal["metric", "kl", "sqnr"]

#: What a score counts, by what it was measured with.
UNITS: dict[By, str] = {"metric": "drop", "kl": "nats", "sqnr": "noise over signal"}


class Method(Protocol):
    """Scores groups of layers: the higher, the more is lost by quantizing them."""

    @property
    def by(self) -> By:
        """What the scores are made of."""
        ...

    def measure(self, probe: Probe, groups: Sequence[Group]) -> list[float]:
        """A score for each group."""
        ...


@dataclass(frozen=True)
class Alone:
    """One group quantized, all others in float: what it costs by itself.

    Attributes:
        by: ``"metric"`` needs labels and as many evaluations as there are groups; ``"kl"`` and ``"sqnr"`` compare
            outputs on the kept examples.
    """

    by: By = "kl"

    def measure(self, probe: Probe, groups: Sequence[Group]) -> list[float]:
        """A score for each group."""
        everything = frozenset(probe.model.layer_names)
        states = [everything - set(group.layers) for group in groups]
        if self.by == "metric":
            return [
                _drop(probe, state, f"only {group.name} quantized")
                for state, group in zip(states, groups, strict=True)
            ]
        return probe.losses_of(states, self.by, what="one layer quantized at a time")


@dataclass(frozen=True)
class Spared:
    """One group in float, all others quantized: what that regains, interactions included.

    Attributes:
        by: as for :class:`Alone`.
    """

    by: By = "metric"

    def measure(self, probe: Probe, groups: Sequence[Group]) -> list[float]:
        """A score for each group."""
        states = [probe.model.float_layers | set(group.layers) for group in groups]
        if self.by == "metric":
            base = _drop(probe, probe.model.float_layers, "all layers quantized")
            return [
                base - _drop(probe, state, f"{group.name} in float")
                for state, group in zip(states, groups, strict=True)
            ]
        quantized = probe.model.float_layers
        lost, *left = probe.losses_of(
            [quantized, *states], self.by, quantized, "one layer in float at a time"
        )
        return [lost - loss for loss in left]


@dataclass(frozen=True)
class Fisher:
    """All groups at once from one forward and backward pass: :func:`~halfstep.fidelity.fisher.fisher`.

    Attributes:
        by: the loss that is estimated.
        draws: backward passes.
        seed: of the draws.
    """

    by: Measure = "kl"
    draws: int = 1
    seed: int = 0

    def measure(self, probe: Probe, groups: Sequence[Group]) -> list[float]:
        """A score for each group."""
        return fisher(probe, groups, self.by, self.draws, self.seed)


METHODS: dict[str, Method] = {
    "metric": Alone("metric"),
    "kl": Alone("kl"),
    "sqnr": Alone("sqnr"),
    "fisher": Fisher("kl"),
    "fisher_sqnr": Fisher("sqnr"),
    "spared": Spared("metric"),
    "spared_kl": Spared("kl"),
    "spared_sqnr": Spared("sqnr"),
}


def find_method(name: str | Method) -> Method:
    """The method called ``name``.

    Raises:
        ArgumentError: for an unknown name, listing the known ones.
    """
    if not isinstance(name, str):
        return name
    if name not in METHODS:
        raise ArgumentError(f"method: got {name!r}, needed one of {', '.join(map(repr, METHODS))}")
    return METHODS[name]


def _drop(probe: Probe, float_layers: frozenset[str], what: str) -> float:
    """The metric's drop with these layers in float."""
    if probe.drop is None:
        raise ArgumentError(
            "sensitivity: this method scores the metric, and got none; give metric=, or method='kl'"
        )
    model = probe.model
    before = model.float_layers
    model.float_layers = float_layers
    try:
        with model.using(Mode.QUANTIZE):
            return probe.drop(what)
    finally:
        model.float_layers = before
