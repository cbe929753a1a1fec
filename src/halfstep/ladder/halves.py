"""Where is the loss: in the weights or in the activations?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from halfstep.fake_quantize import Mode
from halfstep.ladder.search import Search

#: A half that causes this share of the two drops' sum is called the cause.
MOST = 0.75


@dataclass(frozen=True)
class Halves:
    """The drop with only the weights quantized, and with only the activations.

    Attributes:
        weights: in the metric's unit.
        activations: the same.
        both: with everything quantized.
        allowed: the goal's.
        metric: whose drops these are; empty where there is only one.
    """

    weights: float
    activations: float
    both: float
    allowed: float
    metric: str = ""

    @property
    def cause(self) -> str:
        """``"weights"``, ``"activations"``, ``"both"``; ``"neither"`` where each alone is within the allowed.

        ``"nothing"`` where none loses anything and the target asks for more than float.
        """
        weights, activations = max(self.weights, 0.0), max(self.activations, 0.0)
        if weights <= self.allowed and activations <= self.allowed:
            return "neither"
        if not weights + activations:
            return "nothing"
        share = weights / (weights + activations)
        return "weights" if share >= MOST else "activations" if share <= 1 - MOST else "both"

    def __str__(self) -> str:
        """The two drops, and what follows from them."""
        of = f" of {self.metric}" if self.metric else ""
        return (
            f"With only the weights quantized the drop{of} is {self.weights:+.4f}, with only the activations "
            f"{self.activations:+.4f}, with both {self.both:+.4f} (allowed {self.allowed:g}): {ADVICE[self.cause]}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The drops and the cause as plain data."""
        return {
            "weights": self.weights,
            "activations": self.activations,
            "both": self.both,
            "allowed": self.allowed,
            "cause": self.cause,
        }


ADVICE = {
    "weights": "the weights lose it. A range for each output channel, more bits, or repairing the weights helps; "
    "another calibrator of activations will not",
    "activations": "the activations lose it. Another calibrator, ranges computed at run time, or 16-bit activations "
    "in few layers help; more bits for the weights will not",
    "both": "both lose a part of it; layers with both halves in float are the surest cure",
    "nothing": "neither half loses anything by itself; what is missing is what files lose beside their simulations",
    "neither": "each half alone would do; their errors add up. A few layers in float, or one half in more bits, "
    "suffice",
}


def where_is_the_loss(search: Search) -> Halves | None:
    """Judge the model with only its weights quantized, then with only its activations; None if it has one half only.

    Both drops are measured on as many examples as the verdict on them takes.
    """
    model = search.model
    kinds = {site.is_weight for site in model.placement.sites}
    if len(kinds) < 2:
        return None
    both = search.judge("all layers quantized")
    with model.using(Mode.QUANTIZE, activations=False):
        weights = search.judge("only weights quantized")
    with model.using(Mode.QUANTIZE, weights=False):
        activations = search.judge("only activations quantized")
    goal = search.goal
    return Halves(search.drop(weights), search.drop(activations), search.drop(both), goal.max_drop, goal.name)
