"""Rungs that are climbed by themselves: what :func:`halfstep.partial` and :func:`halfstep.mixed_bits` do and return."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from halfstep.errors import ArgumentError
from halfstep.evaluate import Drop, Score, as_scorers
from halfstep.fidelity.reference import knowing_float
from halfstep.identity import Identity
from halfstep.journal import Journal
from halfstep.ladder.evaluation import Evaluation
from halfstep.ladder.float_score import float_evaluation
from halfstep.ladder.goal import Asked, GoalSpec
from halfstep.ladder.identity import claim_run
from halfstep.ladder.mixed_bits import MixedBits, WidthTable, climb_mixed_bits, movable, widths_found
from halfstep.ladder.partial import Partial, climb_partial
from halfstep.ladder.search import Search
from halfstep.ladder.sensitivity import Halves, Sensitivity
from halfstep.model import QuantizedModel
from halfstep.precision import groups_of, pinned_layers


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What came of a search by itself. The model is left as it says.

    Attributes:
        met: whether the goal is met, by its own rule.
        float_score: of the float model.
        score: of the model as it is left, on all examples.
        drop: from the one to the other, with its interval, corrected for the candidates examined.
        history: every evaluation.
        decisions: what was decided and why, one sentence each.
        full_evaluations: what it all cost, in evaluations of every example.
        saved: examples that early verdicts spared.
    """

    met: bool
    float_score: float
    score: float
    drop: Drop
    history: tuple[Evaluation, ...]
    decisions: tuple[str, ...]
    full_evaluations: float
    saved: int

    @classmethod
    def of(cls, search: Search, score: Score, **own: Any) -> Self:
        """What a search came to, with the model's score and what the kind of search has of its own."""
        return cls(
            met=search.goal.met(score),
            float_score=search.goal.float_score.value,
            score=score.value,
            drop=search.goal.compare(score),
            history=tuple(search.evaluations),
            decisions=search.decisions,
            full_evaluations=search.memory.replayed_cost,
            saved=search.memory.saved,
            **own,
        )

    @property
    def found(self) -> str:
        """What was found, in a few words; may be empty."""
        return ""

    def __str__(self) -> str:
        """The verdict and the decisions."""
        head = ", ".join(filter(None, (f"{'met' if self.met else 'not met'}: drop {self.drop}", self.found)))
        return "\n".join([head, *(f"- {sentence}" for sentence in self.decisions)])


@contextmanager
def search_by_itself(
    model: QuantizedModel, metric: Any, aim: GoalSpec, directory: str | Path | None, rung: str
) -> Iterator[Search]:
    """The search of a rung that is climbed by itself, with the float model scored.

    Args:
        model: observed and calibrated.
        metric: as for :func:`halfstep.quantize`.
        aim: what is asked for.
        directory: of the journal; None keeps nothing.
        rung: its name.

    Raises:
        ArgumentError: if the float model itself misses the target.
        MetricError: if the metric cannot be used.
        RunError: if the directory belongs to another search, or cannot be written.
    """
    scorer = as_scorers(metric)
    aim.check(scorer)
    with Journal(directory) as journal:
        unseen: tuple[str, ...] = ()
        if directory is not None:
            unseen = claim_run(journal, model, scorer, aim).unseen
            own = [(name, x) for name, x in model.named_parameters() if not name.startswith("quantizers.")]
            journal.claim("parameters", Identity(own).digest)
        scorer = knowing_float(scorer, model)
        score, _ = float_evaluation(scorer, model, journal, unseen)
        yield Search(model, scorer, aim.goal(score, scorer), journal=journal, rung=rung)


@dataclass(frozen=True, kw_only=True)
class PartialResult(SearchResult):
    """What :func:`partial` found.

    Attributes:
        put_back: the step that each layer was put to, by the layer's name.
        halves: which half loses the accuracy; None if the model met the goal as it was, or has one half only.
        sensitivity: the ranking; None if none was needed.
    """

    put_back: Mapping[str, str]
    halves: Halves | None
    sensitivity: Sensitivity | None

    @property
    def float_layers(self) -> tuple[str, ...]:
        """The layers put back to float."""
        return tuple(name for name, step in self.put_back.items() if step == "float")

    @property
    def found(self) -> str:
        """How many layers were put back."""
        return f"{len(self.put_back)} layers put back"


