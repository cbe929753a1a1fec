"""Partial quantization by itself: what :func:`halfstep.partial` does and returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfstep.errors import ArgumentError
from halfstep.ladder.alone import SearchResult, search_by_itself
from halfstep.ladder.goal import Asked, GoalSpec
from halfstep.ladder.partial import Partial, climb_partial
from halfstep.ladder.sensitivity import Halves, Sensitivity
from halfstep.model import QuantizedModel
from halfstep.precision import groups_of, pinned_layers


@dataclass(frozen=True, kw_only=True)
class PartialResult(SearchResult):
    """What :func:`partial` found.

    Attributes:
        put_back: the step that each layer was put to, by the layer's name.
        halves: which half loses the accuracy; None if the model met the goal as it was, or has one half only.
        sensitivity: the ranking; None if none was needed.
    """

    put_back: Mapping[str, str]
    halves: Halves | None
    sensitivity: Sensitivity | None

    @property
    def float_layers(self) -> tuple[str, ...]:
        """The layers put back to float."""
        return tuple(name for name, step in self.put_back.items() if step == "float")

    @property
    def found(self) -> str:
        """How many layers were put back."""
        return f"{len(self.put_back)} layers put back"


def partial(
    model: QuantizedModel,
    metric: Any,
    max_drop: Asked = None,
    options: Partial | None = None,
    confidence: float = 0.95,
    strict: bool = False,
    *,
    relative_drop: Asked = None,
    floor: Asked = None,
    directory: str | Path | None = None,
) -> PartialResult:
    """Put the fewest layers back to float that keep the score as near to the float model's as asked.

    Args:
        model: observed and calibrated; it is left with the layers put back that were found.
        metric: as for :func:`halfstep.quantize`.
        max_drop: in the metric's unit, against the float model on the same examples; 0.01 unless another target is
            given.
        options: how to look for them.
        confidence: of the drops' intervals, all candidates together; and that all examples say so too where the target
            is said to be missed. Every early verdict on the way has it by itself, so that of many one may be wrong:
            that costs a layer put back needlessly, and nothing is accepted before all examples are seen.
        strict: whether the upper end of the drop's interval must keep to the target, as for
            :func:`halfstep.quantize`, or the drop that was measured.
        relative_drop: instead of ``max_drop``: a share of the float score.
        floor: instead of ``max_drop``: the worst score allowed.
        directory: for a journal of every evaluation: the same call again goes on where it was interrupted. None
            keeps nothing.

    Raises:
        RecipeError: if a pattern matches no layer, or layers are pinned both ways, or all of them in float.
        ArgumentError: if no layer is left that could be put back, more than one target is given, or the float model
            itself misses it.
        MetricError: if the metric cannot be used.
        RunError: if the directory belongs to another search, or cannot be written.

    >>> hs.partial(q, hs.Accuracy(labelled), max_drop=0.01).float_layers  # doctest: +SKIP
    ('blocks.0.body.3',)
    """
    options = options or Partial()
    if not pinned_layers(model, options.keep_float, options.keep_quantized)[1]:
        raise ArgumentError(
            "partial: no layers are left to put back to float: "
            + ("all that are quantized are pinned" if groups_of(model) else "none is quantized")
        )
    aim = GoalSpec(max_drop, relative_drop, floor, confidence, strict)
    with search_by_itself(model, metric, aim, directory, Partial.name) as search:
        found = climb_partial(search, options)
    table, halves = search.found.get("sensitivity"), search.found.get("halves")
    return PartialResult.of(
        search,
        found,
        put_back={
            name: step for name in model.layer_names if (step := model.precision.step_of(name)) is not None
        },
        halves=halves if isinstance(halves, Halves) else None,
        sensitivity=table if isinstance(table, Sensitivity) else None,
    )
