"""Fashion-MNIST, small residual CNN, int8: float, simulated and deployed accuracy on all 10,000 test images.

python -m bench.fashion_int8
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from rich.console import Console
from rich.table import Table

import halfstep as hs
from bench import fashion
from halfstep.runtime.deployed import DeployedModel
from halfstep.runtime.parity import compare


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--network", default="resnet", choices=sorted(fashion.NETWORKS))
    options = parser.parse_args()
    data = fashion.load()
    model = fashion.trained(options.network, data)
    with tempfile.TemporaryDirectory() as directory:
        outcome = hs.quantize(
            model,
            data.train_images[:4],
            calibration=data.calibration(512),
            metric=hs.Accuracy(data.test()),
            max_drop=0.003,
            directory=directory,
        )
        captured = outcome.model.captured
        deployed = DeployedModel(f"{directory}/model.onnx", captured.in_spec, captured.out_spec)
        parity = compare(outcome.model, deployed, [images for images, _ in data.test()])
    table = Table(
        title=f"Fashion-MNIST, {options.network}, W8A8, max calibrator, 512 calibration images, seed 0"
    )
    table.add_column("figure")
    table.add_column("value", justify="right")
    proof = outcome.verification
    parameters = sum(p.numel() for p in model.parameters())
    for row in (
        ("parameters", f"{parameters:,}"),
        ("float accuracy, 10,000 images", f"{outcome.float_score:.2%}"),
        ("simulated", f"{outcome.score:.2%}"),
        ("deployed file", f"{outcome.deployed_score:.2%}"),
        ("same top-1 as the simulation", f"{parity.top1:.2%} of {parity.examples:,}"),
        ("outputs against the simulation's", f"{parity.sqnr:.1f} dB"),
        ("layers on integer kernels", f"{proof.integer_layers} of {len(proof.layers)}"),
        ("size over float", f"{proof.size / proof.float_size:.2f}"),
    ):
        table.add_row(*row)
    Console().print(table)


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
