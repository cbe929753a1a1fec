"""Ranges at run time: fused as ONNX Runtime fuses them, and simulated to the last rounding."""

import copy

import onnx
import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep.errors import ArgumentError
from halfstep.export.mismatch import OUTPUTS, agreements
from halfstep.fake_quantize import Mode
from halfstep.fidelity.compare import compare
from halfstep.runtime.deployed import DeployedModel
from tests.export.mixed_network import TOKENS, build, deployed, quantized

#: Integer sums are exact; what follows them is float32 in the same order.
EXACT = 120.0

#: Behind a float layer a value next to a tie may be rounded the other way: one code in thousands.
CODE_APART = 60.0


def test_products_fuse_to_the_kernels_with_run_time_ranges(tmp_path):
    q = quantized(hs.Recipe.dynamic())
    counts, sqnr = deployed(q, tmp_path / "model.onnx")
    assert counts["MatMulIntegerToFloat"] == 2  # two layers read one activation: it is quantized once
    assert counts["DynamicQuantizeLinear"] == 1
    assert counts["DynamicQuantizeMatMul"] == 2
    assert counts["FusedConv"] == 1
    assert not {"MatMul", "MatMulInteger", "Gemm", "Cast"} & counts.keys()
    assert sqnr > CODE_APART
    reasons = {layer.name: layer.reason for layer in q.layers}
    assert reasons["conv"] == "conv has no kernel on onnxruntime that takes ranges at run time; left in float"
    assert not reasons["first"]


@pytest.mark.parametrize("bits", [3, 4])
def test_few_bits_beside_run_time_ranges_run_on_the_same_kernels(bits, tmp_path):
    q = quantized(hs.Recipe.dynamic(bits), nn.Linear(96, 64).eval(), torch.randn(4, 96))
    counts, sqnr = deployed(q, tmp_path / "model.onnx", torch.randn(4, 96))
    assert counts == {"DynamicQuantizeMatMul": 1}
    assert sqnr > EXACT


GROUPS = (
    (8, 64, 8),
    (7, 32, 8),
    (4, 32, 4),
    (3, 16, 4),
    (2, 32, 2),
    (2, 16, 4),
)  # bits, group, the kernel's bits


