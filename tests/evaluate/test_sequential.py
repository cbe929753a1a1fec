"""The sequential test: rarely wrong, certain at the end, quick where the case is clear."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from halfstep.evaluate.early import STAKES, SequentialTest


def reference(differences, threshold, low, high, total=None):
    """The capital of both gamblers after every example, one by one."""
    all_shares = sum(STAKES.values())
    above = [share / all_shares for share in STAKES.values()]
    below, capitals = list(above), []
    for index, x in enumerate(differences):
        mean, grown = threshold, 1
        if total is not None:
            mean = (total * threshold - sum(differences[:index])) / (total - index)
            grown = total / (total - index)
        stakes = [min(stake * grown, 0.95) for stake in STAKES]
        if low < mean < high:
            above = [c * (1 + s * (x - mean) / (mean - low)) for c, s in zip(above, stakes, strict=True)]
            below = [c * (1 + s * (mean - x) / (high - mean)) for c, s in zip(below, stakes, strict=True)]
        capitals.append((sum(above), sum(below)))
    return capitals


@given(
    st.lists(st.sampled_from([-1.0, -0.5, 0.0, 1.0]), min_size=1, max_size=40),
    st.floats(-0.4, 0.4),
    st.booleans(),
    st.integers(1, 40),
)
def test_the_capital_is_the_references_however_the_examples_are_cut(differences, threshold, finite, cut):
    total = 100 if finite else None
    test = SequentialTest(threshold, -1.0, 1.0, level=1e-12, total=total)
    for part in torch.tensor(differences, dtype=torch.float64).split(cut):
        test.update(part)
    above, below = reference(differences, threshold, -1.0, 1.0, total)[-1]
    if test.answer is None:
        assert float(test._above.logsumexp(0)) == pytest.approx(math.log(above), abs=1e-9)
        assert float(test._below.logsumexp(0)) == pytest.approx(math.log(below), abs=1e-9)


@settings(max_examples=50)
@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 200), st.integers(0, 2**31))
def test_with_all_examples_seen_the_answer_is_there_and_mostly_right(lost, won, same, seed):
    values = torch.cat([torch.ones(lost), -torch.ones(won), torch.zeros(same + 1)]).double()
    values = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(seed))]
    test = SequentialTest(0.02, -1.0, 1.0, level=1e-9, total=len(values))
    test.update(values)
    assert test.answer == ("above" if float(values.mean()) > 0.02 + 1e-12 else "below")


def test_a_mean_equal_to_the_threshold_is_below():
    values = torch.zeros(100)
    values[:2] = 1
    test = SequentialTest(0.02, -1.0, 1.0, level=1e-9, total=100)
    assert test.update(values) == "below"


@pytest.mark.parametrize("finite", [pytest.param(True, marks=pytest.mark.slow), False])
def test_wrong_answers_at_the_threshold_are_as_rare_as_stated(finite):
    generator = torch.Generator().manual_seed(1)
    wrong, runs, count = 0, 400, 2000
    for _ in range(runs):
        uniform = torch.rand(count, generator=generator)
        if finite:  # exactly one example too many is lost: the mean lies above the threshold by 1 / count
            values = torch.cat([torch.ones(61), -torch.ones(40), torch.zeros(count - 101)])
            values = values[uniform.argsort()]
            answers = "below"
        else:
            values = (uniform < 0.03).double() - (uniform > 0.98).double()
            answers = "above or below"  # the mean is the threshold: either answer counts against the test
        test = SequentialTest(0.01, -1.0, 1.0, level=0.05, total=count if finite else None)
        for part in values.split(100):
            if test.update(part):
                break
        wrong += test.answer is not None and test.answer in answers and test.seen < count
    # Either side errs with at most 5%; three standard deviations of the count are allowed on top.
    sides = 1 if finite else 2
    expected = 0.05 * sides * runs
    assert wrong <= expected + 3 * math.sqrt(expected)


@pytest.mark.parametrize(
    ("lost", "won", "answer"), [(0.13, 0.03, "above"), (0.004, 0.004, "below"), (0.06, 0.02, "above")]
)
def test_clear_cases_take_a_quarter_of_the_examples_at_most(lost, won, answer):
    count = 10_000
    for seed in range(20):
        values = torch.zeros(count)
        values[: int(lost * count)] = 1
        values[int(lost * count) : int((lost + won) * count)] = -1
        values = values[torch.randperm(count, generator=torch.Generator().manual_seed(seed))]
        test = SequentialTest(0.01, -1.0, 1.0, level=0.05, total=count)
        for part in values.split(100):
            if test.update(part):
                break
        assert (test.answer, test.seen <= count / 4) == (answer, True)


@pytest.mark.parametrize(("lost", "won"), [(0.02, 0.005), (0.01, 0.005), (0.02, 0.015)])
def test_hard_cases_take_little_more_than_the_likelihood_ratio_of_the_two_answers(lost, won):
    # Of a random walk that is known to end at g rather than at 0 (in standard deviations of its end), the likelihood
    # ratio after a share t is exp(g^2 t / (2 (1 - t))) where the walk keeps to its mean: 1 / level at t below.
    count, level, threshold = 10_000, 0.05, 0.01
    gap = (lost - won - threshold) * math.sqrt(count / (lost + won))
    share = 1 / (1 + gap**2 / (2 * math.log(1 / level)))
    seen, generator = [], torch.Generator().manual_seed(0)
    for _ in range(100):
        values = torch.zeros(count)
        values[: int(lost * count)] = 1
        values[int(lost * count) : int((lost + won) * count)] = -1
        values = values[torch.randperm(count, generator=generator)]
        test = SequentialTest(threshold, -1.0, 1.0, level, total=count)
        for part in values.split(250):
            if test.update(part):
                break
        seen.append(test.seen / count)
    # Three deviations of a median over 100 runs, 1.25 * 0.16 / sqrt(100) each.
    assert sorted(seen)[50] < share + 0.06
