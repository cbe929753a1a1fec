"""Weights alone: what ONNX Runtime makes of the file, that it answers as the simulation, and what it weighs.

An export costs a second, so one network carries a layer for every format.
"""

import onnx
import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep.fake_quantize import Mode
from halfstep.fidelity.compare import compare
from halfstep.formats import Codebook
from halfstep.formats.floating import E4M3
from halfstep.runtime.deployed import DeployedModel, inspect_kernels
from tests.export.mixed_network import deployed, quantized

#: Both sides compute in float32 and differ in the order of sums only.
ROUND_OFF = 100.0


class Branches(nn.Module):
    """A layer for each format side by side; answers with a list."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x):
        return [layer(x) for layer in self.layers]


def branches(specs, make, inputs, path):
    """A network of one layer for each weight spec, exported: the model, the optimised graph's counts, the SQNRs."""
    torch.manual_seed(0)
    model = Branches([make() for _ in specs]).eval()
    recipe = hs.Recipe.int8()
    for index, spec in enumerate(specs):
        recipe = recipe.override(f"layers.{index}", hs.LayerSpec(spec, None))
    q = quantized(recipe, model, inputs)
    hs.export_onnx(q, path)
    with q.using(Mode.QUANTIZE):
        simulation, file = q(inputs), DeployedModel(path, q.captured.in_spec, q.captured.out_spec)(inputs)
    noise = [(a - b).square().sum() / a.square().sum() for a, b in zip(simulation, file, strict=True)]
    return q, inspect_kernels(path).counts, [-10 * torch.log10(n.clamp_min(1e-30)).item() for n in noise]


GROUPED = {
    "4 bits in groups": hs.TensorSpec(4, hs.PerGroup(1, 32)),
    "3 bits": hs.TensorSpec(3, hs.PerGroup(1, 16)),
    "4 bits per channel": hs.TensorSpec(4),
    "4 bits, one scale": hs.TensorSpec(4, hs.PerTensor()),
    "affine": hs.TensorSpec(hs.Integer(4, signed=False, symmetric=False), hs.PerGroup(1, 32)),
    "signed affine": hs.TensorSpec(hs.Integer(4, symmetric=False), hs.PerGroup(1, 32)),
    "3 bits, unsigned": hs.TensorSpec(hs.Integer(3, signed=False), hs.PerGroup(1, 32)),
    "groups that do not divide the length": hs.TensorSpec(4, hs.PerGroup(1, 64)),
}


@pytest.mark.parametrize("bias", [True, False])
def test_few_bits_become_matmul_n_bits_in_float(bias, tmp_path):
    path, x = tmp_path / "model.onnx", torch.randn(4, 5, 96)
    _, counts, sqnr = branches(GROUPED.values(), lambda: nn.Linear(96, 24, bias), x, path)
    assert counts == {"MatMulNBits": len(GROUPED)}
    assert min(sqnr) > ROUND_OFF, dict(zip(GROUPED, sqnr, strict=True))
    nodes = onnx.load(path).graph.node
    levels = {a.i for n in nodes for a in n.attribute if a.name == "accuracy_level"}
    assert levels == {1}  # activations stay float: the runtime's own choice would be 4


UNPACKED = {  # and how many bits each takes in the file
    "8 bits": (hs.TensorSpec(8, hs.PerGroup(1, 32)), 8),
    "8 bits per channel": (hs.TensorSpec(8), 8),
    "7 bits": (hs.TensorSpec(7, hs.PerGroup(1, 32)), 7),
    "6 bits, affine": (hs.TensorSpec(hs.Integer(6, False, False), hs.PerGroup(1, 32)), 6),
    "5 bits, odd groups": (hs.TensorSpec(5, hs.PerGroup(1, 20)), 5),
    "3 bits, odd groups": (hs.TensorSpec(3, hs.PerGroup(1, 20)), 3),
    "2 bits": (hs.TensorSpec(2, hs.PerGroup(1, 32)), 2),
    "16 bits": (hs.TensorSpec(16), 16),
    "mid-rise": (hs.TensorSpec(hs.Integer(3, mid_rise=True), hs.PerGroup(1, 32)), 3),
    "NF4": (hs.TensorSpec(Codebook.nf4(), hs.PerGroup(1, 64)), 4),
    "binary": (hs.TensorSpec(Codebook.binary(), hs.PerChannel()), 1),
    "ternary": (hs.TensorSpec(Codebook.ternary()), 2),
    "a rule": (hs.TensorSpec(Codebook.rule([-0.05, 0, 0.01], [-0.02, 0.005], ties_up=True)), 2),
    "mu-law, 9 bits": (hs.TensorSpec(Codebook.mu_law(9)), 16),
    "fp8": (hs.TensorSpec(E4M3), 8),
}


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_other_formats_are_stored_packed_and_run_as_floats(kind, tmp_path):
    path, x = tmp_path / "model.onnx", torch.randn(4, 8, 96)
    make = {"linear": lambda: nn.Linear(96, 191), "conv": lambda: nn.Conv1d(8, 767, 3)}[kind]
    specs = [spec for spec, _ in UNPACKED.values()]
    q, counts, sqnr = branches(specs, make, x, path)
    assert counts == {"Conv": len(specs)} if kind == "conv" else counts["MatMul"] == len(specs)
    assert not {"Gather", "Cast", "Mul", "BitShift"} & counts.keys()  # computed at load
    assert min(sqnr) > ROUND_OFF, dict(zip(UNPACKED, sqnr, strict=True))
    tensors = onnx.load(path).graph.initializer
    for index, (name, (_, bits)) in enumerate(UNPACKED.items()):
        stored = [
            t for t in tensors if t.name.startswith(f"layers.{index}.weight") and "_quantized" in t.name
        ]
        values = q.weight(f"layers.{index}.weight").numel()
        assert values * bits / 8 <= sum(len(t.raw_data) for t in stored) < values * bits / 8 + 32, name


