"""What strict and confidence promise: over all candidates of a search, in a resumed one too, with its file."""

import math

import pytest
import torch
from climbing import climb
from torch import nn

import halfstep as hs
from halfstep.evaluate import Score, share_of_error
from halfstep.fake_quantize import Mode
from halfstep.journal import Journal
from halfstep.ladder.float_score import float_evaluation
from halfstep.ladder.goal import Goal
from halfstep.ladder.search import Search

ALLOWED = 0.01
RUNS, CANDIDATES, EXAMPLES = 400, 40, 1000
LOST, WON = ALLOWED + 0.01, 0.01


def candidates(generator):
    """The float model's hits and those of candidates, half of whose discordant examples are the same.

    The float model is right on half of all examples; of these a candidate loses 2 LOST, of the others it wins 2 WON.
    """
    right = torch.rand(EXAMPLES, generator=generator) < 0.5
    rate = torch.where(right, 2 * LOST, 2 * WON)
    common = torch.rand(EXAMPLES, generator=generator) < rate / 2
    own = torch.rand(CANDIDATES, EXAMPLES, generator=generator) < (rate / 2) / (1 - rate / 2)
    return right.double(), (right ^ (common | own)).double()


def test_a_strict_goal_accepts_what_loses_the_allowed_in_as_few_searches_as_it_says():
    generator = torch.Generator().manual_seed(0)
    counted, uncounted = [], []  # which candidate was accepted first, in every search
    for _ in range(RUNS):
        reference, hits = candidates(generator)
        goal = Goal(ALLOWED, Score.mean(reference), confidence=0.95, strict=True, bounds=(0.0, 1.0))
        scores = [Score.mean(hit) for hit in hits]
        counted.append(next((k for k, s in enumerate(scores, 1) if goal.met(s.numbered(k))), math.inf))
        uncounted.append(next((k for k, s in enumerate(scores, 1) if goal.met(s)), math.inf))
    expected = 0.05 * RUNS
    for number in (1, 5, 10, 20, 40):
        accepted = sum(first <= number for first in counted)
        assert accepted <= expected + 3 * math.sqrt(expected)  # three deviations of a count of rare events
    assert sum(first <= 40 for first in uncounted) > 4 * expected  # what counting is for


@pytest.mark.parametrize(("examples", "share"), [(1000, 0.5), (4000, 0.5)])
def test_a_climb_that_builds_on_its_luckiest_accepts_as_few(examples, share):
    """Each rung's candidates are changes of the best one before it, which they share so much of their losses with."""
    runs, accepted, uncounted = 1000, 0, 0
    generator = torch.Generator().manual_seed(0)
    least = ALLOWED - 1.5 * math.sqrt((LOST + WON) / examples)  # drops above are far from being met
    for _ in range(runs):
        right = torch.rand(examples, generator=generator) < 0.5
        rate = torch.where(right, 2 * LOST, 2 * WON)
        fresh = rate * (1 - share) / (1 - rate * share)
        goal = Goal(ALLOWED, Score.mean(right.double()), strict=True, bounds=(0.0, 1.0))
        best, luck, number = torch.rand(examples, generator=generator) < rate, -1.0, 0
        first, first_uncounted = False, False
        for rung in (3, 1, 16, 20):  # calibrations, repairs, partial quantization, training
            parent = best
            for _ in range(rung):
                number += 1
                kept = parent & (torch.rand(examples, generator=generator) < share)
                lost = kept | (torch.rand(examples, generator=generator) < fresh)
                score = Score.mean((right ^ lost).double())
                if score.value > luck:
                    best, luck = lost, score.value
                if goal.drop(score) <= least:
                    first |= goal.met(score.numbered(number))
                    first_uncounted |= goal.met(score)
        assert number == CANDIDATES
        accepted, uncounted = accepted + first, uncounted + first_uncounted
    assert accepted <= 0.05 * runs
    assert uncounted > 0.2 * runs


@pytest.fixture
def model():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))
    inputs = torch.randn(500, 8, generator=torch.Generator().manual_seed(1))
    q = hs.prepare(network, inputs[:2])
    hs.observe(q, [inputs])
    hs.calibrate(q)
    with torch.no_grad():
        q.labelled = list(zip(inputs.split(10), network(inputs).argmax(1).split(10), strict=True))
    return q


def begin(model, journal=None, **options):
    metric = hs.Accuracy(model.labelled)
    score, _ = float_evaluation(metric, model, journal)
    goal = Goal(0.05, score, bounds=metric.bounds, **options)
    model.set_mode(Mode.QUANTIZE)
    return Search(model, metric, goal, journal=journal or Journal())


def shift(model, by):
    """Another candidate."""
    with torch.no_grad():
        model.weight("2.bias").copy_(torch.tensor([by, 0, 0]))


