"""A sentence encoder with the outliers of large ones: how near to float its embeddings stay, how fast its files run.

Six layers of width 192, trained here on the docstrings of Python's standard library (``bench.networks.text``); then
three channels of every layer are made 100 times as large without changing the function, as they are in large trained
encoders, and masks add the lowest float32. Batches are as long as their longest sentence; 64 sentences to calibrate on,
256 others to judge on, seed 0. All files race in one interleaved run, beside the float file a second time and
onnxruntime's quantize_dynamic as it comes and with weights per channel.

python -m bench.encoder [--rounds 11] [--threads 2] [--folder files] [--only dynamic]
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import halfstep as hs
from bench.networks.text import DYNAMIC, SentenceEncoder, sentence_encoder
from bench.peer_onnxruntime import quantize_dynamic
from bench.sentences import batched, encoded, parts, sentences
from halfstep.model import QuantizedModel
from halfstep.runtime.deployed import DeployedModel, inspect_kernels
from halfstep.runtime.latency import race

CALIBRATION, TEST = 64, 256
BATCHES = (1, 8)

#: The linear layers behind GELU, whose inputs hold the largest activations.
BEHIND_GELU = "encoder.layers.?.fc2"

Batches = list[dict[str, torch.Tensor]]


def prepare(model: SentenceEncoder, batches: Batches, recipe: hs.Recipe | None = None) -> QuantizedModel:
    return hs.prepare(model, batches[0], recipe, dynamic=DYNAMIC, padding="attention_mask")


def static(model: SentenceEncoder, batches: Batches, recipe: hs.Recipe | None = None) -> QuantizedModel:
    """Ranges from calibration everywhere."""
    q = prepare(model, batches, recipe or hs.Recipe.int8())
    hs.observe(q, batches)
    hs.calibrate(q, hs.MSE())
    return q


def dynamic(model: SentenceEncoder, batches: Batches, recipe: hs.Recipe | None = None) -> QuantizedModel:
    """Ranges at run time everywhere."""
    q = prepare(model, batches, recipe or hs.Recipe.dynamic())
    hs.calibrate(q)
    return q


def partly(model: SentenceEncoder, batches: Batches, field: str) -> QuantizedModel:
    """Ranges from calibration, but for the six layers behind GELU."""
    q = static(model, batches)
    setattr(q, field, [BEHIND_GELU])
    hs.calibrate(q, hs.MSE())
    return q


def migrated(
    model: SentenceEncoder, batches: Batches, layers: tuple[str, ...] = (), floating: bool = False
) -> QuantizedModel:
    """Channels of layer norms and values evened out; then ranges at run time in some layers, perhaps six in float."""
    q = static(model, batches)
    hs.migrate(q)
    q.dynamic_layers = layers
    q.float_layers = [BEHIND_GELU] if floating else []
    hs.calibrate(q, hs.MSE())
    return q


def but_six(model: SentenceEncoder, batches: Batches) -> QuantizedModel:
    """Ranges at run time, those six layers in float."""
    q = dynamic(model, batches)
    q.float_layers = [BEHIND_GELU]
    return q


CANDIDATES: dict[str, Callable[[SentenceEncoder, Batches], QuantizedModel]] = {
    "static": static,
    "static, W4": lambda m, b: static(m, b, hs.Recipe.uniform(4, 8, ends=None)),
    "static, 6 layers dynamic": lambda m, b: partly(m, b, "dynamic_layers"),
    "static, 6 layers float": lambda m, b: partly(m, b, "float_layers"),
    "dynamic": dynamic,
    "dynamic, 6 layers float": but_six,
    "migrated": migrated,
    "migrated, 6 layers float": lambda m, b: migrated(m, b, floating=True),
    "migrated, dynamic": lambda m, b: migrated(m, b, ("*",)),
    "dynamic, W4": lambda m, b: dynamic(m, b, hs.Recipe.dynamic(4)),
    "dynamic, groups of 32": lambda m, b: dynamic(m, b, hs.Recipe.dynamic(8, 32)),
    "dynamic, W4 in groups of 32": lambda m, b: dynamic(m, b, hs.Recipe.dynamic(4, 32)),
    "weights alone, 8 bits, groups of 128": lambda m, b: dynamic(m, b, hs.Recipe.weight_only(8, 128)),
    "weights alone, 4 bits, groups of 128": lambda m, b: dynamic(m, b, hs.Recipe.weight_only(4, 128)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--folder", type=Path, help="keep the files there, and use those that are there")
    parser.add_argument("--only", nargs="*", default=list(CANDIDATES), help="candidates, by name")
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    torch.manual_seed(0)
    model, vocabulary = sentence_encoder()
    _, known, new = parts(sentences())
    calibration = [encoded(vocabulary, batch) for batch in batched(known[:CALIBRATION], 16)]
    test = [encoded(vocabulary, batch) for batch in batched(new[:TEST], 64)]
    with tempfile.TemporaryDirectory() as directory:
        files = write_files(model, calibration, options.folder or Path(directory), options.only)
        report(files, test, options.threads, options.rounds)


def write_files(
    model: SentenceEncoder, calibration: Batches, folder: Path, names: list[str]
) -> dict[str, Path]:
    """Every contestant's file; float first."""

    def kept(name: str, write: Callable[[Path], object]) -> Path:
        path = folder / f"{name.replace(',', '').replace(' ', '_')}.onnx"
        if not path.exists():
            write(path)
        return path

    folder.mkdir(parents=True, exist_ok=True)
    floating = kept("float", lambda path: hs.export_float(prepare(model, calibration), path))
    files = {"float": floating, "float again (null)": floating}
    for name, per_channel in (("quantize_dynamic", False), ("quantize_dynamic, per channel", True)):
        files[name] = kept(name, lambda path, c=per_channel: quantize_dynamic(floating, path, c))
    for name in names:
        files[name] = kept(name, lambda path, n=name: hs.export_onnx(CANDIDATES[n](model, calibration), path))
    return files


