"""The rungs by name; this table is where a new one is added."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from halfstep.errors import ArgumentError
from halfstep.ladder.ptq import climb_ptq
from halfstep.ladder.rung import Rung

RUNGS: dict[str, Rung] = {rung.name: rung for rung in (Rung("ptq", "post-training quantization", climb_ptq),)}


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
