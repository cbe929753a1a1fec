"""Tails: what stays in float behind the last layers, by rule and on request."""

import onnx
import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep.calibration.diagnostics import tails
from halfstep.errors import ArgumentError
from halfstep.fidelity.compare import compare
from halfstep.runtime.deployed import DeployedModel


class Decode(nn.Module):
    """Distances as expectations, boxes around anchors, and the scores beside them."""

    def __init__(self, bins=4):
        super().__init__()
        self.expectation = nn.Conv2d(bins, 1, 1, bias=False)
        self.expectation.weight.data = torch.arange(float(bins)).reshape(1, bins, 1, 1)
        self.register_buffer("anchors", torch.arange(16.0) + 0.5)

    def forward(self, boxes, scores):
        sides = boxes.flatten(2).unflatten(1, (4, 4)).transpose(1, 2).softmax(1)
        sides = self.expectation(sides).squeeze(1)
        ends = torch.cat([self.anchors - sides[:, :2], self.anchors + sides[:, 2:]], 1)
        return torch.cat([ends * 32, scores.flatten(2).sigmoid()], 1)


class Detector(nn.Module):
    """Heads on a small backbone, decoding, and what is chosen of it; a layer that looks at the boxes once more."""

    def __init__(self, choosing=True):
        super().__init__()
        self.choosing = choosing
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1), nn.ReLU()
        )
        self.boxes, self.scores, self.decode = nn.Conv2d(8, 16, 1), nn.Conv2d(8, 3, 1), Decode()
        self.again = nn.Linear(7, 7)

    def forward(self, x):
        y = self.backbone(x)
        found = self.decode(self.boxes(y), self.scores(y)).transpose(1, 2)
        if not self.choosing:  # ranks that rounding decides would make another answer
            return self.again(found)
        best = found[..., 4:].amax(-1).topk(5).indices
        return self.again(found.gather(1, best[..., None].expand(-1, -1, 7)))


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    return Detector().eval()


def reasons(q):
    return {each.name: each.reason for each in (*q.placement.layers, *q.placement.float_operators)}


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_the_expectation_of_a_softmax_is_decoding(detector, target):
    q = hs.prepare(detector, torch.randn(2, 1, 8, 8), target=target)
    why = reasons(q)
    assert why["decode.expectation"].startswith("computes the expectation of a softmax")
    assert why["decode.concat"] == why["decode.expectation"]
    assert not any(site.startswith("decode") for site in q.sites)
    assert not why["again"]  # layers behind the decoding are layers as any other
    (sentence,) = tails(q)
    assert sentence.startswith("decode.expectation, ")
    assert "decode.concat" in sentence


def test_what_is_behind_a_named_module_is_float(tmp_path):
    q = hs.prepare(Detector(choosing=False).eval(), torch.randn(2, 1, 8, 8), float_from="decode")
    why = reasons(q)
    behind = "is behind 'decode', from where on all is left in float"
    assert {why[name] for name in ("decode.expectation", "decode.concat", "again")} == {behind}
    assert {layer.name for layer in q.layers if not layer.reason} == {
        "backbone.0",
        "backbone.2",
        "boxes",
        "scores",
    }
    hs.observe(q, [torch.randn(8, 1, 8, 8)])
    hs.calibrate(q)
    path = hs.export_onnx(q, tmp_path / "model.onnx")
    nodes = onnx.load(path).graph.node
    codes = [node.input[0] for node in nodes if node.op_type == "QuantizeLinear"]
    assert not any("decode" in name for name in codes)
    deployed = DeployedModel(path, q.captured.in_spec, q.captured.out_spec)
    assert compare(q, deployed, [torch.randn(4, 1, 8, 8)]).sqnr > 60


def test_a_single_operator_may_be_named(detector):
    q = hs.prepare(detector, torch.randn(2, 1, 8, 8), float_from=["again", "decode.sigmoid"])
    why = reasons(q)
    assert "'decode.sigmoid'" in why["decode.sigmoid"]
    assert "behind" in why["again"]
    assert not why["scores"]


def test_the_last_layers_are_those_before_the_tail(detector):
    recipe = hs.Recipe.uniform(2, 8, portable=False)
    bits = {
        name: site.format.bits
        for name, site in hs.prepare(
            detector, torch.randn(2, 1, 8, 8), recipe, float_from="decode"
        ).sites.items()
    }
    assert bits["boxes.weight"] == bits["scores.weight"] == bits["backbone.0.weight"] == 8
    assert bits["backbone.2.weight"] == 2


def test_names_that_are_not_there(detector):
    with pytest.raises(
        ArgumentError, match=r"float_from: got 'decoder', needed a module or an operator .* 'decode'"
    ):
        hs.prepare(detector, torch.randn(2, 1, 8, 8), float_from="decoder")


def test_a_tail_is_part_of_what_a_run_is_known_by(detector):
    x = torch.randn(2, 1, 8, 8)
    contents = {
        hs.prepare(detector, x, float_from=name).captured.content for name in (None, "decode", "again")
    }
    assert len(contents) == 3