def report(files: dict[str, Path], test: Batches, threads: int, rounds: int) -> None:
    console = Console(width=150)
    table = Table(title=f"sentence encoder, {threads} threads, {rounds} interleaved rounds")
    table.add_column("file")
    columns = [
        "cosine",
        "worst",
        "neighbour kept",
        "of float",
        *(f"batch {b}, x float" for b in BATCHES),
        "spread",
    ]
    for column in columns:
        table.add_column(column, justify="right")
    models = {name: DeployedModel(path, threads=threads) for name, path in files.items()}
    races = {}
    for batch in BATCHES:
        x = tuple(test[0][name][:batch] for name in ("input_ids", "attention_mask"))
        races[batch] = race({n: (lambda m=m, x=x: m(*x)) for n, m in models.items()}, rounds)
    wanted = embeddings(models["float"], test)
    for name, path in files.items():
        cosine, worst, kept = agreement(embeddings(models[name], test), wanted)
        size = path.stat().st_size / files["float"].stat().st_size
        speeds = [f"{races[batch][name].speedup:.2f}" for batch in BATCHES]
        spread = max(races[batch][name].spread for batch in BATCHES)
        table.add_row(
            name,
            f"{cosine:.4f}",
            f"{worst:.3f}",
            f"{kept:.1%}",
            f"{size:.3f}",
            *speeds,
            f"± {spread / 2:.0%}",
        )
    console.print(table)
    for name in list(files)[4:]:
        console.print(
            f"{name}: {inspect_kernels(files[name], threads).counts}", soft_wrap=True, highlight=False
        )


def embeddings(model: DeployedModel, test: Batches) -> torch.Tensor:
    """(sentences, features)."""
    return torch.cat([model(batch["input_ids"], batch["attention_mask"]) for batch in test])


def agreement(ours: torch.Tensor, wanted: torch.Tensor) -> tuple[float, float, float]:
    """Mean and worst cosine, and the share of sentences that keep their nearest neighbour."""
    cosine = torch.nn.functional.cosine_similarity(ours, wanted)
    nearest = [(e @ e.T).fill_diagonal_(-1).argmax(1) for e in (ours, wanted)]
    return float(cosine.mean()), float(cosine.min()), float((nearest[0] == nearest[1]).float().mean())


if __name__ == "__main__":
    main()
