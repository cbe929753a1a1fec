"""Weights computed from parameters, and operators computed twice."""

import torch
from torch import nn
from torch.nn import functional as F

import halfstep as hs
from halfstep.fake_quantize import Mode
from halfstep.fidelity.compare import compare
from halfstep.runtime.deployed import DeployedModel, inspect_kernels


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 8, 3, padding=1))
        self.b, self.fc = nn.Conv2d(8, 8, 1), nn.utils.parametrizations.weight_norm(nn.Linear(8, 4))

    def forward(self, x):
        x = self.b(F.relu(self.a(x)) + self.a(x))
        return self.fc(x.mean((2, 3)))


def test_computed_weights_and_repeated_calls_run_on_integers(tmp_path):
    torch.manual_seed(0)
    model, x = Both().eval(), torch.randn(4, 3, 8, 8)
    q = hs.prepare(model, x)
    with q.using(Mode.FLOAT), torch.no_grad():
        torch.testing.assert_close(q(x), model(x))
    assert len(q.layer_names) == 3  # the second call of `a` gives what the first gave
    weights = {name: q.weight(name) for name in q.sites if name.endswith("weight")}
    assert torch.equal(weights["a.weight"], model.a.weight)
    hs.observe(q, [x])
    hs.calibrate(q)
    path = hs.export_onnx(q, tmp_path / "model.onnx")
    kernels = inspect_kernels(path)
    assert kernels.floating == ()
    assert kernels.counts["QLinearConv"] == 2 and kernels.counts["QLinearAdd"] == 1
    assert kernels.counts["QGemm"] == 1
    assert compare(q, DeployedModel(path), [x]).sqnr > 35


def test_positions_that_the_model_computes_are_no_weight():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(8, 16), nn.Linear(16, 4)
            self.register_buffer("places", torch.arange(8).unsqueeze(0))

        def forward(self, x):
            return self.head(x + self.table(self.places[:, 2:6]))

    q = hs.prepare(Positions().eval(), torch.randn(2, 4, 16))
    assert q.layer_names == ["table", "head"]
    assert set(q.sites) >= {"table.weight", "head.weight"}
