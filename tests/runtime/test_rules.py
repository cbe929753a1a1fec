"""TensorRT's rules: every one is broken by a file made for it, and kept by our own export."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn import functional as F

import halfstep as hs
from halfstep.errors import ExportError
from halfstep.runtime import tensorrt
from halfstep.runtime.rules import lint

INT8 = np.zeros((), np.int8)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.up, self.fc = nn.ConvTranspose2d(8, 8, 2, 2), nn.Linear(8, 4)

    def forward(self, x):
        x = F.relu(self.a(x))
        x = F.relu(self.b(x) + x)
        return self.fc(self.up(x).mean((2, 3)))


def calibrated(target, recipe=None):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 8, 8)
    q = hs.prepare(Net().eval(), x, target=target, recipe=recipe)
    hs.observe(q, [x])
    hs.calibrate(q)
    return q


def broken(path):
    return {finding.rule.name: finding for finding in lint(path, tensorrt.RULES)}


def test_our_file_keeps_every_rule(tmp_path):
    assert broken(hs.export_onnx(calibrated("tensorrt"), tmp_path / "model.onnx")) == {}


def test_a_file_for_onnxruntime_is_refused_in_clear_words(tmp_path):
    found = broken(hs.export_onnx(calibrated("onnxruntime"), tmp_path / "model.onnx"))
    assert set(found) == {"zero points", "code types", "biases", "residual adds"}
    assert found["biases"].places == (
        "a/Conv/bias_quantized",
        "b/Conv/bias_quantized",
        "fc/Gemm/bias_quantized",
    )
    assert str(found["residual adds"]) == (
        "slower, residual adds, 1 place (add/Add): a conv takes the add after it in only if its own result reaches the "
        "add unquantized; quantize the other branch (the skip) only"
    )
    assert str(found["biases"]).startswith("refused, biases, 3 places (a/Conv/bias_quantized, ")


def test_what_it_would_refuse_is_not_written(tmp_path):
    q = calibrated("tensorrt", hs.Recipe.uniform(8, 16))
    with pytest.raises(ExportError, match=r"tensorrt would refuse the file: refused, code types, .*: int16"):
        hs.export_onnx(q, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def conv(path, opset=21, *, weight_axis=0, x_scale=1.0, op="Conv", extra=(), domain="", **tensors):
    """x -> Q -> DQ -> Conv with a weight behind a DequantizeLinear: kept rules, but for what is asked."""
    arrays = {
        "x_scale": np.asarray(x_scale, np.float32),
        "x_zero": np.zeros(np.shape(x_scale), np.int8),
        "w": np.ones((4, 4, 1, 1), np.int8),
        "w_scale": np.ones(4, np.float32),
        "w_zero": np.zeros(4, np.int8),
        **tensors,
    }
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "x_scale", "x_zero"], ["xd"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["wd"], axis=weight_axis),
        helper.make_node(op, ["xd", "wd"], ["y"], name="layer", domain=domain),
        *extra,
    ]
    shape = ["n", 4, 2, 2]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items() if array is not None],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)]), path)
    return path


def int4(block):
    node = helper.make_node("DequantizeLinear", ["w4", "w4_scale"], ["w4d"], axis=0, block_size=block)
    codes = helper.make_tensor("w4", TensorProto.INT4, [256, 2], np.zeros(512, np.int8))
    return node, codes


BREACHES = {
    "scales": [{"x_scale": 0.0}, {"x_scale": np.nan}],
    "activations per tensor": [{"x_scale": np.ones(4)}],
    "axis of weights": [{"weight_axis": 1}, {"op": "ConvTranspose", "weight_axis": 0}],
    "operators": [{"op": "ConvInteger"}, {"domain": "com.microsoft"}],
    "opset": [{"opset": 11}],
    "zero points": [{"w_zero": np.ones(4, np.int8)}],
    "code types": [{"w": np.ones((4, 4, 1, 1), np.uint8), "w_zero": np.zeros(4, np.uint8)}],
}


def test_the_file_that_the_others_vary_keeps_every_rule(tmp_path):
    assert broken(conv(tmp_path / "m.onnx")) == {}
    assert broken(conv(tmp_path / "m.onnx", op="ConvTranspose", weight_axis=1)) == {}


@pytest.mark.parametrize("name", BREACHES)
def test_a_breach_is_found(name, tmp_path):
    for options in BREACHES[name]:
        assert set(broken(conv(tmp_path / "m.onnx", **options))) == {name}, options


@pytest.mark.parametrize(("block", "names"), [(128, set()), (64, set()), (32, {"four bits"})])
def test_int4_blocks(block, names, tmp_path):
    node, codes = int4(block)
    path = conv(tmp_path / "m.onnx", extra=[node], w4_scale=np.ones((256 // block, 2), np.float32))
    model = onnx.load(path)
    model.graph.initializer.append(codes)
    onnx.save(model, path)
    assert set(broken(path)) == names
