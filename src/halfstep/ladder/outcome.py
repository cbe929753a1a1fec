"""What a climb returns."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Any

from halfstep.export.onnx import export_onnx
from halfstep.export.verify import Verification
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
        score: of the simulation.
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
        return {"float_score": repr(self.float_score), "score": repr(self.score), "rung": self.rung}

    def standings(self) -> dict[str, MetricResult]:
        """The metrics of the file by name; empty where there is only one, which has none."""
        return {standing.metric: standing for standing in self.metrics if standing.metric}

    def to_dict(self) -> dict[str, Any]:
        """Everything but the model, as plain data that JSON knows: NaN and infinity become None."""
        proof = self.verification
        record = {
            "met": self.met,
            "refused": self.refused,
            "rung": self.rung,
            "target": self.model.target.name,
            "recipe": repr(self.model.recipe),
            "float_score": self.float_score,
            "score": self.score,
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
            "parity": asdict(proof.parity),
            "latency_ms": {name: asdict(value) for name, value in proof.latency.items()},
            "latency_by_size": {
                words: {name: asdict(value) for name, value in raced.items()}
                for words, raced in proof.sizes.items()
            },
            "microseconds": dict(proof.microseconds),
            "bytes": proof.size,
            "float_bytes": proof.float_size,
            "kernels": proof.kernels.counts,
            "saturable": list(proof.saturable),
            "environment": environment(),
            "layers": [asdict(layer) for layer in proof.layers],
            "float_operators": [
                dict(zip(("name", "kind", "reason"), op, strict=True)) for op in proof.float_operators
            ],
        }
        return {name: finite(value) for name, value in record.items()}

    def save(self, path: Path) -> None:
        """Write :meth:`to_dict` as JSON; the file appears whole or not at all.

        Raises:
            RunError: if it cannot be written.
        """
        write_whole(path, (json.dumps(self.to_dict(), indent=2, allow_nan=False) + "\n").encode())

    def __repr__(self) -> str:
        verdict = "met" if self.met else "not met, its file refused," if self.refused else "not met"
        return (
            f"Outcome: {verdict} on rung {self.rung}: float {self.float_score:.4f}, simulated {self.score:.4f}, "
            f"deployed {self.deployed_score:.4f} (allowed drop {self.max_drop:g}), {self.evaluations} evaluations"
            + "".join(f"; {name} {standing}" for name, standing in self.standings().items())
        )

    def _repr_html_(self) -> str:
        """The figures and decisions, as a notebook shows them."""
        proof = self.verification
        rows = [
            ("target", "met" if self.met else "not met"),
            ("rung", self.rung),
            ("float score", f"{self.float_score:.4f}"),
            ("simulated score", f"{self.score:.4f}"),
            ("deployed score", f"{self.deployed_score:.4f} (allowed drop {self.max_drop:g})"),
            *((name, str(standing)) for name, standing in self.standings().items()),
            ("layers left in float", ", ".join(self.float_layers) or "none"),
            ("layers on integer kernels", f"{proof.integer_layers} of {len(proof.layers)}"),
            ("size of float", f"{proof.size / proof.float_size:.2f}"),
            ("speed over float", f"{proof.latency['quantized'].speedup:.2f}x{_asked(self.latency)}"),
            *((f"at {words}", f"{raced['quantized'].speedup:.2f}x") for words, raced in proof.sizes.items()),
            ("evaluations", str(self.evaluations)),
        ]
        sentences = "".join(f"<li>{escape(sentence)}</li>" for sentence in (*self.decisions, *self.advice))
        return f"{html_table(rows)}<ol>{sentences}</ol>"


def _asked(latency: float | None) -> str:
    return "" if latency is None else f" (asked {latency:g}x)"
