"""Exported files: what ONNX Runtime executes, and that it answers as the simulation does."""

import copy

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfstep as hs
from halfstep.errors import ExportError, NotObservedError, RefusedError
from halfstep.export import build
from halfstep.export import onnx as export
from halfstep.export.mismatch import OUTPUTS, agreements, run_watched
from halfstep.fake_quantize import Mode
from halfstep.fidelity.compare import Parity, compare
from halfstep.runtime.deployed import DeployedModel, inspect_kernels
from halfstep.runtime.file import read_sites


class Residual(nn.Module):
    """Conv, residual add, relu6, max pool, concat, global pool, linear: most of the table at once."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU6())
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(32, 10)

    def forward(self, x):
        x = self.stem(x)
        y = F.relu(self.conv(x) + x)
        y = torch.cat([F.max_pool2d(y, 2), F.avg_pool2d(y, 2)], 1)
        return self.fc(y.mean((2, 3)))


class Tokens(nn.Module):
    """Linear on three dimensions, GELU, a residual: float results between integer products."""

    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


def quantized(model, x):
    torch.manual_seed(0)
    q = hs.prepare(model.eval(), x)
    hs.observe(q, [x])
    hs.calibrate(q)
    return q


@pytest.fixture(scope="module")
def residual(tmp_path_factory):
    torch.manual_seed(0)
    x = torch.randn(8, 3, 16, 16)
    q = quantized(Residual(), x)
    return q, x, hs.export_onnx(q, tmp_path_factory.mktemp("residual") / "model.onnx", {"note": "kept"})


def test_everything_that_has_a_kernel_is_integer(residual):
    _, _, path = residual
    counts = inspect_kernels(path).counts
    wanted = {
        "QLinearConv": 2,
        "QLinearAdd": 1,
        "QLinearConcat": 1,
        "QGemm": 1,
        "QLinearGlobalAveragePool": 1,
    }
    assert wanted.items() <= counts.items()
    assert counts["QLinearAveragePool"] == 1
    assert not {"Conv", "FusedConv", "Gemm", "Add", "Clip", "Relu", "MaxPool"} & (set(counts) - {"MaxPool"})


def test_the_file_answers_as_the_simulation_at_any_batch_size(residual):
    q, x, path = residual
    deployed = DeployedModel(path)
    for batch in (1, 5, 8):
        parity = compare(q, deployed, [x[:batch]])
        assert parity.sqnr > 35
        assert parity.top1 == 1.0


def test_the_file_is_well_kept(residual):
    q, _, path = residual
    model = onnx.load(path)
    onnx.checker.check_model(model, full_check=True)
    assert [(i.domain, i.version) for i in model.opset_import if i.domain == ""] == [("", 21)]
    tensors = {t.name: t for t in model.graph.initializer}
    assert tensors["stem.0.weight_quantized"].data_type == onnx.TensorProto.INT8
    assert tensors["conv/Conv/bias_quantized"].data_type == onnx.TensorProto.INT32
    assert not any(t.data_type == onnx.TensorProto.FLOAT and len(t.dims) > 1 for t in model.graph.initializer)
    assert {"stem.0/Conv", "conv/Conv", "fc/Gemm"} <= {node.name for node in model.graph.node}
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    assert metadata["halfstep.note"] == "kept"
    assert metadata["halfstep.target"] == "onnxruntime"
    assert metadata["halfstep.recipe"] == repr(q.recipe)
    scale = onnx.numpy_helper.to_array(tensors["conv/Conv/bias_scale"])
    x_scale = onnx.numpy_helper.to_array(tensors["stem.2_scale"])
    w_scale = onnx.numpy_helper.to_array(tensors["conv.weight_scale"])
    np.testing.assert_allclose(scale, x_scale * w_scale, rtol=1e-6)


def test_sites_are_read_back_from_the_file(residual):
    q, _, path = residual
    sites, _ = read_sites(path)
    stored = {site.tensor: site for site in sites}
    low, high = q.sites["x"].range()
    assert stored["x"].low == pytest.approx(float(low))
    assert stored["x"].high == pytest.approx(float(high))
    assert stored["conv.weight_quantized"].granularity == "per channel"


def test_the_same_model_gives_the_same_bytes(residual, tmp_path):
    q, _, path = residual
    again = hs.export_onnx(copy.deepcopy(q), tmp_path / "again.onnx", {"note": "kept"})
    assert again.read_bytes() == path.read_bytes()


def test_a_float_layer_is_really_float_and_its_weight_too(residual, tmp_path):
    q, x, _ = residual
    q = copy.deepcopy(q)
    q.float_layers = ["conv", "fc"]
    path = hs.export_onnx(q, tmp_path / "mixed.onnx")
    kernels = inspect_kernels(path)
    assert kernels.counts["QLinearConv"] == 1
    assert {name.split("/")[0] for name in kernels.floating} == {"conv", "fc"}
    # With the weight quantized behind our back the outputs would differ by far more than rounding.
    assert compare(q, DeployedModel(path), [x]).sqnr > 35


def test_linear_on_sequences_multiplies_integers(tmp_path):
    x = torch.randn(4, 7, 16)
    q = quantized(Tokens(), x)
    path = hs.export_onnx(q, tmp_path / "tokens.onnx")
    kernels = inspect_kernels(path)
    assert kernels.counts["MatMulIntegerToFloat"] == 2
    assert kernels.floating == ()
    assert compare(q, DeployedModel(path), [x]).sqnr > 35
    reasons = {op.name: op.reason for op in q.placement.float_operators}
    assert "gelu has no" not in reasons["gelu"]
    assert "has no integer kernel on onnxruntime" in reasons["gelu"]


class Rectified(nn.Module):
    """A product without a bias, rectified, and nothing integer behind it."""

    def __init__(self):
        super().__init__()
        self.up, self.norm = nn.Linear(16, 32, bias=False), nn.LayerNorm(32)

    def forward(self, x):
        return self.norm(F.relu(self.up(x)))


def test_a_product_in_front_of_a_relu_that_stays_float_multiplies_integers(tmp_path):
    x = torch.randn(4, 7, 16)
    q = quantized(Rectified(), x)
    kernels = inspect_kernels(hs.export_onnx(q, tmp_path / "rectified.onnx"))
    assert kernels.counts["MatMulIntegerToFloat"] == 1
    assert kernels.floating == ()


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x, mask):
        query, key, value = self.qkv(x).unflatten(2, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return self.out(
            F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)
        )


def test_a_query_whose_mask_leaves_nothing_answers_as_in_torch(tmp_path):
    x, mask = torch.randn(4, 6, 16), torch.rand(4, 1, 6, 6) > 0.5
    mask[0, 0, 1] = mask[2] = False
    q = quantized(Masked(), (x, mask))
    path = hs.export_onnx(q, tmp_path / "masked.onnx")
    assert compare(q, DeployedModel(path), [(x, mask)]).sqnr > 100
    assert torch.allclose(
        DeployedModel(hs.export_float(q, tmp_path / "float.onnx"))(x, mask), q.captured(x, mask), atol=1e-5
    )


def test_a_channel_that_batch_norm_switched_off_does_not_overflow_its_bias(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model[1].weight.data[1] = 1e-12
    model[1].bias.data[:] = 0.5
    x = torch.randn(4, 3, 8, 8)
    q = quantized(model, x)
    path = hs.export_onnx(q, tmp_path / "dead.onnx")
    assert compare(q, DeployedModel(path), [x]).sqnr > 30
    with q.using(Mode.FLOAT):
        assert compare(q, DeployedModel(path), [x]).sqnr > 30


def test_an_uncalibrated_model_is_refused_and_no_file_appears(tmp_path):
    q = hs.prepare(nn.Linear(4, 4), torch.randn(2, 4))
    with pytest.raises(ExportError, match=r"2 of 2 sites have no range \(input, weight"):
        hs.export_onnx(q, tmp_path / "model.onnx")
    with pytest.raises(NotObservedError, match=r"site 'input'"):
        hs.calibrate(q)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_answers_otherwise_is_not_left_behind(tmp_path, monkeypatch):
    q = quantized(nn.Linear(4, 4), torch.randn(2, 4))
    path = tmp_path / "model.onnx"
    path.write_text("what was there before")
    monkeypatch.setattr(export, "MINIMUM_SQNR", 1e6)
    with pytest.raises(RefusedError, match=r"they part at the outputs \([\d.]+ dB\), needed 1000000 dB"):
        hs.export_onnx(q, path)
    assert path.read_text() == "what was there before"
    assert [file.name for file in tmp_path.iterdir()] == ["model.onnx"]


def test_where_file_and_simulation_part_is_named(residual, tmp_path, monkeypatch):
    q, _, _ = residual
    lowered = build.lower

    def spoiled(onnx_model, model):
        lowered(onnx_model, model)
        scale = onnx_model.graph.initializers["relu_scale"]
        scale.const_value = ir.tensor(scale.const_value.numpy() / 10, name=scale.name)

    monkeypatch.setattr(build, "lower", spoiled)
    with pytest.raises(
        RefusedError,
        match=r"they part at site 'relu' \([-\d.]+ dB, \d+ steps beyond half a one\), needed 60 dB",
    ):
        hs.export_onnx(q, tmp_path / "model.onnx")
    assert list(tmp_path.iterdir()) == []


def test_every_site_agrees_where_nothing_is_wrong(residual):
    q, x, path = residual
    found = agreements(q, path, x)
    assert [agreement.site for agreement in found] == [
        *(name for name in q.sites if not name.endswith("weight")),
        OUTPUTS,
    ]
    assert min(agreement.sqnr for agreement in found) > 90
    assert all(agreement.beyond < 1e-3 for agreement in found)
    assert all(agreement.codes > 0 for agreement in found[:-1])


def test_watching_leaves_the_kernels_as_they_are(residual):
    q, x, path = residual
    (output,), seen = run_watched(q, path, x)
    assert torch.equal(output, DeployedModel(path)(x))
    assert all(codes.dtype == torch.int32 for codes in seen.values())


def test_a_bias_that_is_not_the_stored_one_is_found_at_its_layer(residual):
    q, x, path = residual
    q = copy.deepcopy(q)
    q.shifts["conv"].shift.fill_(float(q.sites["conv"].scale))  # a step of what the layer writes
    first = next(agreement for agreement in agreements(q, path, x) if not agreement.sqnr >= 60)
    assert first.site == "conv" and first.others > 0.5 * first.codes and 0.4 < first.beyond < 1.6


def test_a_file_that_only_rounds_ties_otherwise_is_accepted(residual, tmp_path, monkeypatch):
    q, _, _ = residual
    monkeypatch.setattr(export, "compare", lambda *_: Parity(1.0, 20.0, 4))
    assert hs.export_onnx(q, tmp_path / "model.onnx").exists()


def test_what_the_runtime_cannot_run_is_refused_in_its_words(residual):
    _, _, path = residual
    with pytest.raises(
        RefusedError, match=r"model.onnx: the runtime cannot run it on x \(2, 4, 16, 16\): .*index: 1"
    ):
        DeployedModel(path)(torch.randn(2, 4, 16, 16))


def test_an_unwritable_place_is_named(tmp_path):
    q = quantized(nn.Linear(4, 4), torch.randn(2, 4))
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match=r"cannot write to .*file"):
        hs.export_onnx(q, tmp_path / "file" / "model.onnx")


@pytest.mark.parametrize("pruned", [slice(0, 1), slice(None)])
@pytest.mark.parametrize("granularity", [hs.PerChannel(0), hs.PerTensor()])
def test_a_bias_is_not_lost_beside_weights_of_zeros(pruned, granularity, tmp_path):
    """A channel that was pruned has no range, and its bias must not be counted in steps of 1."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 3)
    with torch.no_grad():
        layer.weight[pruned] = 0
    x = 1000 * torch.randn(64, 6)
    q = hs.prepare(layer, x, hs.Recipe.uniform(8, 8, weight_granularity=granularity))
    hs.observe(q, [x])
    hs.calibrate(q)
    empty = [row for row in range(3) if not layer.weight[row].any()]
    alone = isinstance(granularity, hs.PerChannel) or len(empty) == 3
    wanted = layer(x)[:, empty]
    assert not alone or torch.allclose(q(x)[:, empty], wanted, rtol=1e-6)
    deployed = DeployedModel(hs.export_onnx(q, tmp_path / "m.onnx"), q.captured.in_spec, q.captured.out_spec)
    with torch.no_grad():
        answers = q(x)
    assert torch.allclose(deployed(x), answers, atol=1e-4 * float(answers.abs().max()))


