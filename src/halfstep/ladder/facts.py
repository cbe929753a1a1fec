"""What came of a run, a line a fact: the one list that notebook, terminal, page and comparison show.

A run that has just ended and one that is read from its journal give the same facts, since both are read from the same
record: what :meth:`.Outcome.to_dict` writes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from halfstep.fidelity.compare import Parity
from halfstep.ladder.goal import MetricResult
from halfstep.runtime.saturation import holds_on


@dataclass(frozen=True)
class Fact:
    """One thing to know of a run.

    Attributes:
        name: what it is, in words; no two facts of a run have the same.
        words: what it comes to, as it is shown.
        key: under which a page keeps the exact number behind the words; empty where there is none.
        value: that number.
    """

    name: str
    words: str
    key: str = ""
    value: float = math.nan


def run_facts(record: Mapping[str, Any]) -> list[Fact]:
    """What is to be known of a run that came to its end.

    Args:
        record: of :meth:`.Outcome.to_dict`, or the journal's, whose numbers that JSON does not know have become None.
    """
    scores = (
        ("float score", "float_score"),
        ("simulated score", "score"),
        ("deployed score", "deployed_score"),
    )
    allowed, made = _number(record["max_drop"]), record["evaluations"]
    return [
        *(Fact(name, f"{(score := _number(record[key])):.4f}", key, score) for name, key in scores),
        Fact("allowed drop", f"{allowed:g}", "max_drop", allowed),
        *_metrics(record["metrics"]),
        Fact("rung", record["rung"]),
        Fact("layers left in float", ", ".join(record["float_layers"]) or "none"),
        *file_facts(record),
        Fact("evaluations", str(made), "evaluations", made),
    ]


def file_facts(record: Mapping[str, Any]) -> list[Fact]:
    """What was measured on a file.

    Args:
        record: of :meth:`.Verification.to_dict`; it may have ``latency``, the speed over float that was asked.
    """
    layers, raced = record["layers"], record["latency_ms"]
    quantized, null = raced["quantized"], raced["null"]
    asked = "" if record.get("latency") is None else f", asked {record['latency']:g}x"
    return [
        *(Fact(*row) for row in Parity.of(record["parity"]).rows()),
        Fact("layers on integer kernels", f"{sum(layer['integer'] for layer in layers)} of {len(layers)}"),
        Fact("answers hold on", holds_on(record.get("saturable", ()))),
        Fact(
            "file size",
            f"{record['bytes'] / 1024:,.0f} KiB, {record['bytes'] / record['float_bytes']:.2f} of float",
        ),
        Fact("latency", f"{quantized['median']:.2f} ms ± {quantized['spread'] / 2:.0%}"),
        Fact(
            "speed over float",
            f"{quantized['speedup']:.2f}x (float against itself {null['speedup']:.2f}x{asked})",
            "speedup",
            quantized["speedup"],
        ),
        *(
            Fact(
                f"at {words}",
                f"{(speed := times['quantized']['speedup']):.2f}x",
                f"speedup at {words}",
                speed,
            )
            for words, times in record.get("latency_by_size", {}).items()
        ),
    ]


def _metrics(records: Iterable[Mapping[str, Any]]) -> list[Fact]:
    """Several metrics, each beside its target; none where there is only one, which is told of already."""
    found = []
    for record in records:
        figures = {name: _number(record[name]) for name in ("float_score", "score", "drop", "max_drop")}
        result = MetricResult(**{**record, **figures})
        if result.metric:
            found.append(Fact(result.metric, str(result), f"metric {result.metric}", result.score))
    return found


def _number(value: float | None) -> float:
    """A number as JSON kept it, which knows no NaN."""
    return math.nan if value is None else value
