"""ResNet-18 becomes integer throughout, and a quarter of its size."""

import torch

import halfstep as hs
from bench.networks.resnet import ResNet18, randomize_batch_norm
from halfstep.fidelity.compare import compare
from halfstep.runtime.deployed import DeployedModel, inspect_kernels


def test_all_convs_adds_and_the_linear_are_integer(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 64, 64)
    q = hs.prepare(randomize_batch_norm(ResNet18()).eval(), x)
    hs.observe(q, [x])
    hs.calibrate(q)
    path, floating = hs.export_onnx(q, tmp_path / "model.onnx"), hs.export_float(q, tmp_path / "float.onnx")
    kernels = inspect_kernels(path)
    assert {"QLinearConv": 20, "QLinearAdd": 8, "QGemm": 1}.items() <= kernels.counts.items()
    assert kernels.floating == ()
    assert path.stat().st_size <= 0.26 * floating.stat().st_size
    assert compare(q, DeployedModel(path), [x]).sqnr > 30