class Recurrent(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.rnn = nn.RNN(8, 6, batch_first=True, **options)
        self.fc = nn.Linear(6 * (1 + self.rnn.bidirectional), 3)

    def forward(self, x):
        return self.fc(self.rnn(x)[0])


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        (Recurrent(), (5, 8)),
        (Recurrent(num_layers=2, bidirectional=True, nonlinearity="relu"), (5, 8)),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveMaxPool2d(1)), (3, 8, 8)),
        (nn.Sequential(nn.RMSNorm(8), nn.Linear(8, 4)), (5, 8)),
        (nn.Sequential(nn.RMSNorm(8), nn.Hardshrink(), nn.Linear(8, 4)), (5, 8)),
    ],
    ids=["rnn", "deep rnn", "a getitem is returned", "rms norm", "rms norm and hardshrink"],
)
def test_what_torch_translates_only_in_parts(model, shape, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(64, *shape)
    q = hs.prepare(model.eval(), x[:2], hs.Recipe.uniform(7, 8))
    hs.export_float(q, tmp_path / "float.onnx")
    hs.observe(q, [x])
    hs.calibrate(q, hs.Max())
    proof = hs.verify(hs.export_onnx(q, tmp_path / "model.onnx"), q, [x[:7]], rounds=3)
    assert proof.integer_layers and proof.parity.sqnr > 40


def test_a_plain_recurrent_layer_keeps_the_length_that_varies(tmp_path):
    torch.manual_seed(0)
    q = hs.prepare(Recurrent(num_layers=2).eval(), torch.randn(4, 5, 8), dynamic={"x": {1: "tokens"}})
    file = DeployedModel(hs.export_float(q, tmp_path / "float.onnx"), q.captured.in_spec, q.captured.out_spec)
    with q.using(Mode.FLOAT), torch.no_grad():
        for length in (1, 5, 9):
            x = torch.randn(3, length, 8)
            assert torch.allclose(file(x), q(x), atol=1e-6)


@pytest.mark.parametrize("bits", [10, 16])
@pytest.mark.parametrize("shape", [(64,), (5, 64)])
def test_wide_activations_are_not_rounded_to_eight_bits(bits, shape, tmp_path):
    """ONNX Runtime fuses a DequantizeLinear and a MatMul to a product in groups, whose sums take bytes."""
    torch.manual_seed(0)
    x = torch.randn(8, *shape)
    q = hs.prepare(
        nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16)), x, hs.Recipe.uniform(8, bits)
    )
    hs.observe(q, [x])
    hs.calibrate(q)
    assert hs.verify(hs.export_onnx(q, tmp_path / "m.onnx"), q, [x], rounds=3).parity.sqnr > 80
