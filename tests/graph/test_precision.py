"""Models in half precision or float64: computed in float32, kept as they were handed over."""

import copy

import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep.errors import ArgumentError, CaptureError, DataError
from halfstep.graph.capture import capture, relative_error
from halfstep.graph.float32 import other_types

TYPES = [torch.float16, torch.bfloat16, torch.float64]


class Net(nn.Module):
    """Conv, batch norm, a buffer, a weight of two names."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.fc, self.again = nn.Linear(4, 4), nn.Linear(4, 4)
        self.again.weight = self.fc.weight
        self.register_buffer("mean", torch.linspace(0, 1, 4))

    def forward(self, x):
        x = self.norm(self.conv(x)).relu().mean((2, 3)) - self.mean
        return self.again(self.fc(x).relu())


def net(dtype=torch.float32):
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        for x in (model.norm.running_var, model.norm.running_mean, model.norm.weight, model.norm.bias):
            x.uniform_(0.5, 2.0)
    return model.eval().to(dtype)


def images(dtype=torch.float32, count=4):
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("given", [None, torch.float32])
def test_it_is_converted_once_and_that_is_said(dtype, given):
    """Example inputs may have the model's type, or be in float32, which this model does not take."""
    model = net(dtype)
    before = copy.deepcopy(model.state_dict())
    with pytest.warns(UserWarning, match=f"handed over in {dtype} and computed in torch.float32") as heard:
        q = hs.prepare(model, images(given or dtype))
    assert len(heard) == 1 and "are 0.0e+00" not in str(heard[0].message)
    assert {x.dtype for x in q.parameters()} == {torch.float32}
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())  # untouched
    assert model.fc.weight.dtype is dtype
    wanted = net(dtype).float()(images())
    for x in (images(), images(dtype).float()):
        assert relative_error(q(x), net(dtype).float()(x)) < 1e-6
    if dtype is torch.float64:
        assert relative_error(q(images(dtype)), wanted) < 1e-6
    else:
        assert relative_error(q(images(dtype)), wanted) < 0.02
    assert q(images(dtype)).dtype is torch.float32


@pytest.mark.parametrize("dtype", TYPES)
def test_what_scores_are_compared_with_is_the_users_own_model(dtype):
    model = net(dtype)
    handed_over = capture(model, images(dtype)).handed_over
    for x in (images(dtype), images()):
        answer = handed_over(x)
        assert answer.dtype is dtype and torch.equal(answer, model(x.to(dtype)))
    assert not any(x is y for x in handed_over.parameters() for y in model.parameters())


def test_a_model_in_float32_is_its_own_reference():
    q = hs.prepare(net(), images())
    assert q.handed_over is q and q.captured.notes == ()


@pytest.mark.parametrize("dtype", TYPES)
def test_the_float_state_has_the_users_types_and_values(dtype):
    model = net(dtype)
    with pytest.warns(UserWarning, match="handed over in"):
        q = hs.prepare(model, images(dtype))
    state = q.to_float_state_dict()
    for name, wanted in model.state_dict().items():
        assert state[name].dtype is wanted.dtype
        if dtype is torch.float64:  # float32 in between
            assert torch.allclose(state[name], wanted, rtol=1e-6, atol=1e-7)
        else:  # unfolded in float64 and rounded to fewer bits: nothing has happened
            assert torch.equal(state[name], wanted), name
    model.load_state_dict(state)


def test_a_trained_value_beyond_its_type_is_named():
    with pytest.warns(UserWarning, match="handed over in"):
        q = hs.prepare(net(torch.float16), images(torch.float16))
    with torch.no_grad():
        q.weight("fc.bias")[0] = 1e5
    with pytest.raises(ArgumentError, match=r"'fc.bias': values up to 100000 are beyond torch.float16"):
        q.to_float_state_dict()


