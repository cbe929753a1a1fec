"""A rung of the ladder: what it does, what it needs, what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from halfstep.ladder.goal import Standing
from halfstep.ladder.partial import Partial
from halfstep.ladder.search import Search
from halfstep.training.options import Training


@dataclass(frozen=True)
class Means:
    """What rungs work with beside the search.

    Attributes:
        training: for QAT, which is skipped without it.
        partial: how to look for layers to put back; None for the usual way.
    """

    training: Training | None = None
    partial: Partial | None = None


@dataclass(frozen=True)
class Rung:
    """A way to make a quantized model better, for a price.

    Attributes:
        name: ``"ptq"``, ``"partial"``, ``"qat"``.
        title: in words.
        climb: starts from ``search.model`` and evaluates candidates; the search keeps the best.
        evaluations: how many full evaluations it usually takes at most, for the estimate.
        missing: what is needed and not there, in words; empty if nothing.
    """

    name: str
    title: str
    climb: Callable[[Search, Means], object]
    evaluations: Callable[[Search, Means], int]
    missing: Callable[[Means], str] = lambda means: ""


@dataclass(frozen=True)
class Reached:
    """What came of a rung.

    Attributes:
        rung: its name.
        met: the simulation meets the target now.
        score: of the best candidate so far, simulated.
        drop: against float, in the metric's unit.
        low: lower end of the drop's confidence interval, corrected for the candidates examined; None without one.
        high: its upper end.
        metrics: how every metric stands, the leading one (whose figures these are) first.
        what: the candidate, in words.
        float_layers: its layers in float.
        put_back: its layers at each step towards float, by the step's attribute.
        cost: of the rung in full evaluations; parts of one count as parts.
        note: why it ended early; empty if it did not.
        file_score: of its file on its runtime, where that decided whether to climb on.
        file_met: whether the file meets the target.
        examined: candidates that had been looked at on the same examples when this one was, itself included.
    """

    rung: str
    met: bool
    score: float
    drop: float
    low: float | None
    high: float | None
    metrics: tuple[Standing, ...]
    what: str
    float_layers: tuple[str, ...]
    put_back: dict[str, list[str]]
    cost: float
    note: str = ""
    file_score: float | None = None
    file_met: bool | None = None
    examined: int = 1
