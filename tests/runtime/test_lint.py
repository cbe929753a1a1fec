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
from halfstep.export import build
from halfstep.runtime import lint as tensorrt
from halfstep.runtime.file import read_sites
from halfstep.runtime.lint import lint

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


def conv(path, opset=21, *, weight_axis=0, x_scale=1.0, op="Conv", before=(), extra=(), domain="", **tensors):
    """x -> Q -> DQ -> Conv with a weight behind a DequantizeLinear: kept rules, but for what is asked."""
    arrays = {
        "x_scale": None if x_scale is None else np.asarray(x_scale, np.float32),
        "x_zero": np.zeros(np.shape(x_scale) if x_scale is not None else (), np.int8),
        "w": np.ones((4, 4, 1, 1), np.int8),
        "w_scale": np.ones(4, np.float32),
        "w_zero": np.zeros(4, np.int8),
        **tensors,
    }
    nodes = [
        *before,
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


def multiplied(path, op, scale_axis, operand=1, transposed=False, **attributes):
    """A weight of (4, 4) with a scale for each entry of an axis, through a Transpose or not, into a product."""
    nodes = [helper.make_node("DequantizeLinear", ["w", "w_scale"], ["wd"], axis=scale_axis)]
    factors = ["x", "wd"] if operand == 1 else ["wd", "x"]
    if transposed:
        nodes.append(helper.make_node("Transpose", ["wd"], ["wt"], perm=[1, 0]))
        factors = [name.replace("wd", "wt") for name in factors]
    nodes.append(helper.make_node(op, factors, ["y"], **attributes))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 4]) for name in "xy"]
    tensors = {"w": np.ones((4, 4), np.int8), "w_scale": np.ones(4, np.float32)}
    stored = [numpy_helper.from_array(array, name) for name, array in tensors.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), path)
    return path


@pytest.mark.parametrize(
    ("outputs", "options"),
    [
        (1, {"op": "MatMul"}),
        (0, {"op": "MatMul", "operand": 0}),
        (1, {"op": "Gemm"}),
        (0, {"op": "Gemm", "transB": 1}),
        (1, {"op": "Gemm", "operand": 0, "transA": 1}),
        (0, {"op": "MatMul", "transposed": True}),
        (1, {"op": "Gemm", "transposed": True, "transB": 1}),
    ],
)
def test_scales_of_matrices_lie_along_the_outputs(outputs, options, tmp_path):
    for axis in (outputs, outputs - 2):
        assert broken(multiplied(tmp_path / "m.onnx", scale_axis=axis, **options)) == {}
    assert set(broken(multiplied(tmp_path / "m.onnx", scale_axis=1 - outputs, **options))) == {
        "axis of weights"
    }


@pytest.mark.parametrize(("number", "names"), [(0.5, set()), (0.0, {"scales"})])
def test_scales_in_constant_nodes_are_stored_however_they_are_written(number, names, tmp_path):
    ways = {"value_float": number, "value": numpy_helper.from_array(np.float32(number))}
    for way, value in ways.items():
        scale = helper.make_node("Constant", [], ["x_scale"], **{way: value})
        path = conv(tmp_path / "m.onnx", before=[scale], x_scale=None)
        assert set(broken(path)) == names
    many = helper.make_node("Constant", [], ["w_scale"], value_floats=[number] * 4)
    assert set(broken(conv(tmp_path / "m.onnx", before=[many], w_scale=None))) == names


def test_what_is_not_stored_is_told(tmp_path):
    scale = helper.make_node("ReduceMax", ["x"], ["x_scale"], keepdims=0)
    assert broken(conv(tmp_path / "m.onnx", before=[scale], x_scale=None))["scales"].places == ("x_scale",)


def test_bodies_of_branches_are_looked_at(tmp_path):
    path = conv(tmp_path / "m.onnx")
    model = onnx.load(path)
    bodies = {}
    for branch, scale in (("then_branch", 1.0), ("else_branch", 0.0)):
        names = [f"{branch}_{end}" for end in ("scale", "codes", "out")]
        nodes = [
            helper.make_node("QuantizeLinear", ["x", names[0], "x_zero"], [names[1]]),
            helper.make_node("DequantizeLinear", [names[1], names[0], "x_zero"], [names[2]]),
        ]
        out = helper.make_tensor_value_info(names[2], TensorProto.FLOAT, ["n", 4, 2, 2])
        stored = [numpy_helper.from_array(np.float32(scale), names[0])]
        bodies[branch] = helper.make_graph(nodes, branch, [], [out], stored)
    model.graph.node.append(helper.make_node("If", ["flag"], ["chosen"], **bodies))
    model.graph.input.append(helper.make_tensor_value_info("flag", TensorProto.BOOL, []))
    onnx.save(model, path)
    assert broken(path)["scales"].places == ("else_branch_scale",)
    assert {site.tensor for site in read_sites(path)[0]} == {"x", "w"}


def test_values_beside_the_file_are_read_there(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "LARGEST_MESSAGE", 0)
    path = hs.export_onnx(calibrated("tensorrt"), tmp_path / "large.onnx")  # holds it to the rules too
    model = onnx.load(path, load_external_data=False)
    onnx.external_data_helper.load_external_data_for_model(model, str(tmp_path))
    onnx.save(model, path, save_as_external_data=True, location="all.data", size_threshold=0)
    assert broken(path) == {}
    assert all(0 < site.high < 100 for site in read_sites(path)[0])
    (tmp_path / "all.data").unlink()
    with pytest.raises(
        ExportError, match=r"tensor '.*': its values cannot be read from beside the file: .*copy"
    ):
        broken(path)


def test_layers_of_nodes_without_names_are_known_by_what_they_make(tmp_path):
    model = onnx.load(hs.export_onnx(calibrated("onnxruntime"), tmp_path / "m.onnx"))
    named = {site.tensor: site.layer for site in read_sites(tmp_path / "m.onnx")[0]}
    made = {node.name: node.output[0] for node in model.graph.node}
    for node in model.graph.node:
        node.name = ""
    onnx.save(model, tmp_path / "unnamed.onnx")
    found = {site.tensor: site.layer for site in read_sites(tmp_path / "unnamed.onnx")[0]}
    assert found == {tensor: made.get(layer, "output") for tensor, layer in named.items()}
    assert all(found.values())


def test_codes_of_8_bit_floats_are_read(tmp_path):
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], name="Q"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"], name="D"),
    ]
    stored = [numpy_helper.from_array(np.float32(0.5), "s")]
    stored.append(helper.make_tensor("z", TensorProto.FLOAT8E4M3FN, [], [0.0]))
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    path = tmp_path / "fp8.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]), path)
    (site,), _ = read_sites(path)
    assert site.layer == "output"
    assert (site.format, site.low, site.high) == ("float8e4m3fn", -224.0, 224.0)
    assert broken(path) == {}


def test_the_type_of_codes_may_be_an_attribute(tmp_path):
    path = conv(tmp_path / "m.onnx")
    model = onnx.load(path)
    for node in model.graph.node[:2]:
        del node.input[2]
    model.graph.node[0].attribute.append(helper.make_attribute("output_dtype", TensorProto.INT8))
    onnx.save(model, path)
    assert broken(path) == {}
