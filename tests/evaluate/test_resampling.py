"""Intervals of numbers of a whole set: drawn as said, wide as they should be, and none where nothing is known."""

import time

import pytest
import torch

from halfstep.evaluate import Score, paired_drop
from halfstep.evaluate.paired import bootstrap_interval
from halfstep.evaluate.resampling import LEAST_DRAWS, Resampled, drawn, resample


def f1(rows):
    """Of (n, 3): what each example adds to hits, false ones and missed ones."""
    hits, false, missed = rows.sum(0)
    return float(2 * hits / (2 * hits + false + missed))


def counts(said, is_so):
    return torch.stack([said & is_so, said & ~is_so, ~said & is_so], 1).double()


def population(count, seed):
    """Labels, and what a model and one that is somewhat worse say of the same examples, (count,) bool each."""
    random = torch.Generator().manual_seed(seed)
    signal = torch.randn(count, generator=random)
    is_so = signal + 0.7 * torch.randn(count, generator=random) > 0.8
    better = signal + 0.3 * torch.randn(count, generator=random)
    worse = better + 0.5 * torch.randn(count, generator=random)
    return is_so, better > 0.8, worse > 0.8


def score(rows, draws=1000):
    return Score(f1(rows), resampled=resample(lambda places: f1(rows[places]), len(rows), draws))


def test_each_set_is_drawn_anew_and_the_same_for_every_model():
    rows = torch.arange(24.0, dtype=torch.float64)
    found = resample(lambda places: float(rows[places].sum()), 24, 200)
    by_hand, random = [], torch.Generator().manual_seed(0)
    for _ in range(200):
        by_hand.append(float(sum(rows[torch.randint(24, (24,), generator=random)])))
    assert found.values.tolist() == by_hand
    assert found.left_out.tolist() == [276.0 - left for left in range(24)]
    assert [p.tolist() for p in drawn(5, 2)] == [p.tolist() for p in drawn(5, 3)][:2]


def test_the_interval_is_that_of_brute_force():
    is_so, better, worse = population(400, 1)
    both = counts(better, is_so), counts(worse, is_so)
    drop = paired_drop(score(both[0], 2000), score(both[1], 2000))
    random = torch.Generator().manual_seed(7)
    differences = []
    for _ in range(8000):
        places = torch.randint(400, (400,), generator=random)
        differences.append(f1(both[0][places]) - f1(both[1][places]))
    ends = torch.tensor(differences).quantile(torch.tensor([0.025, 0.975])).tolist()
    spread = float(torch.tensor(differences).std())
    assert drop.method == "bootstrap over examples" and drop.count == 400
    # an end drawn 2,000 times errs by 0.06 standard deviations, and BCa moves it by about a tenth of one
    assert drop.low == pytest.approx(ends[0], abs=0.25 * spread)
    assert drop.high == pytest.approx(ends[1], abs=0.25 * spread)
    assert drop.low < drop.value < drop.high


@pytest.mark.parametrize("examined", [1, 8])
def test_of_a_mean_it_is_the_interval_of_means(examined):
    """As BCa for means is, which draws nothing; of the eighth candidate the ends lie beyond what 1,000 draws know."""
    random = torch.Generator().manual_seed(2)
    first = torch.rand(300, generator=random, dtype=torch.float64)
    second = first - 0.3 * torch.rand(300, generator=random, dtype=torch.float64) ** 2
    scores = [
        Score(float(rows.mean()), resampled=resample(lambda p, rows=rows: float(rows[p].mean()), 300))
        for rows in (first, second)
    ]
    drop = paired_drop(scores[0], scores[1].numbered(examined))
    low, high = bootstrap_interval(first - second, 1 - 2 * 0.05 / (examined * (examined + 1)))
    assert drop.low == pytest.approx(low, abs=0.08 * (high - low))
    assert drop.high == pytest.approx(high, abs=0.08 * (high - low))


def test_it_covers_the_true_drop_as_often_as_it_says():
    is_so, better, worse = population(1_000_000, 3)
    true = f1(counts(better, is_so)) - f1(counts(worse, is_so))
    runs, covered, above, below = 150, 0, 0, 0
    for run in range(runs):
        is_so, better, worse = population(300, 100 + run)
        drop = paired_drop(score(counts(better, is_so), 200), score(counts(worse, is_so), 200))
        covered += drop.low <= true <= drop.high
        above, below = above + (true > drop.high), below + (true < drop.low)
    # three standard deviations of a share of 0.95 of 150 are 0.053, of one of 0.025 they are 0.038
    assert covered / runs >= 0.95 - 0.053 and max(above, below) / runs <= 0.025 + 0.038


