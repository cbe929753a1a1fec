"""Activations split into parts with integer kernels."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfstep as hs
from halfstep.export.verify import layer_fates
from halfstep.fake_quantize import Mode
from halfstep.fidelity.compare import compare
from halfstep.graph.capture import capture
from halfstep.graph.fold import decompose
from halfstep.runtime.deployed import DeployedModel, inspect_kernels


class Gates(nn.Module):
    """HardSwish, SiLU and squeeze-and-excite between convs: integer throughout."""

    def __init__(self):
        super().__init__()
        self.a, self.act = nn.Conv2d(3, 8, 3, padding=1), nn.Hardswish()
        self.b, self.c = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.gate, self.fc = nn.Hardsigmoid(), nn.Linear(8, 4)

    def forward(self, x):
        x = self.act(self.a(x))
        x = F.silu(self.b(x))
        x = x * self.gate(self.c(F.adaptive_avg_pool2d(x, 1)))
        return self.fc(x.mean((2, 3)))


@pytest.fixture(scope="module")
def quantized():
    torch.manual_seed(0)
    x = 3 * torch.randn(8, 3, 16, 16)
    q = hs.prepare(Gates().eval(), x)
    hs.observe(q, [x])
    hs.calibrate(q)
    return q, x


def test_only_the_kinds_asked_for_are_split():
    captured = decompose(capture(Gates().eval(), torch.randn(2, 3, 16, 16)), {"silu"})
    targets = [node.target for node in captured.graph.nodes]
    assert torch.ops.aten.hardswish.default in targets
    assert torch.ops.aten.silu.default not in targets


def test_the_parts_carry_the_modules_name(quantized):
    q, x = quantized
    names = [name for name in q.sites if not name.endswith("weight")]
    assert names[:6] == ["x", "a", "act.hardsigmoid", "act.mul", "b", "sigmoid"]
    model = Gates().eval()
    q = hs.prepare(model, x)
    with q.using(Mode.FLOAT), torch.no_grad():
        torch.testing.assert_close(q(x), model(x))


def test_gates_run_on_integers_and_answer_as_simulated(quantized, tmp_path):
    q, x = quantized
    path = hs.export_onnx(q, tmp_path / "gates.onnx")
    kernels = inspect_kernels(path)
    wanted = {
        "QLinearConv": 3,
        "QLinearAdd": 2,  # the two HardSigmoids
        "QLinearMul": 3,
        "QLinearGlobalAveragePool": 2,
        "QLinearSigmoid": 1,
        "QGemm": 1,
        "QuantizeLinear": 1,
    }
    assert wanted.items() <= kernels.counts.items()
    assert set(kernels.counts) - set(wanted) == {"Transpose", "Reshape"}
    assert all(fate.integer for fate in layer_fates(q, kernels))
    assert compare(q, DeployedModel(path, q.captured.in_spec, q.captured.out_spec), [x]).sqnr > 40


def test_a_gate_whose_codes_do_not_end_with_it_stays_as_it_is(quantized, tmp_path):
    q, x = quantized
    q.sites["act.hardsigmoid"].set_range(torch.tensor(0.0), torch.tensor(1.5))  # does not clip at 1
    path = hs.export_onnx(q, tmp_path / "wide.onnx")
    counts = inspect_kernels(path).counts
    assert counts["HardSigmoid"] == 1 and counts["QLinearAdd"] == 1
    assert compare(q, DeployedModel(path, q.captured.in_spec, q.captured.out_spec), [x]).sqnr > 40
