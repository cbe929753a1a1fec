"""Max, Percentile and MovingAverage; what all calibrators have in common."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from halfstep.calibrators import MSE, Calibrator, Entropy, Max, MovingAverage, Percentile, WeightCalibrator
from halfstep.errors import ArgumentError, NotObservedError
from halfstep.formats import Codebook, Integer
from halfstep.formats.floating import E2M1, E4M3
from halfstep.granularity import PerChannel, PerGroup, PerTensor
from halfstep.statistics import Histogram

SCALE, AFFINE = Integer(8), Integer(8, signed=False, symmetric=False)
CALIBRATORS: list[Calibrator] = [Max(), Percentile(99.9), Percentile(100), Entropy(), MSE()]
FORMATS = [SCALE, AFFINE, Integer(2), Integer(4, symmetric=False), Integer(16), Codebook.nf4(), E4M3, E2M1]


def observed(x: torch.Tensor, **options: bool) -> Histogram:
    histogram = Histogram(**options)
    histogram.update(x)
    return histogram


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("calibrator", CALIBRATORS, ids=str)
@settings(deadline=None, max_examples=12)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=50))
def test_a_range_holds_zero_lies_within_the_data_and_is_symmetric_where_its_format_is(
    calibrator: Calibrator, format, numbers: list[float]
) -> None:
    numbers = [
        x if abs(x) > 1e-6 else 0.0 for x in numbers
    ]  # below, float32 has no scale for a 16-bit format
    low, high = calibrator.range(observed(torch.tensor(numbers)), format)
    reach = max(map(abs, numbers))
    assert -reach <= low <= 0 <= high <= reach
    if format.symmetric:
        assert low == -high
    else:
        assert low >= min(0.0, *numbers)
        assert high <= max(0.0, *numbers)


@pytest.mark.parametrize("format", FORMATS, ids=str)
@pytest.mark.parametrize("calibrator", CALIBRATORS, ids=str)
def test_every_calibrator_keeps_a_constant_whole(calibrator: Calibrator, format) -> None:
    assert calibrator.range(observed(torch.full((1000,), 2.0)), format) == (
        (-2.0 if format.symmetric else 0.0),
        2.0,
    )


@pytest.mark.parametrize("calibrator", CALIBRATORS, ids=str)
def test_zeros_alone_give_a_zero_range(calibrator: Calibrator) -> None:
    low, high = calibrator.range(observed(torch.zeros(100)), AFFINE)
    assert (low, high) == (0.0, 0.0)


@pytest.mark.parametrize("calibrator", CALIBRATORS, ids=str)
def test_nothing_observed_is_an_error(calibrator: Calibrator) -> None:
    for histogram in (Histogram(), observed(torch.tensor([math.nan, math.inf]))):
        with pytest.raises(NotObservedError, match="no finite value was observed"):
            calibrator.range(histogram, SCALE)


@pytest.mark.parametrize("calibrator", CALIBRATORS, ids=str)
def test_nan_and_infinities_do_not_move_a_range(calibrator: Calibrator) -> None:
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    dirty = torch.cat([x, torch.tensor([math.nan, math.inf, -math.inf])])
    assert calibrator.range(observed(dirty), AFFINE) == calibrator.range(observed(x), AFFINE)


@pytest.mark.parametrize("calibrator", CALIBRATORS, ids=str)
def test_scaling_the_data_by_a_power_of_two_scales_the_range(calibrator: Calibrator) -> None:
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0)) + 0.5
    low, high = calibrator.range(observed(x), AFFINE)
    assert calibrator.range(observed(x * 1024), AFFINE) == pytest.approx((low * 1024, high * 1024), rel=1e-6)


@pytest.mark.parametrize("calibrator", CALIBRATORS, ids=str)
def test_asking_one_calibrator_does_not_change_what_the_next_one_sees(calibrator: Calibrator) -> None:
    histogram = observed(torch.randn(5000, generator=torch.Generator().manual_seed(0)))
    before = histogram.state_dict()
    calibrator.range(histogram, AFFINE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in histogram.state_dict().items())


def test_protocols_are_met() -> None:
    assert all(isinstance(calibrator, Calibrator) for calibrator in [*CALIBRATORS, MovingAverage()])
    answering = {type(c).__name__ for c in CALIBRATORS if isinstance(c, WeightCalibrator)}
    assert answering == {"Max", "MSE"}


def test_names_carry_their_options() -> None:
    names = [Max(), Percentile(99.99), Percentile(100), Percentile(99.9999), Entropy(), Entropy(64), MSE()]
    assert [str(name) for name in [*names, MovingAverage(0.5)]] == [
        "max",
        "percentile(99.99)",
        "percentile(100)",
        "percentile(99.9999)",
        "entropy",
        "entropy(64 candidates)",
        "mse",
        "moving average(0.5)",
    ]


# Percentile.


def test_percentile_100_is_the_max() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(500):
        histogram = observed(torch.randn(300, generator=generator))
        for format in (SCALE, AFFINE):
            assert Percentile(100).range(histogram, format) == Max().range(histogram, format)


@pytest.mark.parametrize("p", [99.0, 99.9, 99.99, 99.999, 99.9999])
def test_percentiles_equal_scipy_with_outliers_of_1e4_times_the_bulk(p: float) -> None:
    x = torch.randn(300_000, generator=torch.Generator().manual_seed(0))
    x[::10_000] *= 1e4
    histogram, d = observed(x), x.double().numpy()
    share = round(p / 100, 8)  # 99.9 / 100 is 0.9990000000000001
    exact = 0 if (1 - share) * x.numel() < 1000 else 2.0**-7
    expected = stats.quantile(np.abs(d), share, method="inverted_cdf")
    assert Percentile(p).range(histogram, SCALE)[1] == pytest.approx(expected, rel=exact)
    low, high = Percentile(p).range(histogram, AFFINE)
    assert high == pytest.approx(stats.quantile(d, share, method="inverted_cdf"), rel=exact)
    assert low == pytest.approx(-stats.quantile(-d, share, method="inverted_cdf"), rel=exact)


def test_a_percentile_is_the_decimal_it_is_written_as() -> None:
    assert Percentile(99.99).share == Fraction(9999, 10_000)
    assert Percentile(99.9999).share == Fraction(999_999, 1_000_000)


def test_a_one_sided_percentile_leaves_zero_as_the_other_end() -> None:
    assert Percentile(99).range(observed(torch.arange(1.0, 101.0)), AFFINE) == (0.0, 99.0)
    assert Percentile(99).range(observed(-torch.arange(1.0, 101.0)), AFFINE) == (-99.0, 0.0)


@pytest.mark.parametrize("p", [50, 90, 99, 99.9])
@pytest.mark.parametrize("format", [SCALE, AFFINE])
def test_a_percentile_of_little_that_is_not_zero_is_the_percentile_of_that(p: float, format: Integer) -> None:
    live = torch.randn(1000, generator=torch.Generator().manual_seed(0)).abs() + 0.1
    histogram = observed(torch.cat([torch.zeros(1_000_000), live]))
    assert Percentile(p).range(histogram, format) == Percentile(p).range(observed(live), format)


@given(st.lists(st.sampled_from([0.0, 0.0, -2.0, -1.0, 1.0, 2.0]), min_size=1, max_size=40))
def test_only_zeros_have_an_empty_range(numbers: list[float]) -> None:
    histogram = observed(torch.tensor(numbers))
    for p in (50, 75, 99.9, 100):
        for format in (SCALE, AFFINE):
            low, high = Percentile(p).range(histogram, format)
            assert (low < high) == any(numbers)
            assert min(0.0, *numbers) <= low or format.symmetric
            assert high <= max(map(abs, numbers))


@pytest.mark.parametrize("p", [49.9, 0, -1, 100.1, math.nan])
def test_percent_out_of_range_is_refused(p: float) -> None:
    with pytest.raises(ArgumentError, match="needed percent from 50 to 100"):
        Percentile(p)


# MovingAverage.


def test_the_moving_average_by_hand() -> None:
    histogram = Histogram(batch_ranges=True)
    for batch in ([0.0, 10.0], [-2.0, 20.0], [math.nan], [0.0, 0.0]):
        histogram.update(torch.tensor(batch))
    # high: 10, 0.9 * 10 + 2 = 11, 0.9 * 11 = 9.9; low: 0, -0.2, -0.18
    assert MovingAverage(0.9).range(histogram, AFFINE) == pytest.approx((-0.18, 9.9))
    assert MovingAverage(0.9).range(histogram, SCALE) == pytest.approx((-9.9, 9.9))
    assert MovingAverage(0.0).range(histogram, AFFINE) == (0.0, 0.0)


def test_the_moving_average_needs_what_it_averages() -> None:
    with pytest.raises(ArgumentError, match="observe with batch_ranges=True"):
        MovingAverage().range(observed(torch.ones(3)), SCALE)
    with pytest.raises(NotObservedError, match="no finite value was observed"):
        MovingAverage().range(Histogram(batch_ranges=True), SCALE)
    with pytest.raises(ArgumentError, match="momentum: got 1, needed at least 0 and less than 1"):
        MovingAverage(1)


# Max of weights.


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerChannel(1), PerGroup(1, 4)], ids=str)
@pytest.mark.parametrize("format", [SCALE, AFFINE], ids=str)
def test_max_of_a_weight_is_the_max_of_each_row(granularity, format) -> None:
    weight = torch.randn(6, 10, generator=torch.Generator().manual_seed(0))
    low, high = Max().weight_range(weight, format, granularity)
    assert low.shape == high.shape == granularity.parameter_shape(weight.shape)
    for row, row_low, row_high in zip(
        granularity.rows(weight, 0.0), low.flatten(), high.flatten(), strict=True
    ):
        assert Max().range(observed(row), format) == (row_low.item(), row_high.item())
