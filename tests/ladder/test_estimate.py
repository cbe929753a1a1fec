"""The estimate: what it says is never exceeded, whatever the answers are."""

import random
import re

import pytest
import torch
from torch import nn

import halfstep as hs
from halfstep.calibration.sweep import passes_at_most
from halfstep.evaluate import EarlyStopping, Score
from halfstep.ladder.climb import estimate
from halfstep.ladder.float_score import float_evaluation
from halfstep.ladder.goal import Goal
from halfstep.ladder.partial import climb_partial, evaluations_at_most, ranked_at_most
from halfstep.ladder.rungs import find_rungs
from halfstep.ladder.search import Search
from tests.ladder.climbing import climb
from tests.ladder.networks import INPUTS, calibrated, labelled


@pytest.fixture(scope="module")
def hopeless():
    """No file can be strictly as good as float on 128 examples, so every rung is climbed to its end."""
    return climb(None, max_drop=0.0, strict=True)


def counted(sentence):
    """The evaluations that an estimate names, by what they are for."""
    inside = re.search(r"evaluations of the metric \((.*?)\)", sentence)[1]
    return {name: int(count) for name, count in (part.rsplit(" ", 1) for part in inside.split(", "))}


def test_no_rung_costs_more_than_was_said(hopeless):
    said = counted(hopeless.decisions[0])
    assert set(said) == {"ptq", "partial", "qat", "deployed files"}
    for step in hopeless.path:
        assert 0 < step.cost <= said[step.rung]
    assert sum(made.rung == "deployed" for made in hopeless.history) <= said["deployed files"]
    assert f"Estimate, at most: {sum(said.values())} evaluations" in hopeless.decisions[0]


def test_the_examples_sent_through_the_network_are_bounded_too(hopeless):
    said = int(re.search(r"([\d,]+) examples through", hopeless.decisions[0])[1].replace(",", ""))
    sweep = next(entry.data for entry in hopeless.entries if entry.kind == "sweep")
    rankings = [
        entry.data["measured"]["finding"]["examples"]
        for entry in hopeless.entries
        if entry.kind == "finding" and entry.data["name"] == "sensitivity"
    ]
    assert sweep["passes"] <= passes_at_most()
    assert 0 < sum(rankings) + sweep["passes"] * sweep["examples"] <= said


def network(layers=7):
    torch.manual_seed(0)
    stack = [layer for _ in range(layers - 1) for layer in (nn.Linear(8, 8), nn.ReLU())]
    return nn.Sequential(*stack, nn.Linear(8, 3))


@pytest.fixture(scope="module")
def model():
    return calibrated(network(), hs.Recipe.uniform(4, 8))


@pytest.fixture(params=range(6))
def dice(request):
    return random.Random(request.param)


@pytest.mark.parametrize(
    "options",
    [
        hs.Partial(),
        hs.Partial(walk="one_by_one", measured=3),
        hs.Partial(method="metric", steps=("dynamic", "int16", "float")),
        hs.Partial(method="spared_kl", prune=False),
    ],
    ids=["gallop", "one by one", "steps", "spared"],
)
def test_no_answers_make_partial_quantization_cost_more(model, dice, options):
    """A metric that answers at random, and the same for the same candidate."""
    model.float_layers = model.int16_layers = model.dynamic_layers = []
    share = dice.choice([0.1, 0.5, 0.9])
    metric = hs.CallableMetric(lambda _: 1.0 if dice.random() < share else 0.0)
    search = Search(model, metric, Goal(0.5, hs.Accuracy(labelled(network())).evaluate(network())))
    bound, examples = evaluations_at_most(search, options), ranked_at_most(search, options)
    climb_partial(search, options)
    assert 0 < search.memory.replayed_cost <= bound
    if "sensitivity" in search.found:
        assert search.found["sensitivity"].examples <= examples


def test_early_verdicts_that_are_overturned_are_within_the_bound(model, dice, monkeypatch):
    model.float_layers = model.int16_layers = model.dynamic_layers = []
    accuracy = hs.Accuracy(labelled(network()))
    share = dice.choice([0.3, 0.6, 0.9])

    def lying(self, candidate, *arguments, **options):
        scores = torch.ones(dice.randint(1, len(INPUTS) - 1), dtype=torch.float64)
        return scores, "below" if dice.random() < share else "above"

    monkeypatch.setattr(EarlyStopping, "run", lying)
    score, made = float_evaluation(accuracy, model)
    search = Search(model, accuracy, Goal(0.003, score), made)
    bound = evaluations_at_most(search)
    climb_partial(search)
    assert search.memory.replayed_cost - sum(e.share for e in made) <= bound


def test_what_it_takes_is_said_in_words(model):
    model.float_layers = model.int16_layers = model.dynamic_layers = []
    metric = hs.CallableMetric(lambda _: 1.0)
    score, made = float_evaluation(metric, model)
    search = Search(model, metric, Goal(0.5, score), made, budget=hs.Budget(minutes=0.001))
    training = hs.Training(labelled(network()), nn.functional.cross_entropy, epochs=3, evaluate_every=1)
    said, timeless = estimate(search, find_rungs(["ptq", "partial", "qat"], training), tune=True)
    assert re.fullmatch(
        r"Estimate, at most: \d+ evaluations of the metric \(ptq 5, partial \d+, qat 6, tune 1, deployed files 4\) "
        r"after 2 of the float network \(again for the metric's noise\), about \S+ s each, [\d,]+ examples through the "
        r"network to compare calibrators and rank layers, about \S+ s; together about \S+ (?:s|min), and up to "
        r"0.0\d+ s of repairs where calibration misses the target; training and timing files not counted. The budget "
        r"of 0.001 minutes may end it before",
        said,
    ), said
    assert timeless == re.sub(r"\d[\d.,e-]* (s|min)\b", "", said)  # the key that journals have had for it
    assert counted(said)["partial"] == evaluations_at_most(search)
    search.started -= 60  # the minutes are over
    late, _ = estimate(search, find_rungs(["ptq", "partial", "qat"], training))
    assert "of repairs" not in late and "about -" not in late
    plain, _ = estimate(Search(model, metric, Goal(0.5, score), made), find_rungs(["ptq"]))
    assert "600 s of repairs" in plain and "not counted" not in plain and "budget" not in plain


def test_the_calibrators_that_are_given_are_the_ones_that_count(model):
    search = Search(model, hs.CallableMetric(lambda _: 1.0), Goal(0.5, Score(1.0)))
    one = hs.best_of(hs.Max(), weights=[hs.MSE()], mixed=False)
    passes = 2 + 1 + 1  # the float network's own, the activations alone, a calibrator of each kind
    few, all_of_them = hs.PTQ(one).cost(search).examples, hs.PTQ().cost(search).examples
    assert few * passes_at_most() == all_of_them * passes
