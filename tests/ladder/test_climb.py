"""Rungs in order, bounds, targets, and the outcome when nothing is good enough."""

import warnings

import pytest
import torch
from climbing import climb, data
from torch import nn

import halfstep as hs
from halfstep.errors import ArgumentError, ExportError, RunError, TrainingError
from halfstep.evaluate import Score
from halfstep.fake_quantize import Mode
from halfstep.ladder.float_score import guesses
from halfstep.ladder.goal import GoalSpec
from halfstep.ladder.identity import Examples, data_warnings


@pytest.fixture(scope="module")
def hopeless():
    """No file can be strictly as good as float on 128 examples."""
    return climb(None, max_drop=0.0, strict=True)


def test_every_rung_is_climbed_and_the_best_is_handed_back(hopeless):
    assert [step.rung for step in hopeless.path] == ["ptq", "partial", "qat"]
    assert not hopeless.met
    assert hopeless.score == max(step.score for step in hopeless.path)
    assert hopeless.deployed_score > 0.5
    assert hopeless.advice[-1].startswith("A max_drop of ")
    assert hopeless.evaluations == len(hopeless.history)


def test_no_rung_ends_below_where_it_began(hopeless):
    ptq, partial, qat = (step.score for step in hopeless.path)
    assert partial >= ptq and qat >= ptq
    # Partial left more in float than wanted, so training began without that; the better of the two is the outcome.
    assert any("comes nearest to the target with" in sentence for sentence in hopeless.decisions)


def test_decisions_have_figures_and_the_estimate_comes_first(hopeless):
    assert hopeless.decisions[0].startswith("Estimate, at most: ")
    assert all(any(c.isdigit() for c in sentence) for sentence in hopeless.decisions)


def test_the_outcome_shows_itself(hopeless):
    assert repr(hopeless).startswith("Outcome: not met on rung ")
    html = hopeless._repr_html_()
    assert f"{hopeless.deployed_score:.4f}" in html and "<script" not in html


def test_a_budget_stops_the_search_with_the_best_so_far():
    outcome = climb(None, max_drop=0.0, strict=True, budget=hs.Budget(evaluations=2))
    assert [step.rung for step in outcome.path] == ["ptq"]
    assert outcome.path[0].note.startswith("the budget is spent: ")
    assert any("a larger budget goes on from here" in sentence for sentence in outcome.advice)


def test_a_rung_that_fails_leaves_what_was_found_before_it():
    inputs, labels = data(5)
    bad = [(inputs, labels), (inputs[:, :5], labels)]
    training = hs.Training(bad, torch.nn.functional.cross_entropy)
    outcome = climb(None, max_drop=0.0, strict=True, rungs=("ptq", "qat"), training=training)
    assert [step.rung for step in outcome.path] == ["ptq", "qat"]
    assert outcome.deployed_score > 0.5
    note = outcome.path[1].note
    assert note.startswith(
        "it failed: training batch 1: input 'input': got shape (128, 5), needed (batch, 6)"
    )
    assert f"Quantization-aware training ended early, {note}" in outcome.decisions
    assert f"The search stopped early, {note}; the same call goes on from here" in outcome.advice


@pytest.mark.parametrize("error", [RunError("the disk is full"), KeyboardInterrupt()])
def test_what_leaves_nothing_to_go_on_with_ends_the_climb(error):
    def loss(outputs, labels):
        calls.append(labels)
        if len(calls) > 1:  # the first is the look before the climb
            raise error
        return torch.nn.functional.cross_entropy(outputs, labels)

    calls = []
    with pytest.raises(type(error)):
        climb(None, max_drop=0.0, strict=True, rungs=("ptq", "qat"), training=hs.Training([data(5)], loss))


def test_a_failure_before_there_is_a_candidate_is_raised(monkeypatch):
    def fail(*_):
        raise ExportError("nothing was evaluated yet")

    monkeypatch.setattr("halfstep.ladder.ptq.climb_ptq", fail)
    with pytest.raises(ExportError, match="nothing was evaluated yet"):
        climb(None)


def test_without_training_the_last_rung_is_left_out_and_said_so():
    outcome = climb(None, max_drop=1.0, rungs=("ptq", "qat"), training=None)
    assert [step.rung for step in outcome.path] == ["ptq"]
    assert outcome.decisions[0] == (
        "Quantization-aware training is left out: it needs training=hs.Training(labelled, loss)"
    )


def test_bounds_that_cannot_be():
    with pytest.raises(ArgumentError, match=r"max_float: got 2, needed a share of the layers, 0 to 1"):
        climb(None, max_float=2)
    with pytest.raises(
        ArgumentError, match=r"got max_drop and floor, needed one of max_drop, relative_drop, floor"
    ):
        climb(None, floor=0.5)
    with pytest.raises(TrainingError, match=r"training: got function, needed hs.Training\(labelled, loss\)"):
        climb(None, training=climb)


