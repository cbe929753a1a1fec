"""Every architecture on ONNX Runtime and OpenVINO: is it integer, does it answer as simulated, how fast, how big.

Random weights (``bench.networks.catalogue``), max calibrator, 32 calibration examples, seed 0. One interleaved run a
network, batch size and runtime: the float file on it, the same float file again (what it differs from 1 by is noise),
onnxruntime's quantize_static (QDQ, u8/s8 per channel, after quant_pre_process), ours, and ours after ``hs.tune`` for
that batch on this machine: what integers slow down is left in float, and counted. On OpenVINO ours beside
nncf.quantize. Last, what weights alone in few bits make of a larger network (``bench.weight_only``).

python -m bench.deployment [--networks vit bert] [--folder /tmp/files]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.utils import _pytree as pytree

import halfstep as hs
from bench import peer_nncf, weight_only
from bench.networks.catalogue import CATALOGUE, build
from bench.peer_onnxruntime import quantize_static
from halfstep.fidelity.compare import Parity, compare
from halfstep.graph.inputs import tensors_of
from halfstep.model import QuantizedModel
from halfstep.runtime.deployed import DeployedModel, find_runtime, inspect_kernels
from halfstep.runtime.file import read_sites
from halfstep.runtime.latency import Latency, enough_rounds, race
from halfstep.runtime.runtime import Kernels

TRANSFORMERS = ("vit", "small vit", "swin-like", "bert")
#: Eight-bit products that VNNI makes where float's fused multiply-add makes one.
VNNI_LIMIT = 4.0
#: Whose files race for each runtime, and against whom. Each runtime has a race of its own: threads of OpenVINO spin for
#: a while after a run, and whoever came next lost up to a third of its speed to them.
RACES = {
    "onnxruntime": (("ours", "tuned"), "quantize_static"),
    "openvino": (("ours on openvino",), "nncf"),
}


@dataclass(frozen=True)
class Files:
    """What is compared, as files; a peer's is None where it failed or is not installed.

    ``tuned`` has one for each batch size.
    """

    floating: Path
    ours: Path
    tuned: dict[int, Path]
    static: Path | None
    ours_openvino: Path
    nncf: Path | None


@dataclass(frozen=True)
class Proof:
    """What our file turned out to be on its runtime.

    ``nudged`` is the simulation against itself, on inputs a millionth larger: what rounding alone makes of it.
    """

    kernels: Kernels
    parity: Parity
    nudged: Parity
    layers: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", nargs="*", default=list(CATALOGUE), choices=list(CATALOGUE))
    parser.add_argument("--folder", type=Path, help="keep the files here, and take those that are there")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--no-tune", action="store_true", help="tuning a file for a batch takes minutes")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument(
        "--only", choices=("files", "race"), help="make and prove the files, or race those there"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        console = Console(width=150)
        if options.only != "race":
            for runtime in ("onnxruntime", "openvino"):
                proofs = {name: prove(name, folder, runtime, options) for name in options.networks}
                console.print(proof_table(proofs, runtime))
        if options.only != "files":
            run_races(folder, options, console)
        console.print(size_table(options.networks, folder))
        if "bert" in options.networks:
            console.print(weight_only.table(folder, options.threads, options.rounds))


def calibrated(name: str, target: str) -> tuple[QuantizedModel, list]:
    entry = CATALOGUE[name]
    torch.manual_seed(1)
    batches = [entry.inputs(4) for _ in range(8)]
    model = hs.prepare(build(name), batches[0], target=target)
    hs.observe(model, batches)
    hs.calibrate(model)
    return model, batches


def paths(name: str, folder: Path, batches: Sequence[int] = ()) -> Files:
    """Where the files of a network lie; peers' only if they are there, ours tuned for these ``batches``."""
    stem = folder / name.replace(" ", "-")
    static, nncf = stem.with_suffix(".static.onnx"), stem.with_suffix(".nncf.xml")
    return Files(
        stem.with_suffix(".float.onnx"),
        stem.with_suffix(".ours.onnx"),
        {batch: stem.with_suffix(f".tuned{batch}.onnx") for batch in batches},
        static if static.exists() else None,
        stem.with_suffix(".openvino.onnx"),
        nncf if nncf.exists() else None,
    )


