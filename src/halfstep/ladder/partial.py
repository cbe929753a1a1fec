"""Rung 2, partial quantization: the fewest layers put back towards float that meet the target."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field, replace
from typing import Literal

from halfstep.calibration.calibrate import kept_examples
from halfstep.errors import ArgumentError
from halfstep.evaluate import Score
from halfstep.fake_quantize import Mode
from halfstep.graph.layer_precision import STEPS, LayerPrecision, Step, find_steps
from halfstep.ladder.costs import group_times
from halfstep.ladder.gallop import QUESTIONS, WALKS, without_needless
from halfstep.ladder.methods import Method, find_method
from halfstep.ladder.rung import Cost, Rung
from halfstep.ladder.search import Search
from halfstep.ladder.sensitivity import (
    LayerSensitivity,
    Sensitivity,
    kept_ranking,
    ranking_examples,
    where_is_the_loss,
)
from halfstep.ladder.speed import Assigned, fastest_assignment
from halfstep.model import QuantizedModel
from halfstep.precision import Assignment, Group, assigned, fits, groups_of, names_of, pinned_layers


@dataclass(frozen=True)
class Partial(Rung):
    """Partial quantization, and how to look for the layers.

    Attributes:
        method: of sensitivity; see :func:`halfstep.sensitivity`.
        steps: what layers may be put to, by names of :data:`~halfstep.graph.layer_precision.STEPS`.
        order: which layers come first: the most sensitive (``"accuracy"``), or those that regain most for each
            microsecond that leaving them in float costs, measured on the target's runtime (``"latency"``). Then
            both orders are tried and their files raced, and float layers are joined where conversions between them
            cost more than integers save.
        walk: how far to go down the sorted list: ``"gallop"`` (and bisect), or ``"one_by_one"``.
        keep_float: patterns of layers that stay in float whatever comes.
        keep_quantized: patterns of layers that are never put back.
        prune: try at the end to do without layers put back, for as many evaluations as :func:`pruning` says.
        measured: groups whose drop is measured beside their score, for Kendall's tau.
        early: whether verdicts may be given before all examples are seen.
        max_float: the share of layers that may stay in float while there are rungs left to climb; a result with more
            is kept for the case that no later rung meets the target.
    """

    name, title = "partial", "Partial quantization"
    method: str | Method | None = None
    steps: tuple[str, ...] = ("float",)
    order: Literal["accuracy", "latency"] = "accuracy"
    walk: Literal["gallop", "one_by_one"] = "gallop"
    keep_float: tuple[str, ...] = ()
    keep_quantized: tuple[str, ...] = ()
    prune: bool = True
    measured: int = 0
    early: bool = True
    # It decides about what comes after, not about the result.
    max_float: float = field(default=0.5, repr=False)

    def __post_init__(self) -> None:
        if self.walk not in WALKS:
            raise ArgumentError(f"walk: got {self.walk!r}, needed one of {', '.join(map(repr, WALKS))}")
        if self.order not in ("accuracy", "latency"):
            raise ArgumentError(f"order: got {self.order!r}, needed 'accuracy' or 'latency'")
        find_steps(self.steps)
        if self.method is not None:
            find_method(self.method)
        if not 0 <= self.max_float <= 1:
            raise ArgumentError(f"max_float: got {self.max_float}, needed a share of the layers, 0 to 1")

    def climb(self, search: Search) -> Score:
        """See :func:`climb_partial`."""
        return climb_partial(search, self)

    def cost(self, search: Search) -> Cost:
        """What :func:`evaluations_at_most` and :func:`ranked_at_most` say."""
        timed = "timing files" if self.order == "latency" else ""
        return Cost(evaluations_at_most(search, self), ranked_at_most(search, self), not_counted=timed)

    def check(self, model: QuantizedModel) -> None:
        """Raise :class:`.RecipeError` if a pattern matches no layer, or layers are pinned both ways."""
        pinned_layers(model, self.keep_float, self.keep_quantized)

    def identity(self) -> str:
        """The options."""
        return repr(self)

    def spare(self, model: QuantizedModel) -> str:
        """Too many layers in float, in words."""
        share = len(model.float_layers) / max(1, len(model.layers))
        if share <= self.max_float:
            return ""
        return f"{share:.0%} of the layers in float, more than the {self.max_float:.0%} wanted"


def climb_partial(search: Search, options: Partial | None = None) -> Score:
    """Put back the fewest layers that meet the goal; the model is left with them, or as near as it came.

    1. Judge weights only and activations only: where is the loss?
    2. Rank the groups of layers by what quantizing them loses.
    3. For each step, cheapest first: if putting every group to it would do, gallop and bisect for the fewest.
    4. Try to put them to something cheaper, least sensitive first.
    5. Evaluate the result on all examples. Should that overturn an early verdict, go back to 3, and judge everything
       on all examples.
    6. Where nothing was found, see whether an early verdict was to blame: the most that may be put back is evaluated
       on all examples, and everything else that was refused early is judged on more of them. Should one hold, go back
       to 3 likewise. So "the target is not met" is the answer all examples would give with the goal's confidence, while
       each layer put back rests on an early verdict of its own: one in many may be needless.

    At least one layer stays quantized: with every layer in float any target is met, by the float model.

    What repairs learned for the layers behind those put back is fitted anew for every candidate, without labels.

    Args:
        search: its model calibrated.
        options: how to look for them.

    Returns:
        The score on all examples.

    Raises:
        RecipeError: if a pattern matches no layer, or layers are pinned both ways.
    """
    score = _climb(search, options or Partial())
    if said := search.refits.sentence():
        search.decide(said)
    return score


def _climb(search: Search, options: Partial) -> Score:
    model, goal, early = search.model, search.goal, search.early
    base, groups = pinned_layers(model, options.keep_float, options.keep_quantized)
    search.choose(base)
    model.set_mode(Mode.QUANTIZE)
    start = search.accept("the pinned layers in float" if options.keep_float else "all layers quantized")
    if goal.met(start) or not groups:
        why = "the target is met as it is" if goal.met(start) else "no layer is left that could be"
        search.decide(f"Partial quantization put no layer back: {why}.")
        return start
    search.early = early and options.early
    try:
        walk = _Walk(search, options, base, groups)
        found = walk.settle()
        if found and options.order == "latency":
            found = [
                fastest_assignment(search, base, found, walk.able.get(STEPS["float"], []), search.threads)
            ]
        return walk.report(*found[0]) if found else walk.best_effort(start)
    finally:
        search.early = early


def pruning(groups: int) -> int:
    """How many evaluations may go into doing without layers that were put back; an early verdict is a part of one.

    Four each time that the groups double: up to 16 groups each can be asked about. Where the groups' losses add up and
    their order is roughly known, that ends at most one group above asking about all (540 random cases each of up to
    200 groups).
    """
    return 4 * math.ceil(math.log2(max(2, groups)))


def evaluations_at_most(search: Search, options: Partial | None = None) -> int:
    """A bound on the full evaluations of :func:`climb_partial`, whatever the metric answers."""
    options = options or Partial()
    count, steps = len(groups_of(search.model)), len(find_steps(options.steps))
    method = None if options.method is None else find_method(options.method)
    start = 1 + 2  # and the two halves
    ranking = count + 1 if method is not None and method.by == "metric" else 0
    walk = steps - 1 + QUESTIONS[options.walk](count)
    if options.early and not search.never_early:
        # Again on all examples after an overturned verdict, what was refused too; and the results, and everything.
        walk = (2 if search.picks else 3) * walk + 3
    prune = pruning(count) if options.prune else 0
    both = options.order == "latency"  # orders, and then layers may join those in float
    return start + ranking + min(options.measured, count) + (1 + both) * (walk + prune) + both


def ranked_at_most(search: Search, options: Partial | None = None) -> int:
    """A bound on the examples that the ranking of :func:`climb_partial` sends through the network."""
    method = (options or Partial()).method
    if method is not None and find_method(method).by == "metric":
        return 0
    count = len(groups_of(search.model))
    float_and_base = 4  # one more to see what the outputs look like, and one where each group is spared
    return (count + float_and_base) * min(kept_examples(search.model), ranking_examples(count))


class _Walk:
    """The ranked groups, and how to try assignments of steps to them."""

    def __init__(
        self, search: Search, options: Partial, base: LayerPrecision, groups: tuple[Group, ...]
    ) -> None:
        self.search, self.options, self.base = search, options, base
        self.steps = find_steps(options.steps)
        self.left = 0.0  # evaluations that may go into pruning
        model = search.model
        if (halves := where_is_the_loss(search)) is not None:
            search.found["halves"] = halves
            search.decide(str(halves))
        search.choose(base)
        free = names_of(groups)
        self.all_free = all(layer.reason or layer.name in free for layer in model.layers)
        #: What early verdicts refused, in words.
        self.refused: dict[frozenset[tuple[Group, Step]], str] = {}
        self.fitting = {step: {group for group in groups if fits(step, model, group)} for step in self.steps}
        for step in self.steps:
            if not self.fitting[step]:
                search.decide(
                    f"Step {step.name!r} is left out: {model.target.name} can have none of the layers {step.words}."
                )
        table = kept_ranking(search, groups, options.method, options.measured)
        if options.order == "latency":
            table = _by_time(search, table)
        search.found["sensitivity"] = table
        self.ranked = [row.group for row in table.rows]
        self.by_accuracy = [row.group for row in sorted(table.rows, key=lambda row: -row.score)]
        first = ", ".join(group.name for group in self.ranked[:3])
        agreement = "" if table.tau is None else f"; Kendall's tau with measured drops is {table.tau:+.2f}"
        by_time = ", over the time that float costs" if options.order == "latency" else ""
        took = f"{table.seconds:.1f} s"
        ranked = (
            f"{len(groups)} groups of layers ranked by {table.method} in {took} ({table.examples:,} examples sent "
            f"through the network){by_time}; first: {first}{agreement}."
        )
        search.decide(ranked, key=ranked.replace(took, "", 1))

    def settle(self) -> list[Assigned]:
        """What meets the goal on all examples: of each order, if there is any, whatever early verdicts said.

        In the order of time a layer that costs much comes last even where nothing holds without it; so that of
        accuracy is tried as well.
        """
        orders = [self.ranked] if self.ranked == self.by_accuracy else [self.ranked, self.by_accuracy]
        return [settled for order in orders if (settled := self._settle(order)) is not None]

    def _settle(self, order: list[Group]) -> Assigned | None:
        """First by early verdicts; should one turn out to be wrong, by all examples."""
        search, early = self.search, self.search.early
        self.ranked, self.left, self.refused = order, pruning(len(order)), {}
        try:
            for search.early in dict.fromkeys((early, False)):
                seen = "More"
                if (assignment := self.find()) is not None:
                    search.choose(assigned(self.base, assignment))
                    wrong = f"{_many(len(assignment))} put back"
                    seen, score = "All", search.accept(f"{wrong}, settled")
                    if search.goal.met(score):
                        return assignment, score
                elif not (wrong := self._overturned()):
                    return None
                search.decide(
                    f"{seen} examples overturn the early verdict on {wrong}; the search goes on, and judges on all."
                )
        finally:
            search.early = early
        return None

    @property
    def able(self) -> dict[Step, list[Group]]:
        """The groups that may be put to each step together, in order; at least one stays quantized."""
        found = {step: [group for group in self.ranked if group in self.fitting[step]] for step in self.steps}
        for step, able in found.items():
            if not step.quantizes and self.all_free and len(able) == len(self.ranked):
                able.pop()
        return found

    def holds(self, assignment: Assignment, what: str, final: bool = False) -> bool:
        """Whether the goal is met with groups put to their steps; ``final`` as for :meth:`.Search.judge`."""
        self.search.choose(assigned(self.base, assignment))
        verdict = self.search.judge(what, final)
        if not (verdict.met or verdict.complete):
            self.refused[frozenset(assignment.items())] = what
        return verdict.met

    def _still_holds(self, assignment: Assignment, what: str) -> bool:
        """:meth:`holds`, at the cost of what may go into pruning."""
        spent = self.search.memory.replayed_cost
        holds = self.holds(assignment, what)
        self.left -= self.search.memory.replayed_cost - spent
        return holds

    def _may_prune(self) -> bool:
        return self.left >= 1

    def _overturned(self) -> str:
        """What an early verdict refused and holds after all, with what it takes to give up on it; empty if nothing.

        The most that may be put back is evaluated on all examples, which its score is needed for anyway.
        """
        if self.refused and (able := self.able[self.steps[-1]]):
            self.search.choose(assigned(self.base, dict.fromkeys(able, self.steps[-1])))
            if self.search.goal.met(self.search.evaluate(self._everything(able))):
                return self._everything(able)
        refused, self.refused = self.refused, {}
        for assignment, what in refused.items():
            if self.holds(dict(assignment), what, final=True):
                return what
        return ""

    def _everything(self, able: list[Group]) -> str:
        """The most that may be put to the last step, in words."""
        rest = [group.name for group in self.ranked if group not in able]
        return f"every group{' but ' + ', '.join(rest) if rest else ''} {self.steps[-1].words}"

    def find(self) -> Assignment | None:
        """An assignment that holds and from which nothing can be taken, by the verdicts so far; or None."""
        for step in self.steps:
            able = self.able[step]
            cheaper = step is not self.steps[-1]
            if not able or (cheaper and not self._first_hold(able, step, len(able), final=True)):
                continue
            count = WALKS[self.options.walk](len(able), functools.partial(self._first_hold, able, step))
            if count is not None:
                return self._cheaper(dict.fromkeys(able[:count], step), step)
        return None

    def _first_hold(self, able: list[Group], step: Step, count: int, final: bool = False) -> bool:
        what = f"the {_many(count)} down to {able[count - 1].name} {step.words}"
        return self.holds(dict.fromkeys(able[:count], step), what, final)

    def _cheaper(self, found: dict[Group, Step], step: Step) -> Assignment:
        """Put groups to the cheapest step that does, the least sensitive first, as far as evaluations go."""
        if not self.options.prune:
            return found

        def without(groups: list[Group], left_out: list[Group]) -> bool:
            more = f" and {_many(len(left_out) - 1)} more" if len(left_out) > 1 else ""
            return self._still_holds(dict.fromkeys(groups, step), f"{left_out[0].name}{more} quantized again")

        kept = without_needless(list(found), without, self._may_prune)
        assignment = dict.fromkeys(kept, step)
        for group in reversed(kept):
            for other in self.steps[: self.steps.index(step)]:
                if not self._may_prune():
                    return assignment
                if group in self.able[other] and self._still_holds(
                    {**assignment, group: other}, f"{group.name} only {other.words}"
                ):
                    assignment[group] = other
                    break
        return assignment

    def report(self, assignment: Assignment, score: Score) -> Score:
        """Say what was found, and return its score."""
        search = self.search
        layers, total = len(names_of(assignment)), len(names_of(self.ranked))
        search.decide(
            f"{layers} of {total} layers put back ({_listed(assignment)}): {search.goal.words(score)}. "
            f"{search.goal.evidence(score)}"
        )
        for step in STEPS.values():
            if search.model.precision[step.name] and (caution := step.caution(search.model.target)):
                search.decide(caution)
        if 2 * len(search.model.float_layers) > len(search.model.layers):
            search.decide(
                "More than half of the layers are in float, which leaves little of what integers save: more bits, "
                "finer ranges or training would leave more of them quantized."
            )
        saved = f", {search.memory.saved:,} examples spared by early verdicts" if search.memory.saved else ""
        why = search.never_early
        why = f" No verdict was early: {why}." if why and not search.memory.saved else ""
        search.decide(
            f"The search so far took {search.memory.replayed_cost:.1f} full evaluations{saved}.{why}"
        )
        return score

    def best_effort(self, start: Score) -> Score:
        """Nothing holds: leave the model as near to the goal as putting layers back gets it."""
        search, step = self.search, self.steps[-1]
        able, score = self.able[step], start
        missed = "Partial quantization does not meet the target."
        if able:
            everything = self._everything(able)
            search.choose(assigned(self.base, dict.fromkeys(able, step)))
            score = search.evaluate(everything)
            missed += (
                f" With {everything} it scores {search.goal.words(score)}. {search.goal.evidence(score)}"
            )
        if search.goal.loss(score) >= search.goal.loss(start):
            search.choose(self.base)
            score = start
        cure = "Unpin layers, or train"
        if self.all_free and not step.quantizes:
            cure = (
                f"With {self.ranked[-1].name} in float too nothing would be quantized; more bits, finer ranges or "
                "training leave more in integers"
            )
        search.decide(f"{missed} {cure}.")
        return score


def _by_time(search: Search, table: Sensitivity) -> Sensitivity:
    """The table in the order of what is regained for a microsecond."""
    times = group_times(search, [row.group for row in table.rows], search.threads)
    rows = [replace(row, microseconds=time) for row, time in zip(table.rows, times, strict=True)]
    return replace(table, rows=tuple(sorted(rows, key=_regained_per_microsecond, reverse=True)))


def _regained_per_microsecond(row: LayerSensitivity) -> tuple[bool, float]:
    """Groups that cost nothing in float come first, then those that regain most for a microsecond."""
    assert row.microseconds is not None
    if row.microseconds <= 0:
        return True, row.score
    return False, row.score / row.microseconds


def _many(groups: int) -> str:
    return "1 group" if groups == 1 else f"{groups} groups"


def _listed(assignment: Assignment) -> str:
    return ", ".join(f"{name} {step.words}" for group, step in assignment.items() for name in group.layers)
