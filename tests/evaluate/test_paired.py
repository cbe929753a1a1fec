"""Paired drops and their intervals, against enumeration, scipy and closed forms."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfstep.evaluate import Score, paired_drop
from halfstep.evaluate.bootstrap import bootstrap_interval
from halfstep.evaluate.discordant import mcnemar, tango_interval


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_the_binomial_test(lost, won):
    if lost + won:
        assert mcnemar(lost, won) == pytest.approx(scipy.stats.binomtest(lost, lost + won).pvalue, rel=1e-9)
    else:
        assert mcnemar(lost, won) == 1


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 200))
def test_tangos_interval_holds_the_drop_and_turns_with_the_sign(lost, won, same):
    count = lost + won + same + 1
    low, high = tango_interval(lost, won, count, 0.95)
    assert -1 <= low <= (lost - won) / count <= high <= 1
    assert tango_interval(won, lost, count, 0.95) == pytest.approx((-high, -low), abs=1e-12)


@given(st.integers(0, 40), st.integers(0, 40))
def test_tangos_interval_leaves_out_0_where_mcnemars_statistic_rejects(lost, won):
    low, high = tango_interval(lost, won, 200, 0.95)
    statistic = (lost - won) ** 2 / max(lost + won, 1)
    critical = scipy.stats.chi2.ppf(0.95, 1)
    assert (low > 0 or high < 0) == (statistic > critical)


def test_tangos_interval_without_discordant_examples_is_wilsons():
    low, high = tango_interval(0, 0, 500, 0.95)
    z2 = scipy.stats.norm.ppf(0.975) ** 2
    assert high == pytest.approx(z2 / (500 + z2)) and low == pytest.approx(-high)


@pytest.mark.parametrize(("lost_rate", "won_rate"), [(0.02, 0.02), (0.1, 0.05), (0.3, 0.02), (0.05, 0.0)])
def test_tangos_interval_covers_the_truth_as_often_as_it_says(lost_rate, won_rate):
    count, covered = 40, 0.0
    rates = (lost_rate, won_rate, 1 - lost_rate - won_rate)
    for lost, won in itertools.product(range(count + 1), repeat=2):
        if lost + won > count:
            continue
        probability = scipy.stats.multinomial.pmf((lost, won, count - lost - won), count, rates)
        if probability > 1e-9:
            low, high = tango_interval(lost, won, count, 0.95)
            covered += probability * (low <= lost_rate - won_rate <= high)
    assert covered > 0.94  # every outcome enumerated; the score test is not exact, but near


def test_the_bootstrap_is_scipys_on_skewed_differences():
    differences = np.random.default_rng(0).exponential(size=200) - 0.5
    ours = bootstrap_interval(torch.tensor(differences), 0.95)
    theirs = scipy.stats.bootstrap(
        (differences,), np.mean, n_resamples=2000, method="BCa", random_state=1
    ).confidence_interval
    # Both ends are quantiles of 2000 resamples; their own spread is about 8% of the standard error.
    error = differences.std() / math.sqrt(200)
    assert ours == pytest.approx(tuple(theirs), abs=0.25 * error)


def test_the_bootstrap_answers_the_same_each_time_and_with_width_0_for_a_constant():
    differences = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert bootstrap_interval(differences, 0.9) == bootstrap_interval(differences, 0.9)
    assert bootstrap_interval(torch.full((5,), 0.25), 0.9) == (0.25, 0.25)


def test_pairing_narrows_the_interval():
    right = (torch.arange(1000) % 4 > 0).double()
    candidate = right.clone()
    candidate[:10] = 0  # 7 of the first 10 were right
    drop = paired_drop(Score.mean(right), Score.mean(candidate))
    assert (drop.value, drop.method, drop.count) == (pytest.approx(0.007), "Tango", 1000)
    assert drop.p_value == pytest.approx(2 / 2**7)
    assert drop.high - drop.low < 0.012  # unpaired: 4 sqrt(.19 * 2 / 1000) = 0.078


def test_lower_is_better_turns_the_drop():
    losses = Score.mean(torch.tensor([1.0, 2.0, 3.0])), Score.mean(torch.tensor([1.5, 2.5, 3.5]))
    drop = paired_drop(*losses, higher_is_better=False)
    assert (drop.value, drop.low, drop.high, drop.method) == (0.5, 0.5, 0.5, "bootstrap")
    assert paired_drop(*losses).value == -0.5


def test_scores_that_cannot_be_paired_have_no_interval():
    drop = paired_drop(Score(0.9), Score(0.8))
    assert drop.value == pytest.approx(0.1) and drop.low is drop.high is None
    assert paired_drop(Score.mean(torch.ones(3)), Score.mean(torch.ones(4))).low is None
    assert str(drop) == "+0.1000"
