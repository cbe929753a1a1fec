"""The rungs by name; this table is where a new one is added."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence

from halfstep.errors import ArgumentError
from halfstep.ladder.best_of import FINALISTS
from halfstep.ladder.partial import climb_partial
from halfstep.ladder.ptq import climb_ptq
from halfstep.ladder.rung import Rung
from halfstep.ladder.search import Search


def _partial_evaluations(search: Search) -> int:
    """Two halves, gallop and bisection over the groups, the backward pass, and all examples for the result."""
    return 2 * math.ceil(math.log2(max(2, len(search.model.layers)))) + 8


RUNGS: dict[str, Rung] = {
    rung.name: rung
    for rung in (
        Rung("ptq", "Post-training quantization", climb_ptq, lambda search: FINALISTS),
        Rung("partial", "Partial quantization", climb_partial, _partial_evaluations),
    )
}


def find_rungs(names: Sequence[str]) -> list[Rung]:
    """The rungs called ``names``, in that order.

    Raises:
        ArgumentError: for an unknown name, with the nearest known one, or if there are none.
    """
    wanted = f"needed some of {', '.join(map(repr, RUNGS))}"
    for name in names:
        if name not in RUNGS:
            near = difflib.get_close_matches(str(name), RUNGS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ArgumentError(f"rungs: got {name!r}, {wanted}{hint}")
    if not names:
        raise ArgumentError(f"rungs: got none, {wanted}")
    return [RUNGS[name] for name in names]
