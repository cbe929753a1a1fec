"""Which layers lose the accuracy, most sensitive first; and whether weights or activations do.

Kendall's tau: how far two scores agree on an order.

Where is the loss: in the weights or in the activations?
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from halfstep.calibration.calibrate import SAMPLE_EXAMPLES
from halfstep.errors import ArgumentError, HalfstepError
from halfstep.evaluate import as_scorer
from halfstep.fake_quantize import Mode
from halfstep.fidelity.reference import Probe, knowing_float
from halfstep.journal import exact
from halfstep.ladder.float_score import float_evaluation
from halfstep.ladder.goal import Goal
from halfstep.ladder.methods import METHODS, UNITS, Alone, Method, find_method
from halfstep.ladder.search import Search
from halfstep.model import QuantizedModel
from halfstep.precision import Group, groups_of


def kendall_tau(first: Sequence[float], second: Sequence[float]) -> float:
    """Kendall's tau-b: pairs that both put in the same order less those that they do not, over all; ties corrected.

    1 for the same order, -1 for the opposite one, about 0 for unrelated ones; NaN where one of them is constant or
    there are fewer than two.

    >>> round(kendall_tau([1, 2, 3, 4], [1, 2, 4, 3]), 4)  # (5 - 1) / 6
    0.6667

    Source: Kendall, Biometrika 33 (1945).
    """
    balance = one = two = 0
    for i in range(len(first)):
        for j in range(i):
            a = (first[i] > first[j]) - (first[i] < first[j])
            b = (second[i] > second[j]) - (second[i] < second[j])
            balance, one, two = balance + a * b, one + a * a, two + b * b
    return balance / math.sqrt(one * two) if one and two else math.nan


#: A half that causes this share of the two drops' sum is called the cause.
MOST = 0.75


@dataclass(frozen=True)
class Halves:
    """The drop with only the weights quantized, and with only the activations.

    Attributes:
        weights: in the metric's unit.
        activations: the same.
        both: with everything quantized.
        allowed: the goal's.
        metric: whose drops these are; empty where there is only one.
    """

    weights: float
    activations: float
    both: float
    allowed: float
    metric: str = ""

    @property
    def cause(self) -> str:
        """``"weights"``, ``"activations"``, ``"both"``; ``"neither"`` where each alone is within the allowed.

        ``"nothing"`` where none loses anything and the target asks for more than float.
        """
        weights, activations = max(self.weights, 0.0), max(self.activations, 0.0)
        if weights <= self.allowed and activations <= self.allowed:
            return "neither"
        if not weights + activations:
            return "nothing"
        share = weights / (weights + activations)
        return "weights" if share >= MOST else "activations" if share <= 1 - MOST else "both"

    def __str__(self) -> str:
        """The two drops, and what follows from them."""
        of = f" of {self.metric}" if self.metric else ""
        return (
            f"With only the weights quantized the drop{of} is {self.weights:+.4f}, with only the activations "
            f"{self.activations:+.4f}, with both {self.both:+.4f} (allowed {self.allowed:g}): {ADVICE[self.cause]}"
        )

    def to_dict(self) -> dict[str, Any]:
        """The drops and the cause as plain data."""
        return {
            "weights": self.weights,
            "activations": self.activations,
            "both": self.both,
            "allowed": self.allowed,
            "cause": self.cause,
        }


ADVICE = {
    "weights": "the weights lose it. A range for each output channel, more bits, or repairing the weights helps; "
    "another calibrator of activations will not",
    "activations": "the activations lose it. Another calibrator, ranges computed at run time, or 16-bit activations "
    "in few layers help; more bits for the weights will not",
    "both": "both lose a part of it; layers with both halves in float are the surest cure",
    "nothing": "neither half loses anything by itself; what is missing is what files lose beside their simulations",
    "neither": "each half alone would do; their errors add up. A few layers in float, or one half in more bits, "
    "suffice",
}


def where_is_the_loss(search: Search) -> Halves | None:
    """Judge the model with only its weights quantized, then with only its activations; None if it has one half only.

    Both drops are measured on as many examples as the verdict on them takes.
    """
    model = search.model
    kinds = {site.is_weight for site in model.placement.sites}
    if len(kinds) < 2:
        return None
    both = search.judge("all layers quantized")
    with model.using(Mode.QUANTIZE, activations=False):
        weights = search.judge("only weights quantized")
    with model.using(Mode.QUANTIZE, weights=False):
        activations = search.judge("only activations quantized")
    goal = search.goal
    return Halves(search.drop(weights), search.drop(activations), search.drop(both), goal.max_drop, goal.name)


@dataclass(frozen=True)
class LayerSensitivity:
    """A row of the table.

    Attributes:
        layers: what is quantized together.
        kinds: what they are.
        score: what quantizing them loses, in the table's unit.
        drop: the metric's drop with only them quantized, where it was measured beside the score.
        microseconds: what leaving them in float costs a batch, where that was measured on the target's runtime.
    """

    layers: tuple[str, ...]
    kinds: tuple[str, ...]
    score: float
    drop: float | None = None
    microseconds: float | None = None

    @property
    def group(self) -> Group:
        """The layers as a group."""
        return Group(self.layers, self.kinds)


@dataclass(frozen=True)
class Sensitivity:
    """Groups of layers by what quantizing them loses.

    Attributes:
        method: how that was measured.
        unit: of the scores: the metric's drop, nats of divergence, or noise over signal.
        rows: most sensitive first.
        examples: sent through the network for it; a pass through a part of it counts as that part.
        seconds: what it took.
        tau: Kendall's tau between score and measured drop, over the rows that have one; None without two.
    """

    method: str
    unit: str
    rows: tuple[LayerSensitivity, ...]
    examples: int
    seconds: float
    tau: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data."""
        return asdict(self)

    @classmethod
    def of(cls, data: Mapping[str, Any]) -> Sensitivity:
        """The one whose fields are ``data``, with numbers as numbers or text."""

        def number(value: Any) -> float | None:
            return None if value is None else float(value)

        rows = tuple(
            LayerSensitivity(
                tuple(row["layers"]),
                tuple(row["kinds"]),
                float(row["score"]),
                number(row["drop"]),
                number(row["microseconds"]),
            )
            for row in data["rows"]
        )
        tau = number(data["tau"])
        return cls(data["method"], data["unit"], rows, data["examples"], float(data["seconds"]), tau)

    def __str__(self) -> str:
        """A line for every group."""
        width = max((len(row.group.name) for row in self.rows), default=0)
        lines = [f"sensitivity by {self.method}, in {self.unit}"]
        for row in self.rows:
            drop = "" if row.drop is None else f"   measured drop {row.drop:+.4f}"
            time = "" if row.microseconds is None else f"   {row.microseconds:+.0f} us in float"
            lines.append(f"  {row.group.name:<{width}}  {row.score:10.4g}{drop}{time}")
        if self.tau is not None:
            measured = sum(row.drop is not None for row in self.rows)
            lines.append(f"  Kendall's tau with the measured drop of {measured} of them: {self.tau:+.2f}")
        return "\n".join(lines)

    def plot(self, path: str | Path) -> Path:
        """Draw the table as bars and write it to ``path``; the suffix chooses the file's format.

        Raises:
            HalfstepError: if matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise HalfstepError("plots need matplotlib: pip install 'halfstep[plot]'") from error
        figure = Figure(figsize=(7, 1 + 0.22 * len(self.rows)), layout="constrained")
        axes = figure.add_subplot()
        names = [row.group.name for row in self.rows]
        places = range(len(self.rows))
        axes.barh(places, [row.score for row in self.rows], color="tab:blue")
        axes.set_yticks(places, names, fontsize=7)
        axes.invert_yaxis()
        positive = [row.score for row in self.rows if 0 < row.score < math.inf]
        if positive and max(positive) > 100 * min(positive):
            axes.set_xscale("symlog", linthresh=max(positive) / 1e4)
        axes.set_xlabel(f"lost by quantizing ({self.method}: {self.unit})")
        measured = [(place, row.drop) for place, row in enumerate(self.rows) if row.drop is not None]
        if measured and self.unit != UNITS["metric"]:
            beside = axes.twiny()
            beside.plot(
                [drop for _, drop in measured], [place for place, _ in measured], "o", color="tab:orange"
            )
            beside.set_xlabel(
                f"measured drop of the metric (tau {self.tau or math.nan:.2f})", color="tab:orange"
            )
        figure.savefig(path)
        return Path(path)


def sensitivity(
    model: QuantizedModel,
    method: str | Method | None = None,
    metric: Any = None,
    measured: int = 0,
    examples: int = 256,
) -> Sensitivity:
    """Score every group of layers by what quantizing it loses.

    A group is what the target fuses: a layer with its activation function, and the layers that read a common
    quantizer. There is no agreed criterion, so there are several, and ``measured`` says how far one agrees with the
    metric.

    Args:
        model: observed and calibrated; it is the same afterwards.
        method: ``"kl"`` or ``"sqnr"``: one group quantized, outputs compared with the float network's on the kept
            examples, no labels; ``"fisher"``: an estimate of the same for all groups from one forward and backward;
            ``"metric"``: one group quantized, the metric evaluated; ``"spared"`` (``_kl``, ``_sqnr``): one group left
            in float with all others quantized. Or a :class:`Method`. None for ``"kl"`` where the model's output looks
            like logits, ``"sqnr"`` elsewhere.
        metric: for ``"metric"``, ``"spared"`` and ``measured``: as for :func:`halfstep.quantize`.
        measured: also measure the metric's drop for so many groups, spread over the ranking.
        examples: use at most so many of the kept examples.

    Raises:
        ArgumentError: for an unknown method, or one that needs a metric where there is none.
        NotObservedError: if the model saw no data or has no ranges.

    >>> print(hs.sensitivity(q, "fisher", metric=hs.Accuracy(labelled), measured=5))  # doctest: +SKIP
    """
    search = None
    if metric is not None:
        scorer = knowing_float(as_scorer(metric), model)
        score, made = float_evaluation(scorer, model)
        search = Search(model, scorer, Goal(0.0, score, scorer.higher_is_better), made)
    return rank(model, search, groups_of(model), method, measured, examples)


def rank(
    model: QuantizedModel,
    search: Search | None,
    groups: tuple[Group, ...],
    method: str | Method | None = None,
    measured: int = 0,
    examples: int = 256,
) -> Sensitivity:
    """:func:`sensitivity` of chosen groups, with the evaluations of a search."""
    with model.compensations.set_aside():  # they hold for one set of layers in float, and here are many
        return _rank(model, search, groups, method, measured, examples)


#: Groups times examples of a ranking, and examples at least: 32 groups are ranked on all kept examples.
RANKED, LEAST_RANKED = 32 * SAMPLE_EXAMPLES, 32


def ranking_examples(groups: int) -> int:
    """On how many of the kept examples groups are ranked: fewer where there are many, as each costs a pass over them.

    :data:`RANKED` example-groups in all, but at least :data:`LEAST_RANKED` examples each.
    """
    return min(SAMPLE_EXAMPLES, max(LEAST_RANKED, RANKED // max(1, groups)))


def kept_ranking(
    search: Search, groups: tuple[Group, ...], method: str | Method | None, measured: int = 0
) -> Sensitivity:
    """The ranking of the groups for a search: an interrupted run's of this very network, or a new one."""
    examples = ranking_examples(len(groups))
    key = search.checkpoints.key_of(groups, method, measured, examples)
    for entry in search.journal.of("ranking"):
        if entry.data["key"] == key:
            return Sensitivity.of(entry.data["measured"]["table"])
    table = rank(search.model, search, groups, method, measured, examples)
    search.journal.write("ranking", key=key, measured={"table": exact(table.to_dict())})
    return table