def prove(name: str, folder: Path, target: str, options: argparse.Namespace) -> Proof:
    """Make our files and the peer's, and run ours against the simulation."""
    files, threads = paths(name, folder, options.batches), options.threads
    model, batches = calibrated(name, target)
    ours = files.ours if target == "onnxruntime" else files.ours_openvino
    hs.export_onnx(model, ours)
    if not files.floating.exists():
        hs.export_float(model, files.floating)
    stem = folder / name.replace(" ", "-")
    if target == "onnxruntime" and files.static is None:
        try:
            quantize_static(files.floating, batches, stem.with_suffix(".static.onnx"))
        except Exception as error:
            print(f"quantize_static fails on {name}: {type(error).__name__}: {str(error).splitlines()[0]}")
    if target == "openvino" and files.nncf is None and peer_nncf.available():
        peer_nncf.quantize(files.floating, batches, stem.with_suffix(".nncf.xml"), name in TRANSFORMERS)
    deployed = DeployedModel(ours, model.captured.in_spec, model.captured.out_spec, threads)
    proof = Proof(
        inspect_kernels(ours, threads),
        compare(model, deployed, batches),
        compare(model, nudged(model), batches),
        len(model.layers),
    )
    if target == "onnxruntime" and not options.no_tune:
        for batch, path in files.tuned.items():
            model.float_layers = []
            print(f"{name}, batch {batch}: {hs.tune(model, threads, batch=batch)}", flush=True)
            hs.export_onnx(model, path)
    return proof


def nudged(model: QuantizedModel) -> Callable[..., Any]:
    """``model`` on float inputs that are larger by a millionth."""

    def nudge(x: torch.Tensor) -> torch.Tensor:
        return x * (1 + 1e-6) if x.is_floating_point() else x

    def run(*args: Any, **kwargs: Any) -> Any:
        args, kwargs = pytree.tree_map_only(torch.Tensor, nudge, (args, kwargs))
        return model(*args, **kwargs)

    return run


def proof_table(proofs: dict[str, Proof], runtime: str) -> Table:
    table = Table(
        title=f"the files on {runtime}: kernels, agreement with the simulation on 32 inputs, and the simulation's with "
        "itself on inputs larger by a millionth"
    )
    for column in (
        "network",
        "layers",
        "integer kernels",
        "multiply in float",
        "same top-1",
        "SQNR, dB",
        "nudged",
    ):
        table.add_column(column, justify="left" if column == "network" else "right")
    for name, proof in proofs.items():
        floating = ", ".join(
            dict.fromkeys(n.split("/")[0].rpartition(".")[2] for n in proof.kernels.floating)
        )
        table.add_row(
            name,
            str(proof.layers),
            str(len(proof.kernels.integer)),
            f"{len(proof.kernels.floating)} {floating}",
            same(proof.parity),
            f"{proof.parity.sqnr:.1f}",
            f"{same(proof.nudged)}, {proof.nudged.sqnr:.1f} dB",
        )
    return table


def same(parity: Parity) -> str:
    return "–" if parity.top1 is None else f"{parity.top1:.1%}"


def run_races(folder: Path, options: argparse.Namespace, console: Console) -> None:
    names, batches, threads, rounds = options.networks, options.batches, options.threads, options.rounds
    for runtime, (contestants, peer) in RACES.items():
        results = {
            (name, batch): compete(
                name, batch, entrants(paths(name, folder, batches), batch, runtime), threads, rounds
            )
            for name in names
            for batch in batches
        }
        settings = f"{threads} threads, {rounds} rounds or more"
        console.print(race_table(results, runtime, contestants, peer, settings))
        for ours in contestants:
            if all(ours in result for result in results.values()):
                console.print(summary(results, ours, peer))
    if options.no_tune:
        return
    floats = Table(title="layers that tuning left in float")
    for column in ("network", *(f"batch {batch}" for batch in batches)):
        floats.add_column(column, justify="left" if column == "network" else "right")
    for name in names:
        floats.add_row(name, *(left_in_float(path) for path in paths(name, folder, batches).tuned.values()))
    console.print(floats)