@pytest.mark.parametrize(
    ("aim", "higher", "allowed"),
    [
        (GoalSpec(), True, 0.01),
        (GoalSpec(max_drop=0.2), True, 0.2),
        (GoalSpec(relative_drop=0.1), True, 0.08),
        (GoalSpec(floor=0.75), True, 0.05),
        (GoalSpec(floor=0.9), False, 0.1),
    ],
)
def test_targets(aim, higher, allowed):
    scorer = hs.CallableMetric(lambda model: 0.8, higher)
    assert aim.goal(Score(0.8), scorer).max_drop == pytest.approx(allowed)


def examples(*batches):
    found = Examples()
    for batch in batches:
        found.add(*batch)
    return found


def test_doubts_about_data():
    x = torch.randn(64, 3)
    assert data_warnings(examples((x,)), examples((torch.randn(64, 3),))) == []
    (sentence,) = data_warnings(examples((x,)), examples((x[:10],), (torch.randn(9, 3),)))
    assert sentence.startswith(
        "10 of 64 calibration examples are also among the 19 that the metric judges on"
    )
    (sentence,) = data_warnings(examples((x[:8],)), examples())
    assert sentence.startswith("8 calibration examples are few")
    (sentence,) = data_warnings(examples((x[:1].expand(64, 3),)), examples())
    assert sentence.startswith("63 of 64 calibration examples are repetitions")


@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_examples_are_counted_and_not_inputs(form):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = nn.Linear(4, 3), nn.Linear(4, 3)

        def forward(self, x, y):
            return self.one(x) + self.other(y)

    torch.manual_seed(0)
    pairs = zip(*(tensor.split(50) for tensor in torch.randn(2, 200, 4)), strict=True)
    batches = [(x, y) if form == "tuple" else {"x": x, "y": y} for x, y in pairs]

    def float_only(model):
        return float(isinstance(model, hs.QuantizedModel) and model.mode is Mode.FLOAT)

    enough, few = (
        hs.quantize(Pair(), batches[0], calibration, float_only, rungs=["ptq"], threads=1)
        for calibration in (batches, batches[:1])
    )
    assert not enough.met and not any("calibration examples" in sentence for sentence in enough.advice)
    assert "50 calibration examples are few; 128 or more give steadier ranges" in few.advice


def test_examples_that_are_used_twice_are_warned_of():
    inputs, _ = data()
    with pytest.warns(UserWarning, match="128 of 128 calibration examples are also among the 128"):
        climb(None, calibration=[inputs], max_drop=1.0)


def test_a_quantizer_that_moves_to_the_other_side_of_a_reshape_stays_the_same():
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    )
    images = torch.rand(64, 1, 8, 8)
    model = hs.prepare(net, images[:2], hs.Recipe.uniform(3, 4))
    hs.observe(model, [images])
    hs.calibrate(model)
    model.float_layers = ["2"]  # what is left has 8 bits, and its quantizer now stands before the Flatten
    assert all(site.calibrated for site in model.sites.values())
    with warnings.catch_warnings(), torch.no_grad():
        assert model(images).shape == (64, 3)


def test_a_float_model_that_guesses_is_asked_about():
    inputs, labels = data()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    lost = [(inputs, labels[order])]  # as if the weights were others
    with pytest.warns(
        UserWarning, match=r"no better than by guessing: always giving one class is right on 0\.\d+"
    ):
        outcome = climb(
            None, metric=hs.Accuracy(lost), rungs=("ptq",), training=None, recipe=hs.Recipe.int8()
        )
    (said,) = (sentence for sentence in outcome.decisions if "guessing" in sentence)
    share = float(labels.bincount().max()) / len(labels)
    assert (
        f"accuracy is {outcome.float_score:.4g}" in said
        and f"right on {share:.4g} of the 128 examples" in said
    )


def test_what_guessing_scores_is_what_the_most_frequent_labels_give():
    inputs = torch.zeros(100, 1)
    labels = torch.tensor([0] * 50 + [1] * 30 + [2] * 20)
    first, two = (
        hs.Accuracy([(inputs[:60], labels[:60]), (inputs[60:], labels[60:])], top=n) for n in (1, 2)
    )
    assert first.of_one_answer() == (0.5, 100) and two.of_one_answer() == (0.8, 100)
    # Two standard deviations of 100 draws: 0.1 at one half, 0.08 at 0.8.
    for metric, limit in ((first, 0.6), (two, 0.88)):
        assert len(guesses(metric, Score(limit - 0.01))) == 1 and not guesses(metric, Score(limit + 0.01))
        assert not guesses(metric, Score(1.0))
    both = hs.evaluate.Several(
        {"first": first, "loss": hs.Metric([(inputs, labels)], lambda x, y: y.double())}
    )
    (said,) = guesses(both, Score(0.3, others={"loss": Score(0.1)}))
    assert said.startswith("The float model's accuracy 'first' is 0.3, no better")
    one = hs.Accuracy([(inputs, torch.zeros(100))])
    assert not guesses(one, Score(0.2))  # of one label nothing is known
