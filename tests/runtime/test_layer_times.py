"""What each layer takes: by its name in the model, on runtimes whose times mean something."""

import numpy as np
import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep.errors import ArgumentError
from halfstep.runtime.deployed import layer_of, layer_times
from halfstep.runtime.latency import STATED, per_run, race


class Net(nn.Module):
    """A conv that takes a measurable time, between a small one and a linear layer."""

    def __init__(self):
        super().__init__()
        self.small, self.large, self.fc = (
            nn.Conv2d(3, 8, 1),
            nn.Conv2d(8, 64, 5, padding=2),
            nn.Linear(64, 10),
        )

    def forward(self, x):
        return self.fc(torch.relu(self.large(torch.relu(self.small(x)))).mean((2, 3)))


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "tensorrt"])
def test_layers_are_timed_by_name_where_times_mean_something(tmp_path, target):
    if target == "openvino":
        pytest.importorskip("openvino")
    torch.manual_seed(0)
    x = torch.randn(4, 3, 24, 24)
    q = hs.prepare(Net().eval(), x, target=target)
    hs.observe(q, [x])
    hs.calibrate(q)
    path = hs.export_onnx(q, tmp_path / "model.onnx")
    times = layer_times(path, [np.asarray(x)], threads=1)
    if target == "tensorrt":
        assert times == {}
        return
    assert {"small", "large", "fc"} <= times.keys()
    assert times["large"] > 0
    proof = hs.verify(path, q, [x], threads=1)
    assert proof.microseconds.keys() == times.keys()


class Keyed(nn.Module):
    """Layers whose names have in them what separates a node's."""

    def __init__(self):
        super().__init__()
        self.by = nn.ModuleDict(
            {"[red]": nn.Conv2d(3, 8, 3), "[/x]": nn.Conv2d(8, 8, 3), "[": nn.Conv2d(8, 8, 3)}
        )

    def forward(self, x):
        return self.by["["](torch.relu(self.by["[/x]"](torch.relu(self.by["[red]"](x)))))


def test_names_may_have_slashes_and_brackets(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(2, 3, 16, 16)
    q = hs.prepare(Keyed().eval(), x, hs.Recipe.uniform(6, 8))
    hs.observe(q, [x])
    hs.calibrate(q)
    q.float_layers = ["by.["]
    proof = hs.verify(hs.export_onnx(q, tmp_path / "model.onnx"), q, [x], threads=1)
    fates = {layer.name: layer.integer for layer in proof.layers}
    assert fates == {"by.[red]": True, "by.[/x]": True, "by.[": False}
    assert fates.keys() <= proof.microseconds.keys()
    assert layer_of("by.[/x]/Conv", fates) == "by.[/x]" and layer_of("by.[/Conv_quant", fates) == "by.["
    assert (
        layer_of("by.[/x]/MatMul/MatMulAddFusion", fates) == "by.[/x]" and layer_of("input/Cast", fates) == ""
    )


def test_nodes_that_run_several_times_add_up():
    assert per_run({"once": [5.0, 1.0, 1.0], "twice": [3.0] * 6}, runs=3) == {"once": 1.0, "twice": 6.0}


def test_a_race_of_too_few_rounds_is_refused():
    with pytest.raises(ArgumentError, match=r"rounds: got 2, needed at least 3"):
        race({"one": lambda: None}, rounds=2)


def test_a_float_layer_has_the_time_of_what_is_fused_into_it(tmp_path):
    """The runtime calls a conv by the name of the clip behind it, which codes of 4 bits need."""
    torch.manual_seed(0)
    x = torch.randn(4, 3, 24, 24)
    q = hs.prepare(Net().eval(), x, hs.Recipe.uniform(4, 4, ends=None))
    q.float_layers = ["large"]
    hs.observe(q, [x])
    hs.calibrate(q)
    times = layer_times(hs.export_onnx(q, tmp_path / "model.onnx"), [np.asarray(x)])
    assert times["large"] == max(times.values())


def test_a_race_ends_early_where_its_rounds_take_long():
    runs = {"one": 0, "other": 0}

    def run(name):
        runs[name] += 1

    race({name: lambda name=name: run(name) for name in runs}, rounds=21, warmup=1, seconds=0.0)
    assert runs == dict.fromkeys(runs, 2 * (1 + STATED))
