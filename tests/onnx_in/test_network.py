"""Networks that torch exported, read back: the same network, quantized and trained like any other."""

import numpy as np
import pytest
import torch
from onnx import helper
from torch import nn

import halfstep as hs
from bench.networks.resnet import SmallResNet, randomize_batch_norm
from bench.networks.vit import SmallViT
from halfstep.runtime.deployed import DeployedModel
from tests.onnx_in.files import export, write


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    torch.manual_seed(0)
    model = randomize_batch_norm(SmallResNet(width=4)).eval()
    return model, export(model, torch.randn(2, 1, 28, 28), tmp_path_factory.mktemp("resnet") / "model.onnx")


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    torch.manual_seed(0)
    model = SmallViT(width=24, depth=1).eval()
    return model, export(model, torch.randn(2, 1, 28, 28), tmp_path_factory.mktemp("vit") / "model.onnx")


def same(network, model, x):
    with torch.no_grad():
        assert torch.allclose(network(x), model(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_an_exported_network_answers_and_is_placed_as_its_module(name, request):
    model, path = request.getfixturevalue(name)
    network, x = hs.from_onnx(path), torch.randn(3, 1, 28, 28)
    same(network, model, x)
    ours, theirs = hs.prepare(network, x), hs.prepare(model, x)
    assert [layer.operator.kind == "attention" for layer in ours.layers] == [
        layer.operator.kind == "attention" for layer in theirs.layers
    ]
    assert len(ours.sites) == len(theirs.sites)
    assert sorted(str(s.format) for s in ours.sites.values()) == sorted(
        str(s.format) for s in theirs.sites.values()
    )


def test_layers_are_called_as_nodes_and_parameters_as_tensors(resnet):
    _, path = resnet
    network = hs.from_onnx(path)
    nodes = {node.name for node in network.source.nodes}
    assert {layer.name for layer in hs.prepare(network, torch.randn(2, 1, 28, 28)).layers} <= nodes
    assert {"fc.weight", "fc.bias"} <= set(dict(network.named_parameters()))


@pytest.mark.parametrize("name", ["resnet", pytest.param("vit", marks=pytest.mark.slow)])
def test_a_file_is_quantized_on_the_first_rung(name, request, tmp_path):
    model, path = request.getfixturevalue(name)
    x, others = torch.randn(64, 1, 28, 28), torch.randn(64, 1, 28, 28)
    with torch.no_grad():
        labelled = [(part, model(part).argmax(1)) for part in others.split(32)]
    outcome = hs.quantize(
        hs.from_onnx(path),
        x[:2],
        calibration=list(x.split(32)),
        metric=hs.Accuracy(labelled),
        max_drop=0.2,
        rungs=("ptq",),
        directory=tmp_path,
        progress=False,
    )
    assert outcome.met and outcome.verification.parity.sqnr > 40
    assert DeployedModel(tmp_path / "model.onnx")(x[:5]).shape == (5, 10)


def test_it_is_observed_repaired_ranked_and_trained(resnet):
    _, path = resnet
    x = torch.randn(32, 1, 28, 28)
    network = hs.from_onnx(path)
    q = hs.prepare(network, x[:2], hs.Recipe.uniform(4, 8))
    hs.observe(q, [x])
    hs.calibrate(q, hs.Max())
    assert hs.repair(q).trials
    ranked = [name for row in hs.sensitivity(q).rows for name in row.layers]
    assert sorted(ranked) == sorted(q.layer_names)
    with torch.no_grad():
        labelled = [(x, network(x).argmax(1))]
    before = q.weight("fc.weight").clone()
    hs.train(q, hs.Training(labelled, nn.functional.cross_entropy, epochs=1))
    assert not torch.equal(before, q.weight("fc.weight"))
    assert set(q.to_float_state_dict()) == set(network.state_dict())


def test_inputs_in_order_and_by_name_and_outputs_by_name(tmp_path):
    nodes = [
        helper.make_node("Add", ["a:0", "b"], ["sum"]),
        helper.make_node("Mul", ["a:0", "b"], ["product"]),
    ]
    path = write(tmp_path / "m.onnx", nodes, {"a:0": ["n", 3], "b": ["n", 3]}, {"sum": None, "product": None})
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    network = hs.from_onnx(path, {"a:0": a, "b": b})
    for found in (network(a, b), network(b=b, a_0=a)):
        assert torch.equal(found["sum"], a + b) and torch.equal(found["product"], a * b)


def test_sizes_computed_from_a_dynamic_batch_stay_dynamic(tmp_path):
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["n"]),
        helper.make_node("Unsqueeze", ["n", "axis"], ["n1"]),
        helper.make_node("Concat", ["n1", "rest"], ["sizes"], axis=0),
        helper.make_node("Reshape", ["x", "sizes"], ["flat"]),
        helper.make_node("Concat", ["n1", "width"], ["both"], axis=0),
        helper.make_node("ConstantOfShape", ["both"], ["zeros"]),
        helper.make_node("MatMul", ["flat", "w"], ["y0"]),
        helper.make_node("Add", ["y0", "zeros"], ["y"]),
    ]
    stored = {
        "zero": np.int64(0),
        "axis": np.array([0]),
        "rest": np.array([-1]),
        "width": np.array([5]),
        "w": np.random.default_rng(0).normal(size=(12, 5)).astype(np.float32),
    }
    path = write(tmp_path / "m.onnx", nodes, {"x": ["n", 3, 4]}, {"y": None}, stored)
    q = hs.prepare(hs.from_onnx(path), torch.randn(2, 3, 4))
    assert q(torch.randn(7, 3, 4)).shape == (7, 5)


