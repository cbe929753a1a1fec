"""Quantizers in the user's own graph: what is not quantized stays, and the file answers as simulated."""

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from torch import nn

import halfstep as hs
from bench.networks.mobilenet import SmallMobileNet
from bench.networks.resnet import SmallResNet, randomize_batch_norm
from bench.networks.sequence import TwoTowers
from bench.networks.vit import SmallViT
from halfstep.runtime.deployed import DeployedModel
from tests.onnx_in.files import export, write


def calibrated(path, x, recipe=None, target="onnxruntime", **chosen):
    q = hs.prepare(path, x, recipe, target)
    for name, layers in chosen.items():
        setattr(q, name, layers)
    hs.observe(q, [x])
    hs.calibrate(q, hs.Max())
    return q


def kept(before, after):
    """The nodes that are as they were, but for what they read."""

    def known(node):
        return (node.op_type, node.domain, *sorted(a.SerializeToString() for a in node.attribute))

    theirs = {node.name: known(node) for node in after.node}
    return [node.name for node in before.node if theirs.get(node.name) == known(node)]


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    torch.manual_seed(0)
    model = SmallViT(width=24, depth=1).eval()
    for norm in (m for m in model.modules() if isinstance(m, nn.LayerNorm)):
        nn.init.uniform_(norm.weight)  # equal ones are stored once
    path = export(model, torch.randn(2, 1, 28, 28), tmp_path_factory.mktemp("vit") / "model.onnx")
    labelled = onnx.load(path)
    helper.set_model_props(labelled, {"names": "{0: 'shirt'}", "stride": "32"})
    onnx.save(labelled, path)
    return path


def test_names_axes_metadata_and_version_stay(vit, tmp_path):
    x = torch.randn(4, 1, 28, 28)
    before = onnx.load(vit)
    after = onnx.load(hs.export_onnx(calibrated(vit, x), tmp_path / "q.onnx"))
    assert [v.SerializeToString() for v in after.graph.input] == [
        v.SerializeToString() for v in before.graph.input
    ]
    assert [v.name for v in after.graph.output] == [v.name for v in before.graph.output]
    versions = {e.domain: e.version for e in after.opset_import}
    assert versions.items() >= {e.domain: e.version for e in before.opset_import}.items()
    properties = {entry.key: entry.value for entry in after.metadata_props}
    assert properties["names"] == "{0: 'shirt'}" and properties["halfstep.target"] == "onnxruntime"
    assert after.producer_name == before.producer_name
    assert kept(before.graph, after.graph) == [node.name for node in before.graph.node]
    new = {node.name for node in after.graph.node} - {node.name for node in before.graph.node}
    assert {node.op_type for node in after.graph.node if node.name in new} <= {
        "QuantizeLinear",
        "DequantizeLinear",
    }


def test_tensors_that_are_not_quantized_stay(vit, tmp_path):
    before = {t.name: t for t in onnx.load(vit).graph.initializer}
    q = calibrated(vit, torch.randn(4, 1, 28, 28), float_layers=["node_conv2d"])
    after = {t.name: t for t in onnx.load(hs.export_onnx(q, tmp_path / "q.onnx")).graph.initializer}
    same = [name for name, t in after.items() if name in before and t.raw_data == before[name].raw_data]
    assert {"patch.weight", "token", "position", "norm.weight"} <= set(same)


@pytest.mark.parametrize(
    "recipe",
    [
        hs.Recipe.uniform(4, 8),
        pytest.param(hs.Recipe.uniform(3, 8), marks=pytest.mark.slow),
        hs.Recipe.weight_only(4, group=16),
        pytest.param(hs.Recipe.dynamic(), marks=pytest.mark.slow),
        hs.Recipe.dynamic(group=16),
        hs.Recipe.codebook(4),
    ],
    ids=["W4A8", "W3A8", "weights alone", "dynamic", "dynamic groups", "codebook"],
)
def test_every_recipe(vit, recipe, tmp_path):
    x = torch.randn(4, 1, 28, 28)
    path = hs.export_onnx(calibrated(vit, x, recipe), tmp_path / "q.onnx")  # which holds it to the simulation
    assert DeployedModel(path)(x[:3]).shape == (3, 10)
    assert set(kept(onnx.load(vit).graph, onnx.load(path).graph)) >= {"node_layer_norm", "node_cat"}


@pytest.mark.parametrize("target", ["openvino", "tensorrt"])
def test_other_targets(vit, target, tmp_path):
    if target == "openvino":
        pytest.importorskip("openvino")
    x = torch.randn(4, 1, 28, 28)
    hs.export_onnx(calibrated(vit, x, hs.Recipe.uniform(7, 8), target), tmp_path / "q.onnx")


