"""The rungs by name; this table is where a new one is added."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence

from halfstep.errors import ArgumentError
from halfstep.evaluate import Score
from halfstep.ladder.best_of import FINALISTS
from halfstep.ladder.partial import climb_partial
from halfstep.ladder.ptq import climb_ptq
from halfstep.ladder.qat import climb_qat
from halfstep.ladder.rung import Means, Rung
from halfstep.ladder.search import Search
from halfstep.progress import protected


def _partial_evaluations(search: Search, means: Means) -> int:
    """Two halves, gallop and bisection over the groups, the backward pass, and all examples for the result."""
    return 2 * math.ceil(math.log2(max(2, len(search.model.layers)))) + 8


def _climb_qat(search: Search, means: Means) -> Score:
    assert means.training is not None  # find_rungs leaves the rung out
    with protected():  # steps that are trained are not thrown away: training looks at the budget by itself
        return climb_qat(search, means.training)


def _qat_evaluations(search: Search, means: Means) -> int:
    """The start, one every so many epochs, the end."""
    training = means.training
    return 0 if training is None else 2 + math.ceil(training.epochs / training.evaluate_every)


def _qat_missing(means: Means) -> str:
    return "" if means.training is not None else "training=hs.Training(labelled, loss)"


RUNGS: dict[str, Rung] = {
    rung.name: rung
    for rung in (
        Rung("ptq", "Post-training quantization", lambda search, _: climb_ptq(search), lambda *_: FINALISTS),
        Rung(
            "partial",
            "Partial quantization",
            lambda search, means: climb_partial(search, means.partial, means.threads),
            _partial_evaluations,
        ),
        Rung("qat", "Quantization-aware training", _climb_qat, _qat_evaluations, _qat_missing),
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
