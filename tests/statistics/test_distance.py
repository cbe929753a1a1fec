"""How far apart two streams are."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.errors import NotObservedError
from halfstep.statistics import Histogram, distance

lists = st.lists(st.integers(-20, 20).map(lambda i: i / 8), min_size=1, max_size=40)


def observed(numbers: list[float]) -> Histogram:
    histogram = Histogram()
    histogram.update(torch.tensor(numbers))
    return histogram


@settings(deadline=None)  # the first example compiles
@given(lists, lists)
def test_it_is_the_two_sample_statistic_where_bins_hold_one_value_each(
    a: list[float], b: list[float]
) -> None:
    largest = max(abs(sum(x <= t for x in a) / len(a) - sum(x <= t for x in b) / len(b)) for t in a + b)
    assert distance(observed(a), observed(b)) == pytest.approx(largest)


@settings(deadline=None)  # the first example compiles
@given(lists, lists)
def test_it_is_symmetric_and_zero_only_for_equal_shares(a: list[float], b: list[float]) -> None:
    assert distance(observed(a), observed(b)) == distance(observed(b), observed(a))
    assert distance(observed(a), observed(a * 3)) == pytest.approx(0.0)


def test_disjoint_streams_are_one_apart_whatever_their_sizes() -> None:
    assert distance(observed([1.0]), observed([2.0] * 1000)) == pytest.approx(1.0)


def test_zeros_of_both_signs_are_one_value() -> None:
    assert distance(observed([0.0, 1.0]), observed([-0.0, 1.0])) == 0.0


def test_an_empty_histogram_has_no_distance() -> None:
    with pytest.raises(NotObservedError, match="saw no finite value"):
        distance(Histogram(), observed([1.0]))
