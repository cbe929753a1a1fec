"""QuantizedModel: whatever the user's layers, parameters and arguments are called, it works."""

import copy

import onnx
import pytest
import torch
from torch import fx, nn

import halfstep as hs
from halfstep.errors import ArgumentError
from halfstep.fidelity.compare import compare
from halfstep.runtime.deployed import DeployedModel
from tests.export.mixed_network import quantized

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


def attributes():
    """Every attribute of what we and torch keep networks in, and some names that files and code have a use for."""
    q = quantized(hs.Recipe.int8(), nn.Linear(6, 6), X)
    names = {*dir(q), *dir(fx.symbolic_trace(nn.Linear(6, 6))), *dir(nn.ModuleDict())}
    return {*(name for name in names if not name.startswith("__")), "model", "input", "output", "x_scale"}


#: Those that torch takes for layers and parameters, and all that Python takes for arguments.
FREE = sorted(name for name in attributes() if not hasattr(nn.Module(), name) and name != "quantizers")
CODE = {"torch", "device", "inf", "nan", "fx_pytree", "pytree", "getattr", "list", "slice", "int", "range"}
ARGUMENTS = sorted(name for name in {*dir(nn.ModuleDict()), *FREE, *CODE} if not name.startswith("_"))


class Row(nn.Module):
    """A layer of every name, one behind the other."""

    def __init__(self):
        super().__init__()
        for name in FREE:
            setattr(self, name, nn.Linear(6, 6))

    def forward(self, x):
        for name in FREE:
            x = x + getattr(self, name)(x).tanh()
        return x


class Parameters(nn.Module):
    """A parameter of every name, beside one layer."""

    def __init__(self):
        super().__init__()
        for name in FREE:
            if name not in ("fc", "x"):
                setattr(self, name, nn.Parameter(torch.rand(6)))
        self.x, self.fc = nn.Parameter(torch.rand(6)), nn.Linear(6, 6)

    def forward(self, x):
        total = x * self.x
        for name in FREE:
            total = total + x * getattr(self, name)
        return {"x": self.fc(total), "fc.weight": total, "none": None}


def round_trip(model, inputs, folder):
    """Prepare, observe, calibrate, save and load, copy, export and run."""
    q = quantized(hs.Recipe.int8(), model.eval(), inputs)
    assert {name for name, _ in q.named_parameters()} == {name for name, _ in model.named_parameters()}
    again = hs.prepare(model, inputs)
    again.load_state_dict(q.state_dict())
    model.load_state_dict(q.to_float_state_dict())
    for other in (again, copy.deepcopy(q)):
        assert compare(q, other, [inputs]).sqnr == float("inf")
    path = hs.export_onnx(q, folder / "model.onnx")
    file = DeployedModel(path, q.captured.in_spec, q.captured.out_spec)
    assert compare(q, file, [inputs]).sqnr > 30
    return q, file


def test_layers_may_have_any_name(tmp_path):
    q, _ = round_trip(Row(), X, tmp_path)
    assert q.layer_names == FREE
    assert q.target.name == "onnxruntime"


def test_layers_of_layers_may_have_any_name():
    q = quantized(hs.Recipe.int8(), nn.Sequential(Row().eval()), X)
    assert q.layer_names == [f"0.{name}" for name in FREE]


def test_parameters_may_have_any_name(tmp_path):
    for model in round_trip(Parameters(), X, tmp_path):
        assert set(model(X)) == {"x", "fc.weight", "none"}
        assert model(X)["none"] is None
    names = [
        value.name for value in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.output
    ]
    assert names == ["output_x", "fc.weight"]


@pytest.mark.slow
def test_arguments_may_have_any_name(tmp_path):
    code = (
        f"def forward(self, {', '.join(ARGUMENTS)}):\n    return self.fc({' + '.join(ARGUMENTS)}) + self.mode"
    )
    namespace = {}
    exec(code, namespace)
    model = type("Arguments", (nn.Module,), {"forward": namespace["forward"]})()
    model.fc, model.mode = nn.Linear(6, 6), nn.Parameter(torch.rand(6))
    round_trip(model, {name: X + index / 100 for index, name in enumerate(ARGUMENTS)}, tmp_path)


@pytest.mark.parametrize("kind", ["layer", "parameter"])
def test_the_one_name_that_we_need_is_asked_for(kind):
    class Holder(nn.Module):
        def __init__(self):
            super().__init__()
            self.quantizers = nn.Linear(6, 6) if kind == "layer" else nn.Parameter(torch.rand(6))

        def forward(self, x):
            return self.quantizers(x) if kind == "layer" else x * self.quantizers

    with pytest.raises(ArgumentError, match=r"called 'quantizers', the name halfstep needs; rename it"):
        hs.prepare(Holder(), X)
