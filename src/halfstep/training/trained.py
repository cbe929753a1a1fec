"""What a training did, and what a judge says of the model on the way."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Judgement:
    """What a judge says of the model as it stands.

    Attributes:
        score: in the metric's unit.
        drop: how much worse than float, in the metric's unit; of several metrics, the most that one uses of its
            allowance.
        enough: whether training may stop.
    """

    score: float
    drop: float
    enough: bool


Judge = Callable[[int], Judgement]

#: Points of a training's loss as plain data.
CURVE = 400


@dataclass(frozen=True)
class Mark:
    """A score taken in training: after ``step`` steps and ``seconds`` of training (evaluations not counted)."""

    step: int
    seconds: float
    score: float
    drop: float


@dataclass(frozen=True)
class Trained:
    """What a training did.

    Attributes:
        steps: made; fewer than ``planned`` after an early stop.
        planned: epochs times batches.
        losses: of every step.
        marks: the scores taken, the one before the first step included; empty without a metric.
        best_step: the step whose state was kept: the best mark's, the last one without a metric.
        seconds: of training, evaluations not counted, over all runs that it took.
        resumed_at: the step that this run went on from; 0 from the start.
        learning_rate: at the start, as given or by the model's fewest bits.
        skipped: how many of the steps changed nothing, since their gradients were beyond float16.
        distilled: what distillation compared, and how that was known; empty without it.
        control: the float control's score; None if none was asked for.
    """

    steps: int
    planned: int
    losses: tuple[float, ...]
    marks: tuple[Mark, ...]
    best_step: int
    seconds: float
    learning_rate: float
    resumed_at: int = 0
    skipped: int = 0
    distilled: str = ""
    control: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data; of the losses at most :data:`CURVE` means over equally many steps."""
        every = max(1, -(-len(self.losses) // CURVE))
        parts = [self.losses[start : start + every] for start in range(0, len(self.losses), every)]
        losses = [math.fsum(part) / len(part) for part in parts]
        return {**asdict(self), "losses": losses, "every": every}
