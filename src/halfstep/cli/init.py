"""halfstep init: a configuration file with every key explained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from halfstep.cli.console import out


def init(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL|FILE.onnx",
            help="package.module:callable that returns a torch.nn.Module; or an ONNX file.",
        ),
    ],
    output: Annotated[Path, typer.Option(help="The file to write.")] = Path("halfstep.yaml"),
    labelled: Annotated[
        str, typer.Option(help="Data to judge on: .npz with inputs and labels, or a callable.")
    ] = "test.npz",
    calibration: Annotated[
        str, typer.Option(help="Data to calibrate on: .npz with inputs, or a callable.")
    ] = "train.npz",
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
) -> None:
    """Write a commented configuration for MODEL, which is loaded to list its layers."""
    from torch import nn

    from halfstep.config import commented
    from halfstep.errors import ArgumentError
    from halfstep.files import write_whole
    from halfstep.onnx_in.from_file import layers_of
    from halfstep.sources import ONNX, load_model

    if output.exists() and not force:
        raise ArgumentError(f"{output} exists; choose another --output, or give --force to replace it")
    if model.endswith(ONNX):
        weighted = layers_of(model)
    else:
        weighted = [
            name
            for name, child in load_model(model).named_modules()
            if isinstance(getattr(child, "weight", None), nn.Parameter)
        ]
    write_whole(output, commented(model, labelled, calibration, weighted).encode())
    out.print(
        f"written to {output}; fill in labelled and calibration, then: halfstep quantize {output}",
        soft_wrap=True,
    )
