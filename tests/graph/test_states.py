"""States: an output that is given back as an input has that input's quantizer."""

import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep.errors import ArgumentError
from halfstep.fake_quantize import Mode
from halfstep.fidelity.compare import compare
from halfstep.runtime.deployed import DeployedModel


class Step(nn.Module):
    """A step of a recurrent network: what comes out is given back."""

    def __init__(self):
        super().__init__()
        self.input, self.state, self.out = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x, h_in):
        h = torch.tanh(self.input(x) + self.state(h_in))
        return {"y": self.out(h), "h_out": h}


class Streaming(nn.Module):
    """Convs over time, of which the second one keeps the last frames that it reads."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv1d(2, 4, 1), nn.Conv1d(4, 2, 3)

    def forward(self, x, cache):
        seen = torch.cat([cache, torch.relu(self.first(x))], 2)
        return self.second(seen), seen[:, :, -2:]


class Stacked(nn.Module):
    """Two recurrent layers with their states in one tensor, (layers, batch, hidden)."""

    def __init__(self):
        super().__init__()
        self.input, self.between = nn.Linear(3, 8), nn.Linear(8, 8)
        self.states = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, x, h):
        first = torch.tanh(self.input(x) + self.states[0](h[0]))
        second = torch.tanh(self.between(first) + self.states[1](h[1]))
        return {"y": second.sum(1), "h": torch.stack([first, second])}


@pytest.fixture(scope="module")
def step():
    torch.manual_seed(0)
    return Step().eval()


def inputs(batch=4):
    return {"x": torch.randn(batch, 3), "h_in": torch.zeros(batch, 8)}


@pytest.mark.parametrize("target", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("states", [{"h_in": "h_out"}, True])
def test_a_state_has_one_quantizer(step, target, states, tmp_path):
    q = hs.prepare(step, inputs(), target=target, states=states)
    hs.observe(
        q, [inputs(64)]
    )  # no state but 0 comes in: without the one that goes out its range would be none
    hs.calibrate(q)
    site = q.sites["h_in"]
    low, high = site.range()
    assert low < -0.5 and high > 0.5
    with q.using(Mode.QUANTIZE), torch.no_grad():
        state = q(**inputs(8))["h_out"]
        torch.testing.assert_close(site(state), state, rtol=0, atol=0)  # codes stay what they are
    path = hs.export_onnx(q, tmp_path / "model.onnx")
    deployed = DeployedModel(path, q.captured.in_spec, q.captured.out_spec)
    assert compare(q, deployed, [{"x": torch.randn(8, 3), "h_in": state}]).sqnr > 50


def test_without_a_name_it_is_an_output_as_any_other(step):
    q = hs.prepare(step, inputs())
    (site,) = (site for site in q.placement.sites if site.name == "h_in")
    assert [position.value.op for position in site.positions] == ["placeholder"]


def test_a_cache_of_what_came_in(tmp_path):
    torch.manual_seed(0)
    example = torch.randn(4, 2, 6), torch.zeros(4, 4, 2)
    q = hs.prepare(Streaming().eval(), example, states={"cache": "output_1"})
    hs.observe(q, [example])
    hs.calibrate(q)
    path = hs.export_onnx(q, tmp_path / "model.onnx")
    deployed = DeployedModel(path, q.captured.in_spec, q.captured.out_spec)
    with torch.no_grad():
        cache = q(*example)[1]
        torch.testing.assert_close(q.sites["cache"](cache), cache, rtol=0, atol=0)
    assert bool(cache.any())
    assert compare(q, deployed, [example, (example[0], cache)]).sqnr > 50


def test_the_layers_of_a_state_share_its_quantizer(tmp_path):
    torch.manual_seed(0)
    example = {"x": torch.randn(4, 3), "h": torch.zeros(2, 4, 8)}
    q = hs.prepare(Stacked().eval(), example, dynamic={"h": {1: "batch"}}, states=True)
    hs.observe(q, [example])
    hs.calibrate(q)
    (site,) = (
        site for site in q.placement.sites if any(r.op == "output" for p in site.positions for r in p.readers)
    )
    assert len(site.positions) == 3
    assert {layer.name for layer in q.layers if site.name in layer.sites} == {"states.0", "states.1"}
    with torch.no_grad():
        state = q(**example)["h"]
    torch.testing.assert_close(q.sites[site.name](state), state, rtol=0, atol=0)
    path = hs.export_onnx(q, tmp_path / "model.onnx")
    deployed = DeployedModel(path, q.captured.in_spec, q.captured.out_spec)
    assert compare(q, deployed, [{"x": torch.randn(4, 3), "h": state}]).sqnr > 50


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ({"h": "h_out"}, "states: got input 'h', needed one of 'x', 'h_in'"),
        ({"h_in": "h"}, "states, input 'h_in': got output 'h', needed one of 'y', 'h_out'"),
        ({"x": "h_out"}, r"input 'x' is \(batch, 3\) of torch.float32 and output 'h_out' is \(batch, 8\)"),
    ],
)
def test_states_that_cannot_be(step, states, message):
    with pytest.raises(ArgumentError, match=message):
        hs.prepare(step, inputs(), states=states)


def test_names_that_tell_nothing_are_asked_for():
    with pytest.raises(
        ArgumentError, match=r"no output of 'output' is called after an input of 'input'; name them"
    ):
        hs.prepare(nn.Linear(2, 2), torch.randn(2, 2), states=True)
