"""Migration from activations to weights: the same function, less error, and only where it pays."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import halfstep as hs
from halfstep.fake_quantize import Mode
from tests.repair.networks import HOMOGENEOUS, Net, built, calibrated, images, ready, tokens


def outlying():
    """A layer norm whose weight makes two channels a hundred times as large as the others."""
    net = tokens()
    with torch.no_grad():
        net.norm.weight[3], net.norm.weight[40] = 100.0, -80.0
        net.a.weight[:, 3] /= 100
        net.a.weight[:, 40] /= 80
    return net


def error(q):
    x = images()
    with torch.no_grad():
        got = q(x)
        with q.using(Mode.FLOAT):
            wanted = q(x)
    return float((got - wanted).norm() / wanted.norm())


@pytest.mark.parametrize("make", HOMOGENEOUS)
def test_the_float_function_stays_and_no_class_gets_worse(make):
    model, x = built(make), images()
    q = ready(make)
    record = hs.migrate(q)
    assert record.treated
    assert all(treated.after <= treated.before for treated in record.treated)
    with torch.no_grad(), q.using(Mode.FLOAT):
        wanted = model(x)
        assert (q(x) - wanted).norm() <= 1e-5 * wanted.norm()


def test_outlying_channels_are_folded_into_the_norm():
    q = calibrated(built(outlying), bits=8)
    before = error(q)
    record = hs.migrate(q)
    assert record.treated[0].name == "norm -> a"
    assert record.treated[0].after < record.treated[0].before / 20
    assert error(q) < before / 4
    ratio = q.weight("norm.weight").detach().abs()
    assert float(ratio.max() / ratio.median()) < 10


def test_weights_alone_take_part_too():
    model, x = built(outlying), images()
    q = hs.prepare(model, x[:2], hs.Recipe(hs.LayerSpec(hs.TensorSpec(4), None)))
    hs.observe(q, [x])
    hs.calibrate(q)
    assert hs.migrate(q).treated


def test_where_the_writer_would_pay_nothing_is_moved():
    q = calibrated(built(tokens), weight_granularity=hs.PerTensor())
    record = hs.migrate(q)
    assert [treated.name for treated in record.treated] == ["norm -> a"]
    assert ("a -> b", "'a', which writes it, has one scale for its whole weight") in record.skipped


def test_readers_in_float_have_nothing_to_gain():
    q = ready(tokens)
    q.float_layers = ["a"]
    assert ("norm -> a", "no quantized layer reads it") in hs.migrate(q).skipped


def test_a_norm_without_a_weight_has_nothing_to_fold_into():
    model = built(
        lambda: Net(
            lambda m, x: m.a(m.norm(x.flatten(2))),
            norm=nn.LayerNorm(64, elementwise_affine=False),
            a=nn.Linear(64, 5),
        )
    )
    record = hs.migrate(calibrated(model))
    assert record.treated == ()


def test_gelu_between_two_layers_is_a_barrier():
    model = built(
        lambda: Net(lambda m, x: m.b(F.gelu(m.a(x.flatten(2)))), a=nn.Linear(64, 8), b=nn.Linear(8, 5))
    )
    record = hs.migrate(calibrated(model))
    assert record.treated == ()
    assert any("is read by gelu" in why for _, why in record.skipped)


def test_ranges_at_run_time_take_part():
    model, x = built(outlying), images()
    spec = hs.LayerSpec(hs.TensorSpec(8)).with_dynamic_activations()
    q = hs.prepare(model, x[:2], hs.Recipe(spec))
    hs.observe(q, [x])
    hs.calibrate(q)
    (treated, *_) = hs.migrate(q).treated
    assert treated.after < treated.before / 4
