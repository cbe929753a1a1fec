"""Placement on onnxruntime: small modules and the sites they get."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfstep as hs
from halfstep.errors import RecipeError


class Net(nn.Module):
    def __init__(self, forward):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, 4)
        self.body = forward

    def forward(self, x):
        return self.body(self, x)


def placed(forward):
    q = hs.prepare(Net(forward), torch.randn(2, 4, 8, 8))
    return [name for name in q.sites if not name.endswith("weight")], q


CASES = {
    "conv, relu, conv": (lambda m, x: m.b(F.relu(m.a(x))), ["x", "relu", "b"]),
    "conv, relu6, conv": (lambda m, x: m.b(F.relu6(m.a(x))), ["x", "clip", "b"]),
    "conv, clamp, conv": (lambda m, x: m.b(m.a(x).clamp(min=0)), ["x", "clip", "b"]),
    "conv, max pool, conv share a scale": (lambda m, x: m.b(F.max_pool2d(m.a(x), 2)), ["x", "a", "b"]),
    "conv, average pool, conv": (lambda m, x: m.b(F.avg_pool2d(m.a(x), 2)), ["x", "a", "average_pool", "b"]),
    "residual": (lambda m, x: m.b(F.relu(m.a(x) + x)), ["x", "a", "relu", "b"]),
    "gate": (lambda m, x: m.b(m.a(x) * torch.sigmoid(m.b(x))), ["x", "a", "b", "sigmoid", "mul", "b:2"]),
    "concat": (lambda m, x: m.b(torch.cat([m.a(x), x], 1)[:, :4]), ["x", "a", "concat", "b"]),
    "spatial mean, linear": (lambda m, x: m.fc(m.a(x).mean((2, 3))), ["x", "a", "global_average_pool"]),
    "add of a number stays float": (lambda m, x: m.b(m.a(x) + 1.0), ["x", "a", "add", "b"]),
    "hardswish stays float": (lambda m, x: m.b(F.hardswish(m.a(x))), ["x", "a", "hardswish", "b"]),
    "softmax stays float": (
        lambda m, x: m.fc(m.a(x).softmax(1).mean((2, 3))),
        ["x", "a", "global_average_pool"],
    ),
    "linear at the end needs no output quantizer": (lambda m, x: m.fc(x.flatten(2)[:, :, :4]), ["reshape"]),
}


@pytest.mark.parametrize("name", CASES)
def test_sites(name):
    forward, expected = CASES[name]
    sites, q = placed(forward)
    assert sites == expected, q


def test_product_of_two_activations_is_a_layer():
    sites, q = placed(lambda m, x: m.fc(x.flatten(2)[:, :, :4]) @ x.flatten(2)[:, :, :4].transpose(1, 2))
    assert q.layer_names == ["fc", "matmul"]
    assert len(sites) == 3


def test_a_float_layer_keeps_what_its_neighbours_need_and_nothing_else():
    _, q = placed(lambda m, x: m.b(F.relu(m.a(x))))
    q.float_layers = ["b"]
    assert list(q.sites) == ["x", "relu", "a.weight"]
    assert [layer.reason for layer in q.layers] == ["", "left in float on request"]
    q.float_layers = []
    assert list(q.sites) == ["x", "relu", "b", "a.weight", "b.weight"]


def test_few_bits_of_activations_are_placed_before_layers_only():
    q = hs.prepare(Net(CASES["residual"][0]), torch.randn(2, 4, 8, 8), recipe=hs.Recipe.uniform(8, 4))
    assert [name for name in q.sites if not name.endswith("weight")] == ["x", "relu"]


def test_formats_of_the_target():
    _, q = placed(CASES["residual"][0])
    assert q.sites["x"].format == hs.Integer(8, signed=False, symmetric=False)
    assert q.sites["a.weight"].format == hs.Integer(8, signed=True, symmetric=True)
    assert q.sites["a.weight"].granularity == hs.PerChannel(0)


def test_a_pattern_without_a_layer_names_the_nearest():
    recipe = hs.Recipe.int8().override("fcc", None)
    with pytest.raises(RecipeError, match=r"'fcc' matches no layer; the nearest names are 'fc'"):
        hs.prepare(Net(CASES["spatial mean, linear"][0]), torch.randn(2, 4, 8, 8), recipe=recipe)


def test_printing_shows_every_site_and_float_layer():
    _, q = placed(CASES["conv, relu, conv"][0])
    q.float_layers = ["b"]
    text = repr(q)
    assert "1 of 2 layers quantized, 3 sites" in text
    assert "b         float: left in float on request" in text
    hs.observe(q, [torch.randn(2, 4, 8, 8)])
    hs.calibrate(q)
    assert "a.weight  s8 scale, per channel of axis 0, range" in repr(q)
