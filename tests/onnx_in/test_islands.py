"""Nodes that the table lacks: run by ONNX Runtime while simulating, and untouched in the file."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

import halfstep as hs
from halfstep.errors import CaptureError, TrainingError
from halfstep.runtime.deployed import DeployedModel
from tests.onnx_in.files import write

FLOAT = TensorProto.FLOAT
RNG = np.random.default_rng(0)
X = torch.from_numpy(RNG.normal(size=(8, 4)).astype(np.float32))


def floats(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def branching(path):
    """An If whose branches read what a layer before it makes, between two layers."""
    value = helper.make_tensor_value_info("o", FLOAT, ["n", 6])
    branches = {
        f"{name}_branch": helper.make_graph(
            [helper.make_node(op, ["h"], ["o"], name=f"in_{name}")], name, [], [value]
        )
        for name, op in (("then", "Relu"), ("else", "Neg"))
    }
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["h"], name="first"),
        helper.make_node("ReduceMax", ["x"], ["most"], name="most", keepdims=0),
        helper.make_node("Greater", ["most", "zero"], ["some"], name="some"),
        helper.make_node("If", ["some"], ["chosen"], name="choice", **branches),
        helper.make_node("Gemm", ["chosen", "v", "c"], ["y"], name="second"),
    ]
    stored = {"w": floats(4, 6), "b": floats(6), "v": floats(6, 3), "c": floats(3), "zero": np.float32(0)}
    return write(path, nodes, {"x": ["n", 4]}, {"y": ["n", 3]}, stored)


def detecting(path):
    """Boxes and scores of layers, the best of which NonMaxSuppression keeps."""
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["flat"], name="boxes"),
        helper.make_node("Reshape", ["flat", "five"], ["corners"], name="corners"),
        helper.make_node("Gemm", ["x", "v", "c"], ["logits"], name="scores"),
        helper.make_node("Unsqueeze", ["logits", "one"], ["classes"], name="classes"),
        helper.make_node("NonMaxSuppression", ["corners", "classes", "count", "iou"], ["kept"], name="nms"),
    ]
    stored = {
        "w": floats(4, 20),
        "b": floats(20),
        "v": floats(4, 5),
        "c": floats(5),
        "five": np.array([-1, 5, 4]),
        "one": np.array([1]),
        "count": np.array([3]),
        "iou": np.array([0.5], np.float32),
    }
    outputs = {"kept": (TensorProto.INT64, ["k", 3]), "logits": ["n", 5]}
    return write(path, nodes, {"x": ["n", 4]}, outputs, stored)


def looping(path):
    """A Loop that adds to what a layer makes, of a shape that onnx does not infer, before another layer."""
    info = helper.make_tensor_value_info
    body = helper.make_graph(
        [
            helper.make_node("Add", ["s", "one"], ["t"], name="step"),
            helper.make_node("Identity", ["c"], ["d"]),
        ],
        "body",
        [info("i", TensorProto.INT64, []), info("c", TensorProto.BOOL, []), info("s", FLOAT, ["n", 6])],
        [info("d", TensorProto.BOOL, []), info("t", FLOAT, ["n", 6])],
    )
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["h"], name="first"),
        helper.make_node("Loop", ["three", "yes", "h"], ["e"], name="again", body=body),
        helper.make_node("Gemm", ["e", "v"], ["y"], name="second"),
    ]
    stored = {
        "w": floats(4, 6),
        "v": floats(6, 3),
        "three": np.array(3),
        "yes": np.array(True),
        "one": np.float32(1),
    }
    return write(path, nodes, {"x": ["n", 4]}, {"y": ["n", 3]}, stored)


def node_of(path, name):
    return next(node for node in onnx.load(path).graph.node if node.name == name)


def quantized(path, folder):
    q = hs.prepare(path, X)
    hs.observe(q, [X])
    hs.calibrate(q, hs.Max())
    return q, hs.export_onnx(q, folder / "q.onnx")


@pytest.mark.parametrize(
    ("build", "name"),
    [(branching, "choice"), (detecting, "nms"), (looping, "again")],
    ids=["If", "NMS", "Loop"],
)
def test_an_island_is_run_and_stays_to_the_byte(build, name, tmp_path):
    path = build(tmp_path / "m.onnx")
    q, out = quantized(path, tmp_path)
    before, after = node_of(path, name), node_of(out, name)
    assert [a.SerializeToString() for a in after.attribute] == [
        a.SerializeToString() for a in before.attribute
    ]
    assert after.output == before.output
    assert [layer.reason for layer in q.layers] == ["", ""]
    found, wanted = DeployedModel(out)(X[:3]), DeployedModel(path)(X[:3])
    for ours, theirs in zip(
        found if isinstance(found, tuple) else [found],
        wanted if isinstance(wanted, tuple) else [wanted],
        strict=True,
    ):
        assert ours.dtype == theirs.dtype and ours.shape[1:] == theirs.shape[1:]


def test_training_through_an_island_is_refused_with_its_name(tmp_path):
    q, _ = quantized(branching(tmp_path / "m.onnx"), tmp_path)
    training = hs.Training([(X, torch.zeros(8).long())], nn.functional.cross_entropy)
    with pytest.raises(
        TrainingError, match=r"node 'choice' is run by onnxruntime.*'w' before it cannot be trained"
    ):
        hs.train(q, training)


def test_what_lies_behind_an_island_trains(tmp_path):
    network = hs.from_onnx(branching(tmp_path / "m.onnx"))
    for name in ("w", "b"):
        network.get_parameter(name).requires_grad_(False)
    q = hs.prepare(network, X)
    hs.observe(q, [X])
    hs.calibrate(q, hs.Max())
    before = q.weight("v").clone()
    hs.train(q, hs.Training([(X, torch.zeros(8).long())], nn.functional.cross_entropy))
    assert not torch.equal(before, q.weight("v"))


def test_an_island_of_an_unknown_shape_is_refused(tmp_path):
    nodes = [
        helper.make_node("NonZero", ["x"], ["places"], name="find"),
        helper.make_node("SequenceConstruct", ["places"], ["list"], name="list"),
        helper.make_node("SequenceAt", ["list", "zero"], ["y"], name="at"),
    ]
    path = write(tmp_path / "m.onnx", nodes, {"x": ["n", 4]}, {"y": None}, {"zero": np.int64(0)})
    with pytest.raises(
        CaptureError, match=r"node 'list'.*cannot be left to onnxruntime as an island.*'list'"
    ):
        hs.from_onnx(path)


def test_what_cannot_be_told_of_an_island_leaves_no_file(tmp_path, monkeypatch):
    """ONNX Runtime's script writes what it has of a file into the working directory where it does not come through."""
    nodes = [helper.make_node("CDist", ["x", "w"], ["y"], name="far", domain="com.microsoft")]
    stored = {"w": floats(6, 4)}
    path = write(tmp_path / "m.onnx", nodes, {"x": ["n", 4]}, {"y": None}, stored, domains=["com.microsoft"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CaptureError, match=r"node 'far'.*the type or shape of 'y' is not known"):
        hs.from_onnx(path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_quantized_in_part_is_taken(tmp_path):
    """Its quantizers, and what reads them, stay; the layers beside them are quantized."""
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["codes"], name="q"),
        helper.make_node("DequantizeLinear", ["codes", "s", "z"], ["xq"], name="dq"),
        helper.make_node("DequantizeLinear", ["wc", "ws"], ["w"], name="wdq", axis=1),
        helper.make_node("MatMul", ["xq", "w"], ["h"], name="theirs"),
        helper.make_node("MatMul", ["h", "v"], ["y"], name="ours"),
    ]
    stored = {
        "s": np.float32(0.03),
        "z": np.uint8(128),
        "wc": RNG.integers(-64, 64, (4, 6)).astype(np.int8),  # no processor's sums saturate
        "ws": RNG.uniform(0.01, 0.02, 6).astype(np.float32),
        "v": floats(6, 3),
    }
    path = write(tmp_path / "m.onnx", nodes, {"x": ["n", 4]}, {"y": ["n", 3]}, stored)
    q, out = quantized(path, tmp_path)
    assert q.layer_names == ["ours"]
    reasons = {op.name: op.reason for op in q.placement.float_operators}
    assert reasons["theirs"] == "is taken with the quantizers that the file had already"
    for name in ("q", "dq", "wdq", "theirs"):
        before, after = node_of(path, name), node_of(out, name)
        assert (list(after.input), list(after.output)) == (list(before.input), list(before.output))
    wanted = DeployedModel(path)(X)
    assert (DeployedModel(out)(X) - wanted).norm() < 0.05 * wanted.norm()


def test_a_file_that_is_quantized_throughout_is_refused(tmp_path):
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["codes"], name="q"),
        helper.make_node("DequantizeLinear", ["codes", "s", "z"], ["xq"], name="dq"),
        helper.make_node("DequantizeLinear", ["wc", "s"], ["w"], name="wdq"),
        helper.make_node("MatMul", ["xq", "w"], ["y"], name="theirs"),
    ]
    stored = {"s": np.float32(0.03), "z": np.uint8(128), "wc": np.ones((4, 6), np.int8)}
    path = write(tmp_path / "m.onnx", nodes, {"x": ["n", 4]}, {"y": ["n", 6]}, stored)
    with pytest.raises(CaptureError, match="it has no layers that are not quantized already"):
        hs.quantize(path, X, [X], hs.Cosine([X]), progress=False)
