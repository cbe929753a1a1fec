"""The last step of a climb, if asked for: layers that integers slow down go back to float, if the target allows."""

from __future__ import annotations

from collections.abc import Callable

from halfstep.errors import RefusedError
from halfstep.evaluate import Score
from halfstep.ladder.measured import tuned
from halfstep.ladder.search import Candidate, Search
from halfstep.progress import BudgetSpent, interruptible
from halfstep.snapshot import ModelState, fingerprint


def favour_speed(search: Search, threads: int | None, score_file: Callable[[], tuple[str, Score]]) -> None:
    """Tune the best candidate for this machine and keep that if it meets the target, or comes no less near to it.

    What was measured is written to the journal, so that a resumed run leaves the same layers in float.

    Args:
        search: its model is the best candidate, and stays so.
        threads: of the runtime, for one operator; None for all cores.
        score_file: exports the best candidate and scores the file on its runtime.
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
        score = search.evaluate(f"with {', '.join(tuning.float_layers)} in float for speed")
    except BudgetSpent as spent:
        before.snapshot.restore()
        search.decide(f"nothing is left in float for speed, the budget is spent: {spent}")
        return
    goal, kept = search.goal, search.reached
    faster = search.best = Candidate(before.what, score, ModelState.of(model), fingerprint(model))
    search.reached = {rung: faster if reached is before else reached for rung, reached in kept.items()}
    if goal.met(score):
        try:
            _, file = score_file()
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
