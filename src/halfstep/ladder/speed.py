"""Layers that integers slow down go back to float, if the target allows.

Which of several sets of float layers is fastest as a file, and what else in float makes it faster.
"""

from __future__ import annotations

from collections.abc import Sequence

from halfstep.errors import RefusedError
from halfstep.evaluate import Score
from halfstep.graph.layer_precision import STEPS, LayerPrecision
from halfstep.ladder.costs import file_times, tuned
from halfstep.ladder.search import Evaluated, Search
from halfstep.precision import Assignment, Group, assigned, names_of
from halfstep.progress import BudgetSpent, interruptible

#: An assignment that meets the goal, and its score.
Assigned = tuple[Assignment, Score]


def fastest_assignment(
    search: Search,
    base: LayerPrecision,
    found: Sequence[Assigned],
    free: Sequence[Group],
    threads: int | None = None,
) -> Assigned:
    """The fastest of what meets the goal, with its float layers joined where that is faster still.

    A float layer between integer ones pays for a conversion on both sides, so what a set of layers costs is not the
    sum of what each costs: whole files are raced. Then groups of ``free`` that the file is faster with in float are
    put there too, if the goal is still met. A decision says how long the result takes beside the quantized and the
    float network.

    Args:
        search: its model is left as what is returned, which becomes its best candidate.
        base: the layers that are put back from the start.
        found: at least one.
        free: the groups that may be in float together.
        threads: of the runtime, for one operator; None for all cores.
    """
    model = search.model
    states = [assigned(base, assignment) for assignment, _ in found]
    times = file_times(search, states, threads) if len(states) > 1 else [0.0]
    assignment, score = found[times.index(min(times))]
    search.choose(assigned(base, assignment))
    assignment, score = _joined(search, base, (assignment, score), free, threads)
    everything = LayerPrecision.of(float=model.layer_names)
    ours, integers, floats = file_times(search, [model.precision, base, everything], threads)
    verdict = (
        f"A batch takes {ours:.0f} us so, {integers:.0f} us quantized throughout, {floats:.0f} us in float."
    )
    if floats <= ours:
        verdict += " Float is as fast on this machine: integers save no time in this network."
    search.decide(verdict)
    # By itself the search prefers what has fewer layers in float.
    search.best = Evaluated.of(model, "the fastest file that meets the target", score)
    return assignment, score


def _joined(
    search: Search, base: LayerPrecision, settled: Assigned, free: Sequence[Group], threads: int | None
) -> Assigned:
    assignment, _ = settled
    to_float = STEPS["float"]
    rest = [group for group in free if assignment.get(group) is not to_float]
    tuning = tuned(search, threads, among=names_of(rest))
    if not tuning.float_layers:
        return settled
    joined = [group for group in rest if set(group.layers) <= search.model.float_layers]
    wider = {**assignment, **dict.fromkeys(joined, to_float)}
    search.choose(assigned(base, wider))
    names = ", ".join(tuning.float_layers)
    joint = search.accept(f"with {names} in float too")
    if search.goal.met(joint):
        search.decide(f"{tuning}: beside other float layers they need no conversion.")
        return wider, joint
    search.decide(f"With {names} in float too the file would be faster and miss the target.")
    search.choose(assigned(base, assignment))
    return settled


def tune_for_speed(search: Search, threads: int | None) -> None:
    """Tune the best candidate for this machine and keep that if it meets the target, or comes no less near to it.

    What was measured is written to the journal, so that a resumed run leaves the same layers in float.

    Args:
        search: its model is the best candidate, and stays so.
        threads: of the runtime, for one operator; None for all cores.
    """
    model, before = search.model, search.best
    assert before is not None
    try:
        with interruptible(search.check_time):
            tuning = tuned(search, threads)
        if not tuning.float_layers:
            search.decide(str(tuning))
            return
        search.rung = "tune"
        score = search.accept(f"with {', '.join(tuning.float_layers)} in float for speed")
    except BudgetSpent as spent:
        before.snapshot.restore()
        search.decide(f"nothing is left in float for speed, the budget is spent: {spent}")
        return
    goal, kept = search.goal, search.reached
    faster = search.best = Evaluated.of(model, before.what, score)
    search.reached = {rung: faster if reached is before else reached for rung, reached in kept.items()}
    if goal.met(score):
        try:
            assert search.score_file is not None
            _, file = search.score_file(faster, paid=True)
            missed = "" if search.asked.met(file) else f"its file, {search.asked.words(file)},"
        except RefusedError as error:
            missed = f"its file, refused ({error}),"
    else:
        missed = "" if goal.loss(score) <= goal.loss(before.score) else goal.words(score)
    if not missed:
        search.decide(f"{tuning}: {goal.words(score)}")
        return
    search.best, search.reached = before, kept
    before.snapshot.restore()
    search.decide(f"{tuning}, and put back: {missed} would miss the target")
