"""Two runs side by side, as rows of words."""

from __future__ import annotations

from halfstep.ladder.goal import Standing
from halfstep.report.html import size
from halfstep.report.run import Run
from halfstep.runtime.saturation import holds_on


def comparison(first: Run, second: Run) -> list[tuple[str, str, str]]:
    """(what, first, second) for all that was asked and all that came of it."""
    a, b = _facts(first), _facts(second)
    return [(what, a.get(what, ""), b.get(what, "")) for what in {**a, **b}]


def _facts(run: Run) -> dict[str, str]:
    asked = {
        name: str(run.settings.get(name, "")) for name in ("target", "recipe", "asked", "metric", "examples")
    }
    end = run.outcome
    if not end:
        return {**asked, "state": f"not finished, {len(run.evaluations)} evaluations"}
    latency = end["measured"]["latency_ms"]["quantized"]
    return {
        **asked,
        "state": "target met" if end["met"] else "target not met",
        "rung": end["rung"],
        "float score": f"{end['float_score']:.4f}",
        "simulated score": f"{end['score']:.4f}",
        "deployed score": f"{end['deployed_score']:.4f}",
        **{each.metric: str(each) for each in (Standing(**m) for m in end["metrics"]) if each.metric},
        "float layers": ", ".join(end["float_layers"]) or "none",
        "integer layers": f"{sum(layer['integer'] for layer in end['layers'])} of {len(end['layers'])}",
        "answers hold on": holds_on(end.get("saturable", ())),
        "file": size(end["bytes"]),
        "speed over float": f"{latency['speedup']:.2f}x",
        "evaluations": str(end["evaluations"]),
    }