@pytest.mark.parametrize(
    "build",
    [pytest.param(SmallMobileNet, marks=pytest.mark.slow), lambda: SmallResNet(width=4)],
    ids=["mobilenet", "resnet"],
)
def test_every_layer_becomes_integer_as_from_the_module(build, tmp_path):
    torch.manual_seed(0)
    model, x = randomize_batch_norm(build()).eval(), torch.randn(4, 1, 28, 28)
    q = calibrated(export(model, x, tmp_path / "m.onnx"), x)
    proof = hs.verify(hs.export_onnx(q, tmp_path / "q.onnx"), q, [x], rounds=3)
    assert proof.integer_layers == len(q.layers) and proof.float_operators == ()
    assert set(q.layer_names) <= set(proof.microseconds)


def test_batch_norms_of_the_file_go_into_the_weights(tmp_path):
    make, rng = helper.make_node, np.random.default_rng(0)
    nodes = [
        make("Conv", ["x", "w"], ["c"], name="conv", pads=[0, 1, 2, 1]),
        make("BatchNormalization", ["c", "g", "b", "m", "v"], ["n"], name="norm"),
        make("Relu", ["n"], ["r"], name="relu"),
        make("Identity", ["r"], ["i"], name="same"),
        make("ReduceMean", ["i"], ["p"], name="pool", axes=[2, 3], keepdims=0),
        make("Gemm", ["p", "f", "fb"], ["y"], name="fc", transB=1),
    ]
    stored = {name: rng.uniform(0.5, 1.5, 4).astype(np.float32) for name in "gbmv"}
    stored |= {"w": rng.normal(size=(4, 2, 3, 3)), "f": rng.normal(size=(5, 4)), "fb": rng.normal(size=5)}
    stored = {name: value.astype(np.float32) for name, value in stored.items()}
    path = write(tmp_path / "m.onnx", nodes, {"x": ["n", 2, 6, 6]}, {"y": ["n", 5]}, stored, opset=13)
    x = torch.randn(4, 2, 6, 6)
    q = calibrated(path, x)
    out = hs.export_onnx(q, tmp_path / "q.onnx")
    model = onnx.load(out)
    assert {e.version for e in model.opset_import if not e.domain} == {13}
    assert {"conv", "fc"} <= {node.name for node in model.graph.node} and "norm" not in str(model.graph.node)
    proof = hs.verify(out, q, [x], rounds=3)
    assert proof.integer_layers == 2 and proof.float_operators == ()
    hs.export_float(q, tmp_path / "float.onnx")


def test_what_asks_for_a_shape_keeps_no_layer_from_its_integer_kernel(tmp_path):
    """As torch's older exporter writes x.flatten(2) with a dynamic batch: it asks the conv, or what is behind it."""
    make, rng = helper.make_node, np.random.default_rng(0)
    nodes = [
        make("Conv", ["x", "w"], ["c"], name="/first/Conv"),
        make("Shape", ["c"], ["size"], name="/Shape"),
        make("Relu", ["c"], ["r"], name="/Relu"),
        make("Conv", ["r", "v"], ["d"], name="/second/Conv"),
        make("Shape", ["d"], ["end"], name="/Shape_1"),
        make("Slice", ["size", "zero", "two"], ["lead"], name="/Slice"),
        make("Slice", ["end", "two", "four"], ["rest"], name="/Slice_1"),
        make("Concat", ["lead", "rest"], ["all"], name="/Concat", axis=0),
        make("Reshape", ["d", "all"], ["f"], name="/Reshape"),
        make("Conv", ["f", "w"], ["y"], name="/third/Conv"),
    ]
    stored = {name: rng.normal(size=(2, 2, 1, 1)).astype(np.float32) for name in "wv"}
    stored |= {"zero": np.array([0]), "two": np.array([2]), "four": np.array([4])}
    path = write(tmp_path / "m.onnx", nodes, {"x": ["n", 2, 6, 6]}, {"y": None}, stored)
    x = torch.randn(4, 2, 6, 6)
    q = calibrated(path, x)
    out = hs.export_onnx(q, tmp_path / "q.onnx")
    assert hs.verify(out, q, [x], rounds=3).integer_layers == 3
    names = {node.name for node in nodes} - {"/Relu"}  # which codes from 0 imply
    assert set(kept(onnx.load(path).graph, onnx.load(out).graph)) == names


def test_the_version_is_raised_where_codes_of_few_bits_need_it(tmp_path):
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], name="fc")]
    stored = {"w": np.random.default_rng(0).normal(size=(64, 256)).astype(np.float32)}
    path = write(tmp_path / "m.onnx", nodes, {"x": ["n", 64]}, {"y": ["n", 256]}, stored, opset=17)
    out = hs.export_onnx(
        calibrated(path, torch.randn(4, 64), hs.Recipe.uniform(4, 8, ends=None)), tmp_path / "q.onnx"
    )
    assert [e.version for e in onnx.load(out).opset_import if not e.domain] == [21]


