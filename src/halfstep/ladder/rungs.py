"""The rungs by name; this table is where a new one is added."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence

from halfstep.errors import ArgumentError
from halfstep.evaluate import Score
from halfstep.ladder.best_of import FINALISTS
from halfstep.ladder.partial import Partial, climb_partial
from halfstep.ladder.ptq import climb_ptq
from halfstep.ladder.qat import climb_qat
from halfstep.ladder.rung import Means, Rung
from halfstep.ladder.search import Search


def _partial_evaluations(search: Search, means: Means) -> int:
    """Two halves, gallop and bisection over the groups, the backward pass, and all examples for the result."""
    return 2 * math.ceil(math.log2(max(2, len(search.model.layers)))) + 8


def _climb_qat(search: Search, means: Means) -> Score:
    assert means.training is not None  # find_rungs leaves the rung out
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
            lambda search, means: climb_partial(search, means.partial),
            _partial_evaluations,
            options=lambda means: repr(means.partial or Partial()),
        ),
        Rung(
            "qat",
            "Quantization-aware training",
            _climb_qat,
            _qat_evaluations,
            _qat_missing,
            lambda means: "" if means.training is None else means.training.content(),
        ),
    )
}


def find_rungs(names: Sequence[str]) -> list[Rung]:
    """The rungs called ``names``, from the bottom.

    The first one is always post-training quantization: it gives the ranges that every other one starts from.

    Raises:
        ArgumentError: for an unknown name, with the nearest known one, if there are none, the first is missing, or
            they come in another order or twice.
    """
    wanted = f"needed some of {', '.join(map(repr, RUNGS))}"
    for name in names:
        if name not in RUNGS:
            near = difflib.get_close_matches(str(name), RUNGS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ArgumentError(f"rungs: got {name!r}, {wanted}{hint}")
    if not names:
        raise ArgumentError(f"rungs: got none, {wanted}")
    asked, lowest = ", ".join(map(repr, names)), next(iter(RUNGS))
    ordered = [name for name in RUNGS if name in names or name == lowest]
    if lowest not in names:
        raise ArgumentError(
            f"rungs: got {asked}, needed {lowest!r} first, since the others start from the ranges that it finds: "
            f"{', '.join(map(repr, ordered))}"
        )
    if list(names) != ordered:
        raise ArgumentError(
            f"rungs: got {asked}, needed each once, from the bottom up: {', '.join(map(repr, ordered))}"
        )
    return [RUNGS[name] for name in ordered]
