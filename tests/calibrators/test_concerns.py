"""Reasons for a second look, as data."""

from __future__ import annotations

import math

import pytest
import torch

from halfstep.calibrators import (
    Entropy,
    Max,
    Percentile,
    data_concerns,
    disagreements,
    lost,
    unlike,
    unsteady,
)
from halfstep.errors import NotObservedError
from halfstep.formats import Integer
from halfstep.statistics import Histogram

NORMAL = torch.randn(20_000, generator=torch.Generator().manual_seed(0))


def observed(x: torch.Tensor) -> Histogram:
    histogram = Histogram()
    histogram.update(x)
    return histogram


def test_healthy_data_raise_no_concern() -> None:
    histogram = observed(NORMAL)
    calibrators = [Max(), Percentile(99.9), Percentile(100), Entropy()]
    assert data_concerns(histogram, calibrators) == []
    assert disagreements({c: c.range(histogram, Integer(8)) for c in calibrators}) == []
    assert unlike(histogram, observed(NORMAL[:5000])) == []


def test_a_site_that_saw_only_zeros() -> None:
    [concern] = data_concerns(observed(torch.zeros(64)))
    assert concern.kind == "only zeros"
    assert str(concern) == "all 64 values are zero: the site is dead on these data, any range will do"


def test_a_site_never_reached() -> None:
    assert [concern.kind for concern in data_concerns(Histogram())] == ["unobserved"]


def test_values_left_out_are_told() -> None:
    [concern] = data_concerns(observed(torch.cat([NORMAL, torch.tensor([math.nan, math.inf, -math.inf])])))
    assert concern.kind == "not finite"
    assert "1 NaN and 2 infinite values" in concern.message


def test_too_few_samples_for_the_percentile_asked() -> None:
    [concern] = data_concerns(observed(NORMAL), [Percentile(99.9), Percentile(99.99)])
    assert concern.kind == "few samples"
    assert concern.message == "percentile(99.99) of 20000 values rests on fewer than 10 of them: needs 100000"


def test_a_percentile_that_leaves_out_most_of_what_is_not_zero() -> None:
    x = torch.zeros(100_000)
    x[:50] = 0.1
    [concern] = data_concerns(observed(x), [Percentile(99.9), Percentile(99.99), Max()])
    assert concern.kind == "sparse"
    assert concern.message.startswith(
        "only 50 of 100000 values are not zero, and percentile(99.9) leaves out 100 on a side"
    )
    assert concern.message.endswith("choose another calibrator, such as mse")
    x[:201] = 0.1
    assert data_concerns(observed(x), [Percentile(99.9)]) == []


def test_calibrators_more_than_twofold_apart() -> None:
    histogram = observed(torch.cat([NORMAL, torch.tensor([100.0])]))
    calibrators = [Max(), Percentile(99.9), Entropy()]
    [concern] = disagreements({c: c.range(histogram, Integer(8)) for c in calibrators})
    assert concern.kind == "disagreement"
    assert concern.message.startswith("max answers [-100, 100] and percentile(99.9) [-3.")


def test_exactly_twofold_is_no_disagreement_and_a_zero_range_is() -> None:
    assert disagreements({Max(): (-2.0, 2.0), Entropy(): (-1.0, 1.0)}) == []
    assert disagreements({Max(): (-2.0, 2.0), Entropy(): (0.0, 0.0)}) != []
    assert disagreements({Max(): (0.0, 0.0), Entropy(): (0.0, 0.0)}) == []
    assert disagreements({Max(): (-2.0, 2.0)}) == []


def test_an_evaluation_unlike_the_calibration() -> None:
    [concern] = unlike(observed(NORMAL), observed(NORMAL + 1))
    assert concern.kind == "unlike"
    assert "distance 0.38" in concern.message
    with pytest.raises(NotObservedError):
        unlike(Histogram(), observed(NORMAL))


def test_halves_of_the_data_that_give_other_ranges() -> None:
    assert unsteady(observed(NORMAL[:10_000]), observed(NORMAL[10_000:]), Integer(8)) == []
    outlier = torch.cat(
        [NORMAL[10_000:], torch.tensor([100.0])]
    )  # one value says nothing about how many are enough
    assert unsteady(observed(NORMAL[:10_000]), observed(outlier), Integer(8)) == []
    [concern] = unsteady(observed(NORMAL[:10_000]), observed(1.5 * NORMAL[10_000:]), Integer(8))
    assert concern.kind == "unsteady"
    assert concern.message.startswith("percentile(99.9) answers [-3.")
    assert concern.message.endswith("on the other: give more examples, in random order")


@pytest.mark.parametrize(("width", "told"), [(1.0, False), (10.0, False), (25.0, True), (640.0, True)])
def test_a_part_with_less_than_half_of_its_bits_is_lost(width: float, told: bool) -> None:
    part = torch.rand(50_000, generator=torch.Generator().manual_seed(0))
    whole = torch.cat([part, width * part])
    found = lost(observed(part), observed(whole), Integer(8, signed=False, symmetric=False))
    assert bool(found) == told
    if width == 640.0:  # all of it is one code: the error is the mean square, 1/3, four times the variance
        assert " has 0.0 of 8.0 bits in the codes that it shares with " in found[0].message


def test_a_part_of_one_value_has_nothing_to_lose() -> None:
    ones = torch.ones(100)
    assert not lost(observed(ones), observed(torch.cat([ones, 500 * ones])), Integer(8))