def partial(
    model: QuantizedModel,
    metric: Any,
    max_drop: Asked = None,
    options: Partial | None = None,
    confidence: float = 0.95,
    strict: bool = False,
    *,
    relative_drop: Asked = None,
    floor: Asked = None,
    directory: str | Path | None = None,
) -> PartialResult:
    """Put the fewest layers back to float that keep the score as near to the float model's as asked.

    Args:
        model: observed and calibrated; it is left with the layers put back that were found.
        metric: as for :func:`halfstep.quantize`.
        max_drop: in the metric's unit, against the float model on the same examples; 0.01 unless another target is
            given.
        options: how to look for them.
        confidence: of the drops' intervals, all candidates together; and that all examples say so too where the target
            is said to be missed. Every early verdict on the way has it by itself, so that of many one may be wrong:
            that costs a layer put back needlessly, and nothing is accepted before all examples are seen.
        strict: whether the upper end of the drop's interval must keep to the target, as for
            :func:`halfstep.quantize`, or the drop that was measured.
        relative_drop: instead of ``max_drop``: a share of the float score.
        floor: instead of ``max_drop``: the worst score allowed.
        directory: for a journal of every evaluation: the same call again goes on where it was interrupted. None
            keeps nothing.

    Raises:
        RecipeError: if a pattern matches no layer, or layers are pinned both ways, or all of them in float.
        ArgumentError: if no layer is left that could be put back, more than one target is given, or the float model
            itself misses it.
        MetricError: if the metric cannot be used.
        RunError: if the directory belongs to another search, or cannot be written.

    >>> hs.partial(q, hs.Accuracy(labelled), max_drop=0.01).float_layers  # doctest: +SKIP
    ('blocks.0.body.3',)
    """
    options = options or Partial()
    if not pinned_layers(model, options.keep_float, options.keep_quantized)[1]:
        raise ArgumentError(
            "partial: no layers are left to put back to float: "
            + ("all that are quantized are pinned" if groups_of(model) else "none is quantized")
        )
    aim = GoalSpec(max_drop, relative_drop, floor, confidence, strict)
    with search_by_itself(model, metric, aim, directory, Partial.name) as search:
        found = climb_partial(search, options)
    table, halves = search.found.get("sensitivity"), search.found.get("halves")
    return PartialResult.of(
        search,
        found,
        put_back={
            name: step for name in model.layer_names if (step := model.precision.step_of(name)) is not None
        },
        halves=halves if isinstance(halves, Halves) else None,
        sensitivity=table if isinstance(table, Sensitivity) else None,
    )


@dataclass(frozen=True, kw_only=True)
class MixedBitsResult(SearchResult):
    """What :func:`mixed_bits` found; the score is that with the widest weights where they miss the goal.

    Attributes:
        bits: of each layer's weights, by the layer's name.
        widths: bytes and losses of every group at every width; None if the goal was missed with the widest.
    """

    bits: Mapping[str, int]
    widths: WidthTable | None

    @property
    def found(self) -> str:
        """The bytes that are left; empty where nothing was lowered."""
        table = self.widths
        return "" if table is None else f"{table.bytes:,} of {table.before:,} bytes of weights"


def mixed_bits(
    model: QuantizedModel,
    metric: Any,
    max_drop: Asked = None,
    options: MixedBits | None = None,
    confidence: float = 0.95,
    *,
    relative_drop: Asked = None,
    floor: Asked = None,
    directory: str | Path | None = None,
) -> MixedBitsResult:
    """Give each layer's weights the fewest bits that keep the score as near to the float model's as asked.

    Args:
        model: observed and calibrated; it is left with the widths that were found, or as it was if the widest of them
            miss the goal.
        metric: as for :func:`halfstep.quantize`.
        max_drop: in the metric's unit, against the float model on the same examples; 0.01 unless another target is
            given.
        options: which widths, and how to look for them.
        confidence: of the drops' intervals and of each early verdict, as for :func:`halfstep.partial`.
        relative_drop: instead of ``max_drop``: a share of the float score.
        floor: instead of ``max_drop``: the worst score allowed.
        directory: for a journal of every evaluation: the same call again goes on where it was interrupted. None
            keeps nothing.

    Raises:
        RecipeError: if a pattern matches no layer.
        ArgumentError: if no layer has integer weights that may have other bits, more than one target is given, or the
            float model itself misses it.
        MetricError: if the metric cannot be used.
        RunError: if the directory belongs to another search, or cannot be written.

    >>> hs.mixed_bits(q, hs.Accuracy(labelled), max_drop=0.01).bits  # doctest: +SKIP
    {'conv1': 8, 'conv2': 4, 'fc': 8}
    """
    options = options or MixedBits()
    if not movable(model, options.keep):
        raise ArgumentError(
            "mixed_bits: no layer is left whose weights could have other bits: "
            + ("all that have integer weights are kept" if movable(model) else "none has integer weights")
        )
    aim = GoalSpec(max_drop, relative_drop, floor, confidence)
    with search_by_itself(model, metric, aim, directory, MixedBits.name) as search:
        found = climb_mixed_bits(search, options)
    table = search.found.get("widths")
    return MixedBitsResult.of(
        search, found, bits=widths_found(model), widths=table if isinstance(table, WidthTable) else None
    )
