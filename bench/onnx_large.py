"""An ONNX file of more than 2 GB, with its tensors beside it: quantized with bounded memory.

``python -m bench.onnx_large [--recipe w4|w8a8] [--gigabytes 2.2] [--folder F]``

Random weights, seed 0: products by large matrices with a ReLU between. For each recipe a process of its own reads the
file, observes 2 batches of 4 examples, calibrates (Max) and writes the file, which is then run on ONNX Runtime and held
to the simulation. Said are the seconds and the largest resident memory of that process, memory that is mapped
from files included. The files are deleted afterwards.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

import halfstep as hs
from halfstep.fidelity.compare import signal_to_noise
from halfstep.runtime.deployed import DeployedModel
from halfstep.runtime.file import parts

WIDTH, HIDDEN = 4096, 16384
RECIPES = {"w4": lambda: hs.Recipe.weight_only(4, group=128), "w8a8": hs.Recipe.int8}


def generate(path: Path, gigabytes: float) -> Path:
    """Pairs of products ``WIDTH x HIDDEN x WIDTH`` until their weights have so many bytes; written matrix by matrix."""
    rng = np.random.default_rng(0)
    nodes, stored, value = [], [], "x"
    count = max(1, round(gigabytes * 1e9 / (WIDTH * HIDDEN * 4 * 2)))
    with path.with_suffix(".data").open("wb") as data:
        for layer in range(count):
            for name, shape in ((f"up{layer}", (WIDTH, HIDDEN)), (f"down{layer}", (HIDDEN, WIDTH))):
                tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=shape)
                tensor.data_location = TensorProto.EXTERNAL
                offset = data.tell()
                data.write((rng.standard_normal(shape, np.float32) / shape[0] ** 0.5).tobytes())
                told = {
                    "location": path.with_suffix(".data").name,
                    "offset": offset,
                    "length": data.tell() - offset,
                }
                for key, number in told.items():
                    tensor.external_data.add(key=key, value=str(number))
                stored.append(tensor)
                nodes.append(
                    helper.make_node("MatMul", [value, name], [f"{name}_made"], name=f"/{name}/MatMul")
                )
                value = f"{name}_made"
                if name.startswith("up"):
                    nodes.append(helper.make_node("Relu", [value], [f"{name}_relu"], name=f"/{name}/Relu"))
                    value = f"{name}_relu"
    nodes[-1].output[0] = "y"
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", WIDTH]) for name in "xy")
    graph = helper.make_graph(nodes, "large", [x], [y], stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def size(path: Path) -> float:
    """Gigabytes of a file with what lies beside it."""
    return sum(part.stat().st_size for part in {path, *parts(path)}) / 1e9


def measure(path: Path, recipe: str) -> None:
    torch.manual_seed(0)
    start = time.perf_counter()
    batches = [torch.randn(4, WIDTH) for _ in range(2)]
    q = hs.prepare(path, batches[0], RECIPES[recipe]())
    hs.observe(q, batches)
    hs.calibrate(q, hs.Max())
    out = hs.export_onnx(q, path.with_name(f"{recipe}.onnx"), check=False)
    seconds = time.perf_counter() - start
    with torch.no_grad():
        wanted = q(batches[0])
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    before, after = size(path), size(out)
    del q
    noise = signal_to_noise(wanted, DeployedModel(out)(batches[0]))
    print(
        f"| {recipe} | {before:.2f} | {after:.2f} | {seconds:.0f} | {kilobytes / 1e6:.1f} | {noise:.0f} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--recipe", action="append", choices=list(RECIPES))
    parser.add_argument("--gigabytes", type=float, default=2.2)
    parser.add_argument(
        "--folder", type=Path, help="where files are put for a while; a temporary one by default"
    )
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)  # of the process that measures
    options = parser.parse_args()
    if options.file is not None:
        measure(options.file, options.recipe[0])
        return
    print("| recipe | GB | GB after | seconds | peak GB | dB to the simulation |\n|---|---|---|---|---|---|")
    for recipe in options.recipe or RECIPES:
        with tempfile.TemporaryDirectory(dir=options.folder) as folder:
            path = generate(Path(folder) / "large.onnx", options.gigabytes)
            command = [sys.executable, "-m", "bench.onnx_large", "--file", path, "--recipe", recipe]
            subprocess.run(list(map(str, command)), check=True)


if __name__ == "__main__":
    main()
