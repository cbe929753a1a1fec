"""Networks as people bring them: two detectors, text of any length, lines of any width, sound, images of two sizes.

Each is trained here (``bench/cache`` keeps the weights, seed 0) and quantized to W8A8 in one call of ``hs.quantize``
with its defaults (a drop of 0.01 allowed), on ONNX Runtime and OpenVINO; beside it the peers as their documents
recommend: ``quantize_static`` (QDQ, u8/s8 per channel, MinMax, after quant_pre_process), ``quantize_dynamic`` for
transformers and recurrent networks, ``nncf.quantize`` with ``model_type`` for transformers. Scores are the files',
on their runtimes; training, calibration and test data are apart. Files race in one interleaved run a runtime.

python -m bench.real [--tasks detector tagger] [--targets onnxruntime] [--folder files] [--tune] [--no-race]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

import halfstep as hs
from bench import peer_nncf
from bench.networks.detector import detector
from bench.networks.detr import detr
from bench.networks.keywords import keywords
from bench.networks.lines import lines
from bench.networks.outlines import outlines
from bench.networks.task import Task
from bench.networks.text import classifier, tagger
from bench.peer_onnxruntime import quantize_dynamic, quantize_static
from halfstep.graph.inputs import tensors_of
from halfstep.runtime.deployed import DeployedModel, find_runtime
from halfstep.runtime.latency import enough_rounds, race

TASKS: dict[str, tuple[str, Callable[[], Task]]] = {
    "detector": ("mAP 50-95", detector),
    "detr": ("mAP 50-95", detr),
    "classifier": ("accuracy", classifier),
    "tagger": ("F1", tagger),
    "lines": ("character errors", lines),
    "keywords": ("accuracy", keywords),
    "outlines": ("mean IoU", outlines),
}
TARGETS = ("onnxruntime", "openvino")
BATCH = 8


@dataclass
class Row:
    """A contestant: its file, its score on its runtime, and its speed over float."""

    name: str
    path: Path | None = None
    score: float | None = None
    speed: float | None = None
    remark: str = ""


@dataclass
class Run:
    """What came of one task on one runtime."""

    runtime: str
    float_score: float
    seconds: float
    rows: list[Row] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=TARGETS)
    parser.add_argument(
        "--folder", type=Path, help="keep the files and journals here, and go on with those there"
    )
    parser.add_argument("--tune", action="store_true", help="layers that integers slow down go to float")
    parser.add_argument("--no-race", action="store_true")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    console = Console(width=150)
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.tasks:
            task = TASKS[name][1]()
            for target in options.targets:
                folder = (options.folder or Path(temporary)) / f"{name}-{target}"
                folder.mkdir(parents=True, exist_ok=True)
                run = compete(task, target, folder, options.threads, options.tune)
                if not options.no_race:
                    speeds(task, run, folder / "run" / "float.onnx", options.rounds, options.threads)
                console.print(table(name, run))


def compete(task: Task, target: str, folder: Path, threads: int, tune: bool) -> Run:
    """Our file and the peers', and what each scores."""
    start = time.perf_counter()
    outcome = hs.quantize(
        task.model,
        task.example,
        task.calibration,
        task.metric,
        target=target,
        directory=folder / "run",
        threads=threads,
        dynamic=task.dynamic,
        padding=task.padding,
        tune=tune,
        progress=False,
    )
    run = Run(target, outcome.float_score, time.perf_counter() - start)
    left = f", {len(outcome.float_layers)} in float" if outcome.float_layers else ""
    proof = outcome.verification
    run.rows.append(
        Row(
            "halfstep",
            outcome.directory / "model.onnx" if outcome.directory else None,
            outcome.deployed_score,
            remark=f"{'met' if outcome.met else 'not met'} on rung {outcome.rung}{left}; {proof.integer_layers} of "
            f"{len(proof.layers)} layers integer" + (f"; {outcome.advice[0]}" if outcome.advice else ""),
        )
    )
    captured, floating = outcome.model.captured, folder / "run" / "float.onnx"
    for name, path, make in peers(task, target, floating, folder):
        row = Row(name)
        try:
            if not path.exists():
                make(path)
            model = DeployedModel(path, captured.in_spec, captured.out_spec, threads, runtime=target)
            row.path, row.score = path, task.metric.evaluate(model).value
        except Exception as error:  # a peer that fails on a network is part of what is shown
            row.remark = f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
        run.rows.append(row)
    return run


def peers(
    task: Task, target: str, floating: Path, folder: Path
) -> list[tuple[str, Path, Callable[[Path], object]]]:
    """Who else makes a file for this runtime: name, path, and how."""
    if target == "openvino":
        if not peer_nncf.available():
            return []
        make = lambda path: peer_nncf.quantize(floating, task.calibration, path, task.transformer)  # noqa: E731
        return [("nncf.quantize", folder / "nncf.xml", make)]
    found: list[tuple[str, Path, Callable[[Path], object]]] = [
        (
            "quantize_static",
            folder / "static.onnx",
            lambda path: quantize_static(floating, task.calibration, path),
        )
    ]
    if task.dynamic_peer:
        found.append(
            ("quantize_dynamic", folder / "dynamic.onnx", lambda path: quantize_dynamic(floating, path))
        )
    return found


def speeds(task: Task, run: Run, floating: Path, rounds: int, threads: int) -> None:
    """Race the files, and float against itself, on the first test examples."""
    inputs, _ = next(iter(task.metric.labelled))
    arrays = [np.ascontiguousarray(tensor[:BATCH]) for tensor in tensors_of(inputs)]
    run.rows.insert(0, Row("float", floating, run.float_score))
    run.rows.insert(1, Row("float again", floating))
    racing = [row for row in run.rows if row.path is not None]
    sessions = {row.name: find_runtime(run.runtime).open(row.path, threads) for row in racing}
    contestants = {name: (lambda s=session: s.run(arrays)) for name, session in sessions.items()}
    result = race(contestants, enough_rounds(contestants["float"], rounds))
    for row in racing:
        row.speed = result[row.name].speedup
    run.rows[0].remark = f"{result['float'].median:.2f} ms a batch of {BATCH}"


def table(name: str, run: Run) -> Table:
    metric = TASKS[name][0]
    found = Table(
        title=f"{name} on {run.runtime}: float {run.float_score:.4f} ({metric}), {run.seconds:.0f} s",
        width=140,
    )
    for column in ("file", metric, "lost", "speed over float", "remark"):
        found.add_column(column, justify="left" if column in ("file", "remark") else "right")
    for row in run.rows:
        lost = None if row.score is None else run.float_score - row.score
        found.add_row(
            row.name,
            "-" if row.score is None else f"{row.score:.4f}",
            "-" if lost is None else f"{lost if metric != 'character errors' else -lost:+.4f}",
            "-" if row.speed is None else f"{row.speed:.2f}",
            row.remark,
        )
    return found


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
