"""ONNX files in: the networks of the catalogue exported by torch, read back, and quantized in their own graphs.

``python -m bench.onnx_in [--network NAME ...] [--torchscript] [--batch 8]``

Random weights, seed 0, batch norms with the statistics of a trained network; 4 batches of random inputs are calibrated
on. For each network: how far the read module is from torch's (relative, L2), whether placement finds the same sites,
the nodes of the file that are there afterwards, the signal-to-noise ratio of the int8 files' outputs to the float
network's (from the module, from the file, and of ``quantize_static`` on the same file), and the speed of the file's
int8 graph over the module's and over ``quantize_static``'s, raced in turns in one process.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import onnx
import torch
from torch.utils import _pytree as pytree

import halfstep as hs
from bench.networks.catalogue import CATALOGUE, build
from bench.peer_onnxruntime import quantize_static
from halfstep.graph.inputs import call_arguments, tensors_of
from halfstep.runtime.deployed import DeployedModel
from halfstep.runtime.latency import race
from halfstep.runtime.parity import signal_to_noise


def export(model: torch.nn.Module, inputs: Any, path: Path, dynamo: bool) -> Path:
    """What torch's exporter writes, with a dynamic batch."""
    args, kwargs = call_arguments(inputs)
    logging.disable(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if dynamo:
            dynamic = {0: torch.export.Dim.DYNAMIC}
            shapes: Any = dict.fromkeys(kwargs, dynamic) if kwargs else tuple(dynamic for _ in args)
            torch.onnx.export(model, args, path, kwargs=kwargs or None, dynamic_shapes=shapes, verbose=False)
        else:
            names = list(kwargs) or [f"input_{i}" for i in range(len(args))]
            axes = {name: {0: "batch"} for name in names}
            torch.onnx.export(
                model, args, path, kwargs=kwargs, dynamo=False, input_names=names, dynamic_axes=axes
            )
    logging.disable(logging.NOTSET)
    return path


def first(outputs: Any) -> torch.Tensor:
    return next(leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor)).detach()


def quantized(model: Any, batches: list[Any], path: Path) -> tuple[hs.QuantizedModel, Path]:
    q = hs.prepare(model, batches[0])
    hs.observe(q, batches)
    hs.calibrate(q, hs.Max())
    return q, hs.export_onnx(q, path, check=False)


def measure(name: str, folder: Path, dynamo: bool, batch: int) -> str:
    torch.manual_seed(0)
    model = build(name)
    batches = [CATALOGUE[name].inputs(4) for _ in range(4)]
    raced = CATALOGUE[name].inputs(batch)
    file = export(model, CATALOGUE[name].inputs(2), folder / "model.onnx", dynamo)
    network = hs.from_onnx(file, batches[0])
    given = tuple(tensors_of(raced))
    with torch.no_grad():
        args, kwargs = call_arguments(raced)
        wanted, read = first(model(*args, **kwargs)), first(network(*given))
    error = float((read - wanted).norm() / wanted.norm())
    by_name = [tuple(tensors_of(each)) for each in batches]
    theirs, from_module = quantized(model, batches, folder / "module.onnx")
    ours, from_file = quantized(network, by_name, folder / "file.onnx")
    before = {node.name for node in onnx.load(file, load_external_data=False).graph.node}
    after = {node.name for node in onnx.load(from_file).graph.node}
    files = {"module": from_module, "file": from_file}
    try:
        files["static"] = quantize_static(file, batches, folder / "static.onnx")
    except Exception as failure:  # the peer's own: which networks it takes is part of the answer
        print(f"  quantize_static makes no file: {type(failure).__name__}")
    runs = {key: DeployedModel(path, threads=1) for key, path in files.items()}
    noise = {key: signal_to_noise(wanted, first(run(*given))) for key, run in runs.items()}
    times = race({key: lambda run=run: run(*given) for key, run in runs.items()}, rounds=31)
    speed = times["module"].median / times["file"].median
    static = f"{times['static'].median / times['file'].median:.2f}" if "static" in times else "-"
    sqnr = " / ".join(f"{noise[key]:.1f}" if key in noise else "-" for key in ("module", "file", "static"))
    same = (
        "the same" if len(ours.sites) == len(theirs.sites) else f"{len(ours.sites)}, not {len(theirs.sites)}"
    )
    kept = f"{len(before & after)} of {len(before)}"
    return f"| {name} | {error:.0e} | {same} | {kept} | {sqnr} | {speed:.2f} | {static} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", action="append", choices=list(CATALOGUE))
    parser.add_argument("--torchscript", action="store_true", help="torch's older exporter")
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    print(
        "| network | error | sites | nodes kept | SQNR in dB, module / file / static | speed over module's | static's |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in options.network or CATALOGUE:
        with tempfile.TemporaryDirectory() as folder:
            print(measure(name, Path(folder), not options.torchscript, options.batch), flush=True)


if __name__ == "__main__":
    main()
