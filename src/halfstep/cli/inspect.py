"""halfstep inspect: what a file holds, and what its runtime makes of it."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from halfstep.cli.console import NOT_MET, Json, Threads, out, print_json

if TYPE_CHECKING:
    from halfstep.runtime.file import FileSite
    from halfstep.runtime.runtime import Kernels


def inspect(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="An ONNX file, of halfstep's or any other tool's.")
    ],
    target: Annotated[
        str | None,
        typer.Option(
            help="Runtime to judge it for: onnxruntime, openvino or tensorrt; by default the one it was exported for."
        ),
    ] = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Show every site of FILE, what its runtime really executes, and why the rest is float.

    For a target that cannot run here (tensorrt) the file is held to its rules; the exit code is 3 if it breaks one.
    """
    from halfstep.runtime.deployed import RULES, inspect_kernels
    from halfstep.runtime.file import float_nodes, read_sites
    from halfstep.runtime.lint import lint
    from halfstep.targets import find_target

    sites, metadata = read_sites(file)
    judge = find_target(target or metadata.get("halfstep.target", "onnxruntime"))
    kernels = inspect_kernels(file, threads, judge.runtime)
    findings = lint(file, RULES.get(judge.name, ()))
    floats = float_nodes(file, kernels, judge)
    if as_json:
        print_json(
            {
                "file": str(file),
                "target": judge.name,
                "metadata": metadata,
                "sites": [asdict(site) for site in sites],
                "kernels": asdict(kernels),
                "float": [asdict(node) for node in floats],
                "findings": [
                    {
                        "rule": finding.rule.name,
                        "refused": finding.rule.refused,
                        "places": finding.places,
                        "reason": finding.rule.reason,
                        "cure": finding.rule.cure,
                    }
                    for finding in findings
                ],
            }
        )
    else:
        _show(file, sites, metadata, kernels)
        for node in floats:
            out.print(f"float: {node}", soft_wrap=True)
        for finding in findings:
            out.print(f"{judge.name}: {finding}", soft_wrap=True)
        if judge.name in RULES and not findings:
            out.print(f"{judge.name}: keeps all of its {len(RULES[judge.name])} rules")
    if any(finding.rule.refused for finding in findings):
        raise typer.Exit(NOT_MET)


def _show(file: Path, sites: list[FileSite], metadata: dict[str, str], kernels: Kernels) -> None:
    """The sites as a table, what the file says of itself, and the operators that are executed."""
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
        out.print(f"{key}: {value}", soft_wrap=True)
    out.print(
        f"integer kernels: {len(kernels.integer)}; float operators that multiply: {len(kernels.floating)}"
    )
    out.print(
        "executed: " + ", ".join(f"{count} {name}" for name, count in kernels.counts.items()), soft_wrap=True
    )
