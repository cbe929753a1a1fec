"""A rung of the ladder: what it does, what it needs, what came of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from halfstep.ladder.goal import MetricResult
from halfstep.ladder.search import Search
from halfstep.model import QuantizedModel


@dataclass(frozen=True)
class Cost:
    """What a rung costs at most, whatever the model and the metric answer.

    Attributes:
        evaluations: of the metric on all examples; parts of one count as parts.
        examples: that are sent through the network without labels, to compare calibrators or to rank layers.
        seconds: of work that is ended when they are over.
        not_counted: other work that takes time, in words.
    """

    evaluations: int
    examples: int = 0
    seconds: float = 0.0
    not_counted: str = ""


class Rung(ABC):
    """A way to make a quantized model better, for a price: a record of options that knows how to climb.

    The ladder asks nothing of a rung but what stands here, so another one is a class in a file of its own, given to
    :func:`halfstep.quantize` by ``rungs=("ptq", Mine(), "qat")``.

    Attributes:
        name: one word, under which the journal keeps it; of a class.
        title: in words; of a class.
        cheapens: it makes what meets the target cheaper, so that the climb goes on to it, past all that do not, from a
            rung whose file does; of a class.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    cheapens: ClassVar[bool] = False

    @abstractmethod
    def climb(self, search: Search) -> object:
        """Change ``search.model``, and let ``search.evaluate`` judge what comes of it: the search keeps the best.

        It starts from the best candidate of the rungs below, and may end early by any :class:`.HalfstepError`.
        """

    @abstractmethod
    def cost(self, search: Search) -> Cost:
        """What that takes at most, for the estimate."""

    def missing(self) -> str:
        """What is needed and not there, in words; the rung is left out then."""
        return ""

    def check(self, model: QuantizedModel) -> None:  # noqa: B027  (there may be nothing to check)
        """Raise what would make it fail on this model, as far as that is known before the work below it."""

    def identity(self) -> str:
        """What decides about its result beside where it starts: only a result with the same is taken again."""
        return ""

    def spare(self, model: QuantizedModel) -> str:
        """Why its result is only kept for the case that no later rung has a better one; empty to stand on it."""
        return ""


@dataclass(frozen=True)
class RungResult:
    """What came of a rung.

    Attributes:
        rung: its name.
        met: the best candidate meets the target now.
        score: of the best candidate so far, see :class:`.Evaluated`.
        drop: against float, in the metric's unit.
        low: lower end of the drop's confidence interval, corrected for the candidates examined; None without one.
        high: its upper end.
        metrics: how every metric stands, the leading one (whose figures these are) first.
        what: the candidate, in words.
        float_layers: its layers in float.
        put_back: the layers that are not as the recipe has them, as :meth:`.LayerPrecision.to_dict` gives them.
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
    metrics: tuple[MetricResult, ...]
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
    def of(cls, data: Mapping[str, Any]) -> RungResult:
        """What the journal says of a rung."""
        known = {field.name: data[field.name] for field in fields(cls) if field.name in data}
        known["metrics"] = tuple(MetricResult(**standing) for standing in data["metrics"])
        return cls(**{**known, "float_layers": tuple(data["float_layers"])})
