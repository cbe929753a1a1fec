"""Fashion-MNIST in int8 on ONNX Runtime and OpenVINO: does the file answer as its simulation, image by image?

Small trained networks; every calibrator and, if need be, the whole ladder on 512 calibration images; accuracy in
float, simulated and of the file on all 10,000 test images, allowed drop 0.3 points, seed 0.

python -m bench.fashion_int8 [--networks resnet] [--targets openvino]
"""

from __future__ import annotations

import argparse
import tempfile
from importlib.util import find_spec

import torch
from rich.console import Console
from rich.table import Table

import halfstep as hs
from bench import fashion
from halfstep.fidelity.compare import compare
from halfstep.runtime.deployed import DeployedModel

TARGETS = ("onnxruntime", "openvino")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--networks", nargs="*", default=list(fashion.NETWORKS), choices=list(fashion.NETWORKS)
    )
    parser.add_argument("--targets", nargs="*", default=list(TARGETS), choices=TARGETS)
    options = parser.parse_args()
    table = Table(title="Fashion-MNIST, W8A8, 512 calibration images, 10,000 test images, seed 0")
    columns = (
        "network",
        "target",
        "float",
        "simulated",
        "file",
        "same top-1",
        "SQNR, dB",
        "integer",
        "of float's size",
    )
    for column in columns:
        table.add_column(column, justify="left" if column in ("network", "target") else "right")
    data = fashion.load()
    for name in options.networks:
        for target in options.targets:
            if target == "openvino" and find_spec("openvino") is None:
                print("openvino is not installed: its rows are left out")
                continue
            table.add_row(name, target, *row(name, target, data))
    Console(width=150).print(table)


def row(name: str, target: str, data: fashion.Fashion) -> list[str]:
    """The figures of one network on one target."""
    with tempfile.TemporaryDirectory() as directory:
        outcome = hs.quantize(
            fashion.trained(name, data),
            data.train_images[:4],
            calibration=data.calibration(512),
            metric=hs.Accuracy(data.test()),
            max_drop=0.003,
            target=target,
            directory=directory,
        )
        captured = outcome.model.captured
        deployed = DeployedModel(f"{directory}/model.onnx", captured.in_spec, captured.out_spec)
        parity = compare(outcome.model, deployed, [images for images, _ in data.test()])
    proof = outcome.verification
    return [
        f"{outcome.float_score:.2%}",
        f"{outcome.score:.2%}",
        f"{outcome.deployed_score:.2%}",
        f"{parity.top1:.2%}",
        f"{parity.sqnr:.1f}",
        f"{proof.integer_layers} of {len(proof.layers)}",
        f"{proof.size / proof.float_size:.2f}",
    ]


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
