"""The MSE calibrator finds the optimum: in closed form, by brute force, and never beaten by another calibrator."""

from __future__ import annotations

import math
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from halfstep.calibrators import MSE, Entropy, Max, Percentile
from halfstep.calibrators.error import Slabs
from halfstep.errors import ArgumentError, FormatError
from halfstep.formats import Codebook, Integer
from halfstep.formats.floating import E2M1, E4M3
from halfstep.functional import fake_quantize
from halfstep.granularity import PerChannel, PerGroup, PerTensor
from halfstep.statistics import Histogram

AFFINE = Integer(8, signed=False, symmetric=False)
NORMAL = torch.randn(20_000, generator=torch.Generator().manual_seed(0))
FEW = NORMAL[:3000]


def observed(x: torch.Tensor) -> Histogram:
    histogram = Histogram()
    histogram.update(x)
    return histogram


def error(x: torch.Tensor, low: float, high: float, format) -> float:
    """The mean squared error of the samples themselves, in float64."""
    scale, zero_point = format.parameters(torch.tensor(low), torch.tensor(high))
    quantized = fake_quantize(x.double(), scale.double(), zero_point, format, PerTensor())
    return (quantized - x.double()).square().mean().item()


def quantile_grid(inverse, size: int = 2_000_000) -> torch.Tensor:
    """Samples of a distribution without the noise of sampling: its quantiles at equal distances."""
    return torch.from_numpy(inverse((np.arange(size) + 0.5) / size)).float()


def expected_error(density, threshold: float, bits: int) -> float:
    """The mean squared error of a symmetric density, by the midpoint rule on [0, 60]."""
    step = 60 / 2_000_000
    x = (np.arange(2_000_000) + 0.5) * step
    most = 2 ** (bits - 1) - 1
    quantized = np.clip(np.rint(x * most / threshold), 0, most) * threshold / most
    return 2 * step * float(density(x) @ (x - quantized) ** 2)


@cache
def histogram_of(law) -> Histogram:
    return observed(quantile_grid(law.ppf))


# bits: (best threshold, its mean squared error), exact integrals
NORMAL_OPTIMA = {
    2: (1.2240, 0.190174),
    3: (1.9523, 0.046860),
    4: (2.4739, 0.0128894),
    5: (2.8987, 0.00369322),
    6: (3.2701, 0.00106929),
    7: (3.6075, 3.08622e-4),
    8: (3.9205, 8.8308e-5),
}
LAPLACE_OPTIMA = {
    2: (2.0000, 0.528482),
    3: (3.4864, 0.166173),
    4: (4.8199, 0.0547904),
    5: (6.0980, 0.0181703),
    6: (7.3586, 0.00595903),
    7: (8.6178, 0.00191989),
    8: (9.8827, 6.06603e-4),
}


@pytest.mark.parametrize("bits", NORMAL_OPTIMA)
@pytest.mark.parametrize(("law", "optima"), [(stats.norm, NORMAL_OPTIMA), (stats.laplace, LAPLACE_OPTIMA)])
def test_the_optimum_in_closed_form(law, optima: dict[int, tuple[float, float]], bits: int) -> None:
    threshold, least = optima[bits]
    low, high = MSE().range(histogram_of(law), Integer(bits))
    assert low == -high
    assert high == pytest.approx(threshold, rel=0.005)
    assert expected_error(law.pdf, high, bits) == pytest.approx(least, rel=1e-4)


def test_uniform_values_are_a_step_squared_over_12_off() -> None:
    x = quantile_grid(lambda u: u)
    for bits in (2, 4, 8):
        format = Integer(bits, signed=False, symmetric=False)
        low, high = MSE().range(observed(x), format)
        # 2^b cells of equal width 1 / 2^b cannot be had with a level at zero: the first cell is half a step.
        step = 1 / (2**bits - 0.5)
        assert low == 0
        assert high == pytest.approx(1 - step / 2, rel=1e-3)
        assert error(x, low, high, format) == pytest.approx(step**2 / 12, rel=1e-2)


