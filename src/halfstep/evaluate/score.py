"""Score: what a metric says of a model; Scorer: anything that says it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch

from halfstep.evaluate.resampling import Resampled


@dataclass(frozen=True)
class Score:
    """What a metric said of a model.

    Attributes:
        value: the metric, in its own unit.
        per_example: float64 scores of the single examples whose mean ``value`` is; None where the metric is not a
            mean over examples.
        others: of several metrics, the scores of those after the first, by name.
        examined: how many candidates of a search had been looked at on the same examples by then, this one included;
            1 for a model by itself. What is said of its drop is corrected for them.
        resampled: where ``value`` is no mean but a number of the whole set, what it is on sets drawn from it; else
            None.
    """

    value: float
    per_example: torch.Tensor | None = None
    others: Mapping[str, Score] = field(default_factory=dict)
    examined: int = 1
    resampled: Resampled | None = None

    @classmethod
    def mean(cls, per_example: torch.Tensor) -> Score:
        """The score whose value is the mean of ``per_example``, (n,)."""
        return cls(float(per_example.mean()), per_example)

    def numbered(self, examined: int) -> Score:
        """The same score, as that of the ``examined``-th candidate of a search."""
        others = {name: part.numbered(examined) for name, part in self.others.items()}
        return replace(self, examined=examined, others=others)

    @property
    def count(self) -> int | None:
        """How many examples were scored, where that is known."""
        if self.per_example is not None:
            return len(self.per_example)
        examples = self.resampled is not None and self.resampled.unit == "examples"
        return self.resampled.count if self.resampled is not None and examples else None

    @property
    def paired(self) -> bool:
        """Whether it can be compared with another one on the same examples."""
        return self.per_example is not None or self.resampled is not None

    def unpaired(self) -> Score:
        """The value alone."""
        return replace(self, per_example=None, resampled=None)

    def repeats(self, other: Score) -> bool:
        """Whether ``other`` says the same, example by example or resample by resample."""
        if self.per_example is not None and other.per_example is not None:
            return torch.equal(self.per_example, other.per_example)
        if self.resampled is not None and other.resampled is not None:
            return self.resampled.repeats(other.resampled)
        return False

    def __float__(self) -> float:
        return self.value


@runtime_checkable
class Scorer(Protocol):
    """Anything that scores a model."""

    higher_is_better: bool

    def evaluate(self, model: Callable[..., Any]) -> Score:
        """Score ``model``, which is called as the user's model is."""
        ...