def test_groups_sum_integers_in_matmul_n_bits(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(*[nn.Linear(96, 96) for _ in GROUPS]).eval(), torch.randn(4, 5, 96)
    recipe = hs.Recipe.int8()
    for index, (bits, group, _) in enumerate(GROUPS):
        recipe = recipe.override(str(index), hs.Recipe.dynamic(bits, group).default)
    q = quantized(recipe, model, x)
    counts, sqnr = deployed(q, tmp_path / "model.onnx", x)
    assert counts == {"MatMulNBits": len(GROUPS)}
    assert sqnr > CODE_APART
    nodes = onnx.load(tmp_path / "model.onnx").graph.node
    found = [{a.name: a.i for a in node.attribute} for node in nodes if node.op_type == "MatMulNBits"]
    assert {a["accuracy_level"] for a in found} == {4}
    assert [(a["block_size"], a["bits"]) for a in found] == [(group, bits) for _, group, bits in GROUPS]


def test_the_range_is_each_tensor_s_own(tmp_path):
    q = quantized(hs.Recipe.dynamic(), nn.Linear(32, 8).eval(), torch.randn(4, 32))
    file = DeployedModel(hs.export_onnx(q, tmp_path / "model.onnx"))
    for scale in (1e-3, 1.0, 1e4):  # calibrated ranges would be right for one of them
        x = torch.randn(4, 32) * scale
        with q.using(Mode.FLOAT):
            wanted = q(x)
        assert (q(x) - wanted).norm() / wanted.norm() < 0.03
        assert compare(q, file, [x]).sqnr > EXACT


@pytest.mark.parametrize("recipe", [hs.Recipe.dynamic(), hs.Recipe.dynamic(4, 32)], ids=["tensors", "groups"])
def test_file_and_simulation_are_compared_at_each_layer(recipe, tmp_path):
    q = quantized(recipe)
    found = agreements(q, hs.export_onnx(q, tmp_path / "model.onnx"), TOKENS)
    assert {agreement.site for agreement in found} == {*(n for n in q.sites if q.sites[n].dynamic), OUTPUTS}
    assert min(agreement.sqnr for agreement in found) > 80


def test_no_data_are_needed():
    q = hs.prepare(nn.Linear(32, 8).eval(), torch.randn(4, 32), recipe=hs.Recipe.dynamic())
    hs.calibrate(q)
    assert q.mode is Mode.QUANTIZE
    assert "input:dynamic  u8 affine, per tensor, range computed at run time" in repr(q)
    with pytest.raises(ArgumentError, match="'input:dynamic': its range is computed at run time"):
        q.sites["input:dynamic"].range()


def test_layers_go_from_fixed_to_run_time_ranges_and_back(tmp_path):
    q = quantized(hs.Recipe.int8())
    before = set(q.sites)
    first = deployed(q, tmp_path / "static.onnx")[0]
    q.dynamic_layers = ["head", "seco*"]
    assert q.dynamic_layers == {"head", "second"}
    assert "table:dynamic" in q.sites  # read by 'second', while 'first' keeps its fixed range
    assert "table" in q.sites
    counts, sqnr = deployed(q, tmp_path / "mixed.onnx")
    assert counts["DynamicQuantizeMatMul"] == 2
    assert first.get("DynamicQuantizeMatMul", 0) == 0
    assert sqnr > 35
    assert copy.deepcopy(q).dynamic_layers == q.dynamic_layers
    q.float_layers = ["second"]  # float wins
    assert "table:dynamic" not in q.sites
    q.float_layers, q.dynamic_layers = [], []
    assert set(q.sites) == before
    assert deployed(q, tmp_path / "back.onnx")[0] == first


def test_a_layer_behind_a_kernel_that_writes_codes_reads_those():
    model = nn.Sequential(nn.Conv1d(4, 4, 3), nn.ReLU(), nn.Linear(8, 8)).eval()
    q = hs.prepare(model, torch.randn(2, 4, 10))
    q.dynamic_layers = ["2"]
    assert [layer.sites for layer in q.layers] == [("input", "0.weight"), ("1", "2.weight")]
    # The conv has no such kernel: it falls to float, and the linear gets a range of its own.
    q.dynamic_layers = ["0", "2"]
    assert [layer.sites for layer in q.layers] == [(), ("1:dynamic", "2.weight")]


def test_gradients_pass_straight_through():
    q = quantized(hs.Recipe.dynamic(), nn.Linear(16, 4).eval(), torch.randn(4, 16))
    x = torch.randn(2, 16, requires_grad=True)
    q(x).sum().backward()
    weight = q.sites["weight"](q.weight("weight")).detach()
    torch.testing.assert_close(x.grad, weight.sum(0).expand(2, 16))


def test_infinite_inputs_name_the_site():
    q = quantized(hs.Recipe.dynamic(), nn.Linear(4, 4).eval(), torch.randn(4, 4))
    with pytest.raises(hs.HalfstepError, match="site 'input:dynamic': scale: got inf"):
        q(torch.full((2, 4), float("inf")))


def test_products_of_two_activations_stay_float():
    class Square(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x):
            return self.a(x) @ x.transpose(1, 2)

    q = hs.prepare(Square().eval(), torch.randn(2, 5, 8), recipe=hs.Recipe.dynamic())
    assert [layer.reason for layer in q.layers] == [
        "",
        "matmul has no kernel on onnxruntime that takes ranges at run time; left in float",
    ]


def test_the_same_bytes_for_the_same_model(tmp_path):
    recipe = hs.Recipe.weight_only(4, 32).override("first", hs.Recipe.dynamic(3).default)
    files = [hs.export_onnx(quantized(recipe, build()), tmp_path / f"{i}.onnx") for i in range(2)]
    assert files[0].read_bytes() == files[1].read_bytes()
