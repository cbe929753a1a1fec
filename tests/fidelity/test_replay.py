"""Replaying a graph with other quantizers gives what the model itself gives, bit for bit."""

import pytest
import torch

import halfstep as hs
from halfstep.demo import DigitsNet
from halfstep.fidelity.replay import FLOAT, Replay, quantizing, wiring
from tests.ladder.networks import INPUTS, Attention, calibrated


@pytest.fixture(scope="module", params=["attention", "residual"])
def case(request):
    torch.manual_seed(0)
    images = torch.rand(64, 1, 8, 8)
    network, inputs = (Attention(), INPUTS) if request.param == "attention" else (DigitsNet().eval(), images)
    model = calibrated(network, inputs=inputs)
    for shift in model.shifts.values():  # as bias correction leaves them
        shift.shift.normal_(std=0.1)
    return model, inputs[:8]


def test_replay_is_the_model(case):
    model, inputs = case
    replay = Replay(model)
    for names in [[], model.layer_names[:2], model.layer_names[2:], model.layer_names]:
        model.float_layers = names
        model.set_mode(hs.model.Mode.QUANTIZE)
        with torch.no_grad():
            wanted = model(inputs)
        wires = wiring(model)
        with quantizing([wires]):
            assert torch.equal(replay.outputs(replay.run(inputs, wires)), wanted)
    model.float_layers = []


def test_change_recomputes_only_what_depends_on_the_difference(case):
    model, inputs = case
    replay = Replay(model)
    last = model.layer_names[-1]
    model.float_layers = [name for name in model.layer_names if name != last]
    after = wiring(model)
    with quantizing([after]):
        values = replay.run(inputs)
        changed = replay.change(values, FLOAT, after)
        assert torch.equal(replay.outputs(changed), replay.outputs(replay.run(inputs, after)))
    assert len(changed) < 5 < len(replay.nodes)
    model.float_layers = []


def test_the_modes_are_as_before_afterwards(case):
    model, _ = case
    model.set_mode(hs.model.Mode.FLOAT)
    with quantizing([wiring(model)]):
        assert all(site.mode is hs.model.Mode.QUANTIZE for site in model.sites.values())
        assert all(shift.active for shift in model.shifts.values())
    assert all(site.mode is hs.model.Mode.FLOAT for site in model.sites.values())
    assert not any(shift.active for shift in model.shifts.values())
