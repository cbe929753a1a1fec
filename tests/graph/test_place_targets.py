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
    q = hs.prepare(Residual(), torch.randn(2, 4, 8, 8), target=target)
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
