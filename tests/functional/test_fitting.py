import numpy as np
import pytest
import torch

from halfstep.errors import DataError, FormatError
from halfstep.formats import Codebook, Integer
from halfstep.functional import (
    binary_scale,
    fake_quantize,
    kmeans_codebook,
    lloyd_max_codebook,
    ternary_scale,
)
from halfstep.granularity import PerChannel, PerGroup, PerTensor

GRANULARITIES = [PerTensor(), PerChannel(0), PerChannel(1), PerGroup(1, 40)]


def mse(x, codebook, granularity):
    scale = torch.ones(granularity.parameter_shape(x.shape))
    return (fake_quantize(x, scale, None, codebook, granularity) - x).square().mean().item()


@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
def test_exact_beats_lloyd_beats_uniform_for_each_parameter(granularity):
    x = torch.randn(8, 100, generator=torch.Generator().manual_seed(0)) * torch.logspace(-1, 1, 8)[:, None]
    exact, lloyd = kmeans_codebook(x, 2, granularity), lloyd_max_codebook(x, 2, granularity)
    assert exact.values.shape == (*granularity.parameter_shape(x.shape), 4)
    low, high = granularity.reduce(x, "min"), granularity.reduce(x, "max")
    uniform = Codebook(low[..., None] + (high - low)[..., None] * (torch.arange(4) + 0.5) / 4, scaled=False)
    errors = [mse(x, codebook, granularity) for codebook in (exact, lloyd, uniform)]
    assert errors[0] <= errors[1] * (1 + 1e-5)
    assert errors[1] <= errors[2] * (1 + 1e-5)


def test_a_table_per_channel_is_each_channels_own():
    x = torch.randn(3, 50)
    together = kmeans_codebook(x, 3, PerChannel(0))
    for row, table in zip(x, together.values, strict=True):
        assert torch.equal(kmeans_codebook(row, 3).values, table)


def test_a_histogram_serves_as_samples():
    x = torch.randint(-20, 20, (5000,)).float()
    values, counts = x.unique(return_counts=True)
    assert torch.equal(kmeans_codebook(values, 3, weights=counts).values, kmeans_codebook(x, 3).values)


def test_weights_pull_the_values():
    x = torch.tensor([0.0, 1.0, 2.0, 10.0])
    weights = torch.tensor([1.0, 1.0, 1000.0, 1.0])
    assert kmeans_codebook(x, 1, weights=weights).values.tolist() == pytest.approx([2.0, 10.0], abs=0.01)


def test_padding_of_a_ragged_group_is_no_sample():
    x = torch.tensor([[5.0, 6.0, 7.0, 8.0, 9.0]])
    table = kmeans_codebook(x, 1, PerGroup(1, 4))
    assert table.values[0, 1, 0] == 9.0, "not the mean of 9 and a padded 0"


@pytest.mark.parametrize("sample", [0.0, 3.0, -1e-20, 1e30])
def test_fewer_distinct_samples_than_values_are_met_exactly(sample):
    x = torch.full((2, 5), sample)
    table = kmeans_codebook(x, 4, PerChannel(0))
    assert table.bits == 4
    assert mse(x, table, PerChannel(0)) == 0
    assert torch.equal(fake_quantize(x, torch.ones(2), None, table, PerChannel(0)), x)


def test_at_8_bits_it_is_no_worse_than_integers():
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    scale, zero_point = Integer(8).parameters(-x.abs().max(), x.abs().max())
    integer = (fake_quantize(x, scale, zero_point, Integer(8)) - x).square().mean().item()
    assert mse(x, kmeans_codebook(x, 8), PerTensor()) < integer


def test_ternary_scale_is_the_optimum_of_a_search():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        x = torch.randn(11, generator=generator) ** 3
        scale = ternary_scale(x, PerTensor())
        found = (fake_quantize(x, scale, None, Codebook.ternary()) - x).square().sum()
        for other in torch.linspace(0.01, 1, 300) * x.abs().max():
            worse = (fake_quantize(x, other, None, Codebook.ternary()) - x).square().sum()
            assert found <= worse * (1 + 1e-5)


def test_scales_per_parameter():
    x = torch.tensor([[1.0, -3.0, 0.0], [0.0, 0.0, 0.0]])
    assert binary_scale(x, PerChannel(0)).tolist() == pytest.approx([4 / 3, 2.0**-126])
    assert ternary_scale(x, PerChannel(0)).tolist() == [3.0, 1.0]
    assert ternary_scale(x[:1], PerGroup(1, 2)).tolist() == [[3.0, 1.0]]


def test_a_dead_filter_stays_next_to_nothing():
    x = torch.zeros(2, 9)
    scale = binary_scale(x, PerChannel(0))
    assert fake_quantize(x, scale, None, Codebook.binary(), PerChannel(0)).abs().max() < 1e-37


def test_bad_input():
    with pytest.raises(FormatError, match="bits: got 9, needed 1 to 8"):
        kmeans_codebook(torch.randn(9), 9)
    with pytest.raises(DataError, match=r"weights: got shape \(3,\), needed \(9,\)"):
        kmeans_codebook(torch.randn(9), 2, weights=torch.ones(3))
    with pytest.raises(DataError, match="samples: got NaN or infinities"):
        lloyd_max_codebook(torch.tensor([1.0, np.nan]), 2)
    with pytest.raises(DataError, match="empty tensor"):
        ternary_scale(torch.zeros(0), PerTensor())
