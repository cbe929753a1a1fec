"""The climb: rung after rung until the target is met, and what that costs at most."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace

import torch

from halfstep.errors import HalfstepError, RankError, RefusedError, RunError
from halfstep.evaluate import Score
from halfstep.fake_quantize import Mode
from halfstep.graph.layer_precision import LayerPrecision
from halfstep.identity import Identity
from halfstep.ladder.evaluation import Decision
from halfstep.ladder.pace import Pace
from halfstep.ladder.prepare import narrower_weights
from halfstep.ladder.rung import Rung, RungResult
from halfstep.ladder.search import Evaluated, Search
from halfstep.model import run
from halfstep.precision import bits_on_request
from halfstep.progress import BudgetSpent, interruptible
from halfstep.snapshot import Snapshot, fingerprint

#: A simulated evaluation takes about so many times as long as a float one.
SLOWER = 3

#: How often a rung that cheapens is climbed, where what it makes misses the target as a file.
TRIES = 2


def ascend(
    search: Search,
    ladder: Sequence[Rung],
    tune: bool,
    pace: Pace | None = None,
) -> list[RungResult]:
    """Climb until a rung meets the goal or the budget is spent; the model is the best candidate then.

    A rung meets the goal if its file does too. Where only the simulation does, the climb goes on, and simulations are
    held to what is left of the target after what files lose more. A file that is refused counts as one that misses.

    From a rung that meets the goal the climb goes on to those that cheapen alone. Where what they make misses the goal
    as a file, they try once more with less allowed, and then what met it before stands.

    Args:
        search: its model observed.
        ladder: the rungs, in order; those that lack something are left out, and a decision says so.
        tune: whether layers that integers slow down are looked for afterwards, for the estimate.
        pace: how fast files must be; None for any speed. What has layers in float and is too slow for it is kept in
            case nothing better comes, as what leaves too many in float is.

    Returns:
        What came of each rung climbed.
    """
    for rung in ladder:
        if missing := rung.missing():
            search.decide(f"{rung.title} is left out: it needs {missing}")
    ladder = [rung for rung in ladder if not rung.missing()]
    expected, timeless = estimate(search, ladder, tune)
    search.decide(expected, key=timeless)
    if said := narrower_weights(search):
        search.decide(said)
    path: list[RungResult] = []
    spares: list[Evaluated] = []
    held: Evaluated | None = None  # its file meets the target
    to_climb = list(ladder)
    while to_climb:
        rung = to_climb.pop(0)
        before, start = search.best, time.perf_counter()
        reached = _climb(search, rung)
        candidate = search.best
        assert candidate is not None
        changed = held is not None and candidate.key != held.key
        if held is not None and not changed:
            search.best = search.reached[rung.name] = candidate = held
        last = bool(reached.note) or not to_climb
        reserve = "" if last else rung.spare(search.model)
        if not (last or reserve) and reached.met and pace is not None:
            reserve = pace.spare(search, candidate)
        if reached.met and not reserve and (not last or changed):
            reached = _with_file(search, rung, reached, candidate)
        search.journal.write("step", **asdict(reached), measured={"seconds": time.perf_counter() - start})
        path.append(reached)
        if reserve:
            verdict = "meets the target" if reached.met else "comes nearest to the target"
            search.decide(
                f"{rung.title} {verdict} with {reserve}: climbing on; this result is kept in case nothing better comes"
            )
            spares.append(candidate)
            search.best = before
            if before is not None:
                before.snapshot.restore()
            continue
        if held is not None and changed and not (reached.met and reached.file_met):
            search.best = held
            held.snapshot.restore()
            del search.reached[rung.name]
            if reached.note or not reached.met or sum(step.rung == rung.name for step in path) == TRIES:
                search.decide(f"{rung.title} is put back: what met the target before it stands")
            else:
                to_climb.insert(0, rung)
            continue
        if reached.met and reached.file_met:
            held = candidate
            to_climb = [rung for rung in to_climb if rung.cheapens]
        if last:
            break
    best = search.best
    for spare in spares:
        if best is None or search.rank(spare) < search.rank(best):
            best = spare
    assert best is not None  # a search evaluates one candidate whatever the budget
    if pace is not None:
        best = pace.choose(search, best, [*spares, *search.reached.values()])
    search.best = best
    best.snapshot.restore()
    return path


def estimate(search: Search, ladder: Sequence[Rung], tune: bool = False) -> tuple[str, str]:
    """What the climb costs at most: counts are bounds, and times what these take by what was timed.

    Returns:
        The sentence, and the same without the times, which every run measures anew.
    """
    costs = {rung.name: rung.cost(search) for rung in ladder}
    counts = {name: cost.evaluations for name, cost in costs.items()}
    if tune:
        counts["tune"] = 1
    counts["deployed files"] = len(ladder) + tune
    total, examples = sum(counts.values()), sum(cost.examples for cost in costs.values())
    repairs = sum(cost.seconds for cost in costs.values())
    floats = [made for made in search.evaluations if made.rung == "float"]
    # The first one also pays for what is loaded and compiled.
    each = SLOWER * min((made.seconds / made.share for made in floats), default=0.0)
    each_example = SLOWER * _example_seconds(search)
    seconds = total * each + examples * each_example + repairs
    # From the top: training takes the longest, and is said first.
    beside = [cost.not_counted for cost in reversed(costs.values())] + ["timing files"] * tune
    not_counted = list(dict.fromkeys(filter(None, beside)))
    left_out = f"; {' and '.join(not_counted)} not counted" if not_counted else ""
    ends = search.budget.spent(total + len(floats), seconds)
    budget = f". The budget of {search.budget} may end it before" if ends else ""

    def sentence(time: Callable[[float, str], str]) -> str:
        parts = [
            f"{total} evaluations of the metric ({', '.join(f'{name} {count}' for name, count in counts.items())}) "
            f"after {len(floats)} of the float network (again for the metric's noise), about {time(each, 's')} each"
        ]
        if examples:
            parts.append(
                f"{examples:,} examples through the network to compare calibrators and rank layers, about "
                f"{time(examples * each_example, 's')}"
            )
        work = seconds - repairs
        together = f"together about {time(work, 's') if work < 60 else time(work / 60, 'min')}"
        if repairs:
            together += f", and up to {time(repairs, 's')} of repairs where calibration misses the target"
        return f"Estimate, at most: {', '.join(parts)}; {together}{left_out}{budget}"

    return sentence(_time), sentence(lambda count, unit: "")


def _example_seconds(search: Search) -> float:
    """What the float network takes for an example: the best of three runs over the first batch that was kept."""
    batch, took = search.model.sample[0], []
    with search.model.using(Mode.FLOAT), torch.no_grad():
        for _ in range(3):
            start = time.perf_counter()
            run(search.model, batch)
            took.append(time.perf_counter() - start)
    return min(took) / search.model.captured.batch_size(batch)


def _time(count: float, unit: str) -> str:
    return f"{_roughly(count)} {unit}"


def _roughly(x: float) -> str:
    """Two digits that count, and no power of ten.

    >>> _roughly(143.2), _roughly(0.00149)
    ('140', '0.0015')
    """
    return f"{float(f'{x:.2g}'):g}"


def _with_file(
    search: Search,
    rung: Rung,
    reached: RungResult,
    candidate: Evaluated,
) -> RungResult:
    """What came of a rung with the score of its file; if that misses the target, simulations are held to less."""
    assert search.score_file is not None
    known = search.recall(reached.file_key)
    try:
        key, file = (
            search.score_file(candidate, paid=True) if known is None else (reached.file_key, known.score)
        )
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
    return replace(reached, file_score=file.value, file_met=met, file_key=key)


def _climb(search: Search, rung: Rung) -> RungResult:
    """Climb one rung, or restore what an earlier run made of it; the model is left as the best candidate."""
    search.rung, note = rung.name, ""
    key = _key(search, rung)
    if (restored := _restored(search, rung, key)) is not None:
        return restored
    try:
        search.check_time()
        with interruptible(search.check_time):
            rung.climb(search)
    except BudgetSpent as spent:
        note = f"the budget is spent: {spent}"
        search.decide(f"{rung.title} ended early, {note}")
    except HalfstepError as error:
        # Nothing to hand back, nowhere to keep it, or nobody left to go on with.
        if search.best is None or isinstance(error, (RunError, RankError)):
            raise
        note = f"it failed: {error}"
        search.decide(f"{rung.title} ended early, {note}")
    best = search.best
    assert best is not None
    best.snapshot.restore()
    search.checkpoints.keep_network(rung.name, key, best.snapshot.state)
    for name, found in search.found.items():
        search.journal.write("finding", name=name, rung=rung.name, measured={"finding": found.to_dict()})
    search.found.clear()
    drop = search.goal.compare(best.score)
    file_key = ""
    if best.score.simulated is not None:  # a run that goes on knows the score by it
        assert search.score_file is not None
        file_key, _ = search.score_file(best, paid=True)
    reached = RungResult(
        rung=rung.name,
        met=search.goal.met(best.score),
        score=best.score.value,
        drop=drop.value,
        low=drop.low,
        high=drop.high,
        metrics=search.goal.standings(best.score),
        what=best.what,
        float_layers=tuple(sorted(best.snapshot.precision["float"])),
        put_back=best.snapshot.precision.to_dict(),
        cost=sum(made.share for made in search.evaluations if made.rung == rung.name),
        note=note,
        key=key,
        file_key=file_key,
        candidate=best.key,
        examined=drop.examined,
    )
    search.reached[rung.name] = best
    return reached


def _key(search: Search, rung: Rung) -> str:
    """What a rung starts from, and what is asked of it."""
    start = "" if search.best is None else search.best.key
    goals = [(goal.name, goal.max_drop) for goal, _ in search.goal.each(search.goal.float_score)]
    return Identity(rung.name, start, search.checkpoints.key, goals, rung.identity()).digest


def _restored(search: Search, rung: Rung, key: str) -> RungResult | None:
    """What an earlier run of the directory made of the same rung, if it finished it.

    None where the rung is to be climbed: what was made of it until an interruption is remembered piece by piece.
    """
    journal = search.journal
    steps = [
        (place, e.data)
        for place, e in enumerate(journal.entries)
        if e.kind == "step" and e.data.get("key") == key
    ]
    saved = journal.load(rung.name, key) if steps and not steps[-1][1]["note"] else None
    if saved is None:
        return None
    place, data = steps[-1]
    reached = RungResult.of(data)
    score = _score_of(search, reached)
    if score is None:
        return None
    precision = LayerPrecision.of_dict(reached.put_back)
    snapshot = Snapshot(search.model, precision, search.checkpoints.network(saved))
    if fingerprint(snapshot.restore()) != reached.candidate:
        return None
    known = [candidate for candidate in search.reached.values() if candidate.key == reached.candidate]
    best = (
        known[0]
        if known
        else Evaluated(reached.what, score, snapshot, reached.candidate, bits_on_request(search.model))
    )
    search.best = search.reached[rung.name] = best
    search.replay(rung.name, [Decision.of(e) for e in journal.entries[:place] if e.kind == "decision"])
    return reached


def _score_of(search: Search, reached: RungResult) -> Score | None:
    """What is remembered of a rung's best candidate: its simulation's score, or the file's in its place."""
    simulation, file = search.recall(reached.candidate), search.recall(reached.file_key)
    if simulation is None or simulation.complete:
        return None if simulation is None else simulation.score
    return None if file is None else replace(file.score, simulated=simulation.score.count)
