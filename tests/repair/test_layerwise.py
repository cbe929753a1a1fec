"""Repairs that go layer by layer: what they see, what they minimise, and that the float network stays."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfstep as hs
from halfstep.bias_shift import BiasShift
from halfstep.fake_quantize import Mode
from halfstep.fidelity.compare import compare
from halfstep.repair import walk as walking
from halfstep.repair.moments import LayerWeight, gather, why_not_rounded
from halfstep.repair.walk import walk
from halfstep.runtime.deployed import DeployedModel
from halfstep.snapshot import Snapshot
from tests.repair.networks import Net, built, calibrated, chain, conv, images, residual


@pytest.fixture(scope="module")
def observed():
    return calibrated(built(residual))


@pytest.fixture
def q(observed):
    return copy.deepcopy(observed)


LAYERS = {
    "conv": (lambda m, x: m.a(x), nn.Conv2d(3, 5, 3)),
    "strided, padded, dilated conv": (
        lambda m, x: m.a(x),
        nn.Conv2d(3, 5, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(2, 1)),
    ),
    "grouped conv": (lambda m, x: m.a(torch.cat([x, x], 1)), nn.Conv2d(6, 4, 3, groups=2, padding="same")),
    "depthwise conv": (lambda m, x: m.a(x), nn.Conv2d(3, 6, 3, groups=3)),
    "conv of one axis": (lambda m, x: m.a(x.flatten(2)), nn.Conv1d(3, 5, 4, stride=3)),
    "conv of three axes": (lambda m, x: m.a(x[:, None]), nn.Conv3d(1, 5, (2, 3, 1))),
    "linear": (lambda m, x: m.a(x.flatten(1)), nn.Linear(192, 5)),
    "linear on sequences": (lambda m, x: m.a(x.flatten(2)), nn.Linear(64, 5)),
}


@pytest.mark.parametrize("what", LAYERS)
def test_the_error_of_moments_is_that_of_the_layer(what):
    forward, layer = LAYERS[what]
    q = calibrated(built(lambda: Net(forward, a=layer)))
    (step,) = list(walk(q, q.sample, "test"))
    weight = LayerWeight.of(q, step.layer)
    got = gather(weight.op, weight.rows(), step.inputs, step.float_inputs).error(weight.rounded_rows())
    axis = 1 if weight.op.kind == "conv" else -1
    errors = [
        (step.run(x) - step.run_float(y)).movedim(axis, 0).flatten(1)
        for x, y in zip(step.inputs, step.float_inputs, strict=True)
    ]
    wanted = torch.cat(errors, 1).double().square().mean(1)
    # Products of float32 summed in float32: the error is a small difference of larger terms.
    torch.testing.assert_close(got.flatten(), wanted, rtol=1e-3, atol=1e-5)


def test_thinned_positions_are_some_of_all():
    q = calibrated(built(lambda: Net(lambda m, x: m.a(x), a=conv(3, 5))))
    (step,) = list(walk(q, q.sample, "test"))
    from halfstep.repair.moments import patches

    every = {tuple(row) for row in patches(step.layer.operator, step.inputs[0])[0].tolist()}
    some = patches(step.layer.operator, step.inputs[0], thinned=3, first=1)[0]
    assert some.shape[0] == 8 * 3 * 8  # of 8 rows, the second, fifth and eighth
    assert {tuple(row) for row in some.tolist()} <= every


def test_a_step_sees_what_the_layer_sees(q):
    seen = {}
    for step in walk(q, q.sample, "test"):
        seen[step.layer.name] = (
            [step.run(x) for x in step.inputs],
            [step.run_float(x) for x in step.float_inputs],
        )
    assert list(seen) == q.layer_names
    with torch.no_grad():
        for batch, got in zip(q.sample, seen["fc"][0], strict=True):
            torch.testing.assert_close(got, q(batch), rtol=1e-5, atol=1e-6)
        with q.using(Mode.FLOAT):
            for batch, got in zip(q.sample, seen["fc"][1], strict=True):
                torch.testing.assert_close(got, q(batch), rtol=1e-5, atol=1e-6)


def test_a_change_holds_for_the_layers_after_it(q):
    inputs = {}
    for step in walk(q, q.sample, "test"):
        inputs[step.layer.name] = step.inputs[0]
        if step.layer.name == "a":
            q.shifts["a"].shift.fill_(-1e3)
    assert float(inputs["b"].abs().max()) == 0  # a ReLU of something very negative


def test_memory_bounds_the_batches_that_are_walked(q, monkeypatch):
    monkeypatch.setattr(walking, "MEMORY", 1)
    assert len(walking.batches_that_fit(q, q.sample)) == 1
    assert all(len(step.inputs) == 1 for step in walk(q, q.sample, "test"))


def test_bias_correction_leaves_no_mean_error(q):
    x = images()
    record = hs.correct_bias(q)
    assert [treated.name for treated in record.treated] == ["a", "b", "c", "fc"]
    for treated in record.treated:  # what is left is the rounding of the bias itself
        assert treated.after < 1e-6 + float(q.shifts[treated.name].steps.size().max()) / 2
    with torch.no_grad():
        quantized = q(x)
        with q.using(Mode.FLOAT):
            wanted = q(x)
    step = float(q.shifts["fc"].steps.size().max())
    torch.testing.assert_close(quantized.mean(0), wanted.mean(0), rtol=0, atol=1e-6 + step / 2)
    before = {name: shift.shift.clone() for name, shift in q.shifts.items()}
    hs.correct_bias(q)
    for name, shift in q.shifts.items():
        torch.testing.assert_close(shift.shift, before[name], rtol=0, atol=1e-6)


def test_a_layer_put_back_to_float_has_its_own_bias_and_weight(q):
    x, before = images(), copy.deepcopy(q)
    hs.correct_bias(q)
    q.sites["a.weight"].round_to(q.weight("a.weight").detach(), torch.zeros(8, 3, 3, 3))
    with torch.no_grad(), q.using(Mode.FLOAT), before.using(Mode.FLOAT):
        assert torch.equal(q(x), before(x))
    q.float_layers = before.float_layers = ["a", "b", "c", "fc"]
    with torch.no_grad():
        assert torch.equal(q(x), before(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_shifted_bias_keeps_its_dtype(dtype):
    shift = BiasShift(torch.tensor([0.5, -1.0]))
    shift.active = True
    assert torch.equal(shift(torch.ones(2, dtype=dtype)), torch.tensor([1.5, 0.0], dtype=dtype))


def test_a_layer_without_a_bias_is_left_alone():
    q = calibrated(built(lambda: Net(lambda m, x: m.a(x), a=conv(3, 4, bias=False))))
    assert hs.correct_bias(q).skipped == (
        ("a", "it has no bias; give it one (of zeros) to have it corrected"),
    )


def test_weighed_ranges_never_make_the_layers_output_worse(q):
    record = hs.weigh_ranges(q)
    assert len(record.treated) == 4
    assert all(treated.after <= treated.before for treated in record.treated)
    assert any(treated.after < treated.before for treated in record.treated)


def test_a_weight_that_meets_only_zeros_does_not_count():
    model = built(lambda: Net(lambda m, x: m.b(F.relu(m.a(x))), a=conv(3, 4), b=conv(4, 4, 1)))
    with torch.no_grad():
        model.a.weight[1], model.a.bias[1] = 0, -1  # a channel that ReLU switches off
        model.b.weight[:, 1] *= 50
    q = calibrated(model)
    ends = q.sites["b.weight"].range()[1].clone()
    hs.weigh_ranges(q)
    assert bool((q.sites["b.weight"].range()[1] < ends / 5).all())


def test_a_weight_of_several_layers_is_left_alone():
    q = calibrated(built(lambda: Net(lambda m, x: m.a(F.gelu(m.a(x))), a=conv(3, 3))))
    assert [why_not_rounded(q, layer) for layer in q.layers] == [
        "its weight is shared with another layer"
    ] * 2
    assert hs.weigh_ranges(q).treated == ()


def test_a_snapshot_puts_everything_back(q):
    x, snapshot = images(), Snapshot.of(q)
    with torch.no_grad():
        before = q(x)
        for repair in (hs.equalize, hs.weigh_ranges, hs.correct_bias):
            assert repair(q).treated
        q.sites["b.weight"].round_to(q.weight("b.weight").detach(), torch.zeros(6, 8, 3, 3))
        assert not torch.equal(q(x), before)
        snapshot.restore()
        assert torch.equal(q(x), before)


def test_the_file_has_the_codes_and_biases_of_the_simulation(q, tmp_path):
    hs.correct_bias(q)
    site, weight = q.sites["b.weight"], q.weight("b.weight").detach()
    up = site.rounded(weight) + site.scale.view(-1, 1, 1, 1) * (torch.arange(3) == 1)
    site.round_to(weight, up.clamp(*(end.view(-1, 1, 1, 1) for end in site.range())))
    deployed = DeployedModel(hs.export_onnx(q, tmp_path / "model.onnx"))
    assert compare(q, deployed, [images()]).sqnr > 35
    site.offset = None
    assert compare(q, deployed, [images()]).sqnr < 30


def test_a_new_range_drops_a_learned_rounding(q):
    site, weight = q.sites["b.weight"], q.weight("b.weight").detach()
    site.round_to(weight, torch.zeros_like(weight))
    with torch.no_grad():
        assert float(site(weight).abs().max()) == 0
        site.calibrate_weight(weight, hs.Max())
        assert float(site(weight).abs().max()) > 0


def test_a_state_carries_roundings_and_shifts(q):
    twin = copy.deepcopy(q)
    hs.correct_bias(q)
    q.sites["b.weight"].round_to(q.weight("b.weight").detach(), torch.zeros(6, 8, 3, 3))
    twin.load_state_dict(q.state_dict())
    with torch.no_grad():
        assert torch.equal(twin(images()), q(images()))
    twin.load_state_dict(calibrated(built(residual)).state_dict())
    assert twin.sites["b.weight"].offset is None


def test_an_uncalibrated_model_is_named():
    q = hs.prepare(built(chain), images(2))
    hs.observe(q, [images()])
    with pytest.raises(hs.HalfstepError, match=r"site 'x': has no range yet"):
        hs.correct_bias(q)
