"""halfstep quantize: the whole ladder."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from halfstep.cli.console import (
    FRESH,
    MET,
    NOT_MET,
    Fresh,
    Json,
    Threads,
    by_dimension,
    by_input,
    by_name,
    err,
    finish,
    progress,
    silence,
)
from halfstep.interrupted import INTERRUPTED


def quantize(
    source: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|FILE.onnx|CONFIG.yaml",
            help="package.module:callable that returns a torch.nn.Module; an ONNX file; or a configuration: see "
            "halfstep init.",
        ),
    ],
    labelled: Annotated[
        str | None,
        typer.Option(
            help="Data to judge on: .npz with inputs and labels, or package.module:callable that returns "
            "batches (inputs, labels); for agreement, cosine and sqnr alone the labels may be left out."
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="Data to calibrate on, other than the labelled: .npz with inputs, or a callable that returns "
            "batches of inputs."
        ),
    ] = None,
    weights: Annotated[
        str | None, typer.Option(help="State dict for the model: .safetensors, or saved by torch.")
    ] = None,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            help="accuracy (the default), or package.module:score, a function (outputs, labels) -> (batch,) floats; "
            "against the float model, without labels: agreement (the same class), cosine, sqnr with a --floor in dB; "
            "NAME=METRIC for each of several, all of which must keep to their targets."
        ),
    ] = None,
    lower_is_better: Annotated[
        bool, typer.Option("--lower-is-better", help="The metric is an error or a loss.")
    ] = False,
    max_drop: Annotated[
        list[str] | None,
        typer.Option(
            help="Largest drop against float, in the metric's unit; 0.01 by default. NAME=DROP for one of several "
            "metrics."
        ),
    ] = None,
    relative_drop: Annotated[
        list[str] | None, typer.Option(help="Instead of --max-drop: a share of the float score.")
    ] = None,
    floor: Annotated[
        list[str] | None, typer.Option(help="Instead of --max-drop: the worst score allowed.")
    ] = None,
    strict: Annotated[
        bool | None,
        typer.Option(
            "--strict", help="Demand that the upper end of the drop's interval keeps to the target."
        ),
    ] = None,
    latency: Annotated[
        float | None,
        typer.Option(
            help="How many times as fast as float the file must be beside the accuracy target, such as 2."
        ),
    ] = None,
    tune: Annotated[
        bool | None, typer.Option("--tune", help="Leave in float what integers slow down on this machine.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option(help="Runtime that the file is for: onnxruntime (the default), openvino or tensorrt."),
    ] = None,
    dynamic: Annotated[
        list[str] | None,
        typer.Option(
            help="A size that varies beside the batch: INPUT:DIMENSION=NAME, such as ids:1=tokens; once for each, and "
            "one name for sizes that are always the same."
        ),
    ] = None,
    padding: Annotated[
        str | None,
        typer.Option(
            help="An input (batch, length) that is 0 where a batch is only filled up, such as attention_mask: left out "
            "of the ranges."
        ),
    ] = None,
    state: Annotated[
        list[str] | None,
        typer.Option(
            help="An output that is given back as an input: INPUT=OUTPUT, such as h_in=h_out; once for each. Both get "
            "one quantizer."
        ),
    ] = None,
    float_from: Annotated[
        list[str] | None,
        typer.Option(
            help="A module, such as head.decode, from whose first value on everything is left in float; may be given "
            "several times."
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            help="static (the default), dynamic (activations get their ranges at run time), or weight_only (packed "
            "weights, activations in float)."
        ),
    ] = None,
    weight_bits: Annotated[
        int | None, typer.Option(help="Bits of the weights, 2 to 16; 8 by default, 4 for weight_only.")
    ] = None,
    group: Annotated[
        int | None,
        typer.Option(
            help="Neighbouring weights that share a scale, for dynamic (a whole channel by default) and weight_only "
            "(128)."
        ),
    ] = None,
    activation_bits: Annotated[
        int | None, typer.Option(help="Bits of the activations, 2 to 16; 8 by default.")
    ] = None,
    portable: Annotated[
        bool | None,
        typer.Option(
            "--portable/--no-portable",
            help="Weights of 7 bits where sums would saturate on x86 processors without VNNI, so that the file answers "
            "alike everywhere; by default as this machine's processor needs it.",
        ),
    ] = None,
    rungs: Annotated[
        str | None,
        typer.Option(
            help="Rungs to climb, from the bottom: ptq,partial,qat by default; ptq,mixed_bits gives each layer's "
            "weights the fewest bits that keep to the target."
        ),
    ] = None,
    evaluations: Annotated[
        int | None, typer.Option(help="Stop the search after so many full evaluations.")
    ] = None,
    minutes: Annotated[float | None, typer.Option(help="Stop the search after so much time.")] = None,
    directory: Annotated[
        str | None, typer.Option(help="Where files, report and journal go; runs/quantized by default.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Batch size for .npz data and datasets; 64 by default.")
    ] = None,
    examples: Annotated[
        int | None, typer.Option(help="Examples to calibrate on, the first ones; 512 by default.")
    ] = None,
    threads: Threads = None,
    fresh: Fresh = False,
    as_json: Json = False,
) -> None:
    """Climb the ladder until the accuracy target is met, and write the ONNX file that proves it.

    The same command again goes on where an earlier one was interrupted.

    torchrun --nproc-per-node 4 -m halfstep quantize ... shares the work among four processes.

    Training, the last rung, needs a configuration: see halfstep init.

    The exit code is 0 if the target is met, 3 if it is not.
    """
    from halfstep.cli.job import CONFIG, Job, config_from
    from halfstep.distributed import joined
    from halfstep.errors import RunError
    from halfstep.journal import Journal
    from halfstep.ladder.quantize import quantize as climb
    from halfstep.ladder.rungs import RUNGS, find_rungs

    flags: dict[str, Any] = {
        "labelled": labelled,
        "calibration": calibration,
        "weights": weights,
        "metric": by_name("--metric", metric, str),
        "higher_is_better": False if lower_is_better else None,
        "max_drop": by_name("--max-drop", max_drop, float),
        "relative_drop": by_name("--relative-drop", relative_drop, float),
        "floor": by_name("--floor", floor, float),
        "strict": strict,
        "latency": latency,
        "tune": tune,
        "target": target,
        "dynamic": by_dimension(dynamic),
        "padding": padding,
        "float_from": float_from or None,
        "states": by_input(state),
        "rungs": None if rungs is None else [name.strip() for name in rungs.split(",")],
        "directory": directory,
        "batch": batch,
        "examples": examples,
        "threads": threads,
    }
    config = config_from(
        source,
        flags,
        {
            "kind": recipe,
            "weights": weight_bits,
            "activations": activation_bits,
            "group": group,
            "portable": portable,
        },
        {"evaluations": evaluations, "minutes": minutes},
    )
    ladder = [rung.name for rung in find_rungs(tuple(RUNGS if config.rungs is None else config.rungs))]
    again = shlex.join(["halfstep", *(argument for argument in sys.argv[1:] if argument != FRESH)])
    folder = Path(config.directory)
    try:
        with joined() as leads, progress() if leads else silence():
            job = Job.load(config)
            metrics, training = job.metrics(), job.training()
            with Journal(folder if leads else None, fresh) as journal:
                if (
                    leads and not journal.resumed
                ):  # so that what is finished before an interruption can be exported
                    job.keep(folder / CONFIG)
            outcome = climb(
                job.model,
                job.example,
                calibration=job.calibration,
                metric=metrics.get("", metrics),
                training=training,
                max_drop=config.max_drop,
                relative_drop=config.relative_drop,
                floor=config.floor,
                confidence=config.confidence,
                strict=config.strict,
                latency=config.latency,
                tune=config.tune,
                recipe=job.recipe(),
                target=config.target,
                dynamic=config.dynamic,
                padding=config.padding,
                float_from=config.float_from,
                states=config.states,
                directory=folder,
                threads=config.threads,
                budget=job.budget(),
                command=again,
                rungs=ladder,
            )
    except KeyboardInterrupt:
        err.print(f"interrupted; to go on where it stopped: {again}", style="red", soft_wrap=True)
        raise typer.Exit(INTERRUPTED) from None
    if not leads:
        raise typer.Exit(MET if outcome.met else NOT_MET)
    try:
        job.keep(folder / CONFIG)
    except RunError as error:  # the run is done, whatever became of the notes on it
        err.print(f"error: {error}", style="red", soft_wrap=True)
    finish(outcome, as_json)