def test_trained_weights_are_written(vit, tmp_path):
    x = torch.randn(16, 1, 28, 28)
    q = calibrated(vit, x)
    hs.train(q, hs.Training([(x, torch.arange(16) % 10)], nn.functional.cross_entropy, learning_rate=1e-2))
    out = hs.export_onnx(q, tmp_path / "q.onnx")
    after = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(out).graph.initializer}
    before = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(vit).graph.initializer}
    assert not np.array_equal(after["norm.weight"], before["norm.weight"])
    hs.export_float(q, tmp_path / "float.onnx")  # held to the float network


def test_several_inputs_in_another_order_and_outputs_by_name(tmp_path):
    torch.manual_seed(0)
    image, vector = torch.randn(4, 3, 32, 32), torch.randn(4, 12)
    path = export(TwoTowers(), (image, vector), tmp_path / "m.onnx")
    names = [v.name for v in onnx.load(path).graph.input]
    turned = dict(zip(names[::-1], (vector, image), strict=True))
    q = calibrated(path, turned)
    out = hs.export_onnx(q, tmp_path / "q.onnx")
    assert sorted(v.name for v in onnx.load(out).graph.output) == sorted(q(**turned))


def test_recurrent_layers_stay_whole(tmp_path):
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], name="turn", perm=[1, 0, 2]),
        helper.make_node("GRU", ["t", "w", "r"], ["s", "h"], name="gru", hidden_size=6),
        helper.make_node("Squeeze", ["h", "zero"], ["state"], name="last"),
        helper.make_node("MatMul", ["state", "f"], ["y"], name="fc"),
    ]
    stored = {
        "w": rng.normal(size=(1, 18, 4)),
        "r": rng.normal(size=(1, 18, 6)),
        "f": rng.normal(size=(6, 3)),
    }
    stored = {name: value.astype(np.float32) for name, value in stored.items()} | {"zero": np.array([0])}
    path = write(tmp_path / "m.onnx", nodes, {"x": ["n", 5, 4]}, {"y": ["n", 3]}, stored)
    q = calibrated(path, torch.randn(4, 5, 4))
    assert q.layer_names == ["fc"]
    assert ("gru", "gru") in [(op.name, op.operator.kind) for op in q.placement.float_operators]
    hs.train(q, hs.Training([(torch.randn(8, 5, 4), torch.zeros(8).long())], nn.functional.cross_entropy))
    out = hs.export_onnx(q, tmp_path / "q.onnx")
    trained = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(out).graph.initializer}
    assert not np.array_equal(trained["w"], stored["w"])
    assert "gru" in kept(onnx.load(path).graph, onnx.load(out).graph)


ALIKE = {
    "Tanh": {},
    "Sigmoid": {},
    "Transpose": {"perm": [0, 1, 3, 2]},
    "MaxPool": {"kernel_shape": [2, 2]},
    "Slice": {},
    "Conv": {},
}


@pytest.mark.parametrize("kind", list(ALIKE))
def test_what_two_nodes_compute_alike_is_quantized_for_both(tmp_path, kind):
    rng = np.random.default_rng(0)
    stored = {name: rng.normal(size=(4, 4, 1, 1)).astype(np.float32) for name in ("w", "u", "v", "same")}
    stored |= {"from": np.array([0]), "to": np.array([2]), "axis": np.array([2])}
    more = {"Slice": ["from", "to", "axis"], "Conv": ["same"]}.get(kind, [])
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="first"),
        helper.make_node("Relu", ["c"], ["r"], name="relu"),
        *(helper.make_node(kind, ["r", *more], [name], name=name, **ALIKE[kind]) for name in ("p", "q")),
        helper.make_node("Conv", ["p", "u"], ["pu"], name="left"),
        helper.make_node("Conv", ["q", "v"], ["qv"], name="right"),
        helper.make_node("Add", ["pu", "qv"], ["y"], name="add"),
    ]
    path = write(tmp_path / "m.onnx", nodes, {"x": ["n", 4, 6, 6]}, {"y": ["n", 4, "h", "w"]}, stored)
    x = torch.randn(4, 4, 6, 6, generator=torch.Generator().manual_seed(0))
    q = hs.prepare(path, x)
    hs.observe(q, [x])
    hs.calibrate(q, hs.Max())
    proof = hs.verify(hs.export_onnx(q, tmp_path / "q.onnx"), q, [x], rounds=3)
    assert proof.integer_layers == len(proof.layers) >= 3


