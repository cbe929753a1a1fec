"""An outcome as the terminal shows it."""

from __future__ import annotations

from rich.table import Table

from halfstep.export.verify import Verification
from halfstep.ladder.outcome import Outcome
from halfstep.runtime.saturation import holds_on


def summary(outcome: Outcome) -> Table:
    """The figures that matter, one a line."""
    proof = outcome.verification
    table = Table(title="met" if outcome.met else "NOT met", show_header=False, title_style="bold")
    table.add_column("what")
    table.add_column("figure", justify="right")
    rows = [
        ("float score", f"{outcome.float_score:.4f}"),
        ("simulated score", f"{outcome.score:.4f}"),
        ("deployed score (the file, on its runtime)", f"{outcome.deployed_score:.4f}"),
        ("allowed drop", f"{outcome.max_drop:g}"),
        *((name, str(standing)) for name, standing in outcome.standings().items()),
        *proof_rows(proof),
        ("evaluations", str(outcome.evaluations)),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def proof_rows(proof: Verification) -> list[tuple[str, str]]:
    """What was measured on the file."""
    null, quantized = proof.latency["null"], proof.latency["quantized"]
    return [
        *proof.parity.rows(),
        ("layers on integer kernels", f"{proof.integer_layers} of {len(proof.layers)}"),
        ("answers hold on", holds_on(proof.saturable)),
        ("file size", f"{proof.size / 1024:,.0f} KiB, {proof.size / proof.float_size:.2f} of float"),
        ("latency", f"{quantized.median:.2f} ms ± {quantized.spread / 2:.0%}"),
        ("speed over float", f"{quantized.speedup:.2f}x (float against itself {null.speedup:.2f}x)"),
        *((f"at {words}", f"{raced['quantized'].speedup:.2f}x") for words, raced in proof.sizes.items()),
    ]


def layer_table(proof: Verification) -> Table:
    """What is integer and what is not, with the reason."""
    table = Table(title="layers")
    for column in ("layer", "kind", "runs in", "µs", "reason"):
        table.add_column(column, justify="right" if column == "µs" else "left")
    times = {name: f"{time:.0f}" for name, time in proof.microseconds.items()}
    for layer in proof.layers:
        runs_in = "integers" if layer.integer else "float"
        table.add_row(layer.name, layer.kind, runs_in, times.get(layer.name, ""), layer.reason)
    for name, kind, reason in proof.float_operators:
        table.add_row(name, kind, "float", times.get(name, ""), reason)
    return table
