"""The climb: rung after rung, by the table of rungs, until the target is met.

The rungs by name; this table is where a new one is added.

Whether weights have 7 bits where sums could saturate: settled at a run's beginning, and said.
"""

from __future__ import annotations

import difflib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace

import torch

from halfstep.errors import ArgumentError, HalfstepError, RankError, RefusedError, RunError
from halfstep.evaluate import Score
from halfstep.fake_quantize import Mode
from halfstep.graph.layer_precision import LayerPrecision
from halfstep.graph.place import place
from halfstep.identity import Identity
from halfstep.journal import Entry
from halfstep.ladder.evaluation import Decision
from halfstep.ladder.mixed_bits import MixedBits
from halfstep.ladder.pace import Pace
from halfstep.ladder.partial import Partial
from halfstep.ladder.ptq import PTQ
from halfstep.ladder.qat import QAT
from halfstep.ladder.rung import Rung, RungResult
from halfstep.ladder.search import Evaluated, Search
from halfstep.model import run
from halfstep.precision import bits_on_request
from halfstep.progress import BudgetSpent, interruptible
from halfstep.recipe import Recipe
from halfstep.runtime.saturation import saturates_here
from halfstep.snapshot import Snapshot, fingerprint
from halfstep.targets import Target
from halfstep.training.options import Training

#: A simulated evaluation takes about so many times as long as a float one.
SLOWER = 3

#: How often a rung that cheapens is climbed, where what it makes misses the target as a file.
TRIES = 2


def ascend(
    search: Search,
    ladder: Sequence[Rung],
    tune: bool,
    score_file: Callable[[], tuple[str, Score]],
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
        score_file: exports the best candidate and scores the file on its runtime; what that is remembered by, and the
            score.
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
            known = search.recall(reached.file_key)
            file = score_file if known is None else lambda of=(reached.file_key, known.score): of
            reached = _with_file(search, rung, reached, candidate, file)
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
        if repairs:
            parts.append(f"{time(repairs, 's')} of repairs")
        together = f"together about {time(seconds / 60, 'min')}"
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
    score_file: Callable[[], tuple[str, Score]],
) -> RungResult:
    """What came of a rung with the score of its file; if that misses the target, simulations are held to less."""
    try:
        key, file = score_file()
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
    verdict = search.recall(reached.candidate)
    if verdict is None or not verdict.complete:
        return None
    precision = LayerPrecision.of_dict(reached.put_back)
    snapshot = Snapshot(search.model, precision, search.checkpoints.network(saved))
    if fingerprint(snapshot.restore()) != reached.candidate:
        return None
    known = [candidate for candidate in search.reached.values() if candidate.key == reached.candidate]
    best = (
        known[0]
        if known
        else Evaluated(
            reached.what, verdict.score, snapshot, reached.candidate, bits_on_request(search.model)
        )
    )
    search.best = search.reached[rung.name] = best
    search.replay(rung.name, [Decision.of(e) for e in journal.entries[:place] if e.kind == "decision"])
    return reached


#: The rungs that have short forms, from the bottom.
RUNGS: dict[str, type[PTQ | Partial | QAT]] = {kind.name: kind for kind in (PTQ, Partial, QAT)}


def find_rungs(
    rungs: Sequence[str | Rung],
    training: Training | None = None,
    partial: Partial | None = None,
    max_float: float | None = None,
) -> list[Rung]:
    """The rungs to climb, from the bottom: those given by name with the options given beside them.

    The first one is always post-training quantization: it gives the ranges that every other one starts from.

    Raises:
        ArgumentError: for an unknown name, with the nearest known one, if there are none, the first is missing, they
            come in another order or twice, or options are given for a rung that has its own.
    """
    short: dict[str, Rung] = {
        "ptq": PTQ(),
        "partial": partial or Partial(),
        "qat": QAT(training),
        "mixed_bits": MixedBits(),
    }
    if max_float is not None:
        short["partial"] = replace(partial or Partial(), max_float=max_float)
    wanted = f"needed some of {', '.join(map(repr, short))}, or a hs.Rung"
    found: list[Rung] = []
    for rung in rungs:
        if not isinstance(rung, Rung) and rung not in short:
            near = difflib.get_close_matches(str(rung).lower(), short, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ArgumentError(f"rungs: got {rung!r}, {wanted}{hint}")
        found.append(rung if isinstance(rung, Rung) else short[rung])
    if not found:
        raise ArgumentError(f"rungs: got none, {wanted}")
    own = ((QAT, "training", training), (Partial, "partial", partial), (Partial, "max_float", max_float))
    for kind, option, given in own:
        if given is not None and any(isinstance(rung, kind) for rung in rungs):
            raise ArgumentError(
                f"{option}: given beside a rung that has its own, hs.{kind.__name__}(...): give one"
            )
    names = [rung.name for rung in found]
    asked, lowest = ", ".join(map(repr, names)), next(iter(RUNGS))
    ordered = [name for name in RUNGS if name in names or name == lowest]
    give = f"give rungs={ordered} (--rungs {','.join(ordered)})"
    if lowest not in names:
        raise ArgumentError(
            f"rungs: got {asked}, needed {lowest!r} first: the others start from the ranges that it finds; {give}"
        )
    known = [name for name in names if name in RUNGS]
    if names[0] != lowest or known != ordered or len({*names}) < len(names):
        raise ArgumentError(f"rungs: got {asked}, needed each once and from the bottom up; {give}")
    return found


#: The entry of the journal that says how a recipe's ``portable`` was settled where the recipe leaves it open.
PORTABLE = "portable"


def settle(recipe: Recipe, target: Target, entries: Iterable[Entry] = ()) -> Recipe:
    """The recipe with ``portable`` said: as the run with these entries has it, else as this processor needs it."""
    if recipe.portable is not None:
        return recipe
    known = [entry.data["portable"] for entry in entries if entry.kind == PORTABLE]
    return replace(recipe, portable=known[-1] if known else target.pair_sums and saturates_here())


def narrower_weights(search: Search) -> str:
    """Which weights have fewer bits than asked for, and why, in a sentence; empty if none has, or it was asked for."""
    model = search.model
    if not (search.journal.of(PORTABLE) and model.recipe.portable):
        return ""
    asked = place(model.graph, model.target, replace(model.recipe, portable=False), model.precision)
    formats = {site.name: site.format for site in asked.sites if site.is_weight}
    narrower = [
        site for site in model.placement.sites if site.is_weight and site.format != formats[site.name]
    ]
    if not narrower:
        return ""
    return (
        f"{len(narrower)} of {len(formats)} weights have {narrower[0].format.bits} bits instead of "
        f"{formats[narrower[0].name].bits}: where this run began, integer kernels add products in 16 bits, which would "
        "saturate (an x86 processor without VNNI). portable=True asks for this on every processor, so that the file "
        "answers alike on all of them; portable=False keeps the bits"
    )
