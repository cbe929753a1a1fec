"""Climbing rung after rung."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

from halfstep.errors import ArgumentError, RefusedError
from halfstep.evaluate import Score
from halfstep.ladder.budget import BudgetSpent
from halfstep.ladder.rung import Means, Reached, Rung
from halfstep.ladder.search import Candidate, Search

#: A simulated evaluation takes about so many times as long as a float one.
SLOWER = 3


def ascend(
    search: Search,
    ladder: Sequence[Rung],
    means: Means,
    max_float: float,
    score_file: Callable[[], Score],
) -> list[Reached]:
    """Climb until a rung meets the goal or the budget is spent; the model is the best candidate then.

    A rung meets the goal if its file does too. Where only the simulation does, the climb goes on, and simulations are
    held to what is left of the target after what files lose more. A file that is refused counts as one that misses.

    Args:
        search: its model observed.
        ladder: the rungs, in order; those that lack something are left out, and a decision says so.
        means: what they work with.
        max_float: the share of layers that may stay in float while there are rungs left to climb.
        score_file: exports the best candidate and scores the file on its runtime.

    Returns:
        What came of each rung climbed.
    """
    for rung in ladder:
        if missing := rung.missing(means):
            search.decide(f"{rung.title} is left out: it needs {missing}")
    ladder = [rung for rung in ladder if not rung.missing(means)]
    if not ladder:
        raise ArgumentError("rungs: none of those asked for can be climbed with what was given")
    search.decide(estimate(search, ladder, means))
    path: list[Reached] = []
    spare: Candidate | None = None
    for index, rung in enumerate(ladder):
        before, start = search.best, time.perf_counter()
        reached = _climb(search, rung, means)
        candidate = search.best
        assert candidate is not None
        share = len(candidate.snapshot.put_back["float_layers"]) / max(1, len(search.model.layers))
        last = bool(reached.note) or index + 1 == len(ladder)
        too_many = share > max_float and not last
        if reached.met and not last and not too_many:
            reached = _with_file(search, rung, reached, candidate, score_file)
        search.journal.write("step", **asdict(reached), measured={"seconds": time.perf_counter() - start})
        path.append(reached)
        if too_many:
            verdict = "meets the target" if reached.met else "comes nearest to the target"
            search.decide(
                f"{rung.title} {verdict} with {share:.0%} of the layers in float, more than the {max_float:.0%} "
                f"wanted: climbing on; this result is kept in case nothing better comes"
            )
            spare, search.best = candidate, before
            if before is not None:
                before.snapshot.restore()
            continue
        if last or (reached.met and reached.file_met):
            break
    best = search.best
    if spare is not None and (best is None or search.rank(spare) < search.rank(best)):
        search.best = best = spare
    assert best is not None  # a search evaluates one candidate whatever the budget
    best.snapshot.restore()
    return path


def estimate(search: Search, ladder: Sequence[Rung], means: Means) -> str:
    """What the climb may cost, in a sentence."""
    counts = {rung.name: rung.evaluations(search, means) for rung in ladder}
    total = sum(counts.values()) + len(ladder)
    float_seconds = [made.seconds / made.share for made in search.evaluations if made.rung == "float"]
    each = min(float_seconds, default=0.0)  # the first one also pays for what is loaded and compiled
    parts = ", ".join(f"{name} {count}" for name, count in counts.items())
    return (
        f"Estimate: up to {total} evaluations ({parts}, deployed files {len(ladder)}) on top of float's, of about "
        f"{_roughly(SLOWER * each)} s each: {_roughly(SLOWER * each * total / 60)} min at most, training not counted"
    )


def _roughly(x: float) -> str:
    """Two digits that count, and no power of ten.

    >>> _roughly(143.2), _roughly(0.00149)
    ('140', '0.0015')
    """
    return f"{float(f'{x:.2g}'):g}"


def _with_file(
    search: Search, rung: Rung, reached: Reached, candidate: Candidate, score_file: Callable[[], Score]
) -> Reached:
    """What came of a rung with the score of its file; if that misses the target, simulations are held to less."""
    try:
        file = score_file()
    except RefusedError as error:
        search.hold_to(search.asked.beyond(candidate.score))
        search.decide(
            f"{rung.title} meets the target in simulation, {search.asked.words(candidate.score)}; its file is refused, "
            f"which counts as missed: {error}: climbing on"
        )
        return replace(reached, file_met=False)
    met = search.asked.met(file)
    if not met:
        search.hold_to(search.asked.narrowed(candidate.score, file))
        held = " and ".join(f"{goal.name} {goal.max_drop:.4g}".lstrip() for goal, _ in search.goal.each(file))
        search.decide(
            f"{rung.title} meets the target in simulation, {search.asked.words(candidate.score)}; its file does not, "
            f"{search.asked.words(file)}: climbing on, with simulations held to a drop of {held}, what files lose more "
            "taken off"
        )
    return replace(reached, file_score=file.value, file_met=met)


def _climb(search: Search, rung: Rung, means: Means) -> Reached:
    """Climb one rung, keep its best candidate, and leave the model so."""
    note = ""
    search.rung = rung.name
    try:
        rung.climb(search, means)
    except BudgetSpent as spent:
        note = f"the budget is spent: {spent}"
        search.decide(f"{rung.title} ended early, {note}")
    best = search.best
    assert best is not None
    best.snapshot.restore()
    search.journal.save(rung.name, best.snapshot.state)
    for name, found in search.found.items():
        search.journal.write("finding", name=name, rung=rung.name, measured={"finding": found.to_dict()})
    search.found.clear()
    drop = search.goal.compare(best.score)
    reached = Reached(
        rung=rung.name,
        met=search.goal.met(best.score),
        score=best.score.value,
        drop=drop.value,
        low=drop.low,
        high=drop.high,
        metrics=search.goal.standings(best.score),
        what=best.what,
        float_layers=tuple(sorted(best.snapshot.put_back["float_layers"])),
        put_back={name: sorted(layers) for name, layers in best.snapshot.put_back.items()},
        cost=sum(made.share for made in search.evaluations if made.rung == rung.name),
        note=note,
    )
    search.reached[rung.name] = best
    return reached
