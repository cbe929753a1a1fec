"""OpenVINO: what it executes, in which precision, and that it answers as the simulation does."""

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfstep as hs
from halfstep.errors import ArgumentError, ExportError, RefusedError
from halfstep.export.mismatch import agreements
from halfstep.fidelity.compare import compare
from halfstep.runtime.deployed import DeployedModel, inspect_kernels, runtime_of
from halfstep.runtime.openvino import INTEGER
from halfstep.runtime.saturation import saturable_layers, saturates_here

pytest.importorskip("openvino")


class Mixed(nn.Module):
    """Conv, HardSwish, residual, pool, linear on tokens, GELU: what is integer, and what is fused in float."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.up, self.down, self.fc = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 10)

    def forward(self, x):
        x = F.hardswish(self.stem(x))
        x = F.relu(self.conv(x) + x)
        y = F.max_pool2d(x, 2).flatten(2).transpose(1, 2)
        y = y + self.down(F.gelu(self.up(y)))
        return {"classes": self.fc(y.mean(1)), "tokens": y}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    torch.manual_seed(0)
    x = torch.randn(4, 3, 16, 16)
    # Processors without VNNI add two products in 16 bits, which weights of 8 bits overflow, and of 7 do not.
    q = hs.prepare(Mixed().eval(), x, hs.Recipe.uniform(7, 8), target="openvino")
    hs.observe(q, [x])
    hs.calibrate(q)
    return q, x, hs.export_onnx(q, tmp_path_factory.mktemp("openvino") / "model.onnx")


def test_every_layer_runs_on_integers(mixed):
    _, _, path = mixed
    kernels = inspect_kernels(path)
    assert kernels.floating == ()
    assert {"stem/Conv", "conv/Conv", "up/MatMul", "down/MatMul", "fc/Gemm"} <= set(kernels.integer)
    convs = {
        name.split()[1]: count for name, count in kernels.counts.items() if name.startswith("Convolution ")
    }
    assert sum(convs.values()) == 2  # in signed or unsigned codes, as suits the processor
    assert set(convs) <= INTEGER


def test_verification_runs_on_the_targets_runtime(mixed):
    q, x, path = mixed
    proof = hs.verify(path, q, [x], rounds=3)
    assert proof.integer_layers == len(proof.layers) == 5
    assert proof.parity.sqnr > 35


def test_the_file_names_its_runtime(mixed):
    q, x, path = mixed
    assert runtime_of(path).name == "openvino"
    deployed = DeployedModel(path, q.captured.in_spec, q.captured.out_spec)
    assert set(deployed(x[:3])) == {"classes", "tokens"}
    other = DeployedModel(path, q.captured.in_spec, q.captured.out_spec, runtime="onnxruntime")
    assert compare(deployed, other, [x]).sqnr > 35
    with pytest.raises(
        ArgumentError, match=r"runtime: got 'tvm', needed one of 'onnxruntime', 'openvino', 'reference'"
    ):
        DeployedModel(path, runtime="tvm")


def test_a_file_that_it_cannot_load_is_named(tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"no file")
    with pytest.raises(ExportError, match=r"broken.onnx: cannot be read as ONNX"):
        inspect_kernels(tmp_path / "broken.onnx")
    with pytest.raises(ExportError, match=r"openvino cannot load .*broken.onnx"):
        DeployedModel(tmp_path / "broken.onnx", runtime="openvino")


def test_without_openvino_the_message_says_what_to_install(mixed, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openvino", None)
    with pytest.raises(ExportError, match=r"not installed; pip install 'halfstep\[openvino\]'"):
        DeployedModel(mixed[2])


@pytest.mark.parametrize("pooled", [True, False])
def test_a_network_that_the_runtime_makes_another_one_of_is_refused(pooled, tmp_path):
    """With sites as further outputs OpenVINO pads this conv, without them it does not, and the shape is another one."""

    class Strided(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(6, 4, 1, stride=2, padding=1), nn.Linear(4, 5)

        def forward(self, x):
            x = self.conv(x).relu()
            return self.fc(x.mean((2, 3))) if pooled else x

    torch.manual_seed(0)
    x = torch.randn(4, 6, 8, 8)
    q = hs.prepare(Strided().eval(), x, hs.Recipe.uniform(7, 8), target="openvino")
    hs.observe(q, [x])
    hs.calibrate(q)
    path = tmp_path / "model.onnx"
    with pytest.raises(RefusedError, match="by more than quantization changes them"):
        hs.export_onnx(q, path)
    assert not path.exists()
    hs.export_onnx(q, path, check=False)
    assert hs.verify(path, q, [x]).parity.sqnr < (30 if pooled else -100)


def test_weights_in_groups_of_4_bits_are_onnx_s_own_type(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 5, 64)
    q = hs.prepare(nn.Linear(64, 32).eval(), x, recipe=hs.Recipe.weight_only(4, 32), target="openvino")
    hs.calibrate(q)
    path = hs.export_onnx(q, tmp_path / "model.onnx")
    types = {t.name: t.data_type for t in onnx.load(path).graph.initializer}
    assert types["weight_transposed_quantized"] == onnx.TensorProto.INT4
    assert any("i4" in name for name in inspect_kernels(path).counts)


def test_what_may_be_negative_keeps_its_sign_through_a_concat(tmp_path):
    """Signed codes behind a concat lost the shift that OpenVINO makes unsigned ones of them by: 13 dB."""

    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 3, padding=1)
            self.c, self.d = nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(24, 8, 1)

        def forward(self, x):
            y = torch.cat([self.a(x), F.relu(self.b(x))], 1)
            return self.d(F.max_pool2d(torch.cat([F.silu(self.c(y)), y], 1), 2))

    torch.manual_seed(0)
    x = torch.randn(4, 3, 16, 16)
    q = hs.prepare(Joined().eval(), x, target="openvino")
    hs.observe(q, [x])
    hs.calibrate(q)
    path = hs.export_onnx(q, tmp_path / "joined.onnx", check=False)
    assert min(agreement.sqnr for agreement in agreements(q, path, x)) > 90
    kernels = inspect_kernels(path)
    assert kernels.floating == () and "concat/Concat" in kernels.integer


class Lines(nn.Module):
    """Convs, then a recurrent layer, whose first state is as large as the batch of what the convs return."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.lstm = nn.LSTM(16, 8, batch_first=True)

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.first(x)), 2)
        x = F.max_pool2d(F.relu(self.second(x)), (4, 1))
        return self.lstm(x.squeeze(2).transpose(1, 2))[0]