@pytest.mark.parametrize("x", [FEW, FEW.relu(), FEW.exp()], ids=["normal", "relu", "log-normal"])
@pytest.mark.parametrize(
    "format",
    [*map(Integer, (2, 3, 4, 8)), Integer(4, mid_rise=True), Codebook.nf4(), Codebook.apot(4), E2M1, E4M3],
    ids=str,
)
def test_no_symmetric_threshold_is_better(x: torch.Tensor, format) -> None:
    top = x.abs().max().item()
    found = error(x, *MSE().range(observed(x), format), format)
    least = min(error(x, -t, t, format) for t in np.geomspace(top / 30, top, 150).tolist())
    assert found <= least * (1 + 1e-3)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize(
    "x",
    [FEW, FEW + 1, torch.nn.functional.gelu(FEW), torch.cat([FEW, -4 * FEW.exp()[:300]])],
    ids=["normal", "shifted", "gelu", "one heavy side"],
)
def test_no_pair_of_ends_is_better(x: torch.Tensor, bits: int) -> None:
    format = Integer(bits, signed=False, symmetric=False)
    found = error(x, *MSE().range(observed(x), format), format)
    lows, highs = (end * np.geomspace(0.02, 1, 20) for end in (x.min().item(), x.max().item()))
    least = min(error(x, low, high, format) for low in lows.tolist() for high in highs.tolist())
    assert found <= least * (1 + 1e-3)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([Integer(2), Integer(4), Integer(8), AFFINE, Integer(4, symmetric=False)]),
    st.floats(0.3, 3.0),
    st.booleans(),
)
def test_no_other_calibrator_is_better(seed: int, format: Integer, power: float, rectified: bool) -> None:
    count = 40_000
    x = torch.randn(count, generator=torch.Generator().manual_seed(seed))
    x = x.sign() * x.abs() ** power
    x = x.relu() if rectified else x + 0.3
    histogram = observed(x)
    best = error(x, *MSE().range(histogram, format), format)
    # At 8 bits the bins (2^-7 of a value) are as wide as the steps: where in its step a sample lies is not known, so
    # the mean square of round-off is the expected one. The samples' own differs by sqrt(4/5) / sqrt(count) of itself,
    # one standard deviation of the square of a uniform variable; three of the difference of two are allowed.
    slack = 1e-2 if format.bits <= 4 else 3 * math.sqrt(2 * 4 / 5 / count)
    for other in (Max(), Percentile(99), Percentile(99.9), Entropy()):
        assert best <= error(x, *other.range(histogram, format), format) * (1 + slack)


def test_many_255_and_one_256_are_nearer_to_255() -> None:
    x = torch.cat([torch.full((100_000,), 255.0), torch.tensor([256.0])])
    low, high = MSE().range(observed(x), Integer(8))
    assert (low, high) == pytest.approx((-255, 255), abs=0.01)


def test_the_error_is_searched_not_descended() -> None:
    # At 2 bits these two clusters make two minima: 1 (a tenth is clipped) and 4 (nine tenths become zero).
    for share, expected in ((0.3, 4.0), (0.001, 1.0)):
        x = torch.where(torch.arange(10_000) < share * 10_000, 4.0, 1.0)
        assert MSE().range(observed(x), Integer(2))[1] == pytest.approx(expected, rel=0.01)


def test_an_outlier_of_1e30_is_kept_because_the_squares_say_so() -> None:
    assert MSE().range(observed(torch.cat([NORMAL, torch.tensor([1e30])])), Integer(8))[1] == pytest.approx(
        1e30
    )


def test_levels_of_an_image_are_met_exactly() -> None:
    x = torch.arange(256).repeat(100).float() / 255
    low, high = MSE().range(observed(x), AFFINE)
    assert (low, high) == (0.0, 1.0)
    assert error(x, low, high, AFFINE) < 1e-14


def test_a_rule_of_absolute_values_has_one_range_only() -> None:
    rule = Codebook.rule([0, 1, 2], [0, 1], ties_up=True)
    x = NORMAL.abs()
    assert MSE().range(observed(x), rule) == (0.0, x.max().item())


def test_a_table_per_channel_is_refused() -> None:
    tables = Codebook(torch.tensor([[-1.0, 1.0], [-2.0, 2.0]]))
    with pytest.raises(FormatError, match="got one table per parameter"):
        MSE().range(observed(NORMAL), tables)
    with pytest.raises(FormatError, match="got one table per parameter"):
        MSE().weight_range(NORMAL.reshape(2, -1), tables, PerChannel(0))


# The error that is minimised.


@pytest.mark.parametrize(
    "format",
    [Integer(2), Integer(8), AFFINE, Integer(10), Integer(5, mid_rise=True), Codebook.nf4(), E4M3],
    ids=str,
)
def test_the_error_from_slabs_is_that_of_the_samples(format) -> None:
    x = torch.randn(200_000, generator=torch.Generator().manual_seed(1))
    ends = np.array([0.7, 2.0, 3.5, 4.8], np.float32).astype(float)
    slabs = Slabs.of(observed(x)).mean_squared_error(-ends, ends, format)
    samples = [error(x, -end, end, format) for end in ends.tolist()]
    assert slabs == pytest.approx(samples, rel=3e-3)


