"""Paired drops and their intervals, against enumeration, scipy and closed forms."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from halfstep.evaluate import Score, paired_drop, share_of_error
from halfstep.evaluate.paired import bootstrap_interval, mcnemar, tango_interval


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
    # Theirs are quantiles of 2000 resamples; their own spread is about 8% of the standard error.
    error = differences.std() / math.sqrt(200)
    assert ours == pytest.approx(tuple(theirs), abs=0.25 * error)


@pytest.mark.parametrize("confidence", [0.8, 0.95, 0.99])
def test_the_bootstrap_of_normal_differences_is_nearly_students(confidence):
    differences = torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    reach = scipy.stats.t.ppf((1 + confidence) / 2, 399) * float(differences.std()) / 20
    expected = (float(differences.mean()) - reach, float(differences.mean()) + reach)
    # BCa corrects by the skewness of the sample, of deviation sqrt(6 / n): a few percent of the reach.
    assert bootstrap_interval(differences, confidence) == pytest.approx(expected, abs=0.06 * reach)


def test_the_bootstrap_holds_far_out_where_nobody_could_resample():
    differences = torch.cat([torch.zeros(900), torch.ones(60), -torch.ones(40)]).double()
    for confidence in (0.95, 1 - 1e-4, 1 - 1e-7):
        ours, tangos = bootstrap_interval(differences, confidence), tango_interval(60, 40, 1000, confidence)
        assert ours == pytest.approx(tangos, abs=0.06 * (tangos[1] - tangos[0]))


def test_values_that_did_not_occur_widen_the_interval_where_bounds_are_known():
    constant = torch.full((50,), 0.25, dtype=torch.float64)
    assert bootstrap_interval(constant, 0.9) == (0.25, 0.25)
    low, high = bootstrap_interval(constant, 0.9, bounds=(-1, 1))
    # A value of 1 that one example in 20 has is missing from 50 examples with 0.95^50 = 8%, one in 17.2 with 5%.
    rate = 1 - 0.05 ** (1 / 50)
    assert high == pytest.approx(0.25 * (1 - rate) + rate) and low == pytest.approx(0.25 * (1 - rate) - rate)
    spread = torch.linspace(-1, 1, 50, dtype=torch.float64)  # whatever is possible occurred
    assert bootstrap_interval(spread, 0.9, bounds=(-1, 1)) == bootstrap_interval(spread, 0.9)


RARE = {  # differences of examples, their mean, their number
    "2% lose half or all": (lambda u, v: (u < 0.02) * torch.where(v < 0.5, 0.5, 1.0), 0.015, 50),
    "0.5% lose half or all": (lambda u, v: (u < 0.005) * torch.where(v < 0.5, 0.5, 1.0), 0.00375, 200),
    "0.2% lose all, the others next to nothing": (lambda u, v: (u < 0.002) + 1e-3 * (v - 0.5), 0.002, 1000),
    "all lose something": (lambda u, v: 0.4 * v * v - 0.05, 0.4 / 3 - 0.05, 100),
}


@pytest.mark.parametrize("what", RARE)
def test_rare_losses_are_covered_as_often_as_stated_where_bounds_are_known(what):
    differences, mean, count = RARE[what]
    generator, runs, missed, missed_unbounded = torch.Generator().manual_seed(0), 120, 0, 0
    for _ in range(runs):
        drawn = differences(*torch.rand(2, count, generator=generator, dtype=torch.float64))
        missed += bootstrap_interval(drawn, 0.95, bounds=(-1, 1))[1] < mean
        missed_unbounded += bootstrap_interval(drawn, 0.95)[1] < mean
    assert missed <= 0.025 * runs + 3 * math.sqrt(0.025 * runs)
    assert (missed_unbounded > 0.08 * runs) == (what != "all lose something")  # the rare ones did not occur


def scores(*values):
    return Score.mean(torch.tensor(values, dtype=torch.float64))


def test_scores_of_two_values_get_tangos_interval_in_their_unit():
    float_hits, hits = torch.ones(50), torch.ones(50)
    hits[:10] = 0
    ones = paired_drop(Score.mean(float_hits), Score.mean(hits))
    percents = paired_drop(Score.mean(100 * float_hits), Score.mean(100 * hits))
    assert (percents.low, percents.high) == (
        pytest.approx(100 * ones.low),
        pytest.approx(100 * ones.high),
    )
    assert percents.method == ones.method == "Tango" and percents.p_value == ones.p_value
    shifted = paired_drop(Score.mean(float_hits + 2), Score.mean(hits + 2))
    assert (shifted.low, shifted.high) == (pytest.approx(ones.low), pytest.approx(ones.high))
    hits[0] = (
        1  # nine are too few to be sure that there is no third value, unless bounds say so, or they are hits
    )
    assert paired_drop(Score.mean(100 * float_hits), Score.mean(100 * hits)).high is None
    bounded = paired_drop(Score.mean(100 * float_hits), Score.mean(100 * hits), bounds=(0.0, 100.0))
    ones = paired_drop(Score.mean(float_hits), Score.mean(hits))
    assert bounded.method == ones.method == "Tango" and bounded.high == pytest.approx(100 * ones.high)


def test_no_interval_has_width_0():
    same = scores(*[100.0] * 20)
    unknown = paired_drop(same, same)
    assert unknown.value == 0 and unknown.low is unknown.high is None
    assert unknown.reason.startswith("of 20 examples too few differ to say what a rare one may lose")
    assert "bounds=(lowest, highest)" in unknown.reason and str(unknown) == "+0.0000"
    known = paired_drop(same, same, bounds=(0.0, 100.0))
    z2 = scipy.stats.norm.ppf(0.975) ** 2
    reach = pytest.approx(100 * z2 / (20 + z2))
    assert known.high == reach and -known.low == reach and not known.reason


def test_few_differing_scores_of_unknown_bounds_have_no_interval():
    dice = torch.linspace(0.3, 0.9, 200, dtype=torch.float64)
    noise = 1e-9 * torch.randn(200, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for differing in (0, 9):
        other = dice + noise
        other[:differing] -= 0.1
        assert paired_drop(Score.mean(dice), Score.mean(other)).high is None
        known = paired_drop(Score.mean(dice), Score.mean(other), bounds=(0.0, 1.0))
        assert known.method == "bootstrap" and known.high > 1 - 0.025 ** (1 / 200) - 1e-6
    other[:10] -= 0.1
    assert paired_drop(Score.mean(dice), Score.mean(other)).high > 0.005
    assert paired_drop(scores(0.5), scores(0.6)).high is None  # two scores need not be all there are


def test_the_kth_candidate_has_its_share_of_the_error():
    first, other = torch.ones(1000), (torch.arange(1000) >= 8).double()
    drop = [paired_drop(Score.mean(first), Score.mean(other).numbered(k), confidence=0.9) for k in (1, 2, 10)]
    assert (drop[0].low, drop[0].high) == tango_interval(8, 0, 1000, 0.9)
    assert drop[1].high == tango_interval(8, 0, 1000, 1 - 2 * 0.1 / 12)[1]
    assert drop[2].low == tango_interval(8, 0, 1000, 1 - 2 * 0.1 / 220)[0]
    assert str(drop[0]).startswith("+0.0080 (90% interval +0.")
    assert str(drop[2]) == "+0.0080 (90% interval -0.0030 to +0.0241, corrected for 10 candidates examined)"
    assert sum(share_of_error(0.05, k) for k in range(1, 10_000)) == pytest.approx(0.05 * 3 / 4, rel=1e-3)


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
    assert drop.value == 0.5 and paired_drop(*losses).value == -0.5
    worse = paired_drop(*losses, higher_is_better=False, bounds=(0.0, 4.0))
    better = paired_drop(*losses, bounds=(0.0, 4.0))
    assert (worse.low, worse.high) == (-better.high, -better.low)


def test_scores_that_cannot_be_paired_have_no_interval():
    drop = paired_drop(Score(0.9), Score(0.8))
    assert drop.value == pytest.approx(0.1) and drop.low is drop.high is None
    assert drop.reason == "the metric gives no scores of single examples that are the same each time"
    unlike = paired_drop(Score.mean(torch.ones(3)), Score.mean(torch.ones(4)))
    assert unlike.low is None and unlike.reason == "there are 3 scores of one model and 4 of the other"
    assert str(drop) == "+0.1000"
