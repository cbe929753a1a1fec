"""The histogram: exact where it says so, whatever the order and the split."""

import numpy as np
import pytest
import torch

from halfstep.statistics import Histogram


def filled(*batches):
    histogram = Histogram()
    for batch in batches:
        histogram.update(batch)
    return histogram


def equal(a, b):
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for key, value in first.items():
        same = torch.equal(value, second[key]) if isinstance(value, torch.Tensor) else value == second[key]
        assert same, key


def test_moments_and_extremes_are_exact():
    x = torch.randn(10_000) * 3 + 1
    histogram = filled(x)
    assert histogram.count == 10_000
    assert (histogram.min, histogram.max) == (float(x.min()), float(x.max()))
    assert histogram.sum == pytest.approx(float(x.double().sum()), rel=1e-9)
    assert histogram.sum_of_squares == pytest.approx(float((x.double() ** 2).sum()), rel=1e-2)


def test_any_split_and_order_gives_the_same_state_bit_for_bit():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3000, generator=generator) * torch.logspace(-3, 3, 3000)
    x[::2] = x[::2].relu()
    whole = filled(x)
    for _ in range(200):
        shuffled = x[torch.randperm(3000, generator=generator)]
        cut = int(torch.randint(0, 3001, (), generator=generator))
        one, two = filled(shuffled[:cut]), filled(shuffled[cut:])
        one.merge(two)
        equal(one, whole)


@pytest.mark.parametrize("first", [torch.zeros(64), torch.full((1,), 1e-30)])
def test_a_first_batch_of_zeros_or_tiny_values_does_not_fix_the_width(first):
    histogram = filled(first, torch.tensor([1e30, -3.0]))
    assert (histogram.min, histogram.max) == (-3.0, float(torch.tensor(1e30)))
    assert histogram.count == len(first) + 2
    values, counts = histogram.bins()
    assert int(counts.sum()) == histogram.count
    assert len(values) <= 2**16


def test_counts_do_not_stop_at_two_to_the_24():
    histogram = Histogram()
    ones = torch.ones(2**22)
    for _ in range(5):
        histogram.update(ones)
    assert histogram.count == 5 * 2**22 > 2**24


def test_nan_and_infinities_are_counted_and_left_out():
    histogram = filled(torch.tensor([1.0, float("nan"), float("inf"), -float("inf"), 0.0]))
    assert (histogram.nan_count, histogram.inf_count, histogram.zero_count) == (1, 2, 1)
    assert (histogram.min, histogram.max) == (0.0, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_other_types_and_strides(dtype):
    x = torch.randn(40, 30).to(dtype)
    equal(filled(x.t()), filled(x.contiguous()))
    assert filled(x[:, ::3]).max == float(x[:, ::3].max())
    assert filled(torch.empty(0), x).count == 1200


def test_state_survives_a_round_trip():
    x = filled(torch.randn(1000))
    other = Histogram()
    other.load_state_dict(x.state_dict())
    equal(x, other)
    assert np.isfinite(other.sum)
