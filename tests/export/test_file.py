"""The file itself: how tensors are stored, once and raw, beside the file where they are large, the same every time."""

import os
import types
from contextlib import suppress
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep.errors import ExportError
from halfstep.export import build, replacing
from halfstep.export.onnx import copy_file
from halfstep.fidelity.compare import compare
from halfstep.runtime.deployed import DeployedModel
from halfstep.runtime.file import file_size
from halfstep.runtime.onnxruntime import OnnxRuntimeSession
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


def beside(folder):
    """The files of weights in a folder."""
    return [path for path in folder.iterdir() if path.suffix == ".data"]


def test_large_weights_lie_beside_the_file(model, path, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "LARGEST_MESSAGE", 1000)
    outside = hs.export_onnx(model, tmp_path / "large.onnx")
    again = hs.export_onnx(model, tmp_path / "again" / "large.onnx")
    (weights,) = beside(tmp_path)
    assert weights.name.startswith("large.onnx.")
    assert weights.stat().st_size > 4096
    assert outside.stat().st_size < path.stat().st_size - 4096
    assert file_size(outside) == outside.stat().st_size + weights.stat().st_size
    assert outside.read_bytes() == again.read_bytes()
    assert weights.read_bytes() == (tmp_path / "again" / weights.name).read_bytes()
    assert compare(model, DeployedModel(outside), [X]).sqnr > 35
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in onnx.load(outside).graph.initializer}
    for tensor in onnx.load(path).graph.initializer:
        np.testing.assert_array_equal(stored[tensor.name], onnx.numpy_helper.to_array(tensor))

    copied = copy_file(outside, tmp_path / "copied" / "large.onnx")
    assert file_size(copied) == file_size(outside)
    assert compare(DeployedModel(copied), DeployedModel(outside), [X]).sqnr == float("inf")

    monkeypatch.undo()  # a small file in the same place leaves no stale weights behind
    hs.export_onnx(model, outside)
    assert not beside(tmp_path)
    assert file_size(outside) == outside.stat().st_size

    (tmp_path / "copied" / weights.name).unlink()
    with pytest.raises(
        ExportError, match=r"large.onnx: its weights cannot be read: .*; copy them along with it"
    ):
        file_size(copied)


class Killed(BaseException):
    pass


def adding(number):
    """A file that adds ``number`` to each of 300 inputs, which is enough to lie beside it."""
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [300]) for name in "xy"]
    weight = onnx.numpy_helper.from_array(np.full(300, number, np.float32), "w")
    node = onnx.helper.make_node("Add", ["x", "w"], ["y"])
    graph = onnx.helper.make_graph([node], "adding", ends[:1], ends[1:], [weight])
    return ir.from_proto(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)]))


def written(path, number):
    with replacing.replacing(path, lambda file: build.save(adding(number), file)):
        pass


def only_until(monkeypatch, step):
    """Let the process be killed at the change of that number to what is in the folder."""
    done = []

    def counted(change):
        def changing(*arguments, **options):
            if len(done) == step:
                raise Killed
            done.append(change)
            return change(*arguments, **options)

        return changing

    monkeypatch.setattr(
        replacing, "os", types.SimpleNamespace(**{**vars(os), "replace": counted(os.replace)})
    )
    monkeypatch.setattr(Path, "unlink", counted(Path.unlink))


@pytest.mark.parametrize(("before", "after"), [(0, 0), (0, 10**9), (10**9, 0)])
@pytest.mark.parametrize("step", range(4))
def test_a_kill_leaves_the_old_file_or_the_new_one_whole(tmp_path, monkeypatch, before, after, step):
    """At every rename and removal: weights beside the file or in it, before and after."""
    path = tmp_path / "model.onnx"
    monkeypatch.setattr(build, "LARGEST_MESSAGE", before)
    written(path, 1.0)
    with monkeypatch.context() as patch:
        patch.setattr(build, "LARGEST_MESSAGE", after)
        only_until(patch, step)
        with suppress(Killed):
            written(path, 2.0)
    (answer,) = OnnxRuntimeSession(path, 1).run([np.zeros(300, np.float32)])
    assert answer[0] in (1.0, 2.0)
    assert (answer == answer[0]).all()

    monkeypatch.setattr(build, "LARGEST_MESSAGE", 0)  # and the next call clears up
    written(path, 3.0)
    assert len(beside(tmp_path)) == 1
    assert len(list(tmp_path.iterdir())) == 2


def test_files_are_on_the_disk_before_they_get_their_names(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "LARGEST_MESSAGE", 0)
    done = []
    sync, rename = replacing.sync, os.replace
    monkeypatch.setattr(replacing, "sync", lambda path: (done.append(("sync", path.suffix)), sync(path)))
    recorded = {"replace": lambda old, new: (done.append(("rename", new.suffix)), rename(old, new))}
    monkeypatch.setattr(replacing, "os", types.SimpleNamespace(**{**vars(os), **recorded}))
    written(tmp_path / "large.onnx", 1.0)
    assert done == [
        ("sync", ".data"),
        ("sync", ".onnx"),
        ("rename", ".data"),
        ("sync", ""),
        ("rename", ".onnx"),
        ("sync", ""),
    ]


def test_what_killed_calls_left_is_removed_and_what_others_write_is_not(tmp_path):
    left, other = tmp_path / ".model.onnx.abcd", tmp_path / ".model.onnx.efgh"
    for folder in (left, other):
        folder.mkdir()
        (folder / "model.onnx").write_bytes(b"half")
    with replacing._locked(other):
        written(tmp_path / "model.onnx", 1.0)
    assert {path.name for path in tmp_path.iterdir()} == {"model.onnx", other.name}


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


def test_the_proof_prints_what_there_is_to_know(tmp_path):
    torch.manual_seed(0)
    q = hs.prepare(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(2, 8))
    hs.observe(q, [torch.randn(32, 8)])
    hs.calibrate(q, hs.Max())
    q.float_layers = ["2"]
    proof = hs.verify(hs.export_onnx(q, tmp_path / "model.onnx"), q, q.sample, rounds=3)
    lines = str(proof).splitlines()
    assert ["1", "of", "2"] in [
        line.split()[-3:] for line in lines if line.startswith("layers on integer kernels")
    ]
    assert lines[-1].startswith("2 (linear) is float: ")
