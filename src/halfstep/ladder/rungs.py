"""The rungs by name; this table is where a new one is added."""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence, Sized

from halfstep.calibration.calibrate import kept_examples
from halfstep.calibration.candidates import FINALISTS
from halfstep.calibration.sweep import passes_at_most
from halfstep.errors import ArgumentError
from halfstep.evaluate import Score
from halfstep.ladder.partial import Partial, climb_partial, evaluations_at_most, ranked_at_most
from halfstep.ladder.ptq import REPAIR_SECONDS, climb_ptq
from halfstep.ladder.qat import climb_qat
from halfstep.ladder.rung import Cost, Means, Rung
from halfstep.ladder.search import Search
from halfstep.progress import protected


def _ptq_cost(search: Search, means: Means) -> Cost:
    """The finalists and what repairs made of the best; every calibrator on the kept examples."""
    left = search.seconds_left()
    seconds = REPAIR_SECONDS if left is None else min(REPAIR_SECONDS, max(0.0, left))
    return Cost(FINALISTS + 1, passes_at_most() * kept_examples(search.model), seconds)


def _partial_cost(search: Search, means: Means) -> Cost:
    return Cost(evaluations_at_most(search, means.partial), ranked_at_most(search, means.partial))


def _climb_qat(search: Search, means: Means) -> Score:
    assert means.training is not None  # find_rungs leaves the rung out
    with protected():  # steps that are trained are not thrown away: training looks at the budget by itself
        return climb_qat(search, means.training)


def _qat_cost(search: Search, means: Means) -> Cost:
    """The float control, the start, one every so many epochs, the end, and the last good state of what diverged."""
    training = means.training
    if training is None:
        return Cost(0)
    marks = training.epochs / training.evaluate_every
    if isinstance(training.labelled, Sized):  # marks lie at whole steps
        steps = len(training.labelled)
        marks = max(1, round(training.epochs * steps)) / max(1, round(training.evaluate_every * steps))
    return Cost(training.control + 3 + math.ceil(marks))


def _qat_missing(means: Means) -> str:
    return "" if means.training is not None else "training=hs.Training(labelled, loss)"


RUNGS: dict[str, Rung] = {
    rung.name: rung
    for rung in (
        Rung("ptq", "Post-training quantization", lambda search, _: climb_ptq(search), _ptq_cost),
        Rung(
            "partial",
            "Partial quantization",
            lambda search, means: climb_partial(search, means.partial, means.threads),
            _partial_cost,
            options=lambda means: repr(means.partial or Partial()),
        ),
        Rung(
            "qat",
            "Quantization-aware training",
            _climb_qat,
            _qat_cost,
            _qat_missing,
            lambda means: "" if means.training is None else means.training.identity().digest,
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
            near = difflib.get_close_matches(str(name).lower(), RUNGS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ArgumentError(f"rungs: got {name!r}, {wanted}{hint}")
    if not names:
        raise ArgumentError(f"rungs: got none, {wanted}")
    asked, lowest = ", ".join(map(repr, names)), next(iter(RUNGS))
    ordered = [name for name in RUNGS if name in names or name == lowest]
    give = f"give rungs={ordered} (--rungs {','.join(ordered)})"
    if lowest not in names:
        raise ArgumentError(
            f"rungs: got {asked}, needed {lowest!r} first: the others start from the ranges that it finds; {give}"
        )
    if list(names) != ordered:
        raise ArgumentError(f"rungs: got {asked}, needed each once and from the bottom up; {give}")
    return [RUNGS[name] for name in ordered]