class Mixed(nn.Module):
    """Half of it in half precision, its inputs by keyword, each in a type of its own; positions in float64."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4, dtype=torch.bfloat16), nn.Linear(4, 4)
        self.register_buffer("positions", torch.rand(4, dtype=torch.float64))

    def forward(self, x, y):
        assert (x.dtype, y.dtype) in [(torch.bfloat16, torch.float32), (torch.float32, torch.float32)]
        return self.b(self.a(x).float() + y), (y.double() + self.positions)


def test_types_may_be_mixed():
    torch.manual_seed(0)
    inputs = {"x": torch.randn(3, 4, dtype=torch.bfloat16), "y": torch.randn(3, 4)}
    model = Mixed()
    assert other_types(model) == (torch.bfloat16,)
    with pytest.warns(UserWarning, match=r"handed over in torch.bfloat16 and computed"):
        q = hs.prepare(model, inputs)
    hs.observe(q, [inputs, {"y": inputs["y"], "x": inputs["x"].float()}])
    hs.calibrate(q)
    assert {layer.name: bool(layer.sites) for layer in q.layers} == {"a": True, "b": True}
    assert q(**inputs)[1].dtype is torch.float64  # meant to be more than float32
    wanted = model(**inputs)
    for own in (inputs, {"y": inputs["y"].bfloat16().float(), "x": inputs["x"].float()}):
        got = q.handed_over(**own)
        assert got[0].dtype is torch.float32 and relative_error(got[0], wanted[0]) < 0.01
    assert torch.equal(q.handed_over(**inputs)[0], wanted[0])


def test_inputs_of_a_third_type_are_refused():
    with pytest.warns(UserWarning, match="handed over in"):
        q = hs.prepare(net(torch.bfloat16), images(torch.bfloat16))
    with pytest.raises(DataError, match=r"got torch.float16, needed torch.float32 or torch.bfloat16 as in"):
        q(images(torch.float16))


def test_shared_buffers_stay_shared_and_frozen_parameters_frozen():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4)).half().eval()
    model[3].running_mean = model[1].running_mean
    model[0].weight.requires_grad_(False)
    with pytest.warns(UserWarning, match="handed over in"):
        q = hs.prepare(model, torch.randn(3, 4).half())
    assert not q.weight("0.weight").requires_grad and q.weight("0.weight").dtype is torch.float32
    state = q.to_float_state_dict()
    assert torch.equal(state["3.running_mean"], model[3].running_mean)


class Named(nn.Module):
    """Names a type, instead of taking it from what it computes with."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        return self.fc(x.to(torch.float16))


def test_code_that_names_a_type_is_explained():
    with pytest.raises(
        CaptureError, match=r"'fc'|'Named'.*converted to torch.float32.*x\.to\(self\.weight\.dtype\)"
    ):
        capture(Named().half(), torch.randn(2, 4).half())


class Unable(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        if x.dtype is torch.float16:
            raise RuntimeError("no kernel for Half")
        return self.fc(x)


def test_a_model_that_does_not_run_as_handed_over_says_so():
    message = (
        r"cannot be run in torch.float16, as it was handed over: module 'Unable', .*test_precision.py:\d+: "
        r"no kernel for Half \(RuntimeError\); hand over model\.float\(\)"
    )
    with pytest.raises(CaptureError, match=message):
        capture(Unable().half(), torch.randn(2, 4).half())


def test_answers_that_overflow_as_handed_over_are_said():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).half()
    with torch.no_grad():
        model[0].weight.fill_(1e4)
    with pytest.warns(UserWarning, match="outputs on the example inputs are more than any number from those"):
        hs.prepare(model, torch.full((2, 4), 100.0).half())


def test_another_precision_is_another_model():
    digests = {
        capture(net(torch.bfloat16).to(dtype), images(dtype)).content for dtype in [torch.float32, *TYPES]
    }
    assert len(digests) == 4


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_a_compiled_model_takes_either_type():
    with pytest.warns(UserWarning, match="handed over in"):
        q = hs.prepare(net(torch.bfloat16), images(torch.bfloat16))
    hs.observe(q, [images()])
    hs.calibrate(q)
    compiled = torch.compile(q, backend="eager", fullgraph=True)
    for dtype in (torch.bfloat16, torch.float32):
        assert torch.equal(compiled(images(dtype)), q(images(dtype)))
