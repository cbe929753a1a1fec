"""ResNet-18, random weights, 224x224: is it integer, how fast, how big, beside onnxruntime's own tool.

python -m bench.resnet18
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import halfstep as hs
from bench.networks.resnet import ResNet18, randomize_batch_norm
from bench.peer_onnxruntime import quantize_static
from halfstep.runtime.deployed import DeployedModel, inspect_kernels
from halfstep.runtime.latency import race


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=41)
    options = parser.parse_args()
    torch.manual_seed(0)
    model = randomize_batch_norm(ResNet18()).eval()
    batches = list(torch.randn(16, 3, 224, 224).split(4))

    quantized = hs.prepare(model, batches[0])
    hs.observe(quantized, batches)
    hs.calibrate(quantized, hs.Max())
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        ours = hs.export_onnx(quantized, folder / "ours.onnx")
        floating = hs.export_float(quantized, folder / "float.onnx")
        peer = quantize_static(floating, batches, folder / "peer.onnx")
        report(ours, floating, peer, options.threads, options.rounds)


def report(ours: Path, floating: Path, peer: Path, threads: int, rounds: int) -> None:
    console = Console()
    files = {"float": floating, "float again (null)": floating, "quantize_static": peer, "halfstep": ours}
    table = Table(title=f"ResNet-18, 224x224, {threads} threads, {rounds} interleaved rounds")
    for column in ("file", "MiB", "of float", "batch 1, ms", "x float", "batch 8, ms", "x float"):
        table.add_column(column, justify="right" if column != "file" else "left")
    races = {}
    for batch in (1, 8):
        x = torch.randn(batch, 3, 224, 224)
        models = {name: DeployedModel(path, threads=threads) for name, path in files.items()}
        races[batch] = race(
            {n: (lambda m=m, x=x: m(x)) for n, m in models.items()}, rounds if batch == 1 else 15
        )
    for name, path in files.items():
        size = path.stat().st_size
        cells = [name, f"{size / 2**20:.2f}", f"{size / floating.stat().st_size:.3f}"]
        for batch in (1, 8):
            result = races[batch][name]
            cells += [f"{result.median:.1f} ± {result.spread / 2:.0%}", f"{result.speedup:.2f}"]
        table.add_row(*cells)
    console.print(table)
    for batch in (1, 8):
        ratio = races[batch]["halfstep"].speedup / races[batch]["quantize_static"].speedup
        console.print(f"batch {batch}: halfstep over quantize_static {ratio:.2f}x")
    console.print("halfstep's optimised graph:", inspect_kernels(ours, threads).counts)


if __name__ == "__main__":
    main()
