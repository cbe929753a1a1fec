"""Climbing rung after rung."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict

from halfstep.errors import ArgumentError
from halfstep.ladder.budget import BudgetSpent
from halfstep.ladder.rung import Means, Reached, Rung
from halfstep.ladder.search import Candidate, Search

#: A simulated evaluation takes about so many times as long as a float one.
SLOWER = 3


def ascend(search: Search, ladder: Sequence[Rung], means: Means, max_float: float) -> list[Reached]:
    """Climb until a rung meets the goal or the budget is spent; the model is the best candidate then.

    Args:
        search: its model observed.
        ladder: the rungs, in order; those that lack something are left out, and a decision says so.
        means: what they work with.
        max_float: the share of layers that may stay in float while there are rungs left to climb.

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
        before = search.best
        reached = _climb(search, rung, means)
        path.append(reached)
        candidate = search.best
        assert candidate is not None
        share = len(candidate.snapshot.put_back["float_layers"]) / max(1, len(search.model.layers))
        if share > max_float and not reached.note and index + 1 < len(ladder):
            verdict = "meets the target" if reached.met else "comes nearest to the target"
            search.decide(
                f"{rung.title} {verdict} with {share:.0%} of the layers in float, more than the {max_float:.0%} "
                f"wanted: climbing on; this result is kept in case nothing better comes"
            )
            spare, search.best = candidate, before
            if before is not None:
                before.snapshot.restore()
            continue
        if reached.met or reached.note:
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
    total = sum(counts.values()) + 1
    float_seconds = [made.seconds / made.share for made in search.evaluations if made.rung == "float"]
    each = min(float_seconds, default=0.0)  # the first one also pays for what is loaded and compiled
    parts = ", ".join(f"{name} {count}" for name, count in counts.items())
    return (
        f"Estimate: up to {total} evaluations ({parts}, the deployed file 1) on top of float's, of about "
        f"{SLOWER * each:.2g} s each: {SLOWER * each * total / 60:.1f} min at most, training not counted"
    )


def _climb(search: Search, rung: Rung, means: Means) -> Reached:
    """Climb one rung, write down what came of it, and leave the model as the best candidate."""
    start, note = time.perf_counter(), ""
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
    search.journal.write("step", **asdict(reached), measured={"seconds": time.perf_counter() - start})
    search.reached[rung.name] = best
    return reached
