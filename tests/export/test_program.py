"""Torch's exporter does nothing twice, and its files are the ones that it would have written."""

import onnx
import pytest
import torch
import torch.nn.functional as F
from onnxruntime import InferenceSession
from torch import nn

import halfstep as hs
from halfstep.export import program


class Network(nn.Module):
    """Operators whose translation depends on something: a global pool, numbers of another type, a size that varies."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.linear = nn.Linear(4, 5)
        self.register_buffer("offset", torch.arange(5))

    def forward(self, x):
        x = F.adaptive_avg_pool2d(F.relu(self.conv(x)) * 5, 1)
        return (self.linear(x.flatten(1)) + self.offset).reshape(x.shape[0], 5) / 2


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return hs.prepare(Network().eval(), torch.randn(2, 3, 8, 8))


def nodes(path):
    return [(node.op_type, node.name) for node in onnx.load(path).graph.node]


def test_the_network_is_not_traced_again_and_the_file_is_the_same(network, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        for owner, name in ((torch.export, "export"), (torch.export.ExportedProgram, "run_decompositions")):
            patch.setattr(owner, name, None)
        file = hs.export_float(network, tmp_path / "float.onnx")
    monkeypatch.setattr(program, "_registry", lambda *_: None)  # torch makes its own
    other = hs.export_float(hs.prepare(Network().eval(), torch.randn(2, 3, 8, 8)), tmp_path / "other.onnx")
    assert nodes(file) == nodes(other)
    shape = onnx.load(file).graph.input[0].type.tensor_type.shape
    assert [size.dim_param or size.dim_value for size in shape.dim] == ["batch", 3, 8, 8]


def test_an_operator_without_a_translation_is_decomposed(tmp_path):
    q = hs.prepare(nn.Conv2d(3, 4, 3, padding="same").eval(), torch.randn(2, 3, 8, 8))
    assert "padding" in str(q.graph)
    assert [kind for kind, _ in nodes(hs.export_float(q, tmp_path / "float.onnx"))] == ["Conv"]


class Parts(nn.Module):
    """Parts of one product, and sizes that are computed: functions of Python's on tensors' lists and on sizes."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 12)

    def forward(self, x):
        a, b, c = self.linear(x).split(4, dim=-1)
        return (a * b + c).reshape(x.shape[0] * x.shape[1] // 2, 8)


def test_functions_of_python_have_their_translations(tmp_path, monkeypatch):
    torch.manual_seed(0)
    x = torch.randn(2, 6, 4)
    model = Parts().eval()
    q = hs.prepare(model, x)
    assert "getitem" in str(q.graph)
    monkeypatch.setattr(torch.onnx, "export", None)  # the registry of what is in the network is enough
    file = hs.export_float(q, tmp_path / "float.onnx")
    assert "Split" in {kind for kind, _ in nodes(file)}
    new = torch.randn(5, 6, 4)
    (got,) = InferenceSession(file).run(None, {"x": new.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(new).detach())


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        x = self.linear(x)
        return torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))


def test_branches_keep_their_bodies(tmp_path):
    q = hs.prepare(Branching().eval(), torch.randn(2, 4))
    assert [kind for kind, _ in nodes(hs.export_float(q, tmp_path / "float.onnx"))][-1] == "If"


class Floats(nn.Module):
    """Nothing but float32, and a number that is a float."""

    def __init__(self, number=0.5):
        super().__init__()
        self.conv, self.linear, self.number = nn.Conv2d(3, 4, 3), nn.Linear(4, 5), number

    def forward(self, x):
        x = F.adaptive_avg_pool2d(F.hardswish(self.conv(x)) * self.number, 1)
        return self.linear(x.flatten(1)).softmax(-1) + self.linear(x.mean((2, 3)))


def exported(model, path):
    torch.manual_seed(0)
    q = hs.prepare(model.eval(), torch.randn(2, 3, 8, 8))
    hs.observe(q, [torch.randn(4, 3, 8, 8)])
    hs.calibrate(q)
    return hs.export_float(q, path / "float.onnx").read_bytes(), hs.export_onnx(
        q, path / "q.onnx"
    ).read_bytes()


def test_where_all_is_float32_no_types_are_looked_for_and_the_files_are_the_same(tmp_path, monkeypatch):
    from torch.onnx._internal.exporter import _fx_passes

    torch.manual_seed(0)
    model = Floats()
    with monkeypatch.context() as patch:
        patch.setattr(_fx_passes, "insert_type_promotion_nodes", None)
        files = exported(model, tmp_path)
    monkeypatch.setattr(program, "_at_once", lambda *_: None)
    assert exported(model, tmp_path) == files


def test_a_whole_number_beside_floats_is_given_their_type(tmp_path, monkeypatch):
    monkeypatch.setattr(program, "_at_once", None)
    torch.manual_seed(0)
    exported(Floats(3), tmp_path)  # also where its simulation is compared with the file
