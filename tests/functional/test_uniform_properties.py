"""Laws of the uniform quantizer."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from halfstep.formats import Integer
from halfstep.functional import fake_quantize, quantize
from halfstep.granularity import PerChannel, PerTensor

FORMATS = [
    Integer(8),
    Integer(8, signed=False, symmetric=False),
    Integer(4, symmetric=False),
    Integer(3, mid_rise=True),
    Integer(6, power_of_two=True),
    Integer(16),
    Integer(2),
    Integer(4, signed=False, symmetric=False, round_shifted=True),
]
samples = st.lists(st.floats(-1000, 1000, width=32), min_size=1, max_size=30).map(torch.tensor)


def calibrated(x, format):
    if float(x.abs().max()) < 1e-30:
        x = torch.ones(1)
    return format.parameters(x.min(), x.max())


@pytest.mark.parametrize("format", FORMATS, ids=str)
@settings(deadline=None, max_examples=50)
@given(x=samples)
def test_round_off_inside_the_range_is_at_most_half_a_step(format, x):
    scale, zero_point = calibrated(x, format)
    low, high = format.range(scale.double(), zero_point)
    error = (fake_quantize(x, scale, zero_point, format).double() - x).abs()
    inside = (x >= low) & (x <= high)
    # float32: x / scale and code * scale are each rounded, relative 2**-24 of at most 2**16 steps.
    slack = scale * 2.0**-24 * 2 * (format.levels + 2)
    assert (error[inside] <= scale / 2 + slack).all()
    # What the zero point's round-off moved an end by costs another half step at most.
    assert (error <= scale + slack).all()


@pytest.mark.parametrize("format", FORMATS, ids=str)
@settings(deadline=None, max_examples=50)
@given(x=samples)
def test_quantizing_twice_changes_nothing(format, x):
    scale, zero_point = calibrated(x, format)
    once = fake_quantize(x, scale, zero_point, format)
    assert torch.equal(fake_quantize(once, scale, zero_point, format), once)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@settings(deadline=None, max_examples=50)
@given(x=samples)
def test_order_is_kept(format, x):
    scale, zero_point = calibrated(x, format)
    found = fake_quantize(x.sort().values, scale, zero_point, format)
    assert (found.diff() >= 0).all()


@pytest.mark.parametrize("format", [f for f in FORMATS if not f.mid_rise], ids=str)
@settings(deadline=None, max_examples=50)
@given(x=samples)
def test_zero_stays_zero(format, x):
    scale, zero_point = calibrated(x, format)
    found = fake_quantize(torch.tensor([0.0, -0.0]), scale, zero_point, format)
    assert found.tolist() == [0, 0]
    assert not found.signbit().any()


@pytest.mark.parametrize("format", FORMATS, ids=str)
@settings(deadline=None, max_examples=50)
@given(x=samples, exponent=st.integers(-20, 20))
def test_scaling_by_a_power_of_two_scales_the_result(format, x, exponent):
    factor = 2.0**exponent
    assume(torch.equal(x * factor / factor, x))  # the smallest numbers have no half
    scale, zero_point = calibrated(x, format)
    found = fake_quantize(x * factor, scale * factor, zero_point, format)
    assert torch.equal(found, fake_quantize(x, scale, zero_point, format) * factor)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@settings(deadline=None, max_examples=25)
@given(x=samples)
def test_one_channel_is_per_tensor(format, x):
    scale, zero_point = calibrated(x, format)
    whole = fake_quantize(x, scale, zero_point, format, PerTensor())
    channel = fake_quantize(x[None], scale[None], zero_point[None], format, PerChannel(0))
    assert torch.equal(channel[0], whole)


def test_the_missions_literal_rounding_differs_only_at_ties_with_an_odd_zero_point():
    """round(s x + z) against round(s x) + z: off ties never, at ties with odd z always."""
    default = Integer(8, signed=False, symmetric=False)
    literal = Integer(8, signed=False, symmetric=False, round_shifted=True)
    one, odd, even = torch.ones(()), torch.tensor(113), torch.tensor(112)
    off_ties = torch.randn(100_000, generator=torch.Generator().manual_seed(0)) * 30
    ties = torch.arange(-100, 100) + 0.5
    for z in (odd, even):
        assert torch.equal(quantize(off_ties, one, z, default), quantize(off_ties, one, z, literal))
    assert torch.equal(quantize(ties, one, even, default), quantize(ties, one, even, literal))
    differ = quantize(ties, one, odd, default).int() - quantize(ties, one, odd, literal)
    assert (differ.abs() == 1).all()


def test_the_literal_rounding_is_the_missions_formula():
    x = torch.arange(-64, 64) / 2 + 0.0
    literal = Integer(8, symmetric=False, round_shifted=True)
    codes = quantize(x, torch.ones(()), torch.tensor(-7), literal)
    assert codes.tolist() == [max(-128, min(127, round(v - 7))) for v in x.tolist()]
