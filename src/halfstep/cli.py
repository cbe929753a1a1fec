"""The command line: the only file that prints and parses arguments."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table

from halfstep.errors import DataError, HalfstepError
from halfstep.progress import listening

MET, NOT_MET, BAD_INPUT = 0, 3, 2

app = typer.Typer(
    help="Quantize a trained PyTorch network to an accuracy target, proven on the runtime it is deployed to.",
    epilog="Exit codes: 0 target met, 3 target not met, 2 bad input.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
out = Console()
err = Console(stderr=True)


class Bars:
    """A progress listener that draws bars on the terminal."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def start(self, what: str, total: int | None) -> Any:
        """A new bar."""
        return self.progress.add_task(what, total=total)

    def advance(self, task: Any, steps: int) -> None:
        """Move it."""
        self.progress.advance(task, steps)

    def end(self, task: Any) -> None:
        """Take it away: what is done is said in the tables."""
        self.progress.remove_task(task)

    def say(self, sentence: str) -> None:
        """Above the bars."""
        self.progress.console.print(sentence, style="dim", highlight=False)


def bars() -> Progress:
    """Bars that vanish when done, on the error stream."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=err,
        transient=True,
    )


@app.command()
def demo(
    directory: Annotated[Path, typer.Option(help="Where to write the files.")] = Path("runs/demo"),
    threads: Annotated[int | None, typer.Option(help="Threads of the runtime; all cores by default.")] = None,
) -> None:
    """Train a small network on handwritten digits, quantize it to int8, and prove the file."""
    from halfstep.demo import load_digits, train_digits
    from halfstep.evaluate import Accuracy
    from halfstep.ladder.climb import quantize as climb

    with bars() as progress, listening(Bars(progress)):
        digits = load_digits()
        model = train_digits(digits)
        outcome = climb(
            model,
            digits.train_images[:4],
            calibration=digits.calibration_batches(),
            metric=Accuracy(digits.test_batches()),
            max_drop=0.01,
            directory=directory,
            threads=threads,
        )
    finish(outcome)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="package.module:callable that returns a torch.nn.Module.")],
    labelled: Annotated[
        str, typer.Option(help="Data to judge on: .npz with inputs and labels, or a callable.")
    ],
    calibration: Annotated[
        str,
        typer.Option(help="Data to calibrate on: .npz with inputs, or a callable. Not the data to judge on."),
    ],
    weights: Annotated[Path | None, typer.Option(help="State dict: .safetensors or torch's.")] = None,
    metric: Annotated[
        str,
        typer.Option(
            help="accuracy, or package.module:score with score(outputs, labels) -> (batch,) floats."
        ),
    ] = "accuracy",
    max_drop: Annotated[float, typer.Option(help="Largest drop against float, in the metric's unit.")] = 0.01,
    target: Annotated[str, typer.Option(help="Runtime to deploy to.")] = "onnxruntime",
    weight_bits: Annotated[int, typer.Option(help="Bits of the weights, 2 to 16.")] = 8,
    activation_bits: Annotated[int, typer.Option(help="Bits of the activations, 2 to 16.")] = 8,
    directory: Annotated[Path, typer.Option(help="Where to write the files.")] = Path("runs/quantized"),
    batch: Annotated[int, typer.Option(help="Batch size for .npz data.")] = 64,
    examples: Annotated[int, typer.Option(help="How many examples of an .npz to calibrate on.")] = 512,
    threads: Annotated[int | None, typer.Option(help="Threads of the runtime; all cores by default.")] = None,
) -> None:
    """Quantize MODEL so that its score drops by no more than --max-drop, and write the ONNX file that proves it."""
    from halfstep.evaluate import Accuracy, Metric
    from halfstep.ladder.climb import quantize as climb
    from halfstep.recipe import Recipe
    from halfstep.sources import find_callable, load_inputs, load_labelled, load_model

    with bars() as progress, listening(Bars(progress)):
        module = load_model(model, weights)
        batches = load_labelled(labelled, batch)
        inputs = load_inputs(calibration, batch, examples)
        if not inputs:
            raise DataError(f"calibration {calibration!r}: got no batch, needed at least one")
        outcome = climb(
            module,
            inputs[0],
            calibration=inputs,
            metric=Accuracy(batches) if metric == "accuracy" else Metric(batches, find_callable(metric)),
            max_drop=max_drop,
            recipe=Recipe.uniform(weight_bits, activation_bits),
            target=target,
            directory=directory,
            threads=threads,
        )
    finish(outcome)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(help="An ONNX file, of halfstep's or any other tool's.")],
    target: Annotated[
        str | None,
        typer.Option(help="Runtime to judge it for; by default the one that it was exported for."),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of the runtime; all cores by default.")] = None,
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


def finish(outcome: Any) -> NoReturn:
    """Print the summary and leave with the exit code that says whether the target was met."""
    from halfstep.report.terminal import layer_table, summary

    floating = [layer for layer in outcome.verification.layers if not layer.integer]
    if floating or outcome.verification.float_operators:
        out.print(layer_table(outcome.verification))
    out.print(summary(outcome))
    for sentence in outcome.decisions:
        out.print(f"- {sentence}", highlight=False)
    if outcome.directory is not None:
        names = ", ".join(sorted(file.name for file in outcome.directory.iterdir() if file.is_file()))
        out.print(f"written to {outcome.directory}: {names}", highlight=False)
    raise typer.Exit(MET if outcome.met else NOT_MET)


def main() -> None:
    """Run the command line; a mistake of the user's ends in one line, not in a traceback."""
    warnings.showwarning = lambda message, category, *_: err.print(f"warning: {message}", style="yellow")
    try:
        app()
    except HalfstepError as error:
        err.print(f"error: {error}", style="red", highlight=False, soft_wrap=True)
        sys.exit(BAD_INPUT)
    except KeyboardInterrupt:
        err.print("interrupted", style="red")
        sys.exit(130)


if __name__ == "__main__":
    main()
