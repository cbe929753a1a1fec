"""Placement per target: the same modules, the sites that each runtime wants."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfstep as hs


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.skip, self.fc = nn.Conv2d(4, 4, 1), nn.Linear(4, 4)

    def forward(self, x):
        x = F.relu(self.a(x))
        x = F.relu(self.b(x) + x)
        x = F.relu(self.b(x) + self.skip(x))
        return self.fc(F.max_pool2d(x, 2).mean((2, 3)))


SITES = {
    # every result is quantized, the ReLU absorbed
    "onnxruntime": ["x", "relu", "b", "relu:2", "b:2", "skip", "relu:3", "global_average_pool"],
    # inputs of layers and pools; of two branches the later one takes the other in
    "openvino": ["x", "relu", "relu:2", "b:2", "relu:3", "global_average_pool"],
    "tensorrt": ["x", "relu", "relu:2", "b:2", "relu:3", "global_average_pool"],
}


@pytest.mark.parametrize("target", SITES)
def test_residual(target):
    q = hs.prepare(Residual(), torch.randn(2, 4, 8, 8), target=target)
    assert [name for name in q.sites if not name.endswith("weight")] == SITES[target], q


@pytest.mark.parametrize(
    ("target", "activations"),
    [
        ("onnxruntime", hs.Integer(8, signed=False, symmetric=False)),
        ("openvino", hs.Integer(8, signed=False, symmetric=False)),
        ("tensorrt", hs.Integer(8, signed=True, symmetric=True, narrow=False)),
    ],
)
def test_formats(target, activations):
    q = hs.prepare(Residual(), torch.randn(2, 4, 8, 8), hs.Recipe.int8(portable=False), target)
    assert q.sites["relu"].format == activations
    assert q.sites["a.weight"].format == hs.Integer(8, signed=True, symmetric=True)
    assert q.sites["a.weight"].granularity == hs.PerChannel(0)


class Signs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(8, 4, 1)
        self.up, self.fc = nn.ConvTranspose2d(4, 4, 2, 2), nn.Linear(4, 4)

    def forward(self, x):
        x = F.relu(self.a(x))
        y = F.max_pool2d(F.relu6(self.b(x)), 2) + 1.0
        y = torch.cat([F.relu(self.a(x)), self.up(y)], 1)
        return self.fc(self.c(y).clamp(-1, 1).mean((2, 3)))


def test_codes_are_unsigned_where_nothing_can_be_negative():
    q = hs.prepare(Signs(), torch.randn(2, 4, 8, 8), target="openvino")
    formats = {name: str(site.format) for name, site in q.sites.items() if not name.endswith("weight")}
    assert formats == {
        "x": "s8 scale full",
        "relu": "u8 affine",
        "add": "u8 affine",
        "relu:2": "s8 scale full",  # beside one that may be negative
        "up": "s8 scale full",
        "concat": "u8 affine",  # whatever its sign
        "clip:2": "s8 scale full",
        "global_average_pool": "s8 scale full",
    }
    assert {
        str(s.format)
        for n, s in hs.prepare(Signs(), torch.randn(2, 4, 8, 8)).sites.items()
        if "weight" not in n
    } == {"u8 affine"}


def test_an_activation_fused_in_float_hands_codes_on():
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            y = F.gelu(self.a(x))
            return self.b(self.b(y) + y)

    sites = {
        name: [
            s for s in hs.prepare(Gated(), torch.randn(2, 4, 8, 8), target=name).sites if "weight" not in s
        ]
        for name in ("onnxruntime", "openvino")
    }
    assert sites == {
        "onnxruntime": ["x", "a", "gelu", "b", "add", "b:2"],
        "openvino": ["x", "gelu", "add"],
    }
    q = hs.prepare(Gated(), torch.randn(2, 4, 8, 8), target="openvino")
    assert [op.reason for op in q.placement.float_operators] == [
        "is computed in float inside the layer before it, at no cost; that layer stays integer"
    ]


def test_a_branch_that_is_read_elsewhere_is_not_taken_in():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x):
            y = self.a(x)
            return self.b(y + x) + y.mean()

    q = hs.prepare(Shared(), torch.randn(2, 4, 8, 8), target="openvino")
    assert [name for name in q.sites if not name.endswith("weight")] == ["x", "a", "add"]


class Widths(nn.Module):
    """Convs (one depthwise, one with two outputs of each channel), products of activations, a table, a linear layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.deep = nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=8)
        self.twice, self.table, self.fc = nn.Conv2d(8, 16, 1, groups=8), nn.Embedding(9, 16), nn.Linear(16, 4)

    def forward(self, x, ids):
        x = self.twice(F.relu(self.deep(F.relu(self.conv(x))))).flatten(2).transpose(1, 2)
        x = x + self.table(ids)[:, None]
        return self.fc((x @ x.transpose(1, 2)) @ x)


