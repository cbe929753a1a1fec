"""Bits per layer by themselves: what :func:`halfstep.mixed_bits` does and returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from halfstep.errors import ArgumentError
from halfstep.ladder.alone import SearchResult, search_by_itself
from halfstep.ladder.goal import Asked, GoalSpec
from halfstep.ladder.mixed_bits import MixedBits, WidthTable, climb_mixed_bits, movable, widths_found
from halfstep.model import QuantizedModel


@dataclass(frozen=True, kw_only=True)
class MixedBitsResult(SearchResult):
    """What :func:`mixed_bits` found; the score is that with the widest weights where they miss the goal.

    Attributes:
        bits: of each layer's weights, by the layer's name.
        widths: bytes and losses of every group at every width; None if the goal was missed with the widest.
    """

    bits: Mapping[str, int]
    widths: WidthTable | None

    @property
    def found(self) -> str:
        """The bytes that are left; empty where nothing was lowered."""
        table = self.widths
        return "" if table is None else f"{table.bytes:,} of {table.before:,} bytes of weights"


def mixed_bits(
    model: QuantizedModel,
    metric: Any,
    max_drop: Asked = None,
    options: MixedBits | None = None,
    confidence: float = 0.95,
    *,
    relative_drop: Asked = None,
    floor: Asked = None,
    directory: str | Path | None = None,
) -> MixedBitsResult:
    """Give each layer's weights the fewest bits that keep the score as near to the float model's as asked.

    Args:
        model: observed and calibrated; it is left with the widths that were found, or as it was if the widest of them
            miss the goal.
        metric: as for :func:`halfstep.quantize`.
        max_drop: in the metric's unit, against the float model on the same examples; 0.01 unless another target is
            given.
        options: which widths, and how to look for them.
        confidence: of the drops' intervals and of each early verdict, as for :func:`halfstep.partial`.
        relative_drop: instead of ``max_drop``: a share of the float score.
        floor: instead of ``max_drop``: the worst score allowed.
        directory: for a journal of every evaluation: the same call again goes on where it was interrupted. None
            keeps nothing.

    Raises:
        RecipeError: if a pattern matches no layer.
        ArgumentError: if no layer has integer weights that may have other bits, more than one target is given, or the
            float model itself misses it.
        MetricError: if the metric cannot be used.
        RunError: if the directory belongs to another search, or cannot be written.

    >>> hs.mixed_bits(q, hs.Accuracy(labelled), max_drop=0.01).bits  # doctest: +SKIP
    {'conv1': 8, 'conv2': 4, 'fc': 8}
    """
    options = options or MixedBits()
    if not movable(model, options.keep):
        raise ArgumentError(
            "mixed_bits: no layer is left whose weights could have other bits: "
            + ("all that have integer weights are kept" if movable(model) else "none has integer weights")
        )
    aim = GoalSpec(max_drop, relative_drop, floor, confidence)
    with search_by_itself(model, metric, aim, directory, MixedBits.name) as search:
        found = climb_mixed_bits(search, options)
    table = search.found.get("widths")
    return MixedBitsResult.of(
        search, found, bits=widths_found(model), widths=table if isinstance(table, WidthTable) else None
    )