def race_table(
    results: dict[tuple[str, int], dict[str, Latency]],
    runtime: str,
    contestants: tuple[str, ...],
    peer: str,
    settings: str,
) -> Table:
    table = Table(
        title=f"{runtime}, {settings}, speed over its float (VNNI's limit for convs: {VNNI_LIMIT:.1f}, AMX's is higher)"
    )
    over = [f"{ours} over {peer}" for ours in contestants]
    for column in ("network", "batch", "float, ms", "null", peer, *contestants, *over):
        table.add_column(column, justify="left" if column == "network" else "right")
    for (name, batch), result in results.items():
        speeds = [
            f"{result[key].speedup:.2f}" if key in result else "-" for key in ("null", peer, *contestants)
        ]
        ratios = [
            f"{result[ours].speedup / result[peer].speedup:.2f}" if {peer, ours} <= result.keys() else "-"
            for ours in contestants
        ]
        table.add_row(name, str(batch), f"{result['float'].median:.2f}", *speeds, *ratios)
    return table


def summary(results: dict[tuple[str, int], dict[str, Latency]], ours: str, peer: str) -> str:
    floats = min(result[ours].speedup for result in results.values())
    ratios = [result[ours].speedup / result[peer].speedup for result in results.values() if peer in result]
    if not ratios:
        return f"{ours}: {peer} is not installed, or has made no file; over float at least {floats:.2f}"
    return (
        f"{ours}: geometric mean over {peer} {statistics.geometric_mean(ratios):.3f}, least {min(ratios):.2f}, over "
        f"{len(ratios)} races; over float at least {floats:.2f}"
    )


def left_in_float(path: Path) -> str:
    names = read_sites(path)[1]["halfstep.float_layers"]
    return str(len(names.split(", ")) if names else 0)


def entrants(files: Files, batch: int, runtime: str) -> dict[str, tuple[Path, str]]:
    """Who races: the runtime's float twice, and the files for it."""
    files_for = {
        "onnxruntime": {
            "quantize_static": files.static,
            "ours": files.ours,
            "tuned": tuned if (tuned := files.tuned[batch]).exists() else None,
        },
        "openvino": {"nncf": files.nncf, "ours on openvino": files.ours_openvino},
    }
    floats = dict.fromkeys(("float", "null"), (files.floating, runtime))
    return floats | {name: (path, runtime) for name, path in files_for[runtime].items() if path}


def compete(
    name: str, batch: int, contestants: dict[str, tuple[Path, str]], threads: int, rounds: int
) -> dict[str, Latency]:
    torch.manual_seed(2)
    arrays = [np.ascontiguousarray(t) for t in tensors_of(CATALOGUE[name].inputs(batch))]
    sessions = {
        key: find_runtime(runtime).open(path, threads) for key, (path, runtime) in contestants.items()
    }
    runs = {key: (lambda s=s: s.run(arrays)) for key, s in sessions.items()}
    return race(runs, enough_rounds(runs["float"], rounds))


def size_table(names: list[str], folder: Path) -> Table:
    table = Table(title="size over float (the OpenVINO peer's is its .bin)")
    for column in ("network", "float, KiB", "ours", "ours on openvino", "quantize_static", "nncf"):
        table.add_column(column, justify="left" if column == "network" else "right")
    for name in names:
        files = paths(name, folder)
        whole = files.floating.stat().st_size
        others = (
            files.ours,
            files.ours_openvino,
            files.static,
            files.nncf and files.nncf.with_suffix(".bin"),
        )
        sizes = ["-" if path is None else f"{path.stat().st_size / whole:.3f}" for path in others]
        table.add_row(name, f"{whole / 1024:,.0f}", *sizes)
    return table


if __name__ == "__main__":
    main()
