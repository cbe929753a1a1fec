"""ONNX Runtime's fused operators: each is held to the runtime itself by the gate."""

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

import halfstep as hs
from bench.networks.vit import SmallViT
from halfstep.onnx_in.table import MICROSOFT, TABLE
from tests.onnx_in.files import export, write

INT32 = TensorProto.INT32
GENERATOR = np.random.default_rng(0)


def floats(*shape):
    return GENERATOR.normal(size=shape).astype(np.float32)


#: Operator: attributes, shapes of its inputs, what is stored, and how many outputs there are.
CASES = {
    "Gelu": ({}, {"x": [2, 6]}, {}, 1),
    "FastGelu": ({}, {"x": [2, 6]}, {"b": floats(6)}, 1),
    "BiasGelu": ({}, {"x": [2, 6]}, {"b": floats(6)}, 1),
    "QuickGelu": ({"alpha": 1.7}, {"x": [2, 6]}, {}, 1),
    "FusedMatMul": ({"transB": 1, "alpha": 0.5}, {"x": [2, 3, 6], "z": [2, 5, 6]}, {}, 1),
    "FusedConv": (
        {"activation": "LeakyRelu", "activation_params": [0.3], "pads": [1, 1, 1, 1]},
        {"x": [2, 3, 5, 5]},
        {"w": floats(4, 3, 3, 3), "b": floats(4)},
        1,
    ),
    "FusedGemm": (
        {"activation": "Relu", "transB": 1},
        {"x": [2, 6]},
        {"w": floats(4, 6), "b": floats(4)},
        1,
    ),
    "SkipLayerNormalization": (
        {"epsilon": 1e-5},
        {"x": [2, 3, 6], "z": [2, 3, 6]},
        {"g": floats(6), "s": floats(6), "b": floats(6)},
        1,
    ),
    "SkipSimplifiedLayerNormalization": (
        {"epsilon": 1e-5},
        {"x": [2, 3, 6], "z": [2, 3, 6]},
        {"g": floats(6)},
        1,
    ),
    "Attention": (
        {"num_heads": 2},
        {"x": [2, 5, 8]},
        {"w": floats(8, 24), "b": floats(24)},
        1,
    ),
    "MultiHeadAttention": (
        {"num_heads": 2},
        {"q": [2, 5, 8], "k": [2, 7, 8], "v": [2, 7, 8]},
        {"b": floats(24)},
        1,
    ),
    "EmbedLayerNormalization": (
        {"epsilon": 1e-5},
        {"ids": (INT32, [2, 5]), "kinds": (INT32, [2, 5])},
        {
            "words": floats(9, 8),
            "places": floats(5, 8),
            "segments": floats(2, 8),
            "g": floats(8),
            "s": floats(8),
        },
        2,
    ),
    "RotaryEmbedding": (
        {},
        {"x": [2, 2, 5, 8], "at": (TensorProto.INT64, [2, 5])},
        {"cosines": np.cos(floats(5, 4)), "sines": np.sin(floats(5, 4))},
        1,
    ),
}


def test_every_operator_has_a_case():
    assert set(CASES) == {name for domain, name in TABLE if domain == MICROSOFT}


@pytest.mark.parametrize("name", CASES)
def test_it_computes_what_the_runtime_does(name, tmp_path):
    attributes, inputs, stored, outputs = CASES[name]
    names = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(name, [*inputs, *stored], names, domain=MICROSOFT, **attributes)
    types = {n: (INT32, None) if n == "y1" else None for n in names}
    path = write(tmp_path / "m.onnx", [node], inputs, types, stored, domains=(MICROSOFT,))
    assert hs.from_onnx(path).nodes[0].op_type == name


def test_a_file_that_the_runtime_has_optimised(tmp_path):
    torch.manual_seed(0)
    model = SmallViT(width=24, depth=1).eval()
    x = torch.randn(2, 1, 28, 28)
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    onnxruntime.InferenceSession(
        str(export(model, x, tmp_path / "m.onnx")), options, providers=["CPUExecutionProvider"]
    )
    network = hs.from_onnx(tmp_path / "fused.onnx")
    assert any(node.domain == MICROSOFT for node in network.source.nodes)
    with torch.no_grad():
        assert torch.allclose(network(x), model(x), atol=1e-5)
