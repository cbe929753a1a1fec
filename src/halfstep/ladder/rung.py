"""A rung of the ladder: what it does, what it needs, what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

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
        threads: of the runtime, for one operator; None for all cores.
        tune: whether layers that integers slow down are looked for at the end.
    """

    training: Training | None = None
    partial: Partial | None = None
    threads: int | None = None
    tune: bool = False


@dataclass(frozen=True)
class Cost:
    """What a rung costs at most, whatever the model and the metric answer.

    Attributes:
        evaluations: of the metric on all examples; parts of one count as parts.
        examples: that are sent through the network without labels, to compare calibrators or to rank layers.
        seconds: of work that is ended when they are over.
    """

    evaluations: int
    examples: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Rung:
    """A way to make a quantized model better, for a price.

    Attributes:
        name: ``"ptq"``, ``"partial"``, ``"qat"``.
        title: in words.
        climb: starts from ``search.model`` and evaluates candidates; the search keeps the best.
        cost: what that takes at most, for the estimate.
        missing: what is needed and not there, in words; empty if nothing.
        options: what decides about its result beside the search, so that only a result with the same is taken again.
    """

    name: str
    title: str
    climb: Callable[[Search, Means], object]
    cost: Callable[[Search, Means], Cost]
    missing: Callable[[Means], str] = lambda means: ""
    options: Callable[[Means], str] = lambda means: ""


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
        file_key: what the file's evaluation is remembered by.
        key: a digest of what the rung started from and was asked for.
        candidate: the fingerprint of the best candidate.
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
    file_key: str = ""
    key: str = ""
    candidate: str = ""

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Reached:
        """What the journal says of a rung."""
        known = {field.name: data[field.name] for field in fields(cls) if field.name in data}
        known["metrics"] = tuple(Standing(**standing) for standing in data["metrics"])
        return cls(**{**known, "float_layers": tuple(data["float_layers"])})