def test_coarser_slabs_keep_count_mean_and_spread() -> None:
    slabs = Slabs.of(observed(torch.cat([NORMAL, torch.zeros(500)])))
    coarser = slabs.coarser(4)
    assert coarser.centres.size < slabs.centres.size / 10
    assert slabs.counts.sum() == coarser.counts.sum()
    assert slabs.counts @ slabs.centres == pytest.approx(coarser.counts @ coarser.centres)
    squares = [s.counts @ (s.centres**2 + s.halves**2 / 3) for s in (slabs, coarser)]
    assert squares[0] == pytest.approx(squares[1])


# Weights.


def weight_errors(
    weight: torch.Tensor, low: torch.Tensor, high: torch.Tensor, format, granularity
) -> torch.Tensor:
    scale, zero_point = format.parameters(low, high)
    difference = fake_quantize(weight, scale, zero_point, format, granularity) - weight
    return granularity.reduce(difference.square(), "sum")


@pytest.mark.parametrize(
    "format", [Integer(2), Integer(4), Integer(8), Integer(4, symmetric=False), Codebook.nf4(), E2M1], ids=str
)
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(0), PerChannel(1), PerGroup(1, 24)], ids=str)
def test_every_row_of_a_weight_gets_its_best_range(granularity, format) -> None:
    weight = torch.randn(
        8, 60, generator=torch.Generator().manual_seed(0)
    )  # 60 = 24 + 24 + 12: a ragged group
    weight[0] *= 100
    low, high = MSE().weight_range(weight, format, granularity)
    assert low.shape == high.shape == granularity.parameter_shape(weight.shape)
    widest = Max().weight_range(weight, format, granularity)
    assert (widest[0] <= low).all()
    assert (high <= widest[1]).all()
    found = weight_errors(weight, low, high, format, granularity)
    for ratio in np.geomspace(0.05, 1, 150).tolist():
        tried = weight_errors(weight, widest[0] * ratio, widest[1] * ratio, format, granularity)
        assert (
            found <= tried * 1.05 + 1e-9
        ).all()  # of few samples the error has narrow dips that a grid may miss


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_weights_optimum_in_closed_form(bits: int) -> None:
    x = quantile_grid(stats.norm.ppf, 100_000)
    threshold, least = NORMAL_OPTIMA[bits]
    _, high = MSE().weight_range(torch.stack([x, 8 * x]), Integer(bits), PerChannel(0))
    assert high.tolist() == pytest.approx([threshold, 8 * threshold], rel=0.02)
    assert expected_error(stats.norm.pdf, high[0].item(), bits) == pytest.approx(least, rel=2e-3)


def test_one_channel_is_the_whole_tensor() -> None:
    weight = torch.randn(1, 500, generator=torch.Generator().manual_seed(0))
    whole = MSE().weight_range(weight, Integer(4), PerTensor())
    channel = MSE().weight_range(weight, Integer(4), PerChannel(0))
    assert [end.item() for end in whole] == [end.item() for end in channel]


def test_padding_of_a_ragged_group_is_not_blamed_on_a_format_without_zero() -> None:
    weight = torch.full((1, 9), 0.5)
    _, high = MSE().weight_range(weight, Codebook.binary(), PerGroup(1, 8))
    assert high.tolist() == [[0.5, 0.5]]


def test_importance_decides_what_is_clipped() -> None:
    weight = torch.cat([torch.linspace(-1, 1, 63), torch.tensor([30.0])])[None]
    without = MSE().weight_range(weight, Integer(4), PerTensor())[1]
    importance = torch.ones(64)
    importance[-1] = 0.0
    ignored = MSE().weight_range(weight, Integer(4), PerTensor(), importance)[1]
    assert without > 20
    assert ignored < 1.1
    same = MSE().weight_range(weight, Integer(4), PerTensor(), torch.full((1, 64), 3.0))[1]
    assert same.item() == pytest.approx(without.item(), rel=1e-3)


def test_importance_out_of_its_domain_is_refused() -> None:
    weight = torch.ones(4, 6)
    with pytest.raises(
        ArgumentError, match=r"importance: got shape \(4,\), needed one that broadcasts to \(4, 6\)"
    ):
        MSE().weight_range(weight, Integer(4), PerTensor(), torch.ones(4))
    with pytest.raises(ArgumentError, match="importance: got negative"):
        MSE().weight_range(weight, Integer(4), PerTensor(), -torch.ones(6))


def test_zero_rows_and_empty_weights_have_zero_ranges() -> None:
    low, high = MSE().weight_range(torch.zeros(3, 5), Integer(4), PerChannel(0))
    assert low.tolist() == high.tolist() == [0.0, 0.0, 0.0]
    low, high = MSE().weight_range(torch.empty(0, 5), Integer(4), PerChannel(0))
    assert low.shape == high.shape == (0,)
