"""A transformer of more than a billion parameters, weights alone in 4 bits: seconds and memory on a CPU.

``python -m bench.large [--billions 1.2] [--group 128] [--folder F]``

Random weights, seed 0, in safetensors, a file a block; the module is made without memory (device ``meta``) and given
the tensors of those files, which are mapped and read where they are first used. A process of its own prepares,
calibrates and exports it. Said are the seconds of each step and the largest resident memory after it, mapped files
included (what is only mapped the system may take back); at last the file is run on ONNX Runtime and held to the
simulation.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

import halfstep as hs
from bench.networks.vit import Block
from halfstep.fidelity.compare import signal_to_noise
from halfstep.runtime.deployed import DeployedModel
from halfstep.runtime.file import file_size

WIDTH, HEADS, TOKENS = 2048, 16, 16


class Transformer(nn.Module):
    """Blocks on vectors (batch, tokens, width): what is large about a language model, without its table of words."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(*(Block(WIDTH, HEADS) for _ in range(depth)))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.blocks(x))


def generate(folder: Path, depth: int) -> None:
    """The parameters of every block, and of the norm at the end, in files of their own."""
    torch.manual_seed(0)
    for index in range(depth):
        block = Block(WIDTH, HEADS)
        state = {f"blocks.{index}.{name}": tensor.contiguous() for name, tensor in block.state_dict().items()}
        save_file(state, folder / f"{index}.safetensors")
    save_file(
        {f"norm.{name}": x for name, x in nn.LayerNorm(WIDTH).state_dict().items()},
        folder / "norm.safetensors",
    )


def load(folder: Path) -> nn.Module:
    """The module with its parameters mapped from the files."""
    files = list(folder.glob("*.safetensors"))
    with torch.device("meta"):
        model = Transformer(len(files) - 1)
    for file in files:
        model.load_state_dict(load_file(file), strict=False, assign=True)
    return model.eval()


def measure(folder: Path, group: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, TOKENS, WIDTH)
    start = time.perf_counter()

    def row(step: str) -> None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"| {step} | {time.perf_counter() - start:.0f} | {peak:.1f} |", flush=True)

    model = load(folder)
    count = sum(parameter.numel() for parameter in model.parameters())
    row(f"load {count / 1e9:.2f} billion parameters, {count * 4 / 1e9:.1f} GB")
    q = hs.prepare(model, x, hs.Recipe.weight_only(4, group))
    row("prepare")
    hs.calibrate(q, hs.MSE())
    row("calibrate")
    path = hs.export_onnx(q, folder / "model.onnx", check=False)
    row(f"export, {file_size(path) / 1e9:.2f} GB")
    with torch.no_grad():
        wanted = q(x)
    row("simulate")
    del q, model
    noise = signal_to_noise(wanted, DeployedModel(path)(x))
    row(f"run on ONNX Runtime, {noise:.0f} dB to the simulation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--billions", type=float, default=1.2)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument(
        "--folder", type=Path, help="where files are put for a while; a temporary one by default"
    )
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    if options.measure is not None:
        measure(options.measure, options.group)
        return
    depth = max(1, round(options.billions * 1e9 / (12 * WIDTH**2)))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        generate(Path(folder), depth)
        print("| after | seconds | peak GB |\n|---|---|---|", flush=True)
        command = [sys.executable, "-m", "bench.large", "--measure", folder, "--group", str(options.group)]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