def test_an_old_file_is_converted(tmp_path):
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("ReduceMean", ["r"], ["m"], axes=[2, 3], keepdims=0),
        helper.make_node("Unsqueeze", ["m"], ["u"], axes=[1]),
        helper.make_node("Clip", ["u"], ["c"], min=0.1, max=0.5),
        helper.make_node("Softmax", ["c"], ["y"], axis=2),
    ]
    path = write(tmp_path / "m.onnx", nodes, {"x": ["n", 3, 4, 4]}, {"y": None}, opset=9)
    network, x = hs.from_onnx(path), torch.randn(2, 3, 4, 4)
    assert network.source.opset == 9
    wanted = torch.softmax(torch.relu(x).mean((2, 3))[:, None].clamp(0.1, 0.5), 2)
    assert torch.allclose(network(x), wanted, atol=1e-6)


def test_gelu_layer_norm_and_attention_in_pieces_are_what_they_are(tmp_path):
    torch.manual_seed(0)
    model = SmallViT(width=24, depth=1).eval()
    x = torch.randn(2, 1, 28, 28)
    network = hs.from_onnx(export(model, x, tmp_path / "m.onnx", opset_version=18))
    kinds = {node.op_type for node in network.nodes}
    assert {"Gelu", "Attend", "Linear"} <= kinds and not {"Erf", "Softmax"} & kinds
    same(network, model, x)


def test_layer_norm_in_pieces(tmp_path):
    make = helper.make_node
    nodes = [
        make("ReduceMean", ["x", "last"], ["mean"]),
        make("Sub", ["x", "mean"], ["d"]),
        make("Pow", ["d", "two"], ["square"]),
        make("ReduceMean", ["square", "last"], ["spread"]),
        make("Add", ["spread", "eps"], ["padded"]),
        make("Sqrt", ["padded"], ["root"]),
        make("Div", ["d", "root"], ["unit"]),
        make("Mul", ["unit", "gain"], ["scaled"]),
        make("Add", ["scaled", "shift"], ["y"]),
    ]
    generator = np.random.default_rng(0)
    stored = {"last": np.array([-1]), "two": np.float32(2), "eps": np.float32(1e-5)}
    stored |= {name: generator.normal(size=6).astype(np.float32) for name in ("gain", "shift")}
    network = hs.from_onnx(write(tmp_path / "m.onnx", nodes, {"x": ["n", 5, 6]}, {"y": None}, stored))
    assert [node.op_type for node in network.nodes] == ["LayerNormalization"]


def test_a_path_stands_for_its_network(resnet):
    _, path = resnet
    q = hs.prepare(path, None)
    assert q.layer_names == hs.prepare(str(path), torch.randn(2, 1, 28, 28)).layer_names


def test_a_module_needs_inputs():
    with pytest.raises(hs.HalfstepError, match="example_inputs: got None"):
        hs.prepare(nn.Linear(2, 2), None)


class Decoder(nn.Module):
    """Whose attention has one parameter for three products: exporters cut it up, in nodes whose names have dots."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True)])

    def forward(self, x, memory):
        return self.layers[0](x, memory)


def test_a_weight_that_is_a_part_of_a_parameter_is_a_weight_of_its_own(tmp_path):
    torch.manual_seed(0)
    inputs = torch.randn(3, 5, 16), torch.randn(3, 7, 16)
    path = export(Decoder(), inputs, tmp_path / "decoder.onnx")
    q = hs.prepare(path, inputs)
    hs.observe(q, [inputs])
    hs.calibrate(q, hs.Max())
    proof = hs.verify(hs.export_onnx(q, tmp_path / "q.onnx"), q, [inputs], rounds=3)
    assert proof.integer_layers == len(proof.layers) >= 7