def test_the_pairs_make_it_narrower_than_sets_drawn_apart():
    is_so, better, worse = population(400, 4)
    first, second = (score(counts(said, is_so)).resampled.values for said in (better, worse))
    assert (first - second).std() < 0.8 * (first.var() + second.var()).sqrt()


def test_a_lower_number_that_is_better_turns_the_ends_round():
    is_so, better, worse = population(400, 5)
    first, second = score(counts(better, is_so)), score(counts(worse, is_so))
    up, down = paired_drop(first, second), paired_drop(first, second, higher_is_better=False)
    assert (down.value, down.low, down.high) == (-up.value, -up.high, -up.low)


def made(values, parts=None, reason="", count=100):
    parts = torch.randn(100, generator=torch.Generator().manual_seed(8)) if parts is None else parts
    values = torch.as_tensor(values, dtype=torch.float64)
    return Score(0.0, resampled=Resampled(values, parts.double(), count, reason=reason))


ONES = made(torch.ones(300), torch.zeros(100))


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (made(torch.ones(300), torch.ones(100)), "too few of 100 examples make any difference"),
        (made([float("nan")] * 4 + [2.0] * 296), "on 4 of 300 sets drawn the metric is no number"),
        (made([], reason="why not"), "why not"),
        (made(torch.ones(300), count=99), "one model was scored on 99 examples, the other on 100 examples"),
    ],
)
def test_where_nothing_is_known_there_is_none(first, reason):
    drop = paired_drop(first, ONES)
    assert reason in drop.reason and drop.low is None and drop.high is None


@pytest.mark.parametrize("won", [False, True])
@pytest.mark.parametrize(("differing", "known"), [(0, False), (6, False), (16, True), (60, True)])
def test_a_few_examples_that_make_all_of_the_difference_are_too_few(won, differing, known):
    """Lost alone, or as many won as lost: then the difference is 0, and often 0 on sets drawn."""
    is_so, said, _ = population(2000, 10)
    changed = said.clone()
    right, wrong = (said == is_so).nonzero().flatten(), (said != is_so).nonzero().flatten()
    places = (
        right[:differing]
        if not won
        else torch.cat([right[: differing // 2], wrong[: differing - differing // 2]])
    )
    changed[places] = ~changed[places]
    drop = paired_drop(score(counts(said, is_so), 200), score(counts(changed, is_so), 200))
    assert (drop.low is not None) == known and bool(drop.reason) != known


def test_few_sets_without_a_number_are_left_out():
    random = torch.Generator().manual_seed(6)
    values = torch.randn(300, generator=random, dtype=torch.float64)
    holes = made(torch.cat([values, torch.tensor([float("nan")] * 2, dtype=torch.float64)]))
    zeros = made(torch.zeros(302), torch.zeros(100))
    whole, less = paired_drop(made(values), zeros), paired_drop(holes, zeros)
    assert (whole.low, whole.high) == (less.low, less.high) and whole.low is not None


def test_time_is_bounded_and_said():
    def slow(places):
        time.sleep(0.01)
        return 1.0

    none = resample(slow, 50, 1000, seconds=0.1)
    assert not len(none.values) and "200 draws that it takes at least" in none.reason
    assert "take more than 0.1 s; hs.SetMetric(..., seconds=) allows more" in none.reason

    calls = []

    def counted(places):
        calls.append(len(places))
        if len(calls) > LEAST_DRAWS + 60:
            time.sleep(0.2)  # from here on the time is up
        return 1.0

    some = resample(counted, 50, 10_000, seconds=0.2)
    assert LEAST_DRAWS <= len(some.values) < 10_000 and not some.reason


def test_fewer_draws_of_one_model_are_paired_with_the_first_of_the_other():
    is_so, better, worse = population(400, 5)
    first, second = counts(better, is_so), counts(worse, is_so)
    assert (
        paired_drop(score(first, 500), score(second, 300)).high
        == paired_drop(score(first, 300), score(second, 300)).high
    )


def test_too_few_to_draw_from():
    assert resample(lambda p: 1.0, 19, 200).reason == "19 examples are too few to draw from, needed 20"


def test_metrics_that_repeat_themselves_are_known_by_their_draws():
    random = torch.Generator().manual_seed(9)
    one, other = (torch.rand(60, 3, generator=random).double() for _ in range(2))
    assert score(one).repeats(score(one, 250)) and not score(one).repeats(score(other))
    assert not score(one).repeats(Score(0.0)) and not score(one).unpaired().paired
    assert score(one).paired and score(one).count == 60 and Score(1.0).count is None
