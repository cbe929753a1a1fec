"""What a sweep compares and finds: its options and its records.

The options of a sweep, as users ask for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from halfstep.calibration.diagnostics import SiteConcern
from halfstep.calibrators import (
    MSE,
    Calibrator,
    Concern,
    Entropy,
    Max,
    Percentile,
    WeightCalibrator,
    data_concerns,
    disagreements,
)
from halfstep.errors import ArgumentError
from halfstep.fidelity.compare import Fidelity, Measure
from halfstep.journal import Journal, exact
from halfstep.model import QuantizedModel
from halfstep.ranges import Answers, SiteRange, activation_sites, set_ranges

#: What is tried where nothing else is asked for: none of them is best everywhere.
CALIBRATORS: tuple[Calibrator, ...] = (
    Max(),
    Percentile(99.9),
    Percentile(99.99),
    Percentile(99.999),
    Percentile(99.9999),
    Entropy(),
    MSE(),
)


WEIGHT_CALIBRATORS: tuple[WeightCalibrator, ...] = (Max(), MSE())


FINALISTS = 3  # candidates that the metric judges at most


@dataclass(frozen=True)
class BestOf:
    """The options of a sweep; made by :func:`best_of`.

    Attributes:
        calibrators: for the activations.
        weights: for the weights.
        by: the measure that ranks, ``"kl"`` or ``"sqnr"``.
        mixed: also try different calibrators at different sites.
        examples: how many of the kept examples are compared on, at most.
        metric: judges the best few; None leaves the last word to the measure.
        finalists: how many of the best it judges.
    """

    calibrators: tuple[Calibrator, ...] = CALIBRATORS
    weights: tuple[WeightCalibrator, ...] = WEIGHT_CALIBRATORS
    by: Measure = "kl"
    mixed: bool = True
    examples: int = 256
    metric: Any = None
    finalists: int = FINALISTS

    def __post_init__(self) -> None:
        for kind, protocol, calibrators in (
            ("calibrators", Calibrator, self.calibrators),
            ("weights", WeightCalibrator, self.weights),
        ):
            if not calibrators:
                raise ArgumentError(f"best_of, {kind}: got none, needed at least one")
            for calibrator in calibrators:
                if not isinstance(calibrator, protocol):
                    raise ArgumentError(
                        f"best_of, {kind}: got {calibrator!r}, needed a {protocol.__name__} such as hs.MSE()"
                    )
        if self.finalists < 1:
            raise ArgumentError(f"best_of, finalists: got {self.finalists}, needed at least 1")


def best_of(
    *calibrators: Calibrator,
    weights: Sequence[WeightCalibrator] = WEIGHT_CALIBRATORS,
    by: Measure = "kl",
    mixed: bool = True,
    examples: int = 256,
    metric: Any = None,
    finalists: int = FINALISTS,
) -> BestOf:
    """Ask for the best of several calibrators: ``calibrate(q, best_of())``.

    All are asked of the same statistics. Each candidate's outputs are compared with the float network's on the
    examples that :func:`~halfstep.observe` kept, and the nearest wins; with a metric the best few are then evaluated,
    and it decides. ``q`` is left with the winner's ranges.

    Args:
        calibrators: for the activations; none stands for :data:`CALIBRATORS`: Max, four percentiles, Entropy, MSE.
        weights: for the weights; the one that does best alone is kept for all candidates.
        by: ``"kl"``, the divergence of the softmax, for classifiers; ``"sqnr"`` for outputs of any kind.
        mixed: also try different calibrators at different sites, as :func:`.influence.influences` proposes them.
        examples: how many of the kept examples are compared on, at most.
        metric: :class:`Accuracy`, :class:`Metric`, or any callable from a model to a float; None for the measure alone.
        finalists: how many of the best it judges.

    Raises:
        ArgumentError: something that is no calibrator, or none for the weights.

    >>> [str(calibrator) for calibrator in best_of(Max(), Percentile(99.9)).calibrators]
    ['max', 'percentile(99.9)']
    """
    return BestOf(tuple(calibrators) or CALIBRATORS, tuple(weights), by, mixed, examples, metric, finalists)


FLOAT = "float"  # in a candidate's place for weights or activations that are not quantized


MIXED = "mixed"  # where the calibrator differs by site


BEFORE = "as before"  # where each site keeps its calibrator, asked of new statistics


@dataclass(frozen=True)
class Candidate:
    """One choice for every site.

    Attributes:
        activations: the calibrator of the activations, those that answered alike joined by ``" = "``; ``"mixed"`` if
            it differs by site; ``"as before"`` if each site keeps its own; ``"float"`` where activations are not
            quantized.
        weights: the same for the weights.
        fidelity: what it does to the outputs.
        score: the metric's; None if it was not evaluated.
        answers: the range of every site, and the calibrator that gave it.
    """

    activations: str
    weights: str
    fidelity: Fidelity
    score: float | None = None
    answers: Answers = field(default_factory=dict, repr=False, compare=False)

    def apply(self, model: QuantizedModel) -> None:
        """Give ``model`` these ranges, and let it quantize."""
        set_ranges(model, self.answers)

    def __str__(self) -> str:
        if FLOAT in (self.activations, self.weights):
            return f"weights by {self.weights}" if self.activations == FLOAT else self.activations
        return f"{self.activations}, weights by {self.weights}"


@dataclass(frozen=True)
class Sweep:
    """What :func:`sweep` found; prints as a table.

    Attributes:
        candidates: the winner first; then those that the metric judged, then all others by the measure.
        by: the measure.
        examples: how many examples the outputs were compared on.
        passes: forward passes over them; the backward pass of ``mixed`` counts as one.
        evaluations: how often the metric was evaluated.
        weights_alone: what each weight calibrator does with activations in float.
        concerns: reasons for a second look at the activations' sites: where calibrators disagree, and what the data
            say against the winner.
        activations_alone: what the measure's best does with weights in float; None where one side is float anyway.
    """

    candidates: tuple[Candidate, ...]
    by: Measure
    examples: int
    passes: int
    evaluations: int = 0
    weights_alone: Mapping[str, Fidelity] = field(default_factory=dict)
    activations_alone: Fidelity | None = None
    concerns: tuple[SiteConcern, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Everything but ranges, as plain data."""
        rows = [
            {
                "activations": candidate.activations,
                "weights": candidate.weights,
                **asdict(candidate.fidelity),
                "score": candidate.score,
            }
            for candidate in self.candidates
        ]
        return {
            "candidates": rows,
            "by": self.by,
            "examples": self.examples,
            "passes": self.passes,
            "evaluations": self.evaluations,
            "concerns": [str(concern) for concern in self.concerns],
        }

    def keep(self, journal: Journal, name: str, key: str) -> None:
        """Keep all of it, ranges included, under a name and a key of what it was computed from."""
        tensors = {
            f"{end}|{index}|{site}": getattr(answer, end)
            for index, candidate in enumerate(self.candidates)
            for site, answer in candidate.answers.items()
            for end in ("low", "high")
        }
        rows = [
            {
                "activations": candidate.activations,
                "weights": candidate.weights,
                "fidelity": asdict(candidate.fidelity),
                "calibrators": {site: str(answer.calibrator) for site, answer in candidate.answers.items()},
            }
            for candidate in self.candidates
        ]
        data = {
            "candidates": rows,
            "by": self.by,
            "examples": self.examples,
            "passes": self.passes,
            "weights_alone": {name: asdict(fidelity) for name, fidelity in self.weights_alone.items()},
            "activations_alone": None if self.activations_alone is None else asdict(self.activations_alone),
            "concerns": [[each.site, each.concern.kind, each.concern.message] for each in self.concerns],
        }
        journal.save(name, tensors, key, exact(data))

    @classmethod
    def kept(
        cls, journal: Journal, name: str, key: str, calibrators: Iterable[Calibrator | WeightCalibrator]
    ) -> Sweep | None:
        """What :meth:`keep` kept, if it did.

        Args:
            journal: that has it.
            name: the same.
            key: the same.
            calibrators: those that were compared.
        """
        saved = journal.load(name, key)
        if saved is None:
            return None
        data, by_name = saved.data, {str(calibrator): calibrator for calibrator in calibrators}
        candidates = []
        for index, row in enumerate(data["candidates"]):
            ends = {
                site: [saved.tensors[f"{end}|{index}|{site}"] for end in ("low", "high")]
                for site in row["calibrators"]
            }
            answers = {
                site: SiteRange(by_name[name], *ends[site]) for site, name in row["calibrators"].items()
            }
            fidelity = Fidelity.of(row["fidelity"])
            candidates.append(Candidate(row["activations"], row["weights"], fidelity, answers=answers))
        alone = data["activations_alone"]
        return cls(
            tuple(candidates),
            data["by"],
            data["examples"],
            data["passes"],
            weights_alone={name: Fidelity.of(fidelity) for name, fidelity in data["weights_alone"].items()},
            activations_alone=None if alone is None else Fidelity.of(alone),
            concerns=tuple(
                SiteConcern(site, Concern(kind, message)) for site, kind, message in data["concerns"]
            ),
        )

    @property
    def best(self) -> Candidate:
        """The winner."""
        return self.candidates[0]

    def __str__(self) -> str:
        rows = [("activations", "weights", "KL", "SQNR, dB", "metric")]
        for candidate in self.candidates:
            score = "" if candidate.score is None else f"{candidate.score:.4f}"
            rows.append((candidate.activations, candidate.weights, *candidate.fidelity.figures(), score))
        alone = [(FLOAT, name, *fidelity.figures(), "") for name, fidelity in self.weights_alone.items()]
        if self.activations_alone is not None:
            alone.append((self.best_by_measure.activations, FLOAT, *self.activations_alone.figures(), ""))
        rows += alone
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        cost = f"{self.examples} examples, {self.passes} passes over them, {self.evaluations} evaluations of the metric"
        return "\n".join([*lines, f"ranked by {self.by}: {cost}"])

    @property
    def best_by_measure(self) -> Candidate:
        """The one whose outputs are nearest to the float network's."""
        return min(self.candidates, key=lambda candidate: candidate.fidelity.loss(self.by))


def site_concerns(model: QuantizedModel, candidates: Sequence[Candidate]) -> tuple[SiteConcern, ...]:
    """What the data say against the first candidate's ranges, and where the calibrators of all disagree."""
    found = []
    for name, module in activation_sites(model).items():
        chosen = candidates[0].answers[name].calibrator
        assert isinstance(chosen, Calibrator)
        answers = [candidate.answers[name] for candidate in candidates]
        ranges = {
            answer.calibrator: (float(answer.low.min()), float(answer.high.max()))
            for answer in answers
            if isinstance(answer.calibrator, Calibrator)
        }
        at_site = [*data_concerns(module.histogram, (chosen,)), *disagreements(ranges)]
        found += [SiteConcern(name, concern) for concern in at_site]
    return tuple(found)
