from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

from halfstep.errors import DataError, FormatError
from halfstep.functional import fitting
from halfstep.functional.fitting import exact_kmeans, lloyd_max


def error(values, samples, weights=None):
    return float(
        np.average(((samples[:, None] - values) ** 2).min(1), weights=weights)
        * np.sum(np.ones_like(samples) if weights is None else weights)
    )


def brute_force(samples, weights, levels):
    """Try every way to cut the sorted samples into intervals."""
    order = np.argsort(samples)
    samples, weights = samples[order], weights[order]
    best = np.inf
    for cuts in combinations(range(1, len(samples)), min(levels, len(samples)) - 1):
        total = 0.0
        for i, j in zip((0, *cuts), (*cuts, len(samples)), strict=True):
            if weights[i:j].sum() > 0:
                mean = np.average(samples[i:j], weights=weights[i:j])
                total += (weights[i:j] * (samples[i:j] - mean) ** 2).sum()
        best = min(best, total)
    return best


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_it_is_the_optimum_of_brute_force(data):
    count = data.draw(st.integers(1, 8))
    samples = np.array(data.draw(st.lists(st.integers(-9, 9), min_size=count, max_size=count)), dtype=float)
    weights = np.array(data.draw(st.lists(st.integers(0, 4), min_size=count, max_size=count)), dtype=float)
    if not weights.any():
        return
    levels = data.draw(st.integers(1, 4))
    values = exact_kmeans(samples, weights, levels)
    assert len(values) <= levels
    assert (np.diff(values) > 0).all()
    assert error(values, samples, weights) == pytest.approx(brute_force(samples, weights, levels), abs=1e-9)


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_exact_is_at_most_lloyd_is_at_most_an_even_grid(offset):
    """The offset shows that large means do not eat the small differences."""
    rng = np.random.default_rng(0)
    for samples in (rng.standard_normal(3000), rng.laplace(size=3000), rng.integers(0, 9, 3000) / 7):
        samples = samples + offset
        for levels in (2, 3, 8, 16):
            even = samples.min() + (np.arange(levels) + 0.5) * np.ptp(samples) / levels
            errors = [
                error(values, samples)
                for values in (exact_kmeans(samples, None, levels), lloyd_max(samples, None, levels), even)
            ]
            assert errors[0] <= errors[1] * (1 + 1e-9) + 1e-9
            assert errors[1] <= errors[2] * (1 + 1e-9) + 1e-9


@pytest.mark.parametrize(
    ("levels", "table", "mse"),
    [
        (4, [0.4528, 1.510], 0.1175),
        (8, [0.2451, 0.7560, 1.344, 2.152], 0.03454),
        (16, [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733], 0.009497),
    ],
)
def test_the_normal_distribution_gives_maxs_table(levels, table, mse):
    """Max 1960, table I, from a histogram of N(0, 1) weighted by exact probabilities."""
    edges = np.linspace(-8, 8, 4097)
    centres, counts = (edges[1:] + edges[:-1]) / 2, np.diff(stats.norm.cdf(edges))
    values = exact_kmeans(centres, counts, levels)
    np.testing.assert_allclose(values[levels // 2 :], table, atol=2e-3)
    # Within a bin of width h the mass is nearly even: taking its centre loses h**2 / 12 of variance.
    lost = (16 / 4096) ** 2 / 12
    assert error(values, centres, counts) + lost == pytest.approx(mse, rel=2e-3)
    # Lloyd's steps end where no bin changes cell, which on a flat optimum is some way off.
    assert error(lloyd_max(centres, counts, levels), centres, counts) + lost == pytest.approx(mse, rel=2e-2)


def test_counts_are_the_same_as_repeated_samples():
    samples = np.array([0.0, 1.0, 3.0, 7.0, 8.0])
    counts = np.array([5, 1, 2, 0, 4])
    np.testing.assert_allclose(
        exact_kmeans(samples, counts.astype(float), 2), exact_kmeans(np.repeat(samples, counts), None, 2)
    )


def test_few_distinct_samples_are_kept_as_they_are():
    assert exact_kmeans(np.array([3.0, 1.0, 3.0]), None, 4).tolist() == [1.0, 3.0]
    assert lloyd_max(np.array([3.0, 1.0, 3.0]), None, 4).tolist() == [1.0, 3.0]


def test_three_values_on_the_normal_find_the_ternary_optimum():
    """The stationary condition of {-a, 0, a}: a = E[x | x > a/2] of N(0, 1), a = 1.2240."""
    a = optimize.brentq(lambda a: stats.norm.pdf(a / 2) / stats.norm.sf(a / 2) - a, 1, 2)
    samples = stats.norm.ppf((np.arange(100_000) + 0.5) / 100_000)
    np.testing.assert_allclose(exact_kmeans(samples, None, 3), [-a, 0, a], atol=1e-3)
    assert a == pytest.approx(1.2240, abs=5e-5)


@pytest.mark.parametrize("solve", [exact_kmeans, lloyd_max])
@pytest.mark.parametrize(
    ("samples", "weights", "message"),
    [
        ([], None, "samples: got none with a positive weight"),
        ([1.0], [0.0], "samples: got none with a positive weight"),
        ([1.0, np.nan], None, "samples: got NaN or infinities"),
        ([1.0, np.inf], None, "samples: got NaN or infinities"),
        ([1.0, 2.0], [1.0, -1.0], "weights: got negative or infinite ones"),
        ([1.0, 2.0], [1.0], "weights: got 1 for 2 samples"),
    ],
)
def test_bad_input(solve, samples, weights, message):
    with pytest.raises(DataError, match=message):
        solve(np.array(samples), None if weights is None else np.array(weights), 2)


def test_too_many_distinct_samples_ask_for_a_histogram(monkeypatch):
    monkeypatch.setattr(fitting, "MOST_ENTRIES", 100)
    with pytest.raises(FormatError, match="got 51 distinct samples for 2 values, needed at most 50"):
        exact_kmeans(np.arange(51.0), None, 2)
