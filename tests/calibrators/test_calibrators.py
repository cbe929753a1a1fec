"""Calibrators against closed forms, scipy and each other."""

import numpy as np
import pytest
import torch
from scipy import stats

from halfstep import functional
from halfstep.calibrators import MSE, Entropy, Max, Percentile
from halfstep.errors import NotObservedError
from halfstep.formats import Integer
from halfstep.granularity import PerChannel, PerTensor
from halfstep.statistics import Histogram

S8, U8 = Integer(8), Integer(8, signed=False, symmetric=False)
EVERY = [Max(), Percentile(99.9), Percentile(100), Entropy(), MSE()]


def observed(x):
    histogram = Histogram()
    histogram.update(x)
    return histogram


@pytest.fixture(scope="module")
def normal():
    return torch.tensor(stats.norm.ppf((np.arange(1_000_000) + 0.5) / 1_000_000), dtype=torch.float32)


@pytest.mark.parametrize(
    ("bits", "alpha", "error"),
    [(2, 1.2240, 0.190174), (3, 1.9523, 0.046860), (4, 2.4739, 0.0128894), (6, 3.2701, 0.00106929)],
)
def test_mse_finds_the_optimum_of_the_normal_distribution(normal, bits, alpha, error):
    format = Integer(bits)
    low, high = MSE().range(observed(normal), format)
    scale, zero_point = format.parameters(torch.tensor(low), torch.tensor(high))
    y = functional.fake_quantize(normal, scale, zero_point, format, PerTensor())
    assert low == -high
    assert high == pytest.approx(alpha, rel=0.03)
    assert float(((y - normal) ** 2).mean()) == pytest.approx(error, rel=0.003)


@pytest.mark.parametrize("percentile", [50.0, 99.0, 99.9, 99.99])
def test_percentiles_are_scipys_with_outliers_of_ten_thousand_times_the_bulk(percentile):
    rng = np.random.default_rng(0)
    x = np.abs(rng.standard_normal(50_000)).astype(np.float32)
    x[:3] = 1e4
    wanted = stats.quantile(x, percentile / 100, method="inverted_cdf")
    _, high = Percentile(percentile).range(observed(torch.from_numpy(x)), S8)
    assert high == pytest.approx(float(wanted), rel=2**-7)


@pytest.mark.parametrize("calibrator", EVERY, ids=str)
@pytest.mark.parametrize("format", [S8, U8], ids=str)
def test_every_calibrator_keeps_a_constant_and_contains_zero(calibrator, format):
    low, high = calibrator.range(observed(torch.full((1000,), 2.0)), format)
    assert low <= 0
    assert high == pytest.approx(2.0, rel=2**-7)


@pytest.mark.parametrize("calibrator", EVERY, ids=str)
def test_no_calibrator_answers_without_data(calibrator):
    with pytest.raises(NotObservedError):
        calibrator.range(Histogram(), S8)


def test_entropy_and_mse_clip_an_outlier_and_max_does_not():
    x = torch.cat([torch.rand(100_000), torch.tensor([10.0])])
    histogram = observed(x)
    assert Max().range(histogram, S8) == (-10.0, 10.0)
    assert Entropy().range(histogram, S8)[1] < 1.1
    assert MSE().range(histogram, Integer(4))[1] < 2.0


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_mse_is_never_worse_than_another_calibrator(bits):
    x = torch.distributions.StudentT(3.0).sample((50_000,))
    histogram, format = observed(x), Integer(bits)

    def error(calibrator):
        low, high = calibrator.range(histogram, format)
        parameters = format.parameters(torch.tensor(low), torch.tensor(high))
        y = functional.fake_quantize(x, *parameters, format, PerTensor())
        return float(((y - x) ** 2).mean())

    assert error(MSE()) <= min(error(other) for other in EVERY) * (1 + 2**-7)


def test_weights_per_channel():
    weight = torch.randn(6, 4, 3, 3) * torch.logspace(-2, 2, 6).view(-1, 1, 1, 1)
    low, high = Max().weight_range(weight, S8, PerChannel(0))
    assert torch.equal(high, weight.abs().amax((1, 2, 3)))
    assert torch.equal(low, -high)
    format = Integer(3)

    def error(calibrator):
        parameters = format.parameters(*calibrator.weight_range(weight, format, PerChannel(0)))
        y = functional.fake_quantize(weight, *parameters, format, PerChannel(0))
        return ((y - weight) ** 2).sum((1, 2, 3))

    assert (error(MSE()) <= error(Max()) * (1 + 1e-6)).all()
