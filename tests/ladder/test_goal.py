"""Targets: absolute, relative, a floor; by the point estimate or by the interval."""

import pytest
import torch

from halfstep.errors import ArgumentError, MetricError
from halfstep.evaluate import Accuracy, CallableMetric, Score, Several
from halfstep.ladder.goal import Goal, GoalSpec

ACCURACY = CallableMetric(lambda model: 0.0)
LOSS = CallableMetric(lambda model: 0.0, higher_is_better=False)
BOTH = Several({"accuracy": ACCURACY, "loss": LOSS})


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
    assert GoalSpec(relative_drop=0.01).goal(Score(0.9), ACCURACY).max_drop == pytest.approx(0.009)
    losses = GoalSpec(relative_drop=0.1).goal(Score(2.0), LOSS)
    assert losses.met(Score(2.2)) and not losses.met(Score(2.21))


def test_a_floor_is_a_drop_from_float():
    floor = GoalSpec(floor=0.85).goal(Score(0.9), ACCURACY)
    assert floor.met(Score(0.85)) and not floor.met(Score(0.849))
    ceiling = GoalSpec(floor=2.5).goal(Score(2.0), LOSS)
    assert ceiling.met(Score(2.5)) and not ceiling.met(Score(2.51))


def test_evidence_without_single_scores_says_so():
    assert "cannot be said" in Goal(0.1, Score(0.9)).evidence(Score(0.9))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: GoalSpec(floor=0.95).goal(Score(0.9), ACCURACY),
            r"^floor: the float model itself scores 0.9, needed at least 0.95",
        ),
        (
            lambda: GoalSpec(floor=0.1).goal(Score(0.9), LOSS),
            r"scores 0.9, needed at most 0.1.*say higher_is_better=True",
        ),
        (lambda: GoalSpec(relative_drop=0.1).goal(Score(0.0), ACCURACY), r"the float model scores 0"),
        (
            lambda: GoalSpec(relative_drop=-0.1).goal(Score(1.0), ACCURACY),
            r"^relative_drop: got -0.1, needed a number of at least 0",
        ),
        (
            lambda: GoalSpec(float("nan")).goal(Score(1.0), ACCURACY),
            r"^max_drop: got nan, needed a number of at least 0",
        ),
        (
            lambda: GoalSpec(2.0).check(Accuracy([])),
            r"^max_drop: got 2, needed at most 1, since no score lies lower; 0.01 is one point of an accuracy",
        ),
        (
            lambda: GoalSpec(relative_drop=1.5).check(Accuracy([])),
            r"^relative_drop: got 1.5, needed at most 1, since no score lies lower; 0.01 is one percent$",
        ),
        (
            lambda: GoalSpec({"top 1": 2.0}, floor={"loss": 9.0}).check(
                Several({"top 1": Accuracy([]), "loss": LOSS})
            ),
            r"^max_drop of 'top 1': got 2, needed at most 1",
        ),
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


def both(accuracy, loss):
    return Score(accuracy, others={"loss": Score(loss)})


def test_several_metrics_must_all_keep_to_their_targets():
    goal = GoalSpec(max_drop=0.01, relative_drop={"loss": 0.1}).goal(both(0.9, 2.0), BOTH)
    assert goal.met(both(0.89, 2.2))
    assert not goal.met(both(0.889, 2.2)) and not goal.met(both(0.89, 2.21))
    assert [(s.metric, s.max_drop, s.met) for s in goal.standings(both(0.95, 2.3))] == [
        ("accuracy", 0.01, True),
        ("loss", pytest.approx(0.2), False),
    ]
    assert goal.words(both(0.89, 2.1)) == (
        "accuracy 0.8900, +0.0100 below float (allowed 0.01) and loss 2.1000, +0.1000 below float (allowed 0.2)"
    )
    why = "the metric gives no scores of single examples that are the same each time"
    unsure = f"How sure the drop is cannot be said: {why}."
    assert goal.evidence(both(0.9, 2.0)) == f"accuracy: {unsure} loss: {unsure}"


def test_candidates_are_ranked_by_the_metric_that_uses_most_of_its_allowance():
    goal = GoalSpec(max_drop={"accuracy": 0.01, "loss": 0.5}).goal(both(0.9, 2.0), BOTH)
    assert goal.loss(both(0.9, 2.25)) == pytest.approx(0.5)
    assert goal.loss(both(0.88, 2.25)) == pytest.approx(2)
    nothing = GoalSpec(max_drop=0.0).goal(
        both(0.9, 2.0), BOTH
    )  # a thousandth of the float score is the measure then
    assert nothing.loss(both(0.9, 2.002)) == pytest.approx(1)
    assert Goal(0.01, Score(0.9)).loss(Score(0.85)) == pytest.approx(0.05)  # one metric: the drop itself


def test_what_is_asked_of_a_name_goes_before_what_is_asked_of_all():
    goal = GoalSpec(max_drop=0.02, floor={"loss": 2.5}).goal(both(0.9, 2.0), BOTH)
    assert (goal.max_drop, goal.others["loss"].max_drop) == (0.02, 0.5)
    assert GoalSpec(floor={"loss": 2.5}).goal(both(0.9, 2.0), BOTH).max_drop == 0.01


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: GoalSpec(max_drop={"los": 1.0}).check(BOTH),
            r"max_drop: got the name 'los', needed one of 'accuracy', 'loss'; did you mean 'loss'\?",
        ),
        (
            lambda: GoalSpec(floor={"loss": 1.0}).check(LOSS),
            r"floor: got the name 'loss', needed a number, for one metric",
        ),
        (
            lambda: GoalSpec(floor={"loss": 1.0}, max_drop={"loss": 1.0}),
            r"target of 'loss': got max_drop and floor, needed one of max_drop, relative_drop, floor",
        ),
        (
            lambda: GoalSpec(floor={"loss": 1.0}).goal(both(0.9, 2.0), BOTH),
            r"metric 'loss': floor: the float model itself scores 2, needed at most 1",
        ),
    ],
)
def test_targets_of_several_metrics_that_cannot_be(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()
