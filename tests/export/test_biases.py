"""Biases: the simulation adds what the file stores, bit for bit, at every width and for every kind of layer."""

import copy

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn
from torch.nn import functional as F

import halfstep as hs
from halfstep.fake_quantize import Mode
from halfstep.fidelity.compare import compare
from halfstep.runtime.deployed import DeployedModel, inspect_kernels
from halfstep.runtime.onnxruntime import open_session


class Kinds(nn.Module):
    """Every kind of layer with a bias: convs, depthwise, transposed, along one axis; linears on vectors and tokens."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.down = nn.Conv2d(8, 8, 3, stride=4)
        self.along = nn.Conv1d(8, 8, 3, padding=1)
        self.tokens = nn.Linear(8, 8)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        x = F.relu(self.depthwise(F.relu(self.conv(x))))
        x = F.relu(self.down(F.relu(self.up(x)))).flatten(2)
        x = F.relu(self.tokens(F.relu(self.along(x)).transpose(1, 2)))
        return self.head(x.mean(1))


STORED = {"conv", "depthwise", "down", "along", "head"}
X = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def network():
    """Biases of the size of a step at 2 bits, so that rounding them is seen."""
    torch.manual_seed(0)
    model = Kinds().eval()
    for layer in model.children():
        nn.init.normal_(layer.bias, std=0.3)
    return model


def quantized(weights, activations, target="onnxruntime", granularity=None, widths=None, **choices):
    recipe = hs.Recipe.uniform(weights, activations, granularity, ends=None)
    for name, bits in (widths or {}).items():
        recipe = recipe.override(name, hs.Recipe.uniform(bits, activations).default)
    q = hs.prepare(network(), X[:4], recipe, target)
    hs.observe(q, [X])
    hs.calibrate(q, hs.MSE(), hs.MSE())
    for name, layers in choices.items():
        setattr(q, name, layers)
    q.set_mode(Mode.QUANTIZE)
    return q


def stored_biases(path):
    """What each layer's node adds, as the file's operators compute it in float32, with its scale (None for floats)."""
    graph = onnx.load(path).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    makers = {node.output[0]: node for node in graph.node}
    found = {}
    for node in graph.node:
        product = node.op_type in ("Conv", "ConvTranspose", "Gemm") and len(node.input) > 2
        added = node.op_type == "Add" and makers.get(node.input[0], node).op_type == "MatMul"
        if not product and not added:
            continue
        name = node.input[2 if product else 1]
        scale = None
        if name in makers:
            codes, scale = (arrays[operand] for operand in makers[name].input)
            assert codes.dtype == np.int32
            value = codes.astype(np.float32) * scale
        else:
            value = arrays[name].reshape(-1)
        found[node.name.rpartition("/")[0]] = value, scale
    return found


@pytest.mark.parametrize(
    ("weights", "activations", "granularity"),
    [(8, 8, None), (4, 8, hs.PerTensor()), (8, 3, None), (2, 2, None), (2, 2, hs.PerTensor())],
    ids=str,
)
def test_the_simulated_bias_is_the_stored_one(weights, activations, granularity, tmp_path):
    q = quantized(weights, activations, granularity=granularity)
    q.shifts["conv"].shift.normal_(std=0.1)
    q.shifts["tokens"].shift.normal_(std=0.1)
    found = stored_biases(hs.export_onnx(q, tmp_path / "model.onnx", check=False))
    assert {bias.layer for bias in q.placement.biases} == STORED
    assert set(found) == STORED | {"tokens", "up"}
    for layer in q.layers:
        value, scale = found[layer.name]
        if layer.name == "up":  # in float on this runtime, and as exact as floats are
            np.testing.assert_allclose(value, q.weight("up.bias").detach(), rtol=1e-6)
            continue
        bias = q.weight(f"{layer.name}.bias").detach()
        simulated = q.shifts[layer.name](bias).numpy()
        assert np.array_equal(simulated, value), layer.name
        corrected = (bias + q.shifts[layer.name].shift).numpy()
        assert (scale is not None) == (layer.name in STORED)
        if scale is not None:
            activation, weight = (q.sites[name].scale.numpy() for name in layer.sites)
            assert np.array_equal(scale, activation * weight / 2 ** max(0, 7 - weights))
            assert (
                np.abs(value - corrected) <= scale * (0.5 + 1e-3)
            ).all()  # a bias is some hundred steps long
            assert not np.array_equal(value, corrected)
        else:
            assert np.array_equal(value, corrected)


def test_weights_of_few_bits_are_the_same_numbers_in_finer_steps(tmp_path):
    widths = {"conv": 2, "depthwise": 3, "down": 4, "along": 7}
    q = quantized(8, 8, widths=widths)
    path = hs.export_onnx(q, tmp_path / "model.onnx", check=False)
    open_session(path, 1, optimized=tmp_path / "optimized.onnx")
    file, optimized = (onnx.load(p).graph for p in (path, tmp_path / "optimized.onnx"))
    arrays = {t.name: numpy_helper.to_array(t) for t in (*file.initializer, *optimized.initializer)}
    kernels = {n.name.split("/")[0]: n for n in optimized.node if n.op_type == "QLinearConv"}
    assert set(kernels) == set(widths)
    for name, kernel in kernels.items():
        codes, scale, zero, added = (arrays[kernel.input[i]] for i in (3, 4, 5, 8))
        assert not zero.any()
        assert np.abs(codes.astype(int)).max() <= 64  # two products of 8 by 7 bits fit 16
        weight = codes * scale.reshape(-1, *[1] * (codes.ndim - 1))
        wanted = q.sites[f"{name}.weight"].rounded(q.weight(f"{name}.weight").detach())
        assert np.array_equal(weight.reshape(wanted.shape), wanted.numpy())
        assert np.array_equal(added, arrays[f"{name}/Conv/bias_quantized"])  # the runtime left it as it was
    assert inspect_kernels(path).counts["QGemm"] == 1


@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_the_file_answers_as_simulated_at_few_bits(bits, target, tmp_path):
    pytest.importorskip(target)
    q = quantized(bits, bits, target)
    parity = compare(q, DeployedModel(hs.export_onnx(q, tmp_path / "model.onnx")), [X])
    assert parity.sqnr > 60
    assert parity.top1 == 1.0


@pytest.mark.parametrize(
    "choices",
    [
        {"float_layers": ["depthwise", "tokens"]},
        {"int16_layers": ["down", "head"]},
        {"dynamic_layers": ["head"]},
        {"float_layers": ["conv"], "int16_layers": ["along"], "dynamic_layers": ["tokens"]},
    ],
    ids=str,
)
def test_layers_at_other_steps_leave_the_rest_exact(choices, tmp_path):
    q = quantized(2, 2, **choices)
    found = stored_biases(hs.export_onnx(q, tmp_path / "model.onnx"))
    for bias in q.placement.biases:
        value, scale = found[bias.layer]
        assert scale is not None
        assert np.array_equal(q.shifts[bias.layer](q.weight(f"{bias.layer}.bias").detach()).numpy(), value)
    elsewhere = {name for names in choices.values() for name in names} - set(choices.get("int16_layers", ()))
    assert {bias.layer for bias in q.placement.biases} == STORED - elsewhere
    assert compare(q, DeployedModel(tmp_path / "model.onnx"), [X]).sqnr > 60


def test_layers_that_only_store_floats_keep_their_bias():
    for target in ("openvino", "tensorrt"):
        q = quantized(2, 2, target)
        assert q.placement.biases == ()
        bias = q.weight("conv.bias").detach()
        assert torch.equal(q.shifts["conv"](bias), bias)
    for recipe in (
        hs.Recipe.weight_only(4, None),
        hs.Recipe.dynamic(),
        hs.Recipe.codebook(hs.Codebook.nf4(), 8),
    ):
        assert hs.prepare(network(), X[:4], recipe).placement.biases == ()


def test_a_bias_that_two_layers_share_is_rounded_for_each(tmp_path):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x):
            return self.a(F.relu(self.a(x)) * 5)

    torch.manual_seed(0)
    x = torch.randn(16, 8)
    q = hs.prepare(Twice().eval(), x, hs.Recipe.uniform(4, 4, ends=None))
    hs.observe(q, [x])
    hs.calibrate(q)
    path = hs.export_onnx(q, tmp_path / "model.onnx")
    found = stored_biases(path)
    first, second = (q.shifts[layer.name](q.weight("a.bias").detach()).numpy() for layer in q.layers)
    assert not np.array_equal(first, second)
    for value, (stored, _) in zip((first, second), found.values(), strict=True):
        assert np.array_equal(value, stored)
    assert compare(q, DeployedModel(path), [x]).sqnr > 60


def test_biases_are_rounded_only_where_there_are_codes_to_add_to():
    q = quantized(2, 2)
    bias = q.weight("conv.bias").detach()
    rounded = q.shifts["conv"](bias)
    assert not torch.equal(rounded, bias)
    for sides in ({"weights": False}, {"activations": False}):
        with q.using(Mode.QUANTIZE, **sides):
            assert torch.equal(q.shifts["conv"](bias), bias)
    with q.using(Mode.FLOAT):
        assert torch.equal(q.shifts["conv"](bias), bias)
    assert torch.equal(copy.deepcopy(q).shifts["conv"](bias), rounded)
    q.float_layers = ["depthwise"]
    q.float_layers = []
    assert torch.equal(q.shifts["conv"](bias), rounded)


def test_gradients_pass_to_the_bias_and_training_learns_it():
    q = quantized(2, 2)
    bias = q.weight("head.bias")
    bias.requires_grad_()
    out = q(X)
    pulled = torch.randn(out.shape)
    (gradient,) = torch.autograd.grad((out * pulled).sum(), bias)
    assert torch.allclose(gradient, pulled.sum(0))
    before = {name: q.weight(f"{name}.bias").detach().clone() for name in STORED}
    labels = torch.randint(5, (32,), generator=torch.Generator().manual_seed(0))
    hs.train(q, hs.Training([(X, labels)] * 4, F.cross_entropy, epochs=4, learning_rate=1e-2))
    for name in STORED:
        now = q.weight(f"{name}.bias").detach()
        assert not torch.equal(now, before[name]), name
        assert not torch.equal(q.shifts[name](now), now)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_biases_keep_their_dtype(dtype):
    q = quantized(4, 4)
    q.shifts["conv"].shift.fill_(0.1)
    assert q.shifts["conv"](q.weight("conv.bias").detach().to(dtype)).dtype == dtype


def test_a_bias_without_a_range_to_be_stored_in_is_zero_or_tiny():
    """Scales whose product is below float32: nothing is divided by zero."""
    q = quantized(8, 8)
    for site in (q.sites["x"], q.sites["conv.weight"]):
        site.scale.fill_(1e-30)
    assert torch.equal(q.shifts["conv"](torch.zeros(8)), torch.zeros(8))


@pytest.mark.parametrize(
    "activation", [nn.ReLU(), nn.ReLU6(), nn.Hardtanh(-0.5, 0.5)], ids=lambda a: type(a).__name__
)
def test_a_product_stays_integer_in_front_of_a_clip_that_nothing_absorbs(tmp_path, activation):
    torch.manual_seed(0)
    x = torch.randn(32, 8)
    q = hs.prepare(nn.Sequential(nn.Linear(8, 8), activation, nn.Linear(8, 3)), x[:2])
    hs.observe(q, [x])
    hs.calibrate(q, hs.Max())
    q.float_layers = ["2"]
    proof = hs.verify(hs.export_onnx(q, tmp_path / "model.onnx"), q, [x], rounds=3)
    assert [layer.integer for layer in proof.layers] == [True, False]
    assert proof.parity.sqnr > 60
