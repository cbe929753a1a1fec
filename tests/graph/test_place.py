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
    q = hs.prepare(Net(forward), torch.randn(2, 4, 8, 8), hs.Recipe.int8(portable=False))
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
    "hardswish is a gate": (lambda m, x: m.b(F.hardswish(m.a(x))), ["x", "a", "hardsigmoid", "mul", "b"]),
    "gelu stays float": (lambda m, x: m.b(F.gelu(m.a(x))), ["x", "a", "gelu", "b"]),
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
    assert sites == ["reshape", "fc"]


def test_a_float_layer_keeps_what_its_neighbours_need_and_nothing_else():
    _, q = placed(lambda m, x: m.b(F.relu(m.a(x))))
    q.float_layers = ["b"]
    assert list(q.sites) == ["x", "relu", "a.weight"]
    assert [layer.reason for layer in q.layers] == ["", "left in float on request, or by a search"]
    q.float_layers = []
    assert list(q.sites) == ["x", "relu", "b", "a.weight", "b.weight"]


class Residual(nn.Module):
    """A stem, a residual block, a head."""

    def __init__(self, between):
        super().__init__()
        self.stem, self.body, self.head = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.between = between

    def forward(self, x):
        x = self.between(self.stem(x))
        return self.head(x + self.body(x))


@pytest.mark.parametrize("between", [nn.ReLU(), nn.Hardswish(), nn.MaxPool2d(2), nn.Identity()])
def test_a_residual_add_behind_a_float_layer_reads_the_codes_that_the_next_layer_needs_anyway(between):
    q = hs.prepare(Residual(between), torch.randn(2, 4, 8, 8))
    q.float_layers = ["stem"]
    assert [op.name for op in q.placement.followers] == ["add"]
    before, x = set(q.sites), torch.randn(4, 4, 8, 8)
    hs.observe(q, [x])
    hs.calibrate(q)
    q.float_layers = ["stem", "body"]  # nothing is in codes before the add now
    assert q.placement.followers == () and set(q.sites) < before


def test_a_residual_stream_that_float_operators_made_stays_float():
    q = hs.prepare(Residual(nn.LayerNorm(8)), torch.randn(2, 4, 8, 8))
    assert q.placement.followers == ()


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
    html = q._repr_html_()
    assert (
        html.count("<tr>") == len(repr(q).splitlines()) - 1
        and "s8 scale, per channel of axis 0, range" in html
    )


class Awkward(nn.Module):
    """Names that our own could hide, or that differ by a dot and an underscore only."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.layers_0 = nn.Linear(4, 4)
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.register_buffer("mask", torch.tensor([0.0, 0.0, 0.0, -float("inf")]))

    def forward(self, x):
        x = F.linear(self.layers_0(self.layers[1](self.layers[0](x))), self.weight)
        return (x + self.mask).softmax(-1)


def test_names_of_the_user_never_meet_ours():
    torch.manual_seed(0)
    model = Awkward().eval()
    q = hs.prepare(model, torch.randn(2, 4))
    hs.observe(q, [torch.randn(64, 4)])
    hs.calibrate(q)
    weights = {"layers.0.weight", "layers.1.weight", "layers_0.weight", "weight"}
    assert weights <= set(q.sites)
    assert len({id(site) for site in q.sites.values()}) == len(q.sites)
    assert set(dict(model.named_parameters())) == {n for n, _ in q.named_parameters()}
    x = torch.randn(8, 4)
    assert (q(x) - model(x)).abs().max() < 0.1
