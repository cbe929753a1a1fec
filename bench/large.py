"""A transformer of more than a billion parameters, weights alone in 4 bits: seconds and memory on a CPU.

``python -m bench.large [--billions 1.2] [--group 128 | --static] [--folder F]``

Random weights, seed 0, in safetensors, a file a block; the module is made without memory (device ``meta``) and given
the tensors of those files, which are mapped and read where they are used (``hs.prepare(..., weights=files)``). A
process of its own prepares, calibrates and exports it; with ``--static`` activations are quantized too, in 8 bits,
and observed stage by stage (``hs.observe(..., device="cpu")``). Said are, after each step, the seconds, the most
memory so far that is the process's own, sampled 50 times a second, and the most that was resident, mapped files
included, which the system may take back; at last the file is run on ONNX Runtime and held to the simulation.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
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


class OwnMemory(threading.Thread):
    """The most memory, in GB, that was the process's own and no file's."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most = 0.0
        self.start()

    def run(self) -> None:
        while True:
            lines = Path("/proc/self/status").read_text().splitlines()
            own = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
            self.most = max(self.most, own * 1024 / 1e9)
            time.sleep(0.02)


def measure(folder: Path, group: int, static: bool) -> None:
    torch.manual_seed(0)
    batches = torch.randn(8, 2, TOKENS, WIDTH)
    x, memory, start = batches[0], OwnMemory(), time.perf_counter()

    def row(step: str) -> None:
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        seconds = time.perf_counter() - start
        print(f"| {step} | {seconds:.0f} | {memory.most:.1f} | {resident:.1f} |", flush=True)

    files = list(folder.glob("*.safetensors"))
    with torch.device("meta"):
        model = Transformer(len(files) - 1).eval()
    count = sum(parameter.numel() for parameter in model.parameters())
    row(f"{count / 1e9:.2f} billion parameters, {count * 4 / 1e9:.1f} GB, in files")
    recipe = hs.Recipe.int8() if static else hs.Recipe.weight_only(4, group)
    q = hs.prepare(model, x, recipe, weights=files)
    row("prepare")
    if static:
        hs.observe(q, batches, device="cpu")
        row(f"observe {len(batches)} batches, stage by stage")
    hs.calibrate(q, weights=None if static else hs.MSE())
    row("calibrate")
    path = hs.export_onnx(q, folder / "model.onnx", check=False)
    row(f"export, {file_size(path) / 1e9:.2f} GB")
    with torch.no_grad():
        wanted = q(x)
    row("simulate")
    del q
    noise = signal_to_noise(wanted, DeployedModel(path)(x))
    row(f"run on ONNX Runtime, {noise:.0f} dB to the simulation")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--billions", type=float, default=1.2)
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--static", action="store_true", help="weights and activations in 8 bits")
    parser.add_argument(
        "--folder", type=Path, help="where files are put for a while; a temporary one by default"
    )
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    if options.measure is not None:
        measure(options.measure, options.group, options.static)
        return
    depth = max(1, round(options.billions * 1e9 / (12 * WIDTH**2)))
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        generate(Path(folder), depth)
        print("| after | seconds | own memory, GB | resident, GB |\n|---|---|---|---|", flush=True)
        command = [sys.executable, "-m", "bench.large", "--measure", folder, "--group", str(options.group)]
        subprocess.run(command + ["--static"] * options.static, check=True)


if __name__ == "__main__":
    main()
