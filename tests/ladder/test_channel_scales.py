"""A scale per channel of an activation, as far as a recipe asks for one."""

import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep.errors import ArgumentError, NotObservedError, RecipeError

X = torch.randn(64, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.01, 1.0, 100.0])


def prepared(granularity, format=8):
    torch.manual_seed(0)
    recipe = hs.Recipe(hs.LayerSpec(activations=hs.TensorSpec(format, granularity)))
    return hs.prepare(nn.Linear(3, 2), X[:2], recipe=recipe)


def test_each_channel_gets_its_own_range_and_small_channels_survive():
    q = prepared(hs.PerChannel(1))
    hs.observe(q, X.split(16))
    hs.calibrate(q)
    site = q.sites["input"]
    low, high = site.range()
    step = site.scale
    assert step.shape == (3,)
    assert ((low - X.amin(0)).abs() <= step).all()
    assert ((high - X.amax(0)).abs() <= step).all()
    error = (site.rounded(X) - X).abs().amax(0)
    assert (error <= step / 2 * 1.01).all()


def test_a_calibrator_cuts_channels_off_at_the_whole_tensors_range():
    q = prepared(hs.PerChannel(1), hs.Integer(8))
    hs.observe(q, [X])
    hs.calibrate(q, hs.Percentile(90))
    whole = hs.Percentile(90).range(q.sites["input"].histogram, hs.Integer(8))[1]
    wanted = X.abs().amax(0).clamp(max=whole)
    assert torch.allclose(q.sites["input"].range()[1], wanted)


def test_the_axis_may_be_counted_from_the_end():
    q = prepared(hs.PerChannel(-1))
    hs.observe(q, [X])
    hs.calibrate(q)
    assert q.sites["input"].scale.shape == (3,)
    assert torch.isfinite(q(X)).all()


@pytest.mark.parametrize("granularity", [hs.PerChannel(0), hs.PerChannel(-2), hs.PerGroup(1, 2)])
def test_scales_cannot_follow_the_batch(granularity):
    with pytest.raises(
        RecipeError, match=r"site 'input': got activations per .*, needed one scale per tensor, or"
    ):
        prepared(granularity)


def test_scales_cannot_follow_codes_through_a_reshape():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4))
    recipe = hs.Recipe(hs.LayerSpec(activations=hs.TensorSpec(8, hs.PerChannel(1))))
    with pytest.raises(
        RecipeError, match=r"site '1': got .*, but the tensors .* have \[8, 288\] channels there"
    ):
        hs.prepare(model, torch.randn(2, 3, 8, 8), recipe=recipe)


def test_the_file_has_the_same_scales(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval()
    x = torch.randn(8, 3, 8, 8)
    recipe = hs.Recipe(hs.LayerSpec(activations=hs.TensorSpec(8, hs.PerChannel(1))))
    q = hs.prepare(model, x[:2], recipe=recipe)
    hs.observe(q, [x])
    hs.calibrate(q)
    file = hs.export_onnx(q, tmp_path / "model.onnx")
    from halfstep.runtime.deployed import DeployedModel

    with torch.no_grad():
        wanted = q(x)
    assert (DeployedModel(file)(x) - wanted).abs().max() <= wanted.abs().max() / 100


def test_the_moving_average_needs_ranges_of_batches():
    q = prepared(None)
    hs.observe(q, X.split(16))
    with pytest.raises(ArgumentError, match=r"site 'input': batch ranges: not kept by this histogram"):
        hs.calibrate(q, hs.MovingAverage())
    with pytest.raises(
        ArgumentError, match=r"site 'input': earlier batches were observed without batch_ranges=True"
    ):
        hs.observe(q, X.split(16), batch_ranges=True)
    q = prepared(None)
    hs.observe(q, X.split(16), batch_ranges=True)
    hs.calibrate(q, hs.MovingAverage(0.0))
    last = X[48:]
    low, high = q.sites["input"].range()
    assert float(high - low) == pytest.approx(float(last.max() - last.min()), rel=0.01)


def test_statistics_can_be_forgotten():
    q = prepared(hs.PerChannel(1))
    hs.observe(q, [X])
    q.sites["input"].forget()
    with pytest.raises(NotObservedError, match=r"site 'input': no finite value was observed"):
        hs.calibrate(q)
