"""ONNX files in: the networks of the catalogue exported by torch, read back, and quantized in their own graphs.

``python -m bench.onnx_in [--network NAME ...] [--torchscript] [--batch 8]``

Random weights, seed 0, batch norms with the statistics of a trained network; 4 batches of random inputs are calibrated
on. For each network: how far the read module is from torch's (relative, L2), whether placement finds the same sites,
the nodes of the file that are there afterwards, the signal-to-noise ratio of the int8 files' outputs to the float
network's (from the module, from the file, and of ``quantize_static`` on the same file), and the speed of the file's
int8 graph over the module's and over ``quantize_static``'s, raced in turns in one process.

``python -m bench.onnx_in --trained [--network resnet ...]``: the networks of ``bench.fashion``, trained, at W8A8 and
W4A8. Each is exported once, and that file is given to halfstep (which may repair, but not train or leave layers in
float), to ``quantize_static`` and, where it is installed, to NNCF's ONNX backend, with the same 512 images to calibrate
on; accuracy on all 10,000 test images on ONNX Runtime, and the speed over the float file's at batch 1. NNCF has no W4A8
with integer activations on ONNX.

``python -m bench.onnx_in --damaged 500``: so many files with bytes changed, cut off or repeated at random, read in
processes with a time limit: how many were refused with an error of halfstep's, how many still hold a network. A crash,
another error or a process that takes too long ends the bench.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import tempfile
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch.utils import _pytree as pytree

import halfstep as hs
from bench import fashion
from bench.networks.catalogue import CATALOGUE, Entry
from bench.networks.detector import SIZE, Detector
from bench.networks.detr import Detr
from bench.networks.keywords import MELS, Spotter
from bench.networks.lines import CRNN, HEIGHT
from bench.networks.resnet import randomize_batch_norm
from bench.networks.text import Classifier, Tagger
from bench.peer_onnxruntime import quantize_static
from halfstep.errors import HalfstepError
from halfstep.fidelity.compare import signal_to_noise
from halfstep.graph.inputs import call_arguments, tensors_of
from halfstep.runtime.deployed import DeployedModel
from halfstep.runtime.latency import race


def _scenes(batch: int) -> torch.Tensor:
    return torch.randn(batch, 1, SIZE, SIZE)


def _frames(batch: int) -> dict[str, torch.Tensor]:
    return {"frames": torch.randn(batch, 40, MELS), "mask": torch.ones(batch, 40)}


#: The catalogue's networks, and those of ``bench.real``, which are not trained here.
NETWORKS: dict[str, Entry] = {
    **CATALOGUE,
    "detector": Entry(Detector, _scenes),
    "detr": Entry(Detr, _scenes),
    "classifier": Entry(lambda: Classifier(1000, 10), CATALOGUE["bert"].inputs),
    "tagger": Entry(lambda: Tagger(1000, 10), CATALOGUE["bert"].inputs),
    "lines": Entry(CRNN, lambda batch: torch.randn(batch, 1, HEIGHT, 128)),
    "keywords": Entry(Spotter, _frames),
}


class ByPlace(torch.nn.Module):
    """A model whose keyword arguments are given in order, as torch's older exporter needs them; its first output."""

    def __init__(self, model: torch.nn.Module, names: list[str]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        outputs = self.model(**dict(zip(self.names, inputs, strict=True)))
        return pytree.tree_leaves(dict(outputs) if isinstance(outputs, dict) else outputs)[0]


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
            by_place = ByPlace(model, list(kwargs)).eval() if kwargs else model
            given = args or tuple(kwargs.values())
            torch.onnx.export(by_place, given, path, dynamo=False, input_names=names, dynamic_axes=axes)
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
    model = randomize_batch_norm(NETWORKS[name].build()).eval()
    batches = [NETWORKS[name].inputs(4) for _ in range(4)]
    raced = NETWORKS[name].inputs(batch)
    file = export(model, NETWORKS[name].inputs(2), folder / "model.onnx", dynamo)
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


def nncf_on_onnx(file: Path, batches: list[torch.Tensor], out: Path) -> Path:
    """NNCF with its defaults on the ONNX file itself."""
    import nncf

    logging.getLogger("nncf").setLevel(logging.ERROR)
    model = onnx.load(file)
    name = model.graph.input[0].name
    dataset = nncf.Dataset([{name: batch.numpy()} for batch in batches])
    onnx.save(nncf.quantize(model, dataset, subset_size=len(batches)), out)
    return out


def trained(name: str, bits: int, folder: Path) -> str:
    """The row of a trained network: accuracies of the files, and their speed over the float one's."""
    data = fashion.load()
    file = export(fashion.trained(name, data), data.train_images[:2], folder / "model.onnx", dynamo=True)
    batches, tests = data.calibration(512), data.test()
    recipe = hs.Recipe.int8() if bits == 8 else hs.Recipe.uniform(bits, 8)
    outcome = hs.quantize(
        file,
        data.train_images[:4],
        batches,
        hs.Accuracy(tests),
        0.001,
        recipe,
        directory=folder / "run",
        rungs=["ptq"],
    )
    files = {"float": file, "halfstep": outcome.directory / "model.onnx"}
    makers = {"quantize_static": lambda: quantize_static(file, batches, folder / "static.onnx", weights=bits)}
    if bits == 8 and find_spec("nncf") is not None:
        makers["NNCF"] = lambda: nncf_on_onnx(file, batches, folder / "nncf.onnx")
    for peer, make in makers.items():
        try:
            files[peer] = make()
        except Exception as failure:  # the peer's own: what it takes is part of the answer
            print(f"  {peer} makes no file: {type(failure).__name__}: {str(failure)[:100]}")
    runs = {key: DeployedModel(path, threads=1, runtime="onnxruntime") for key, path in files.items()}
    hits = {
        key: sum(int((first(run(images)).argmax(1) == labels).sum()) for images, labels in tests) / 1e4
        for key, run in runs.items()
    }
    one = tests[0][0][:1]
    times = race({key: lambda run=run: run(one) for key, run in runs.items()}, rounds=31)
    columns = ("float", "halfstep", "quantize_static", "NNCF")
    accuracies = " | ".join(f"{hits[key]:.2%}" if key in hits else "-" for key in columns)
    speeds = " / ".join(
        f"{times['float'].median / times[key].median:.2f}" if key in times else "-" for key in columns[1:]
    )
    return f"| {name} | W{bits}A8 | {accuracies} | {speeds} |"


#: Damaged files that one process reads, and its time limit in seconds.
TOGETHER, LIMIT = 250, 600


def damaged(seed: int, count: int) -> None:
    """Read damaged copies of a small exported file; how many were refused, and how many were not."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        layers = (torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 5))
        x = torch.zeros(2, 1, 8, 8)
        whole = export(
            torch.nn.Sequential(*layers).eval(), x, Path(folder) / "whole.onnx", dynamo=False
        ).read_bytes()
        generator, refused = np.random.default_rng(seed), 0
        for index in range(count):
            content = bytearray(whole)
            for _ in range(generator.integers(1, 6)):
                content[generator.integers(len(content))] = generator.integers(256)
            where = generator.integers(len(content))
            if generator.random() < 0.2:
                del content[where:]
            elif generator.random() < 0.2:
                content[where:where] = content[where : where + generator.integers(1, 200)]
            path = Path(folder) / f"{index}.onnx"
            path.write_bytes(content)
            try:
                hs.from_onnx(path, x)
            except HalfstepError:
                refused += 1
        print(f"{refused} refused, {count - refused} still a network", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", action="append", choices=[*NETWORKS, *fashion.NETWORKS])
    parser.add_argument(
        "--trained", action="store_true", help="accuracies of trained networks, beside the peers'"
    )
    parser.add_argument("--torchscript", action="store_true", help="torch's older exporter")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--damaged", type=int, metavar="N", help="read N damaged files")
    parser.add_argument("--seed", type=int, help=argparse.SUPPRESS)  # of the process that reads some of them
    options = parser.parse_args()
    if options.seed is not None:
        damaged(options.seed, options.damaged)
        return
    if options.damaged:
        for start in range(0, options.damaged, TOGETHER):
            count = min(TOGETHER, options.damaged - start)
            command = [sys.executable, "-m", "bench.onnx_in", "--damaged", str(count), "--seed", str(start)]
            subprocess.run(command, check=True, timeout=LIMIT)
        return
    if options.trained:
        print("| network | bits | float | halfstep | quantize_static | NNCF | speed over float |")
        print("|---|---|---|---|---|---|---|")
        for name in options.network or fashion.NETWORKS:
            for bits in (8, 4):
                with tempfile.TemporaryDirectory() as folder:
                    print(trained(name, bits, Path(folder)), flush=True)
        return
    print(
        "| network | error | sites | nodes kept | SQNR in dB, module / file / static | speed over module's | static's |"
    )
    print("|---|---|---|---|---|---|---|")
    for name in options.network or NETWORKS:
        with tempfile.TemporaryDirectory() as folder:
            print(measure(name, Path(folder), not options.torchscript, options.batch), flush=True)


if __name__ == "__main__":
    main()
