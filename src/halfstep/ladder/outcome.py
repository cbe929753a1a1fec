"""What a climb returns, and what there is to know of it: the list that notebook, terminal, page and comparison show.

A run that has just ended and one that is read from its journal give the same facts, since both are read from the same
record: what :meth:`Outcome.to_dict` writes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from halfstep.export.onnx import export_onnx
from halfstep.export.verify import Fact, Verification, file_facts
from halfstep.files import write_whole
from halfstep.journal import Entry, finite
from halfstep.ladder.evaluation import Evaluation
from halfstep.ladder.goal import MetricResult
from halfstep.ladder.identity import environment
from halfstep.ladder.rung import RungResult
from halfstep.listing import html_table
from halfstep.model import QuantizedModel


@dataclass(frozen=True, repr=False)
class Outcome:
    """The quantized model, its scores, and how they came about.

    Attributes:
        met: the deployed file is within the target, and as fast as was asked.
        rung: the rung that the result stands on, ``"ptq"``, ``"partial"`` or ``"qat"``.
        float_score: of the float model, in the metric's unit.
        score: of the simulation on all examples; where ``simulated`` says so, the file's.
        deployed_score: of the exported file, on its runtime.
        max_drop: what was asked.
        metrics: how every metric of the file stands beside its own target; the first one leads: scores above are its.
        float_layers: layers put back to float for accuracy, by name.
        evaluations: full evaluations made, the float and the deployed one included.
        history: each of them, in order.
        decisions: what was decided and why, one sentence each.
        verification: what the file turned out to be.
        model: the simulation.
        directory: where the files lie; None if none was given.
        path: the rungs climbed, in order, and what came of each.
        advice: what would help, if the target was not met.
        entries: the journal, from which the report is made.
        refused: why no file answers as its simulation, so that the target is not met whatever the file scores; empty
            where one does.
        latency: how many times as fast as float the file was to be; None where any speed would do.
        simulated: how many examples the simulation was scored on, where these showed that the target is met and the
            file was scored on all; None where both were.
    """

    met: bool
    rung: str
    float_score: float
    score: float
    deployed_score: float
    max_drop: float
    float_layers: tuple[str, ...]
    evaluations: int
    history: tuple[Evaluation, ...]
    decisions: tuple[str, ...]
    verification: Verification
    model: QuantizedModel
    directory: Path | None = None
    path: tuple[RungResult, ...] = ()
    advice: tuple[str, ...] = ()
    entries: tuple[Entry, ...] = ()
    metrics: tuple[MetricResult, ...] = ()
    refused: str = ""
    latency: float | None = None
    simulated: int | None = None

    def export(self, path: str | Path) -> Path:
        """Write the quantized network to ``path`` as ONNX.

        Raises:
            ExportError: if it cannot be written; see :func:`halfstep.export_onnx`.
        """
        return export_onnx(self.model, path, self.metadata())

    def report(self, path: str | Path) -> Path:
        """Write the report of the run to ``path``: one HTML page that needs no network.

        Raises:
            RunError: if it cannot be written.
        """
        from halfstep.report.page import write_report
        from halfstep.report.run import Run

        name = self.directory.resolve().name if self.directory is not None else "run"
        return write_report(Run.of(self.entries, name), path)

    def metadata(self) -> dict[str, str]:
        """What the file says of itself beside recipe and versions."""
        return {"float_score": repr(self.float_score), "rung": self.rung}

    def standings(self) -> dict[str, MetricResult]:
        """The metrics of the file by name; empty where there is only one, which has none."""
        return {standing.metric: standing for standing in self.metrics if standing.metric}

    def to_dict(self) -> dict[str, Any]:
        """Everything but the model, as plain data that JSON knows: NaN and infinity become None."""
        record = self._record() | {
            "target": self.model.target.name,
            "recipe": repr(self.model.recipe),
            "environment": environment(),
        }
        return {name: finite(value) for name, value in record.items()}

    def facts(self) -> list[Fact]:
        """What came of the run, a line a fact."""
        return run_facts(self._record())

    def _record(self) -> dict[str, Any]:
        return {
            "met": self.met,
            "refused": self.refused,
            "rung": self.rung,
            "float_score": self.float_score,
            "score": self.score,
            "simulated": self.simulated,
            "deployed_score": self.deployed_score,
            "max_drop": self.max_drop,
            "latency": self.latency,
            "metrics": [asdict(standing) for standing in self.metrics],
            "float_layers": list(self.float_layers),
            "evaluations": self.evaluations,
            "path": [asdict(step) for step in self.path],
            "history": [asdict(evaluation) for evaluation in self.history],
            "decisions": list(self.decisions),
            "advice": list(self.advice),
            **self.verification.to_dict(),
        }

    def save(self, path: Path) -> None:
        """Write :meth:`to_dict` as JSON; the file appears whole or not at all.

        Raises:
            RunError: if it cannot be written.
        """
        write_whole(path, (json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n").encode())

    def __repr__(self) -> str:
        verdict = "met" if self.met else "not met, its file refused," if self.refused else "not met"
        simulated = f"{self.score:.4f}" if self.simulated is None else f"on {self.simulated:,} examples"
        return (
            f"Outcome: {verdict} on rung {self.rung}: float {self.float_score:.4f}, simulated {simulated}, "
            f"deployed {self.deployed_score:.4f} (allowed drop {self.max_drop:g}), {self.evaluations} evaluations"
            + "".join(f"; {name} {standing}" for name, standing in self.standings().items())
        )

    def _repr_html_(self) -> str:
        """The figures and decisions, as a notebook shows them."""
        rows = [
            ("target", "met" if self.met else "not met"),
            *((fact.name, fact.words) for fact in self.facts()),
        ]
        sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in (*self.decisions, *self.advice))
        return f"{html_table(rows)}<ol>{sentences}</ol>"


def run_facts(record: Mapping[str, Any]) -> list[Fact]:
    """What is to be known of a run that came to its end.

    Args:
        record: of :meth:`.Outcome.to_dict`, or the journal's, whose numbers that JSON does not know have become None.
    """
    allowed, made = _number(record["max_drop"]), record["evaluations"]
    return [
        _score("float score", record, "float_score"),
        _simulated(record),
        _score("deployed score", record, "deployed_score"),
        Fact("allowed drop", f"{allowed:g}", "max_drop", allowed),
        *_metrics(record["metrics"]),
        Fact("rung", record["rung"]),
        Fact("layers left in float", ", ".join(record["float_layers"]) or "none"),
        *file_facts(record),
        Fact("evaluations", str(made), "evaluations", made),
    ]


def _score(name: str, record: Mapping[str, Any], key: str) -> Fact:
    score = _number(record[key])
    return Fact(name, f"{score:.4f}", key, score)


def _simulated(record: Mapping[str, Any]) -> Fact:
    if (seen := record.get("simulated")) is None:  # runs of older versions do not say
        return _score("simulated score", record, "score")
    return Fact("simulated score", f"{seen:,} examples sufficed, see the deployed one")


def _metrics(records: Iterable[Mapping[str, Any]]) -> list[Fact]:
    """Several metrics, each beside its target; the drop of an only one, whose scores are told of already."""
    found = []
    for record in records:
        figures = {name: _number(record[name]) for name in ("float_score", "score", "drop", "max_drop")}
        result = MetricResult(**{**record, **figures})
        if result.metric:
            found.append(Fact(result.metric, str(result), f"metric {result.metric}", result.score))
        else:
            found.append(Fact("drop and interval", result.drop_in_words(), "drop", result.drop))
    return found


def _number(value: float | None) -> float:
    """A number as JSON kept it, which knows no NaN."""
    return math.nan if value is None else value