def test_a_table_for_each_channel_is_looked_up_there(tmp_path):
    torch.manual_seed(0)
    values = torch.randn(24, 4).sort(1).values
    model, x = nn.Linear(96, 24), torch.randn(4, 96)
    model.weight.data = torch.randn(24, 96)
    q = quantized(hs.Recipe.codebook(Codebook(values, scaled=False), None, hs.PerChannel()), model, x)
    _, sqnr = deployed(q, tmp_path / "model.onnx", x)
    assert sqnr > ROUND_OFF
    rows = q.sites["weight"](model.weight)
    assert all(set(row.tolist()) <= set(table.tolist()) for row, table in zip(rows, values, strict=True))


def test_embedding_of_8_bits_dequantizes_only_the_rows_it_reads(tmp_path):
    q = quantized(hs.Recipe.int8())
    counts, sqnr = deployed(q, tmp_path / "model.onnx")
    assert counts["GatherBlockQuantized"] == 1
    assert q.sites["table.weight"].granularity == hs.PerChannel(0)
    assert sqnr > 35


def test_a_weight_shared_by_table_and_product_is_stored_as_each_kernel_wants_it(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(64, 48)

        def forward(self, tokens):
            return torch.tanh(self.table(tokens)) @ self.table.weight.T

    torch.manual_seed(0)
    tokens = torch.arange(12).reshape(2, 6)
    for recipe in (hs.Recipe.weight_only(4, 32), hs.Recipe.weight_only(5, None)):
        q = quantized(recipe, Tied().eval(), tokens)
        counts, sqnr = deployed(q, tmp_path / "model.onnx", tokens)
        assert counts["GatherBlockQuantized"] == 1
        assert sqnr > ROUND_OFF


def test_few_bits_beside_8_bit_activations_run_on_integer_kernels_and_weigh_their_bits(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 64, 3), nn.ReLU(), nn.Conv2d(64, 32, 3), nn.Flatten(), nn.Linear(512, 32)
    )
    x = torch.randn(4, 8, 8, 8)
    weights = 8 * 64 * 9 + 64 * 32 * 9 + 512 * 32
    for bits in (3, 4):
        q = quantized(hs.Recipe.uniform(bits, 8, ends=None), model.eval(), x)
        counts, sqnr = deployed(q, tmp_path / "model.onnx", x)
        assert (counts["QLinearConv"], counts["QGemm"]) == (2, 1)
        assert sqnr > 30
        size = (tmp_path / "model.onnx").stat().st_size
        assert (
            weights * bits / 8 < size < weights * bits / 8 + 15_000
        )  # what else a file of three layers holds


def test_groups_beside_fixed_activations_keep_both_roundings_and_no_third(tmp_path):
    torch.manual_seed(0)
    q = quantized(hs.Recipe.uniform(4, 8, hs.PerGroup(1, 32)), nn.Linear(64, 8).eval(), torch.randn(4, 64))
    counts, sqnr = deployed(q, tmp_path / "model.onnx", torch.randn(4, 64))
    assert counts == {"QuantizeLinear": 1, "DequantizeLinear": 1, "MatMulNBits": 1}
    assert sqnr > ROUND_OFF


def test_a_codebook_between_quantizers_is_not_rounded_to_8_bits_by_the_runtime(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 64, 3), nn.ReLU(), nn.Conv2d(64, 8, 3)
    )
    x = torch.randn(4, 3, 12, 12)
    recipe = hs.Recipe.int8().override("2", hs.LayerSpec(hs.TensorSpec(Codebook.nf4()), hs.TensorSpec(8)))
    q = quantized(recipe, model.eval(), x)
    counts, sqnr = deployed(q, tmp_path / "model.onnx", x)
    assert counts["QLinearConv"] == 2
    assert sqnr > 35


def test_few_bits_agree_at_any_batch(tmp_path):
    q = quantized(hs.Recipe.weight_only(4, 32))
    counts, _ = deployed(q, tmp_path / "model.onnx")
    assert (counts["MatMulNBits"], counts["GatherBlockQuantized"], counts["FusedConv"]) == (4, 1, 1)
    file = DeployedModel(tmp_path / "model.onnx")
    for batch in (1, 3, 16):
        tokens = torch.randint(0, 100, (batch, 7))
        assert compare(q, file, [tokens]).sqnr > ROUND_OFF