def test_halves_that_are_cut_from_one_tensor(tmp_path):
    """As older exporters write what later YOLOs do: two nodes that cut along channels, all of the batch."""
    rng = np.random.default_rng(0)
    sizes = {"w": (8, 3, 3, 3), "u": (4, 4, 3, 3), "v": (4, 12, 1, 1)}
    stored = {name: rng.normal(size=size).astype(np.float32) for name, size in sizes.items()}
    stored |= {"zero": np.array([0]), "four": np.array([4]), "eight": np.array([8]), "axis": np.array([1])}
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="enter"),
        helper.make_node("Sigmoid", ["c"], ["s"], name="gate"),
        helper.make_node("Mul", ["c", "s"], ["m"], name="silu"),
        helper.make_node("Slice", ["m", "zero", "four", "axis"], ["a"], name="a"),
        helper.make_node("Slice", ["m", "four", "eight", "axis"], ["b"], name="b"),
        helper.make_node("Conv", ["b", "u"], ["d"], name="inner", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["b", "d"], ["e"], name="skip"),
        helper.make_node("Concat", ["a", "b", "e"], ["all"], name="all", axis=1),
        helper.make_node("Conv", ["all", "v"], ["y"], name="leave"),
    ]
    path = write(tmp_path / "m.onnx", nodes, {"x": ["n", 3, 8, 8]}, {"y": ["n", 4, 6, 6]}, stored)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    q = hs.prepare(path, x)
    hs.observe(q, [x])
    hs.calibrate(q, hs.Max())
    proof = hs.verify(hs.export_onnx(q, tmp_path / "q.onnx"), q, [x], rounds=3)
    assert proof.integer_layers == len(proof.layers) == 3


def unnamed(path, **options):
    """A file whose nodes have no names, but for one that is called as the output of another one."""
    make = helper.make_node
    nodes = [
        make("Conv", ["x", "w", "b"], ["c"], pads=[1, 1, 1, 1]),
        make("Relu", ["c"], ["r"]),
        make("GlobalAveragePool", ["r"], ["p"], name="c"),
        make("Flatten", ["p"], ["f"]),
        make("Gemm", ["f", "fw", "fb"], ["y"], transB=1),
    ]
    shapes = {"w": (8, 3, 3, 3), "b": (8,), "fw": (5, 8), "fb": (1, 5)}
    stored = {name: np.random.default_rng(0).normal(size=s).astype(np.float32) for name, s in shapes.items()}
    return write(path, nodes, {"x": ["n", 3, 8, 8]}, {"y": ["n", 5]}, stored, **options)


def test_layers_of_nodes_without_names_are_known_by_what_they_make(tmp_path):
    """Kernels have their names, and are known by them. The last one's bias is a matrix of one row."""
    x = torch.randn(4, 3, 8, 8)
    q = calibrated(unnamed(tmp_path / "m.onnx"), x)
    file = hs.export_onnx(q, tmp_path / "q.onnx")
    fates = {layer.name: layer.integer for layer in hs.verify(file, q, [x]).layers}
    assert fates == {"c:2": True, "y": True}
    assert {"c", "c:2", "y"} <= {node.name for node in onnx.load(file).graph.node}


def test_stored_tensors_that_are_inputs_too_are_inputs_no_longer(tmp_path):
    """Formats before 4 ask for that; a caller could not replace what is stored in codes."""
    model = onnx.load(unnamed(tmp_path / "m.onnx", opset=13))
    model.ir_version = 3
    for tensor in model.graph.initializer:
        declared = helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        model.graph.input.append(declared)
    onnx.save(model, tmp_path / "m.onnx")
    x = torch.randn(4, 3, 8, 8)
    q = calibrated(tmp_path / "m.onnx", x)
    for write_file in (hs.export_onnx, hs.export_float):
        graph = onnx.load(write_file(q, tmp_path / "new.onnx")).graph
        assert [value.name for value in graph.input] == ["x"]


@pytest.mark.parametrize(("name", "known"), [(None, "batch"), ("n", "n")])
def test_sizes_that_vary_have_plain_names(name, known, tmp_path):
    """Those that the file's inputs have, or else one that says what it is."""
    stored = {"w": np.ones((4, 6), np.float32), "v": np.ones((6, 3), np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("MatMul", ["h", "v"], ["y"])]
    path = write(tmp_path / "m.onnx", nodes, {"x": [name, 4]}, {"y": None}, stored)
    out = onnx.load(hs.export_onnx(calibrated(path, torch.randn(8, 4)), tmp_path / "q.onnx"))
    sizes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*out.graph.output, *out.graph.value_info)
    }
    assert sizes["y"] == [known, 3]
    assert {size for shape in sizes.values() for size in shape if isinstance(size, str)} == {known}
