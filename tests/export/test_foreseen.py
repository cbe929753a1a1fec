"""Files of several choices of layers from one translation: the same files as from one of each."""

import onnx
import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep.export import trace
from halfstep.export.onnx import foresee
from halfstep.precision import groups_of
from tests.export.test_biases import Kinds


class Attention(nn.Module):
    """A value that several layers read, a sum of two branches, linears on tokens, whose biases are floats."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))
        self.out, self.wide, self.narrow = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        y = self.norm(x)
        heads = [f(y).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.query, self.key, self.value)]
        y = nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        x = x + self.out(y)
        return x + self.narrow(nn.functional.gelu(self.wide(x)))


NETWORKS = {"convs": (Kinds, (3, 8, 8)), "attention": (Attention, (5, 8))}


def quantized(name, target):
    torch.manual_seed(0)
    make, shape = NETWORKS[name]
    q = hs.prepare(make().eval(), torch.randn(4, *shape), target=target)
    hs.observe(q, [torch.randn(16, *shape)])
    hs.calibrate(q)
    return q


def content(path):
    """All that a runtime reads of a file, in whatever order tensors are stored."""
    graph = onnx.load(path).graph
    nodes = [node.SerializeToString(deterministic=True) for node in graph.node]
    return nodes, {tensor.name: tensor.raw_data for tensor in graph.initializer}


@pytest.fixture
def translations(monkeypatch):
    """How often torch's exporter was called."""
    calls, own = [], trace.to_onnx
    monkeypatch.setattr(trace, "to_onnx", lambda *given: calls.append(1) or own(*given))
    return calls


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("name", NETWORKS)
def test_files_of_foreseen_choices_are_those_of_a_translation_of_their_own(
    name, target, translations, tmp_path
):
    q = quantized(name, target)
    base, groups = q.precision, groups_of(q)
    choices = [base, *(base.with_layers("float", group.layers) for group in groups)]
    choices.append(base.with_layers("float", q.layer_names))
    for shift in q.shifts.values():
        shift.shift += 0.1
    foresee(q, choices)
    found = []
    for index, choice in enumerate(choices):
        q.choose(choice)
        found.append(content(hs.export_onnx(q, tmp_path / f"{index}.onnx", check=False)))
    floating = content(hs.export_float(q, tmp_path / "float.onnx", check=False))
    assert len(translations) == 1
    for index, choice in enumerate(choices):
        q.choose(choice)
        trace._known.clear()
        assert found[index] == content(hs.export_onnx(q, tmp_path / "own.onnx", check=False))
    trace._known.clear()
    assert floating == content(hs.export_float(q, tmp_path / "own.onnx", check=False))
    assert len(translations) == len(choices) + 2


def test_what_was_not_foreseen_is_translated_anew(translations, tmp_path):
    q = quantized("convs", "onnxruntime")
    base = q.precision
    foresee(q, [base.with_layers("float", ["conv"])])
    q.choose(base.with_layers("float", ["up"]))
    file = hs.export_onnx(q, tmp_path / "q.onnx")
    assert len(translations) == 2
    with torch.no_grad():
        q.weight("up.weight").mul_(2)  # another network
    assert content(hs.export_onnx(q, tmp_path / "other.onnx", check=False)) != content(file)
    assert len(translations) == 3