def _rank(
    model: QuantizedModel,
    search: Search | None,
    groups: tuple[Group, ...],
    method: str | Method | None,
    measured: int,
    examples: int,
) -> Sensitivity:
    start = time.perf_counter()
    probe = Probe(model, (lambda what: search.goal.drop(search.evaluate(what))) if search else None, examples)
    chosen = find_method(probe.by if method is None else method)
    if measured and search is None:
        raise ArgumentError(f"measured: got {measured} groups to measure and no metric; give metric=")
    scores = chosen.measure(probe, groups)
    name = next((name for name, known in METHODS.items() if known == chosen), repr(chosen))
    order = sorted(range(len(groups)), key=lambda index: -scores[index])
    rows = tuple(LayerSensitivity(groups[i].layers, groups[i].kinds, scores[i]) for i in order)
    table = Sensitivity(name, UNITS[chosen.by], rows, round(probe.passes), time.perf_counter() - start)
    return _with_drops(table, probe, groups, measured) if measured else table


def _with_drops(table: Sensitivity, probe: Probe, groups: tuple[Group, ...], measured: int) -> Sensitivity:
    """The table with the metric measured on some rows, evenly spread from the first to the last."""
    count = min(measured, len(table.rows))
    last = len(table.rows) - 1
    chosen = sorted({round(i * last / max(count - 1, 1)) for i in range(count)})
    others = tuple(table.rows[index].group for index in chosen)
    drops = dict(zip(chosen, Alone("metric").measure(probe, others), strict=True))
    rows = tuple(replace(row, drop=drops.get(index)) for index, row in enumerate(table.rows))
    pairs = [(row.score, row.drop) for row in rows if row.drop is not None]
    tau = kendall_tau([score for score, _ in pairs], [drop for _, drop in pairs])
    return replace(table, rows=rows, tau=None if math.isnan(tau) else tau)
