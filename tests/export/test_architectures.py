"""Every architecture of the benches, small: what each runtime makes of it, counted on the graph that is executed."""

from dataclasses import dataclass, field

import pytest
import torch

import halfstep as hs
from bench.networks.catalogue import CATALOGUE, build
from bench.networks.vit import SmallViT
from halfstep.fidelity.compare import compare
from halfstep.runtime.deployed import DeployedModel, inspect_kernels


@dataclass(frozen=True)
class Expected:
    """Integer operators of ONNX Runtime's graph, and the layers that multiply in float, on either runtime."""

    counts: dict[str, int]
    floating: tuple[str, ...] = ()
    openvino_floating: tuple[str, ...] = field(default=())


EXPECTED = {
    "resnet18": Expected({"QLinearConv": 20, "QLinearAdd": 8, "QLinearGlobalAveragePool": 1, "QGemm": 1}),
    "small resnet": Expected({"QLinearConv": 9, "QLinearAdd": 3, "QLinearGlobalAveragePool": 1, "QGemm": 1}),
    # 10 of the adds are HardSigmoids
    "mobilenet": Expected(
        {"QLinearConv": 21, "QLinearAdd": 13, "QLinearMul": 10, "QLinearGlobalAveragePool": 3, "QGemm": 1}
    ),
    "efficientnet-like": Expected(
        {
            "QLinearConv": 37,
            "QLinearSigmoid": 23,
            "QLinearMul": 23,
            "QLinearAdd": 4,
            "QLinearGlobalAveragePool": 8,
            "QGemm": 1,
        }
    ),
    "convnext-like": Expected({"QLinearConv": 9, "MatMulIntegerToFloat": 12, "QGemm": 1}),
    "vit": Expected(
        {"QLinearConv": 1, "MatMulIntegerToFloat": 16, "BiasGelu": 4, "QGemm": 1},
        tuple(f"blocks.{i}.attention.attention" for i in range(4)),
    ),
    "small vit": Expected(
        {"QLinearConv": 1, "MatMulIntegerToFloat": 16, "BiasGelu": 4, "QGemm": 1},
        tuple(f"blocks.{i}.attention.attention" for i in range(4)),
    ),
    "swin-like": Expected(
        {"QLinearConv": 1, "MatMulIntegerToFloat": 17, "QGemm": 1},
        tuple(f"stage{s}.{i}.attention.attention" for s in (1, 2) for i in range(2)),
    ),
    "unet": Expected({"QLinearConv": 11, "QLinearConcat": 2, "ConvTranspose": 1}, ("up2",)),
    "bert": Expected(
        {"MatMulIntegerToFloat": 12, "QGemm": 1},
        tuple(f"encoder.layer.{i}.attention.self.attention" for i in range(2)),
        tuple(f"encoder.layer.{i}.attention.self.attention" for i in range(2)),
    ),
    "lstm": Expected({"MatMulIntegerToFloat": 1, "LSTM": 1}, ("lstm:2",), ("RNNSeq",)),
    "gru": Expected({"MatMulIntegerToFloat": 1, "GRU": 1}, ("gru:2",), ("RNNSeq",)),
    "two towers": Expected({"QLinearConv": 2, "QLinearGlobalAveragePool": 1, "QLinearConcat": 1, "QGemm": 3}),
}
QUICK = ("two towers",)
CASES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in EXPECTED]


def test_no_architecture_is_forgotten():
    assert set(EXPECTED) == set(CATALOGUE)


def exported(name, target, folder, recipe=None):
    torch.manual_seed(0)
    batches = [CATALOGUE[name].inputs(4) for _ in range(2)]
    q = hs.prepare(build(name), batches[0], recipe, target)
    hs.observe(q, batches)
    hs.calibrate(q)
    path = hs.export_onnx(q, folder / "model.onnx", check=False)
    deployed = DeployedModel(path, q.captured.in_spec, q.captured.out_spec)
    return q, inspect_kernels(path), compare(q, deployed, batches)


def layers(names):
    return tuple(dict.fromkeys(name.split("/")[0] for name in names))


@pytest.mark.parametrize("name", CASES)
def test_on_onnxruntime(name, tmp_path):
    _, kernels, parity = exported(name, "onnxruntime", tmp_path)
    expected = EXPECTED[name]
    assert expected.counts.items() <= kernels.counts.items(), kernels.counts
    assert layers(kernels.floating) == expected.floating
    assert parity.sqnr > 30


@pytest.mark.parametrize("name", CASES)
def test_on_openvino(name, tmp_path):
    pytest.importorskip("openvino")
    # Processors without VNNI add two products in 16 bits, which weights of 8 bits overflow, and of 7 do not.
    q, kernels, parity = exported(name, "openvino", tmp_path, hs.Recipe.uniform(7, 8))
    assert layers(kernels.floating) == EXPECTED[name].openvino_floating
    assert {layer.name for layer in q.layers if not layer.reason} <= set(layers(kernels.integer))
    # Where OpenVINO takes signed codes as unsigned ones (a Zen 4), a conv behind the U-Net's concat is less exact.
    assert parity.sqnr > 25


def test_a_fallback_says_so(tmp_path):
    q = hs.prepare(build("gru"), CATALOGUE["gru"].inputs(2))
    (reason,) = [op.reason for op in q.placement.float_operators if op.operator.kind == "gru"]
    assert reason == "gru is not in the table of onnxruntime; it runs in float"


def test_attention_is_left_in_float_and_says_so():
    q = hs.prepare(SmallViT(depth=1).eval(), torch.randn(2, 1, 28, 28))
    reasons = {op.operator.kind: op.reason for op in q.placement.float_operators}
    assert "float softmax between them; left in float" in reasons["attention"]
    assert [layer.name for layer in q.layers if layer.reason] == []
