"""The file itself: how tensors are stored, once and raw, beside the file where they are large, the same every time."""

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep.export import build
from halfstep.runtime.deployed import DeployedModel
from halfstep.runtime.parity import compare
from halfstep.runtime.size import file_size
from tests.export.mixed_network import quantized

X = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))


class Twins(nn.Module):
    """Two layers with equal weights, and one weight that two layers share."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.shared = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.b.load_state_dict(self.a.state_dict())

    def forward(self, x):
        return self.shared(torch.tanh(self.shared(torch.tanh(self.a(x))))) + self.b(x)


@pytest.fixture(scope="module")
def model():
    recipe = hs.Recipe.int8().override("b", hs.Recipe.weight_only(4, 32).default)
    return quantized(recipe.override("a", hs.Recipe.weight_only(4, 32).default), Twins().eval(), X)


@pytest.fixture(scope="module")
def path(model, tmp_path_factory):
    return hs.export_onnx(model, tmp_path_factory.mktemp("file") / "model.onnx")


def test_tensors_are_raw_named_after_the_model_and_stored_once(path):
    tensors = onnx.load(path).graph.initializer
    for tensor in tensors:
        assert tensor.HasField("raw_data"), tensor.name
        assert not tensor.int32_data and not tensor.float_data
    large = [(t.data_type, tuple(t.dims), t.raw_data) for t in tensors if len(t.raw_data) >= 256]
    assert len(set(large)) == len(large)
    names = {tensor.name for tensor in tensors}
    assert {"a.weight_quantized", "shared.weight_quantized"} & names
    assert "b.weight_quantized" not in names  # equal to a's
    assert not [name for name in names if name.startswith(("val_", "_"))]


def test_what_the_file_says_of_itself(model, path):
    metadata = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert metadata["halfstep.target"] == "onnxruntime"
    assert metadata["halfstep.dynamic_layers"] == ""
    assert metadata["halfstep.recipe"] == repr(model.recipe)
    assert [(o.domain, o.version) for o in onnx.load(path).opset_import] == [("", 21), ("com.microsoft", 1)]


def test_large_weights_lie_beside_the_file(model, path, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "EXTERNAL_ABOVE", 1000)
    outside = hs.export_onnx(model, tmp_path / "large.onnx")
    again = hs.export_onnx(model, tmp_path / "again" / "large.onnx")
    weights = tmp_path / "large.onnx.data"
    assert weights.stat().st_size > 4096
    assert outside.stat().st_size < path.stat().st_size - 4096
    assert file_size(outside) == outside.stat().st_size + weights.stat().st_size
    assert outside.read_bytes() == again.read_bytes()
    assert weights.read_bytes() == (tmp_path / "again" / "large.onnx.data").read_bytes()
    assert compare(model, DeployedModel(outside), [X]).sqnr > 35
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(outside).graph.initializer}
    for tensor in onnx.load(path).graph.initializer:
        np.testing.assert_array_equal(stored[tensor.name], onnx.numpy_helper.to_array(tensor))

    monkeypatch.undo()  # a small file in the same place leaves no stale weights behind
    hs.export_onnx(model, outside)
    assert not weights.exists()
    assert file_size(outside) == outside.stat().st_size


def test_layers_on_packed_or_unpacked_weights_say_so(tmp_path):
    model = nn.Sequential(
        nn.Embedding(50, 64), nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
    ).eval()
    tokens = torch.arange(20).reshape(4, 5)
    recipe = hs.Recipe.dynamic().override("1", hs.Recipe.weight_only(4, 32).default)
    q = quantized(recipe.override("2", hs.Recipe.weight_only(8, 32).default), model, tokens)
    proof = hs.verify(hs.export_onnx(q, tmp_path / "model.onnx"), q, [tokens], rounds=3)
    assert {layer.name: (layer.integer, layer.reason) for layer in proof.layers} == {
        "0": (False, "its weight of 8 bits stays packed in memory and is dequantized row by row"),
        "1": (False, "its weight of 4 bits stays packed in memory and is multiplied in float"),
        "2": (
            False,
            "its weight of 8 bits is unpacked when the file is loaded and multiplied in float: a smaller file, "
            "no faster",
        ),
        "3": (True, ""),
    }
    assert not proof.float_operators
    assert set(proof.kernels.packed) == {"0/GatherBlockQuantized", "1/MatMulNBits"}
    assert proof.size < proof.float_size
