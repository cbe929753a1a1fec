"""The entropy calibrator equals its definition, and is free of its published faults."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from entropy_reference import bin_width, divergence

from halfstep.calibrators import MSE, Entropy, Max
from halfstep.calibrators.entropy import divergences
from halfstep.errors import ArgumentError
from halfstep.formats import Integer
from halfstep.statistics import Histogram

SCALE, AFFINE = Integer(8), Integer(8, signed=False, symmetric=False)
NORMAL = torch.randn(20_000, generator=torch.Generator().manual_seed(0))


def observed(x: torch.Tensor) -> Histogram:
    histogram = Histogram()
    histogram.update(x)
    return histogram


@pytest.mark.parametrize(
    "format", [Integer(2), Integer(4), SCALE, AFFINE, Integer(3, symmetric=False)], ids=str
)
@pytest.mark.parametrize(
    "x",
    [
        NORMAL[:800],
        NORMAL[:800].relu(),
        NORMAL[:800] * 2 + 1,
        torch.cat([NORMAL[:500], torch.tensor([40.0, -9.0])]),
    ],
    ids=["normal", "relu", "shifted", "outliers"],
)
def test_it_equals_the_loop_over_all_candidates(x: torch.Tensor, format: Integer) -> None:
    histogram = observed(x)
    values, counts = (array.tolist() for array in histogram.bins())
    kept = [(v, c) for v, c in zip(values, counts, strict=True) if v]
    values, counts = [v for v, _ in kept], [c for _, c in kept]

    edges = sorted({(math.floor(abs(v) / bin_width(v)) + 1) * bin_width(v) for v in values})
    results = []
    for edge in edges:
        within = [c for v, c in kept if abs(v) < edge]
        if (len(within) >= format.levels and 2 * sum(within) >= sum(counts)) or edge == edges[-1]:
            low, high = max(-edge, min(values)), min(edge, max(values))
            if format.symmetric:
                high = min(edge, max(map(abs, values)))
                low = -high
            low, high = min(low, 0.0), max(high, 0.0)
            low, high = float(np.float32(low)), float(np.float32(high))
            results.append((divergence(values, counts, low, high, format), low, high))

    everywhere = divergences(
        np.array(values), np.array(counts), *(np.array([r[end] for r in results]) for end in (1, 2)), format
    )
    assert everywhere == pytest.approx([r[0] for r in results], abs=1e-12)
    low, high = Entropy(candidates=10_000).range(histogram, format)
    best = min(r[0] for r in results)
    assert any((low, high) == r[1:] and r[0] <= best + 1e-12 for r in results)


def test_the_divergence_by_hand() -> None:
    values, counts = np.array([0.4, 0.5, 0.8, 1.0]), np.array([3, 5, 7, 9])
    whole, half = divergences(values, counts, np.zeros(2), np.array([1.0, 0.5]), AFFINE)
    assert whole == pytest.approx(0.0, abs=1e-15)
    # P = 3, 5 + 16 of 24; Q = 3, 5 of 8.
    assert half == pytest.approx(3 / 24 * math.log(8 / 24) + 21 / 24 * math.log(21 / 24 * 8 / 5))


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
def test_more_than_one_candidate_is_tested(bits: int) -> None:
    outliers = torch.cat([NORMAL, torch.tensor([30.0, -30.0])])
    high = Entropy().range(observed(outliers), Integer(bits))[1]
    assert high < 6
    assert Max().range(observed(outliers), Integer(bits))[1] == 30


def test_an_outlier_of_1e30_changes_nothing() -> None:
    low, high = Entropy().range(observed(NORMAL), SCALE)
    assert Entropy().range(observed(torch.cat([NORMAL, torch.tensor([1e30])])), SCALE) == pytest.approx(
        (low, high), rel=0.05
    )


def test_uniform_values_and_one_10_are_clipped_below_1_1() -> None:
    x = torch.cat([torch.rand(10_000, generator=torch.Generator().manual_seed(0)), torch.tensor([10.0])])
    assert Entropy().range(observed(x), SCALE)[1] < 1.1
    assert Entropy().range(observed(x), AFFINE)[1] < 1.1


def test_no_divergence_is_infinite_however_empty_the_bins() -> None:
    x = torch.tensor([0.01, 0.02, 5.0, 5.0, 900.0, 1e6, -3.0])
    values, counts = observed(x).bins()
    highs = np.array([0.02, 4.0, 5.0, 6.0, 1e5, 1e6])
    assert np.isfinite(divergences(values, counts, -highs, highs, SCALE)).all()


def test_the_first_candidate_follows_the_number_of_levels() -> None:
    # A search that starts at a fixed bin, whatever the width, misses the small thresholds that few bits need.
    narrow = Entropy().range(observed(NORMAL), Integer(2))[1]
    wide = Entropy().range(observed(NORMAL), Integer(8))[1]
    assert narrow < 2.6 < wide


def test_16_bits_clip_nothing() -> None:
    assert Entropy().range(observed(NORMAL), Integer(16))[1] == NORMAL.abs().max().item()


def test_zeros_have_no_say() -> None:
    histogram = observed(NORMAL)
    expected = Entropy().range(histogram, SCALE)
    histogram.update(torch.zeros(1_000_000))
    assert Entropy().range(histogram, SCALE) == expected


def test_fewer_candidates_are_close_to_all() -> None:
    every, few = (Entropy(candidates).range(observed(NORMAL), SCALE)[1] for candidates in (10_000, 64))
    assert few == pytest.approx(every, rel=0.1)


def test_clipping_is_kept_where_a_mean_squared_error_would_not_clip() -> None:
    x = torch.cat([NORMAL, torch.tensor([1e4])])
    assert MSE().range(observed(x), SCALE)[1] > 9000
    assert Entropy().range(observed(x), SCALE)[1] < 6


def test_arguments_out_of_their_domain_are_refused() -> None:
    with pytest.raises(ArgumentError, match="candidates: got 0, needed at least 1"):
        Entropy(0)
    with pytest.raises(ArgumentError, match="holds no bin"):
        divergences(np.array([5.0]), np.array([1]), np.zeros(1), np.ones(1), AFFINE)
