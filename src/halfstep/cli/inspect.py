"""halfstep inspect: what a file holds, and what its runtime makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from halfstep.cli.console import NOT_MET, out
from halfstep.cli.options import Threads


def inspect(
    file: Annotated[Path, typer.Argument(help="An ONNX file, of halfstep's or any other tool's.")],
    target: Annotated[
        str | None,
        typer.Option(help="Runtime to judge it for; by default the one that it was exported for."),
    ] = None,
    threads: Threads = None,
) -> None:
    """Show every site of FILE, what its runtime really executes, and why the rest is float.

    For a target that cannot run here (tensorrt) the file is held to its rules; the exit code is 3 if it breaks one.
    """
    from halfstep.runtime.account import float_nodes
    from halfstep.runtime.kernels import inspect_kernels
    from halfstep.runtime.rules import lint
    from halfstep.runtime.runtimes import RULES
    from halfstep.runtime.sites import read_sites
    from halfstep.targets import find_target

    sites, metadata = read_sites(file)
    judge = find_target(target or metadata.get("halfstep.target", "onnxruntime"))
    kernels = inspect_kernels(file, threads, judge.runtime)
    findings = lint(file, RULES.get(judge.name, ()))
    table = Table(title=f"{file}: {len(sites)} sites")
    for column in ("layer", "tensor", "format", "granularity", "range"):
        table.add_column(column, overflow="fold")
    for site in sites:
        kind = "" if not site.constant else " (stored)"
        table.add_row(
            site.layer,
            site.tensor + kind,
            site.format,
            site.granularity,
            f"{site.low:.4g} to {site.high:.4g}",
        )
    out.print(table)
    for key, value in metadata.items():
        out.print(f"{key}: {value}", highlight=False, soft_wrap=True)
    out.print(
        f"integer kernels: {len(kernels.integer)}; float operators that multiply: {len(kernels.floating)}"
    )
    out.print(
        "executed: " + ", ".join(f"{count} {name}" for name, count in kernels.counts.items()), soft_wrap=True
    )
    for node in float_nodes(file, kernels, judge):
        out.print(f"float: {node}", highlight=False, soft_wrap=True)
    for finding in findings:
        out.print(f"{judge.name}: {finding}", highlight=False, soft_wrap=True)
    if judge.name in RULES and not findings:
        out.print(f"{judge.name}: keeps all of its {len(RULES[judge.name])} rules")
    if any(finding.rule.refused for finding in findings):
        raise typer.Exit(NOT_MET)
