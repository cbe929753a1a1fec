"""Bits per layer: the fewest bytes of weights that meet the target."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from halfstep.calibration.calibrate import kept_examples
from halfstep.errors import ArgumentError
from halfstep.evaluate import Score
from halfstep.export.sizes import nominal_bytes, stored_bytes
from halfstep.fake_quantize import Mode
from halfstep.graph.layer_precision import WIDTHS, LayerPrecision, weight_widths
from halfstep.ladder.gallop import QUESTIONS
from halfstep.ladder.methods import Method, find_method
from halfstep.ladder.partial import pruning
from halfstep.ladder.rung import Cost, Rung
from halfstep.ladder.search import Evaluated, Search
from halfstep.ladder.sensitivity import kept_ranking, ranking_examples
from halfstep.ladder.widths import Levels, Move, after, further, most_moves, moves_of, steps_from
from halfstep.model import QuantizedModel
from halfstep.precision import Group, groups_of, matching

Counted = Literal["stored", "nominal"]

#: After so many early verdicts that all examples overturned none is early any more.
OVERTURNED = 2

#: What says how many bytes each weight takes.
COUNTS: dict[Counted, Callable[[QuantizedModel], dict[str, int]]] = {
    "stored": stored_bytes,
    "nominal": nominal_bytes,
}


@dataclass(frozen=True)
class MixedBits(Rung):
    """Bits per layer: weights in fewer bits where that saves most bytes at least cost in the outputs.

    Attributes:
        bits: the widths that weights may have, the widest first, which all of them begin with; out of 8, 6, 4, 3, 2.
        bytes: what is counted: what the target's file stores (``"stored"``: OpenVINO's has whole bytes whatever the
            bits, small weights are not packed, and what unpacks takes bytes too), or bits as if each were stored
            (``"nominal"``).
        method: of sensitivity; see :func:`halfstep.sensitivity`.
        keep: patterns of layers whose weights stay as the recipe has them.
        prune: try at the end to lower further layers, for as many evaluations as :func:`.pruning` says.
        repair: round the weights in fewer bits anew for every candidate, by GPTQ on the outputs of their layers, and
            shift biases, where the network's outputs come nearer to float by that.
        early: whether verdicts may be given before all examples are seen.
    """

    name, title, cheapens = "mixed_bits", "Mixed bits", True
    bits: tuple[int, ...] = (8, 4, 2)
    bytes: Counted = "stored"
    method: str | Method | None = None
    keep: tuple[str, ...] = ()
    prune: bool = True
    repair: bool = True
    early: bool = True

    def __post_init__(self) -> None:
        falling = all(wide > narrow for wide, narrow in zip(self.bits, self.bits[1:], strict=False))
        if len(self.bits) < 2 or not falling or not set(self.bits) <= set(WIDTHS):
            known = ", ".join(map(str, sorted(WIDTHS, reverse=True)))
            raise ArgumentError(
                f"bits: got {self.bits}, needed two widths or more out of {known}, the widest first"
            )
        if self.bytes not in COUNTS:
            raise ArgumentError(f"bytes: got {self.bytes!r}, needed {' or '.join(map(repr, COUNTS))}")
        if self.method is not None:
            find_method(self.method)

    def climb(self, search: Search) -> Score:
        """See :func:`climb_mixed_bits`."""
        return climb_mixed_bits(search, self)

    def cost(self, search: Search) -> Cost:
        """What :func:`evaluations_at_most` says; a ranking for each width."""
        count, by = len(movable(search.model, self.keep)), self.method and find_method(self.method).by
        examples = (count + 1) * min(kept_examples(search.model), ranking_examples(count))
        return Cost(
            evaluations_at_most(search, self),
            0 if by == "metric" else len(self.bits) * examples,
            not_counted="rounding weights" if self.repair else "",
        )

    def check(self, model: QuantizedModel) -> None:
        """Raise :class:`.RecipeError` if a pattern matches no layer."""
        matching(self.keep, model)

    def identity(self) -> str:
        """The options."""
        return repr(self)


@dataclass(frozen=True)
class GroupWidths:
    """What a group's weights take and lose at each width.

    Attributes:
        layers: that have the same width.
        bytes: at each width.
        losses: at each width, more than at the widest, in the unit of the ranking.
        bits: that were found for it.
    """

    layers: tuple[str, ...]
    bytes: tuple[int, ...]
    losses: tuple[float, ...]
    bits: int


@dataclass(frozen=True)
class WidthTable:
    """The groups of layers by width.

    Attributes:
        widths: in bits, the widest first.
        counted: which bytes.
        method: how losses were measured.
        rows: in the order of execution.
    """

    widths: tuple[int, ...]
    counted: Counted
    method: str
    rows: tuple[GroupWidths, ...]

    @property
    def before(self) -> int:
        """Bytes with the widest weights throughout."""
        return sum(row.bytes[0] for row in self.rows)

    @property
    def bytes(self) -> int:
        """Bytes at the widths that were found."""
        return sum(row.bytes[self.widths.index(row.bits)] for row in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        """A line for every group: its bits, and bytes and loss at each width."""
        names = [Group(row.layers, ()).name for row in self.rows]
        size = max(map(len, names), default=0)
        lines = [
            f"bits per layer; {self.counted} bytes and loss by {self.method} at {_listed(self.widths)} bits"
        ]
        for name, row in zip(names, self.rows, strict=True):
            cells = "  ".join(
                f"{count:>10,} {loss:9.3g}" for count, loss in zip(row.bytes, row.losses, strict=True)
            )
            lines.append(f"  {name:<{size}}  {row.bits}  {cells}")
        return "\n".join(lines)


def movable(model: QuantizedModel, keep: Sequence[str] = ()) -> tuple[Group, ...]:
    """The groups of layers whose weights may have another width: those with integer weights, none of them pinned.

    Args:
        model: as it stands.
        keep: patterns of layers that are pinned; what is tied to them is too.

    Raises:
        RecipeError: if a pattern matches no layer.
    """
    pinned = matching(keep, model)
    widths = {layer.name: weight_widths(model.placement, layer) for layer in model.layers}
    return tuple(
        group
        for group in groups_of(model)
        if not pinned.intersection(group.layers) and any(widths[name] for name in group.layers)
    )


def evaluations_at_most(search: Search, options: MixedBits) -> int:
    """A bound on the full evaluations of :func:`climb_mixed_bits`, whatever the metric answers."""
    count = len(movable(search.model, options.keep))
    moves = count * (len(options.bits) - 1)
    by_metric = options.method is not None and find_method(options.method).by == "metric"
    ranking = len(options.bits) * (count + 1) if by_metric else 0
    walk = QUESTIONS["gallop"](moves) + (pruning(moves) if options.prune else 0) + 1
    again = OVERTURNED if options.early and not search.never_early else 0
    return 1 + ranking + walk * (1 + again)


def climb_mixed_bits(search: Search, options: MixedBits | None = None) -> Score:
    """Lower the bits of weights as far as the goal is met; the model is left with what takes the fewest bytes.

    1. All weights have the widest of the widths. Where that misses the goal the model is left as it was.
    2. What each group of layers takes in the file at each width, and what it alone loses in the outputs there, without
       labels: moves to fewer bits by the loss that a byte saved costs.
    3. Gallop and bisect for the most of them that hold.
    4. Try further moves, one by one, those left over that cost least first.
    5. Evaluate the result on all examples. Should that overturn an early verdict, go back to 3, where most verdicts are
       known; after :data:`OVERTURNED` of them judge everything on all examples.

    Where losses add up and their order is right, what 3 finds takes at most one move's bytes more than the best
    assignment there is; see :func:`.most_moves`. First and last layers move like all others.

    Args:
        search: its model calibrated.
        options: how to look for them.

    Returns:
        The score on all examples.

    Raises:
        RecipeError: if a pattern matches no layer.
    """
    options, model, early = options or MixedBits(), search.model, search.early
    as_found = model.precision
    model.forget_widths()
    model.set_mode(Mode.QUANTIZE)
    groups = movable(model, options.keep)
    if not groups:
        search.decide(
            "Mixed bits changes nothing: no layer with integer weights is left that may have others."
        )
        return search.accept("as it was")
    search.early = early and options.early
    try:
        lowering = _Lowering(search, options, groups)
        lowering.choose(lowering.widest)
        widest = f"weights of {options.bits[0]} bits"
        start = search.accept(widest)
        if not search.goal.met(start):
            search.decide(
                f"Mixed bits lowers nothing: with {widest} it scores {search.goal.words(start)}, and fewer lose more."
            )
            search.choose(as_found)
            return start
        return lowering.settle(start)
    finally:
        search.early, model.compensations.asked = early, frozenset()


class _Lowering:
    """The groups with their widths, and how to try assignments."""

    def __init__(self, search: Search, options: MixedBits, groups: tuple[Group, ...]) -> None:
        self.search, self.options, self.groups = search, options, groups
        self.widest: Levels = (0,) * len(groups)
        free = {name for group in groups for name in group.layers}
        precision = search.model.precision
        self.base = precision.but(**{width.name: precision[width.name] - free for width in WIDTHS.values()})
        self.steps = [WIDTHS[bits] for bits in options.bits]
        #: Where a group has a width anyway, by the recipe: groups by level.
        self.usual: dict[int, set[Group]] = {}
        self.left = 0.0  # evaluations that may go into pruning
        self.range_widths()

    def range_widths(self) -> None:
        """Find the ranges of all weights at all widths, or take those that an interrupted run found."""
        model, journal = self.search.model, self.search.journal
        key = self.search.checkpoints.key_of(
            "widths", self.options.bits, [group.layers for group in self.groups]
        )
        kept, found = journal.load("widths", key), dict[str, torch.Tensor]()
        for level, step in enumerate(self.steps):
            model.choose(self.precision((level,) * len(self.groups)))
            on_request = {site.name for site in model.placement.sites if site.usual is not None}
            self.usual[level] = {group for group in self.groups if not self.weights(group) & on_request}
            for name in on_request & set().union(*map(self.weights, self.groups)):
                site = model.sites[name]
                for part in ("scale", "zero_point"):
                    place = f"{part}|{step.bits}|{name}"
                    if kept is not None:
                        getattr(site, part).copy_(kept.tensors[place])
                    found[place] = getattr(site, part).clone()
        if kept is None:
            journal.save("widths", found, key)

    def weights(self, group: Group) -> set[str]:
        """The weights that a group's layers read."""
        model = self.search.model
        read = {name for layer in model.layers if layer.name in group.layers for name in layer.sites}
        return {site.name for site in model.placement.sites if site.is_weight and site.name in read}

    # candidates

    def precision(self, levels: Levels) -> LayerPrecision:
        """The groups at their levels; what the recipe has anyway is not asked for."""
        put = self.base
        for group, level in zip(self.groups, levels, strict=True):
            if group not in self.usual.get(level, ()):
                put = put.with_layers(self.steps[level].name, group.layers)
        return put

    def choose(self, levels: Levels) -> None:
        """Put the model to them, roundings and shifts fitted to that."""
        model = self.search.model
        lowered = [group for group, level in zip(self.groups, levels, strict=True) if level]
        if self.options.repair:
            model.compensations.asked = frozenset(name for group in lowered for name in group.layers)
        self.search.choose(self.precision(levels))

    def holds(self, levels: Levels, what: str) -> bool:
        """Whether the goal is met so."""
        self.choose(levels)
        return self.search.judge(what).met

    # what moves cost and save

    def measure(self) -> None:
        """Bytes and losses of every group at every width."""
        search, model = self.search, self.search.model
        counts: list[list[int]] = []  # by level, then by group
        losses: list[list[float]] = []
        seconds = 0.0
        for level in range(len(self.steps)):
            model.choose(self.precision((level,) * len(self.groups)))
            counted = COUNTS[self.options.bytes](model)
            counts.append([sum(counted[name] for name in self.weights(group)) for group in self.groups])
            ranking = kept_ranking(search, self.groups, self.options.method)
            scores = {row.group: row.score for row in ranking.rows}
            losses.append([scores[group] for group in self.groups])
            seconds, self.method = seconds + ranking.seconds, ranking.method
        self.counts = list(zip(*counts, strict=True))
        self.losses = [
            tuple(_more(loss, widest) for loss in (widest, *rest))
            for widest, *rest in zip(*losses, strict=True)
        ]
        took = f"{seconds:.1f} s"
        totals = ", ".join(
            f"{sum(sizes):,} with {bits}" for bits, sizes in zip(self.options.bits, counts, strict=True)
        )
        where = "in the file" if self.options.bytes == "stored" else "if every bit is stored as one"
        search.decide(
            f"The weights of {_many(len(self.groups))} of layers take these bytes {where}: {totals} bits."
        )
        said = f"What each width loses in each group was measured by {self.method} in {took}."
        search.decide(said, key=said.replace(took, "", 1))

    def table(self) -> list[list[tuple[int, float]]]:
        """Bytes and loss of each group at each level."""
        return [
            list(zip(sizes, losses, strict=True))
            for sizes, losses in zip(self.counts, self.losses, strict=True)
        ]

    # the search

    def settle(self, start: Score) -> Score:
        """What takes the fewest bytes and meets the goal on all examples, whatever early verdicts said."""
        search, early = self.search, self.search.early
        self.measure()
        table = self.table()
        moves = moves_of(table)
        levels, score = self.widest, start
        if not moves:
            search.decide(
                f"No group of layers takes fewer bytes with fewer bits in a file for {search.model.target.name}; "
                "hs.MixedBits(bytes='nominal') counts bits."
            )
        try:
            for search.early in (*[early] * (OVERTURNED if early else 0), False):
                levels = self.find(table, moves)
                self.choose(levels)
                score = search.accept(f"{self._lowered(levels)}, settled")
                if search.goal.met(score):
                    break
                search.decide(
                    f"All examples overturn the early verdict on {self._lowered(levels)}; the search goes on from what "
                    "is known."
                )
        finally:
            search.early = early
        return self.report(levels, score)

    def find(self, table: list[list[tuple[int, float]]], moves: list[Move]) -> Levels:
        """The levels that hold by the verdicts so far."""
        count = most_moves(
            moves,
            lambda count: self.holds(
                after(self.widest, moves[:count]), self._words(moves[count - 1 : count], count)
            ),
        )
        levels = after(self.widest, moves[:count])
        if not self.options.prune or not moves:
            return levels
        steps = steps_from(table, levels)
        self.left = float(pruning(len(moves)))

        def still_holds(there: Levels, tried: Sequence[Move]) -> bool:
            spent = self.search.memory.replayed_cost
            holds = self.holds(there, self._words(tried))
            self.left -= self.search.memory.replayed_cost - spent
            return holds

        return further(levels, steps, still_holds, lambda: self.left >= 1)

    def report(self, levels: Levels, score: Score) -> Score:
        """Say what was found, and return its score."""
        search = self.search
        rows = tuple(
            GroupWidths(group.layers, sizes, losses, self.options.bits[level])
            for group, sizes, losses, level in zip(self.groups, self.counts, self.losses, levels, strict=True)
        )
        table = WidthTable(self.options.bits, self.options.bytes, self.method, rows)
        search.found["widths"] = table
        lowered = [row for row, level in zip(rows, levels, strict=True) if level]
        if lowered:
            listed = ", ".join(f"{name} {row.bits}" for row in lowered for name in row.layers)
            search.decide(
                f"Weights have fewer bits in {len(lowered)} of {_many(len(rows))} of layers ({listed}) and take "
                f"{table.bytes:,} bytes instead of {table.before:,}: {search.goal.words(score)}. "
                f"{search.goal.evidence(score)}"
            )
            if figures := search.refits.sentence().partition(": ")[2]:
                search.decide(f"Weights rounded and biases shifted for these bits: {figures}")
        else:
            search.decide(
                f"No weight has fewer than {self.options.bits[0]} bits: {search.goal.words(score)}."
            )
        saved = f", {search.memory.saved:,} examples spared by early verdicts" if search.memory.saved else ""
        search.decide(f"The search so far took {search.memory.replayed_cost:.1f} full evaluations{saved}.")
        # By bits alone the search may prefer what takes more bytes in the file.
        search.best = Evaluated.of(search.model, self._lowered(levels), score)
        return score

    def _lowered(self, levels: Levels) -> str:
        count = sum(level > 0 for level in levels)
        return f"fewer bits in {_many(count)} of layers"

    def _words(self, moves: Sequence[Move], first: int = 0) -> str:
        """What is tried, in words."""
        move = moves[-1]
        there = f"{self.groups[move.item].name} to {self.options.bits[move.level]} bits"
        if first:
            return f"the first {first} moves to fewer bits, down to {there}"
        more = f" and {len(moves) - 1} moves before" if len(moves) > 1 else ""
        return f"{there}{more}"


def _more(loss: float, than: float) -> float:
    """How much more is lost than at the widest width, which noise may make less than nothing."""
    return max(0.0, loss - than) if math.isfinite(loss) else loss


def _many(groups: int) -> str:
    return "1 group" if groups == 1 else f"{groups} groups"


def _listed(widths: Sequence[int]) -> str:
    return ", ".join(map(str, widths))


def widths_found(model: QuantizedModel) -> Mapping[str, int]:
    """The bits of each layer's integer weights as they stand, by the layer's name; the widest of several."""
    widths = {layer.name: weight_widths(model.placement, layer) for layer in model.layers if not layer.reason}
    return {name: max(bits) for name, bits in widths.items() if bits}
