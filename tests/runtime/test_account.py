"""Which nodes of a file are float, and why, in words."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfstep as hs
from halfstep.export.verify import float_fates
from halfstep.runtime.deployed import inspect_kernels
from halfstep.runtime.file import float_nodes
from halfstep.targets import TARGETS


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Conv2d(4, 4, 1) for _ in range(4))
        self.act, self.norm, self.fc = nn.GELU(), nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, x):
        x = self.act(self.a(x))
        x = self.d(F.relu(self.b(x) + self.c(x)))
        y = self.norm(x.flatten(2).transpose(1, 2))
        return self.fc(y).softmax(-1)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    torch.manual_seed(0)
    x = torch.randn(2, 4, 8, 8)
    q = hs.prepare(Net().eval(), x, recipe=hs.Recipe.int8().override("c", None))
    hs.observe(q, [x])
    hs.calibrate(q)
    return q, hs.export_onnx(q, tmp_path_factory.mktemp("account") / "model.onnx")


def test_every_float_node_says_why(exported):
    _, path = exported
    nodes = float_nodes(path, inspect_kernels(path), TARGETS["onnxruntime"])
    assert [(node.name, node.operator) for node in nodes] == [
        ("act", "Gelu"),
        ("c", "Conv"),
        ("add", "Add"),
        ("norm", "LayerNormalization"),
        ("softmax", "Softmax"),
    ]
    assert str(nodes[0]).startswith(
        "act: Gelu has no integer kernel on onnxruntime and runs in float; the linear layers around it stay integer"
    )
    assert "is not between integer operators" in str(nodes[2])


def test_a_follower_that_the_runtime_left_in_float_is_told(exported):
    q, path = exported
    kernels = inspect_kernels(path)
    assert [name for name, _, _ in float_fates(q, kernels)] == ["act", "add", "norm", "softmax"]
    whole = hs.prepare(Net().eval(), torch.randn(2, 4, 8, 8))
    assert [follower.name for follower in whole.placement.followers] == ["add"]
    fates = {
        name: reason for name, _, reason in float_fates(whole, kernels)
    }  # a file in which the add is float
    assert fates["add"] == "stands between quantizers, but the runtime found no integer kernel for it there"