def test_candidates_are_counted_in_the_order_in_which_they_were_first_looked_at(model):
    search = begin(model)
    assert search.evaluate("first").examined == 1
    with model.using(Mode.QUANTIZE, activations=False):
        assert search.evaluate("half of it").examined == 1  # can never be accepted
    shift(model, 9.0)
    early = search.judge("second")
    assert not early.complete and early.score.examined == 2
    shift(model, 0.01)
    assert search.judge("third").score.examined == 3
    shift(model, 0.0)
    shift(model, 9.0)
    assert search.evaluate("second, whole").examined == 2
    assert [made.examined for made in search.evaluations] == [1, None, 2, 3, 2]


def test_a_resumed_search_counts_as_the_first_one_did(model, tmp_path):
    numbers = []
    for shifts in (
        (0.0, 9.0),
        (9.0, 0.02, 0.0, 0.03),
    ):  # it need not ask for all of them again, nor in that order
        with Journal(tmp_path) as journal:
            shift(model, 0.0)
            search = begin(model, journal)
            for by in shifts:
                shift(model, by)
                numbers.append(search.evaluate(f"shifted by {by}").examined)
    assert numbers == [1, 2, 2, 3, 1, 4]


def test_an_evaluation_that_fails_takes_no_number(model, monkeypatch):
    search = begin(model)
    with monkeypatch.context() as patch:
        patch.setattr(search.scorer, "evaluate", None)
        with pytest.raises(TypeError):
            search.evaluate("killed")
    shift(model, 0.01)
    assert search.evaluate("first").examined == 1


def test_the_same_candidate_is_held_to_more_the_later_it_comes(model):
    search = begin(model, strict=True)
    allowed = search.goal.compare(search.evaluate("first")).high  # of n examples that agree, z^2 / (n + z^2)
    search.goal = Goal(allowed, search.goal.float_score, strict=True, bounds=(0.0, 1.0))
    score = search.evaluate("first")
    assert search.goal.met(score) and not search.goal.met(score.numbered(2))
    assert search.goal.evidence(score).startswith("The 95% interval of the drop, -0.")
    said = search.goal.evidence(score.numbered(2))
    assert ", corrected for 2 candidates examined, includes the allowed" in said


def test_a_final_refusal_is_held_to_its_share_of_the_error(model, monkeypatch):
    search, levels = begin(model), []
    run = search._stopper.run

    def noted(candidate, max_drop, level, *args, **options):
        levels.append(level)
        return run(candidate, max_drop, level, *args, **options)

    monkeypatch.setattr(search._stopper, "run", noted)
    search.evaluate("first")
    shift(model, 0.3)
    verdict = search.judge("second")
    assert not verdict.met and not verdict.complete
    assert search.judge("second") is verdict  # remembered
    final = search.judge("second", final=True)
    assert not final.met and final.score.count > verdict.score.count
    assert search.judge("second", final=True) is final  # nothing more is needed
    assert levels == pytest.approx([0.05, share_of_error(0.05, 2), share_of_error(0.05, 2)])
    made = search.evaluations[-2:]
    assert sum(each.examples for each in made) == final.score.count  # none was scored twice
    shift(model, 0.4)
    assert not search.judge("third", final=True).met
    assert levels[-1] == pytest.approx(share_of_error(0.05, 3))


@pytest.mark.slow
def test_a_file_is_held_to_its_candidates_share_and_the_report_says_how_many_there_were(tmp_path):
    outcome = climb(tmp_path / "run", rungs=("ptq", "partial"), max_float=1.0, max_drop=0.02)
    numbers = [made.examined for made in outcome.history if made.rung in ("ptq", "partial") and made.examined]
    assert sorted(set(numbers)) == list(range(1, max(numbers) + 1)) and max(numbers) > 3
    deployed = [made for made in outcome.history if made.rung == "deployed"]
    assert deployed[-1].examined == outcome.path[-1].examined == outcome.metrics[0].examined
    assert outcome.path[-1].score in [m.score for m in outcome.history if m.examined == deployed[-1].examined]
    again = climb(tmp_path / "run", rungs=("ptq", "partial"), max_float=1.0, max_drop=0.02)
    assert again.path == outcome.path and again.metrics == outcome.metrics
    page = outcome.report(tmp_path / "report.html").read_text()
    assert ">candidate</th>" in page
    assert "An interval is widened for the candidates that were examined" in page


def test_a_strict_target_without_an_interval_is_missed_and_the_advice_says_why():
    inputs, labels = torch.randn(64, 6, generator=torch.Generator().manual_seed(1)), torch.zeros(64)
    metric = hs.Metric([(inputs, labels)], lambda outputs, labels: 0 * labels + 0.5)
    outcome = climb(None, metric=metric, rungs=("ptq",), strict=True)
    assert not outcome.met and outcome.score == outcome.float_score
    assert outcome.metrics[0].high is None and "too few differ" in outcome.metrics[0].unsure
    advice = outcome.advice[-1]
    assert advice.startswith(
        "A strict target cannot be met without an interval: of 64 examples too few differ"
    )
    assert "hs.Metric(..., bounds=(lowest, highest)) says them" in advice
    bounded = hs.Metric([(inputs, labels)], metric.score, bounds=(0.0, 1.0))
    assert climb(None, metric=bounded, rungs=("ptq",), strict=True, max_drop=0.1).met