@pytest.mark.parametrize("dynamic", [None, {"x": {3: "width"}}])
def test_a_bias_is_not_lost_where_the_runtime_also_reads_the_convs_shape(tmp_path, dynamic):
    torch.manual_seed(0)
    model, x = Lines().eval(), torch.rand(4, 1, 8, 16)
    nn.init.uniform_(model.first.bias, -1, 1)
    q = hs.prepare(model, x, hs.Recipe.uniform(7, 8), target="openvino", dynamic=dynamic)
    hs.observe(q, [x])
    hs.calibrate(q)
    path = hs.export_onnx(q, tmp_path / "model.onnx")  # refuses a file that answers otherwise
    assert compare(DeployedModel(path, q.captured.in_spec, q.captured.out_spec), q, [x]).sqnr > 60
    assert "first/Conv/bias/Add" in {node.name for node in onnx.load(path).graph.node}
    assert {"first/Conv", "second/Conv"} <= set(inspect_kernels(path).integer)


class Heads(nn.Module):
    """Self-attention over patches: one linear layer for queries, keys and values."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


@pytest.mark.skipif(saturates_here(), reason="there these products saturate, and recipes leave them in float")
def test_attentions_first_product_runs_on_integers_and_its_keys_are_turned_as_floats(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(4, 20, 32)
    q = hs.prepare(Heads().eval(), x, target="openvino")
    hs.observe(q, [x])
    hs.calibrate(q)
    path = hs.export_onnx(q, tmp_path / "model.onnx")  # refuses a file that answers otherwise
    graph = onnx.load(path).graph
    makers = {value: node for node in graph.node for value in node.output}
    product = next(node for node in graph.node if node.name.endswith("attention/MatMul"))
    for factor in product.input:
        scaled = makers[factor]
        assert (scaled.op_type, makers[scaled.input[0]].op_type) == ("Mul", "DequantizeLinear")
    for turn in (node for node in graph.node if node.name.endswith("attention/Transpose")):
        assert makers[makers[turn.input[0]].input[0]].op_type != "DequantizeLinear"
    assert product.name in inspect_kernels(path).integer
    proof = hs.verify(path, q, [x], rounds=3)
    assert [op.kind for op in proof.float_operators if op.kind == "attention"] == []
    assert compare(DeployedModel(path, q.captured.in_spec, q.captured.out_spec), q, [x]).sqnr > 40
    assert "attention" in saturable_layers(path)


@pytest.mark.parametrize(
    ("inputs", "asked", "group"),
    [(64, 128, 64), (192, 128, 96), (130, 128, 0), (131, 128, 0), (50, 16, 10), (256, 128, 128)],
)
def test_groups_divide_what_they_are_of(inputs, asked, group, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(32, inputs)
    model = nn.Sequential(nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, 8))
    q = hs.prepare(model, x, hs.Recipe.weight_only(group=asked), target="openvino")
    assert [bool(layer.reason) for layer in q.layers] == [not group, False]
    assert not group or q.sites["0.weight"].granularity == hs.PerGroup(1, group)
    hs.observe(q, [x])
    hs.calibrate(q)
    proof = hs.verify(hs.export_onnx(q, tmp_path / "model.onnx"), q, [x], rounds=3)
    assert proof.parity.sqnr > 60
    q = hs.prepare(model, x, hs.Recipe.weight_only(group=asked))
    assert q.sites["0.weight"].granularity == hs.PerGroup(1, asked)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6(), nn.Identity()])
def test_wide_codes_still_clip(activation, tmp_path):
    """OpenVINO takes quantizers of 16 bits out, so those have 15."""
    torch.manual_seed(0)
    x = torch.rand(32, 12)
    model = nn.Sequential(nn.Linear(12, 12), activation, nn.Linear(12, 6))
    q = hs.prepare(model, x, hs.Recipe.uniform(7, 16), target="openvino")
    hs.observe(q, [x])
    hs.calibrate(q)
    path = hs.export_onnx(q, tmp_path / "model.onnx")
    assert hs.verify(path, q, [x, 2 * x], rounds=3).parity.sqnr > 60


@pytest.mark.parametrize(
    "pool",
    [
        lambda x: x.amax(1),
        lambda x: x.max(1).values,
        lambda x: x.amin(1),
        lambda x: F.adaptive_max_pool1d(x.transpose(1, 2), 1).flatten(1),
        lambda x: torch.cat([x.amax(1), x.mean(1)], 1)[:, :12],
    ],
    ids=["amax", "max", "amin", "adaptive", "concat"],
)
def test_what_reads_the_largest_of_values_is_in_float(pool, tmp_path):
    """OpenVINO computes something else where that is quantized."""

    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(12, 12), nn.Linear(12, 4)

        def forward(self, x):
            return self.last(pool(self.first(x).relu()))

    torch.manual_seed(0)
    x = 3 * torch.randn(4, 5, 12)
    q = hs.prepare(Pooled().eval(), x, hs.Recipe.uniform(7, 8), target="openvino")
    hs.observe(q, [x])
    hs.calibrate(q)
    assert not q.layers[0].reason
    assert hs.verify(hs.export_onnx(q, tmp_path / "m.onnx"), q, [x], rounds=3).parity.sqnr > 60
