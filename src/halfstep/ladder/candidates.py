"""What a sweep compares and finds, as records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from halfstep.calibrators import Calibrator, Concern, WeightCalibrator, data_concerns, disagreements
from halfstep.fidelity.compare import Fidelity, Measure
from halfstep.journal import Journal, exact
from halfstep.ladder.concerns import SiteConcern
from halfstep.model import QuantizedModel
from halfstep.ranges import Answer, Answers, activation_sites, set_ranges

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
            answers = {site: Answer(by_name[name], *ends[site]) for site, name in row["calibrators"].items()}
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
