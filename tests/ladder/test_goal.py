"""Targets: absolute, relative, a floor; by the point estimate or by the interval."""

import pytest
import torch

from halfstep.errors import ArgumentError, MetricError
from halfstep.evaluate import Score
from halfstep.ladder.goal import Goal


def hits(right, count=1000):
    return Score.mean((torch.arange(count) < right).double())


def test_the_point_estimate_decides_unless_strict():
    candidate = hits(891)
    assert Goal(0.01, hits(900)).met(candidate)
    strict = Goal(0.01, hits(900), strict=True)
    assert not strict.met(candidate)
    assert (
        "includes the allowed 0.01: other examples could decide otherwise (1,000 were used)"
        in strict.evidence(candidate)
    )
    assert strict.met(hits(900)) and "lies within the allowed 0.01" in strict.evidence(hits(900))
    assert "lies wholly above the allowed 0.01" in strict.evidence(hits(800))


def test_rounding_of_the_difference_does_not_count():
    assert Goal(0.1, Score(0.9)).met(
        Score(0.8)
    )  # 0.9 - 0.8 = 0.09999999999999998, 0.3 - 0.2 rounds the other way
    assert Goal(0.1, Score(0.3)).met(Score(0.2))


def test_a_relative_drop_is_a_share_of_float():
    assert Goal.relative(0.01, Score(0.9)).max_drop == pytest.approx(0.009)
    losses = Goal.relative(0.1, Score(2.0), higher_is_better=False)
    assert losses.met(Score(2.2)) and not losses.met(Score(2.21))


def test_a_floor_is_a_drop_from_float():
    assert Goal.floor(0.85, Score(0.9)).met(Score(0.85)) and not Goal.floor(0.85, Score(0.9)).met(
        Score(0.849)
    )
    ceiling = Goal.floor(2.5, Score(2.0), higher_is_better=False)
    assert ceiling.met(Score(2.5)) and not ceiling.met(Score(2.51))


def test_evidence_without_single_scores_says_so():
    assert "cannot be said" in Goal(0.1, Score(0.9)).evidence(Score(0.9))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Goal.floor(0.95, Score(0.9)), r"float model itself scores 0.9, needed at least 0.95"),
        (
            lambda: Goal.floor(0.1, Score(0.9), False),
            r"scores 0.9, needed at most 0.1.*say higher_is_better=True",
        ),
        (lambda: Goal.relative(0.1, Score(0.0)), r"the float model scores 0"),
        (lambda: Goal.relative(-0.1, Score(1.0)), r"relative drop: got -0.1, needed a number of at least 0"),
        (lambda: Goal(float("nan"), Score(1.0)), r"max_drop: got nan"),
        (
            lambda: Goal(0.1, Score(1.0), confidence=95),
            r"confidence: got 95, needed a number from 0.5 to below 1",
        ),
    ],
)
def test_goals_that_cannot_be(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


def test_a_strict_goal_needs_scores_of_single_examples():
    with pytest.raises(MetricError, match=r"a strict goal needs the scores of single examples"):
        Goal(0.1, Score(0.9), strict=True)