def weight_bits(recipe, target="onnxruntime", **choices):
    q = hs.prepare(Widths(), (torch.randn(2, 4, 8, 8), torch.tensor([1, 2])), recipe, target)
    for name, layers in choices.items():
        setattr(q, name, layers)
    return {
        site.name.removesuffix(".weight"): site.format.bits for site in q.placement.sites if site.is_weight
    }


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
def test_portable_weights_have_7_bits_where_two_products_may_exceed_16(target):
    found = weight_bits(hs.Recipe.int8(portable=True), target)
    assert {name: bits for name, bits in found.items() if name != "table"} == {
        "conv": 7,
        "deep": 8,
        "twice": 7,
        "fc": 7,
    }
    assert found.get("table", 8) == 8
    assert set(weight_bits(hs.Recipe.int8(portable=False), target).values()) == {8}


@pytest.mark.parametrize(
    ("target", "portable"), [("openvino", True), ("openvino", False), ("onnxruntime", True)]
)
def test_a_portable_recipe_leaves_products_of_two_signed_activations_in_float(target, portable):
    example = (torch.randn(2, 4, 8, 8), torch.tensor([1, 2]))
    q = hs.prepare(Widths(), example, hs.Recipe.int8(portable=portable), target)
    reasons = {layer.name: layer.reason for layer in q.layers}
    left = [name for name in ("matmul", "matmul:2") if "16 bits" in reasons[name]]
    assert left == (["matmul", "matmul:2"] if (target, portable) == ("openvino", True) else [])
    assert not reasons["fc"]


def test_portable_weights_beside_other_formats():
    usual = weight_bits(hs.Recipe.uniform(8, 4, ends=None, portable=True))
    assert usual["conv"] == 8  # codes of 4 bits: 2 * 15 * 127 fits
    assert weight_bits(hs.Recipe.uniform(4, 8, ends=None, portable=True))["conv"] == 4
    assert weight_bits(hs.Recipe.weight_only(8, None))["fc"] == 8
    assert weight_bits(hs.Recipe.dynamic(portable=True))["fc"] == 7
    assert weight_bits(hs.Recipe.dynamic(8, group=16, portable=True))["fc"] == 8  # groups are added otherwise
    assert set(weight_bits(hs.Recipe.int8(portable=True), "tensorrt").values()) == {8}


@pytest.mark.parametrize("step", ["float_layers", "int16_layers", "dynamic_layers"])
def test_a_weight_keeps_its_portable_format_whatever_layers_are_elsewhere(step):
    usual = weight_bits(hs.Recipe.int8(portable=True))
    found = weight_bits(hs.Recipe.int8(portable=True), **{step: ["conv", "fc"]})
    assert found == {name: bits for name, bits in usual.items() if name in found}


class Attending(nn.Module):
    """Attention between linear layers, with a mask or without."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x, mask=None):
        q, k, v = (
            part(x).unflatten(-1, (2, 4)).transpose(1, 2) for part in (self.query, self.key, self.value)
        )
        return self.out(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(("portable", "masked"), [(False, False), (True, False), (False, True)])
def test_on_openvino_attention_reads_queries_and_keys_in_codes(portable, masked):
    """Unless it has a mask, which costs the runtime its one kernel, or two signed codes may saturate elsewhere."""
    example = (torch.randn(2, 5, 8), torch.zeros(5, 5))[: 1 + masked]
    q = hs.prepare(Attending(), example, hs.Recipe.int8(portable=portable), "openvino")
    (attention,) = q.graph.find_nodes(
        op="call_function", target=torch.ops.aten.scaled_dot_product_attention.default
    )
    coded = {position.value for site in q.placement.sites for position in site.positions}
    integer = not (portable or masked)
    assert [value in coded for value in attention.args[:3]] == [integer, integer, False]
    assert [follower.operator.kind for follower in q.placement.followers] == ["attention"] * integer


@pytest.mark.parametrize("name", ["key", "out"])
def test_attention_between_float_layers_is_float(name):
    recipe = hs.Recipe.int8(portable=False).override(name, None)
    q = hs.prepare(Attending(), torch.randn(2, 5, 8), recipe, "openvino")
    (reason,) = [op.reason for op in q.placement.float_operators if op.operator.kind == "attention"]
    assert reason == "is not between integer operators: quantizing for it alone would cost time"
