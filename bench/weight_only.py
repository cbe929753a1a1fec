"""Weights alone: how small the file of a network gets whose size is its weights, how fast, how near to float.

A BERT of 4 layers, width 512 and a vocabulary of 8,000 with random weights, seed 0; 32 sequences of 64 tokens. All
files are raced on ONNX Runtime in one interleaved run; the float file twice.

python -m bench.weight_only [--threads 2] [--rounds 21]
"""

from __future__ import annotations

import argparse
import functools
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import halfstep as hs
from bench.networks.catalogue import CATALOGUE
from bench.networks.sequence import bert
from halfstep.fake_quantize import Mode
from halfstep.fidelity.compare import compare
from halfstep.graph.inputs import tensors_of
from halfstep.runtime.deployed import DeployedModel
from halfstep.runtime.file import file_size
from halfstep.runtime.latency import race

RECIPES = {
    "int8, weights and activations": hs.Recipe.int8(),
    "int8, weights alone": hs.Recipe.weight_only(8, None),
    "int4 in groups of 128, weights alone": hs.Recipe.weight_only(4, 128),
}
BATCHES = (1, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        Console(width=150).print(table(Path(folder), options.threads, options.rounds))


def table(folder: Path, threads: int, rounds: int) -> Table:
    """Make the files in ``folder`` and compare them."""
    torch.manual_seed(0)
    network = bert(width=512, layers=4, heads=8, vocabulary=8000).eval()
    batches = [CATALOGUE["bert"].inputs(8) for _ in range(4)]
    files, answers = {}, {}
    for name, recipe in RECIPES.items():
        model = hs.prepare(network, batches[0], recipe=recipe)
        hs.observe(model, batches)
        hs.calibrate(model)
        if not files:
            files["float"] = hs.export_float(model, folder / "float.onnx")
        files[name] = hs.export_onnx(model, folder / f"{len(files)}.onnx")
        specs = model.captured.in_spec, model.captured.out_spec
        agreed = compare(model, DeployedModel(files[name], *specs, threads), batches)
        with model.using(Mode.FLOAT):
            answers[name] = (
                agreed.sqnr,
                compare(model, DeployedModel(files[name], *specs, threads), batches).sqnr,
            )
    result = Table(
        title=f"weights alone: a BERT of {sum(p.numel() for p in network.parameters()) / 1e6:.1f} M parameters, "
        f"onnxruntime, {threads} threads, {rounds} interleaved rounds"
    )
    for column in (
        "file",
        "MiB",
        "of float",
        "dB, simulation",
        "dB, float",
        *(f"batch {b}" for b in BATCHES),
    ):
        result.add_column(column, justify="left" if column == "file" else "right")
    models = {name: DeployedModel(path, threads=threads) for name, path in files.items()}
    contestants = {"float": models["float"], "float again (null)": models["float"], **models}
    races = {}
    for batch in BATCHES:
        inputs = [tensor[:batch] for tensor in tensors_of(batches[0])]
        runs = {name: functools.partial(model, *inputs) for name, model in contestants.items()}
        races[batch] = race(runs, rounds)
    for name in contestants:
        size = file_size(files.get(name, files["float"]))
        near = [f"{value:.1f}" for value in answers.get(name, ())] or ["", ""]
        speeds = [f"{races[batch][name].speedup:.2f}" for batch in BATCHES]
        result.add_row(name, f"{size / 2**20:.1f}", f"{size / file_size(files['float']):.3f}", *near, *speeds)
    return result


if __name__ == "__main__":
    main()
