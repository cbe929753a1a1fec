"""Whatever device a model is on, all is computed there: nothing reads a value on the way, or makes a tensor elsewhere.

Tensors on the device ``meta`` have no values: to read one is an error, and so is an operation with a tensor on the CPU.
So what runs there would not wait for an accelerator, nor copy to the host.
"""

import itertools
import math

import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep import functional
from halfstep.errors import DataError
from halfstep.fake_quantize import FakeQuantize
from halfstep.functional import CLIPPED_STE, LSQ, PACT
from halfstep.statistics import ChannelRange, Histogram
from halfstep.statistics.counting import Tally

FORMATS = [
    hs.Integer(8),
    hs.Integer(4, symmetric=False),
    hs.Codebook.nf4(),
    hs.Codebook.apot(4),
    hs.Floating(4, 3),
]
GRANULARITIES = [hs.PerTensor(), hs.PerChannel(0), hs.PerGroup(1, 4)]
META = torch.device("meta")


@pytest.mark.parametrize("gradient", [None, CLIPPED_STE, LSQ, PACT])
def test_fake_quantize_reads_no_value(gradient):
    for format, granularity in itertools.product(FORMATS, GRANULARITIES):
        x = torch.empty(8, 16, device=META, requires_grad=gradient is not None)
        shape = granularity.parameter_shape(x.shape)
        scale = torch.empty(shape, device=META, requires_grad=gradient in (LSQ, PACT))
        zero_point = torch.empty(shape, device=META, dtype=torch.int32)
        y = functional.fake_quantize(x, scale, zero_point, format, granularity, gradient or CLIPPED_STE)
        assert y.device == META
        if gradient is not None:
            y.sum().backward()
            assert x.grad.device == META


def test_learned_codebooks_read_no_value():
    x, values = (torch.empty(size, device=META, requires_grad=True) for size in ((8, 16), (16,)))
    scale = torch.empty((), device=META, requires_grad=True)
    functional.fake_quantize_learned(x, values, scale).sum().backward()
    assert values.grad.device == scale.grad.device == META


def test_counting_reads_no_value():
    tally = Tally(META)
    tally.add(torch.empty(10_000, device=META))
    assert tally.nans.device == META
    channels = ChannelRange(1)
    for _ in range(2):
        channels.update(torch.empty(4, 3, 5, device=META))
    site = FakeQuantize("here", hs.Integer(8), hs.PerTensor(), (4, 5))
    site.mode = hs.model.Mode.OBSERVE
    site(torch.empty(4, 5, device=META))
    assert site.histogram.nans_there.device == META


def test_the_guard_sees_a_value_that_is_read():
    with pytest.raises(RuntimeError, match="meta"):
        Histogram().update(torch.empty(3, device=META)) or Tally(META).nans.item()
    with pytest.raises(RuntimeError):
        torch.empty(3, device=META) + torch.ones(3)


class Net(nn.Module):
    """With a tensor that is made anew."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Linear(6, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x))) + torch.arange(8, device=x.device)
        return self.head(x.mean((2, 3)))


X = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(0))
RECIPES = [hs.Recipe.int8(), hs.Recipe.uniform(3, 4), hs.Recipe.dynamic(), hs.Recipe.weight_only(4, 16)]


def calibrated(recipe):
    torch.manual_seed(0)
    q = hs.prepare(Net().eval(), X, recipe)
    hs.observe(q, [X])
    hs.calibrate(q)
    return q


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("recipe", RECIPES, ids=["int8", "uniform", "dynamic", "weight_only"])
def test_a_model_computes_where_it_is(recipe, learned):
    q = calibrated(recipe)
    for site in q.sites.values() if learned else ():
        if not site.dynamic:
            site.learn(values=True)
    q.to(META)  # the graph's own tensors too
    y = q(X)  # inputs come to the model
    assert y.device == META
    y.sum().backward()
    assert all(parameter.grad is None or parameter.grad.device == META for parameter in q.parameters())
    with q.using(hs.model.Mode.OBSERVE):
        assert q(X).device == META


def test_nan_that_a_device_has_counted_is_told_of():
    site = FakeQuantize("deep", hs.Integer(8), hs.PerTensor(), (4,))
    site.histogram._pending = tally = Tally(torch.device("cpu"))  # as an accelerator's
    tally.add(torch.tensor([1.0, math.nan, 2.0, math.nan]))
    with pytest.raises(
        DataError, match="site 'deep': 2 values are NaN; look for NaN in the calibration data"
    ):
        FakeQuantize.check_observed([site])
    FakeQuantize.check_observed([FakeQuantize("new", hs.Integer(8), hs.PerTensor(), (4,))])


# on an accelerator itself


def copies_to_the_host(work):
    """How many copies from the device to the host some work makes."""
    from torch.profiler import ProfilerActivity, profile

    work()  # what is made once
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        work()
        torch.cuda.synchronize()
    return sum(event.count for event in seen.key_averages() if "DtoH" in event.key)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("recipe", RECIPES, ids=["int8", "uniform", "dynamic", "weight_only"])
def test_no_value_is_copied_to_the_host(recipe):
    q, x = calibrated(recipe).to("cuda"), X.to("cuda")

    def step():
        q(x).sum().backward()

    assert copies_to_the_host(step) == 0
    assert copies_to_the_host(torch.ones(1, device="cuda").item) == 1  # the measure sees one


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_observing_waits_once_a_batch():
    q, batches = calibrated(hs.Recipe.int8()).to("cuda"), [X.to("cuda")] * 5
    assert copies_to_the_host(lambda: hs.observe(q, batches)) <= len(batches) + 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_statistics_and_answers_are_those_of_the_cpu():
    here, there = calibrated(hs.Recipe.uniform(4, 4)), calibrated(hs.Recipe.uniform(4, 4)).to("cuda")
    torch.testing.assert_close(there(X).cpu(), here(X), rtol=1e-3, atol=1e-3)
    x = torch.randn(100_000)
    one, other = Histogram(), Histogram()
    one.update(x)
    other.update(x.cuda())
    for name, tensor in one.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)
